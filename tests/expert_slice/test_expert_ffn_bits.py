"""`expert_ffn` gives the same bits whatever the number of threads, the cut in ranks, the layout.

Of experts of few rows the weights' layout may decide the order of sums; that of nothing else does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ffn import (
    Args,
    Shape,
    all_results,
    asking,
    assert_layouts_agree,
    assert_same_bits,
    check_ffn,
    check_ffn_gradients,
    judge_gradients,
    layouts,
    problem,
    replaced,
    run,
    upstream_of,
)
from slicing import DTYPES, call, distinct_ids, dtype_name, plain_expert_ffn
from torch import Tensor

from ppmoe_ops.testing import cast_sample

pytestmark = pytest.mark.kernel

# Experts of many rows, of few, and of 1 to 18.
ROWS = {"many": Shape(90, 37, 41, 2, 4, 1, 3), "few": Shape(9, 37, 41, 2, 4, 1, 3)}
STAIRS = Shape(171, 37, 41, 1, 18, 0, 18, "stairs")


@pytest.mark.parametrize("rows", [*ROWS, "stairs"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_strides_do_not_change_a_bit(dtype: torch.dtype, activation: str, rows: str) -> None:
    args = problem(ROWS.get(rows, STAIRS), dtype, activation)
    expected, plain = all_results(args), upstream_of(args)
    for name in layouts(args[0]):
        for argument in ("x", "weights", "w_in", "b_in", "w_out", "b_out"):
            at = ("x", "slots", "offsets", "weights", "w_in", "b_in", "w_out", "b_out").index(
                argument
            )
            turned = replaced(args, **{argument: layouts(args[at])[name]})
            came = all_results(turned)
            assert_layouts_agree(came, expected, turned, args, plain, f"{argument} {name}")
        everything = tuple(
            layouts(each)[name] if isinstance(each, Tensor) and each.is_floating_point() else each
            for each in args
        )
        grad = layouts(upstream_of(args))[name]
        came = all_results(everything, grad)
        assert_layouts_agree(came, expected, everything, args, grad, f"all {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_layouts_of_transformers(dtype: torch.dtype) -> None:
    # gate_up_proj [E, 2F, H] and down_proj [E, H, F]; some models store them the other way round.
    args = problem(Shape(60, 34, 26, 2, 6), dtype, "swiglu", (False, False))
    expected = all_results(args)
    stored_in, stored_out = args[4].mT.contiguous(), args[6].mT.contiguous()
    assert stored_in.shape == (6, 34, 52)
    turned = replaced(args, w_in=stored_in.transpose(1, 2), w_out=stored_out.transpose(1, 2))
    assert_layouts_agree(all_results(turned), expected, turned, args, upstream_of(args), "stored")
    # The experts of one rank, cut out of the parameters of all.
    both = torch.cat((args[4], args[4])), torch.cat((args[6], args[6]))
    assert_same_bits(all_results(replaced(args, w_in=both[0][6:], w_out=both[1][6:])), expected)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_expanded_inputs(dtype: torch.dtype, rows: str) -> None:
    shape = ROWS[rows]
    args = problem(shape, dtype, "gelu_tanh")
    tokens, hidden, local = shape.tokens, shape.hidden, shape.here
    changes: dict[str, Tensor] = {
        "x": args[0][:1].expand(tokens, hidden),
        "weights": args[3][:, :1].expand(tokens, 2),
        "w_in": args[4][:1].expand(local, -1, -1),
        "b_in": args[5][:, :1].expand(local, shape.width),
        "w_out": args[6][:, :1].expand(local, hidden, shape.width),
        "b_out": args[7][:1].expand(local, hidden),
    }
    for name, value in changes.items():
        expanded, closed = replaced(args, **{name: value}), replaced(args, **{name: value.clone()})
        assert_same_bits(all_results(expanded), all_results(closed), name)
    column = args[0][:, :1].expand(tokens, hidden)
    check_ffn(replaced(args, x=column))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_expanded_upstream_gradient(dtype: torch.dtype) -> None:
    args = asking(problem(ROWS["many"], dtype, "geglu"))
    leaves = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
    out = run(args)
    summed = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    closed = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    assert_same_bits(summed, closed)
    row = torch.randn(1, out.size(1)).to(dtype)
    one = torch.autograd.grad(out, leaves, row.expand_as(out), retain_graph=True)
    assert_same_bits(one, torch.autograd.grad(out, leaves, row.expand_as(out).clone()))


def test_indices_with_strides() -> None:
    args = problem(ROWS["many"], torch.float32, "silu")
    slots, offsets = args[1:3]
    spread, apart = torch.full((2 * slots.numel(),), -9).int(), torch.full((8,), 77).int()
    spread[::2], apart[1::2] = slots, offsets
    turned = replaced(args, slots=spread[::2], offsets=apart[1::2])
    assert_same_bits(all_results(turned), all_results(args))


SHARED = {
    "drawn": Shape(700, 130, 90, 2, 8, 1, 6),
    "one_expert": Shape(900, 70, 110, 1, 4, 0, 4, "one"),
    "few_rows": Shape(24, 150, 170, 2, 8, 0, 8),
    "many_tokens": Shape(9000, 9, 12, 2, 5, 1, 3),
    "wide": Shape(40, 520, 700, 2, 4, 0, 2),
    # The number of threads decides how these tokens are cut, between an expert's few rows too.
    "few_rows_among_many": Shape(1100, 150, 170, 1, 3, 0, 3, "rare"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHARED)
def test_threads_and_runs_do_not_change_a_bit(shape: str, dtype: torch.dtype) -> None:
    args = problem(SHARED[shape], dtype, "swiglu" if shape == "drawn" else "gelu")
    torch.set_num_threads(1)
    expected = all_results(args)
    assert_same_bits(all_results(args), expected)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same_bits(all_results(args), expected, f"{threads} threads")
    for threads in (4, 2, 4):
        torch.set_num_threads(threads)
        assert_same_bits(all_results(args), expected, f"{threads} threads again")


def parts_of(args: Args, ids: Tensor, ranks: int) -> list[Args]:
    """The arguments of every rank: its index, and views of its experts."""
    local = args[4].size(0) // ranks
    parts = []
    for rank in range(ranks):
        first = rank * local
        slots, offsets = call("expert_index", (ids, first, local))
        mine = [None if each is None else each[first : first + local] for each in args[4:8]]
        parts.append((args[0], slots, offsets, args[3], *mine, args[8]))
    return parts


def whole_layer(
    dtype: torch.dtype, top_k: int, activation: str, tokens: int = 101, dropped: bool = False
) -> tuple[Args, Tensor]:
    args = problem(Shape(tokens, 36, 44, top_k, 8), dtype, activation)
    ids = distinct_ids(tokens, top_k, 8)
    if dropped:
        ids = torch.where(torch.rand(tokens, top_k) < 0.3, -1, ids)
    slots, offsets = call("expert_index", (ids, 0, 8))
    return replaced(args, slots=slots, offsets=offsets), ids


@pytest.mark.parametrize("tokens", [13, 101, 2600])
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "relu"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_ranks_add_up_bit_for_bit(
    dtype: torch.dtype, top_k: int, activation: str, tokens: int
) -> None:
    for dropped in (False, True):
        args, ids = whole_layer(dtype, top_k, activation, tokens, dropped)
        expected = run(args)
        for ranks in (1, 2, 4, 8):
            parts = [run(each) for each in parts_of(args, ids, ranks)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            assert torch.equal(total, expected), f"{ranks} ranks"


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_ranks_add_up_to_the_whole(dtype: torch.dtype, top_k: int, ranks: int) -> None:
    args, ids = whole_layer(dtype, top_k, "geglu", dropped=top_k == 3)
    exact = plain_expert_ffn(*cast_sample(args, torch.float64))
    total = torch.stack([run(each) for each in parts_of(args, ids, ranks)]).sum(0)
    # Each rank rounds its own sum to the dtype before they are added.
    allowed = 2 * max(ranks, 2) * torch.finfo(dtype).eps * exact.abs().max().item()
    assert (total.double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_gradients_over_ranks(ranks: int, dtype: torch.dtype) -> None:
    args, ids = whole_layer(dtype, 2, "swiglu")
    args = asking(args)
    leaves = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
    upstream = upstream_of(args)
    outputs = [run(each) for each in parts_of(args, ids, ranks)]
    grads: list[Any] = list(torch.autograd.grad(outputs, leaves, [upstream] * ranks))
    if dtype == torch.float32:
        judge_gradients(grads, args, upstream)
    # An expert's own gradients do not depend on where its neighbours are.
    assert_same_bits(grads[2:], check_ffn_gradients(args)[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_few_rows_have_the_same_bits_on_a_rank_of_their_own(dtype: torch.dtype) -> None:
    # Beside an expert of many rows theirs are cut in other places than without it.
    args = problem(Shape(1100, 150, 170, 1, 3, 0, 3, "rare"), dtype, "swiglu")
    bounds = args[2].tolist()
    expected = all_results(args)
    for expert in (1, 2):
        low, high = bounds[expert : expert + 2]
        mine = [each[expert : expert + 1] for each in args[4:8]]
        came = all_results((*args[:2], args[2][expert : expert + 2], args[3], *mine, args[8]))
        tokens = args[1][low:high].long()
        assert_same_bits(
            [each[tokens] for each in came[:3]], [each[tokens] for each in expected[:3]]
        )
        assert_same_bits(came[3:], [each[expert : expert + 1] for each in expected[3:]])


def test_ranks_without_a_slot_add_exact_zeros() -> None:
    args, ids = whole_layer(torch.float32, 2, "gelu")
    ids = ids % 4
    ids[:, 1] = (ids[:, 0] + 1) % 4
    for part in parts_of(args, ids, 4)[2:]:
        out = run(part)
        assert_same_bits([out], [torch.zeros_like(out)])
        for grad in all_results(part):
            assert_same_bits([grad], [torch.zeros_like(grad)])
