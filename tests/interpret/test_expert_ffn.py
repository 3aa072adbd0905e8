"""The expert layer in Triton against a plain loop over experts, with and without descriptors."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.kernels._launch import Gpu, column
from ppmoe_ops.kernels.expert_slice import (
    configs,
    expert_ffn,
    expert_ffn_backward,
    ffn_combine,
    ffn_sums,
    ffn_weight_gradient,
    tiles,
)
from ppmoe_ops.ops.expert_slice.activations import (
    ACTIVATIONS,
    GATED,
    activate,
    activate_backward,
)
from ppmoe_ops.testing import assert_error_rule, cast_sample

from . import aids

MODULES = (
    tiles, expert_ffn, expert_ffn_backward, ffn_combine, ffn_sums, ffn_weight_gradient
)  # fmt: skip
FORWARD = ["plan_kernel", "into_experts_kernel", "out_of_experts_kernel", "combine_kernel"]
ALL = (True,) * 6


@pytest.fixture(params=["pointers", "descriptors"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A device without a copy engine, and one with it."""
    found = Gpu(3, request.param == "descriptors")
    for module in (expert_ffn, expert_ffn_backward):
        monkeypatch.setattr(module, "gpu_of", lambda _: found)
    return found


def layer(
    tokens: int,
    hidden: int,
    width: int,
    top_k: int,
    first: int,
    local: int,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.float32,
    experts: int = 8,
    biases: bool = True,
) -> tuple[Any, ...]:
    """The arguments of `expert_ffn` for the experts from `first` on."""
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k]
    slots, offsets = OPERATORS["expert_index"].reference(ids, first, local)
    inner = 2 * width if activation in GATED else width
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    b_in, b_out = (tensor(local, inner), tensor(local, hidden)) if biases else (None, None)
    weights = torch.rand(tokens, top_k).to(wide)
    w_in, w_out = tensor(local, inner, hidden), tensor(local, hidden, width)
    x = tensor(tokens, hidden)
    return x, slots, offsets, weights, w_in, b_in, w_out, b_out, activation


def groups(slots: Tensor, offsets: Tensor) -> list[Tensor]:
    bounds = offsets.tolist()
    return [slots[low:high].long() for low, high in itertools.pairwise(bounds)]


def plain_forward(
    x: Tensor, slots: Tensor, offsets: Tensor, weights: Tensor, w_in: Tensor, b_in: Tensor | None,
    w_out: Tensor, b_out: Tensor | None, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A loop over experts in the dtype of x, and the pre-activation of local rows."""
    out, pre = torch.zeros_like(x), []
    for expert, group in enumerate(groups(slots, offsets)):
        token = group // weights.size(1)
        hidden = x[token] @ w_in[expert].T
        hidden = hidden if b_in is None else hidden + b_in[expert]
        row = activate(hidden, activation) @ w_out[expert].T
        row = row if b_out is None else row + b_out[expert]
        out.index_add_(0, token, (row * weights.reshape(-1)[group].unsqueeze(-1)).to(x.dtype))
        pre.append(hidden)
    return out, torch.cat(pre) if pre else x.new_zeros(0, w_in.size(1))


def plain_backward(
    grad: Tensor, x: Tensor, slots: Tensor, offsets: Tensor, weights: Tensor, w_in: Tensor,
    w_out: Tensor, b_out: Tensor | None, pre: Tensor, activation: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All six gradients by a loop over experts in the dtype of x."""
    grads = (
        torch.zeros_like(x),
        torch.zeros_like(weights),
        torch.zeros_like(w_in),
        w_in.new_zeros(w_in.shape[:2]),
        torch.zeros_like(w_out),
        w_out.new_zeros(w_out.shape[:2]),
    )
    first = int(offsets[0])
    for expert, group in enumerate(groups(slots, offsets)):
        hidden = pre[first : first + group.numel()]
        first += group.numel()
        token, share = group // weights.size(1), weights.reshape(-1)[group].unsqueeze(-1)
        unweighted = grad[token] @ w_out[expert]
        act = activate(hidden, activation)
        pre_grad = activate_backward((share * unweighted).to(x.dtype), hidden, activation)
        grads[0].index_add_(0, token, pre_grad @ w_in[expert])
        dots = (unweighted * act).to(weights.dtype).sum(-1)
        if b_out is not None:
            dots = dots + (grad[token] @ b_out[expert]).to(weights.dtype)
        grads[1][token, group % weights.size(1)] = dots
        grads[2][expert] = pre_grad.T @ x[token]
        grads[3][expert] = pre_grad.sum(0)
        grads[4][expert] = grad[token].T @ (share * act).to(x.dtype)
        grads[5][expert] = (share * grad[token]).to(x.dtype).sum(0)
    return grads


def check_forward(args: tuple[Any, ...]) -> Tensor:
    out, pre = expert_ffn.expert_ffn_forward(*args, True)
    alone, nothing = expert_ffn.expert_ffn_forward(*args, False)
    assert torch.equal(out, alone)
    assert nothing.shape == (0, args[4].size(1))
    local = int(args[2][-1])
    plain, exact = plain_forward(*args), plain_forward(*cast_sample(args, torch.float64))
    for got, theirs, truth in zip((out, pre[:local]), plain, exact, strict=True):
        assert_error_rule(got, theirs, truth, 2)
    return pre


def check_backward(args: tuple[Any, ...], pre: Tensor) -> tuple[Tensor, ...]:
    x, slots, offsets, weights, w_in, _, w_out, b_out, activation = args
    grad = torch.randn(x.shape).to(x.dtype)
    given = (grad, x, slots, offsets, weights, w_in, w_out, b_out, pre, activation)
    got = expert_ffn_backward.expert_ffn_backward(*given, *ALL)
    plain, exact = plain_backward(*given), plain_backward(*cast_sample(given, torch.float64))
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert_error_rule(ours, theirs, truth, 3)
    return got


SHAPES = {
    "odd widths, a slice": (9, 19, 13, 3, 2, 3),
    "even widths, all local": (20, 32, 48, 2, 0, 8),
    "more choices than local experts": (6, 16, 16, 5, 3, 2),
    "one token": (1, 8, 8, 1, 0, 8),
    "several tiles an expert": (70, 64, 144, 2, 0, 2),
}


@pytest.mark.parametrize("dtype", aids.DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_parity(shape: tuple[int, ...], dtype: torch.dtype, gpu: Gpu) -> None:
    args = layer(*shape, dtype=dtype, experts=max(8, shape[5]))
    check_backward(args, check_forward(args))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    args = layer(12, 16, 24, 2, 1, 6, activation, biases=activation in GATED)
    check_backward(args, check_forward(args))


@pytest.mark.parametrize("load", ["few", "some", "many", "plain", "little", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_configuration(
    load: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (expert_ffn, expert_ffn_backward):
        monkeypatch.setattr(module, "ffn_load", lambda *_: load)
        monkeypatch.setattr(module, "gpu_of", lambda _: Gpu(2, load not in ("plain", "unaligned")))
    args = layer(150, 80, 272, 1, 0, 2, dtype=dtype, experts=3)
    check_backward(args, check_forward(args))


def test_tables_share_the_height_of_a_tile() -> None:
    for size in (2, 4, 8):
        for load in ("few", "some", "many", "plain", "little", "unaligned"):
            tables = (configs.INTO, configs.OUT_OF, configs.ACTIVATION_GRADIENT)
            assert len({column(each, size, load).block_m for each in tables}) == 1


def test_the_load_is_known_without_reading_a_tensor() -> None:
    x = torch.empty(4, 64, dtype=torch.bfloat16, device="meta")
    engine, none = Gpu(132, True), Gpu(108, False)
    found = [configs.ffn_load(engine, rows, 4, x) for rows in (64, 65, 1024, 1025)]
    assert found == ["few", "some", "some", "many"]
    assert configs.ffn_load(none, 9999, 4, x) == "plain"
    little = Gpu(84, False, shared=99 * 1024)
    assert [configs.ffn_load(little, rows, 4, x) for rows in (64, 65, 9999)] == [
        "few", "little", "little"
    ]  # fmt: skip
    assert configs.ffn_load(engine, 9999, 4, x[:, 1:]) == "unaligned"


@pytest.mark.parametrize("shape", [(0, 4, 6, 2, 0, 4), (3, 4, 6, 2, 0, 0), (5, 4, 0, 2, 0, 8),
                                   (5, 0, 4, 2, 0, 8)])  # fmt: skip
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    args = layer(*shape)
    check_backward(args, check_forward(args).nan_to_num())


def test_strided_and_turned_operands(gpu: Gpu) -> None:
    x, slots, offsets, weights, w_in, b_in, w_out, b_out, name = layer(
        17, 32, 48, 2, 0, 8, dtype=torch.float16
    )
    turned = w_in.transpose(1, 2).contiguous().transpose(1, 2)
    other = w_out.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.randn(17, 64).half()
    for given in (
        (x, slots, offsets, weights, turned, b_in, other, b_out, name),
        (wide[:, ::2], slots, offsets, weights, w_in, b_in, w_out, b_out, name),
        (x, slots, offsets, weights.T.contiguous().T, w_in[:1].expand(8, -1, -1), b_in,
         w_out[:1].expand(8, -1, -1), b_out[:1].expand(8, -1), name),
    ):  # fmt: skip
        check_backward(given, check_forward(given))
    args = (x, slots, offsets, weights, w_in, b_in, w_out, b_out, name)
    pre = check_forward(args)
    apart = torch.zeros(pre.size(0), 2 * pre.size(1)).half()
    apart[:, ::2] = pre.nan_to_num()
    check_backward(args, apart[:, ::2])


def test_rows_that_nobody_wrote_reach_no_result(gpu: Gpu) -> None:
    """Slots of other ranks leave rows that hold anything; here NaN."""
    args = layer(30, 32, 32, 4, 2, 3, dtype=torch.float16)
    pre = check_forward(args)
    pre[int(args[2][-1]) :] = torch.nan
    got = check_backward(args, pre)
    assert not any(bool(each.isnan().any()) for each in got)


def test_a_row_that_is_not_finite_stays_with_its_tokens() -> None:
    args = layer(40, 16, 16, 1, 0, 8)
    x, slots, offsets, weights, w_in, b_in, w_out, b_out, name = args
    x = x.clone()
    x[7] = torch.nan
    out, _ = expert_ffn.expert_ffn_forward(
        x, slots, offsets, weights, w_in, b_in, w_out, b_out, name, False
    )
    assert out.isnan().any(-1).nonzero().flatten().tolist() == [7]


def test_launches_are_counted() -> None:
    args = layer(20, 16, 16, 2, 0, 8)
    x, slots, offsets, weights, w_in, _, w_out, b_out, name = args
    with contextlib.ExitStack() as stack:
        lists = [stack.enter_context(aids.counted(module)) for module in MODULES]
        _, pre = expert_ffn.expert_ffn_forward(*args, True)
        forward = {kernel for names in lists for kernel in names}
        # A module that imports another's kernel counts it too.
        assert forward == set(FORWARD)
        assert max(names.count(kernel) for names in lists for kernel in names) == 1
        given = (torch.randn(x.shape), x, slots, offsets, weights, w_in, w_out, b_out, pre, name)
        inner, outer = "activation_gradient_kernel", "weight_gradient_kernel"
        for needs, expected in {
            (True, False, False, False, False, False): {inner, *FORWARD[2:]},
            (False, True, False, False, False, False): {
                inner, "bias_dots_kernel", "weight_sums_kernel"
            },
            (False, False, True, False, False, False): {inner, outer},
            (False, False, False, True, False, False): {inner, "bias_sums_kernel"},
            (False, False, False, False, True, False): {inner, outer},
            (False, False, False, False, False, True): {"bias_sums_kernel"},
            (False,) * 6: set(),
        }.items():  # fmt: skip
            for names in lists:
                names.clear()
            grads = expert_ffn_backward.expert_ffn_backward(*given, *needs)
            assert {kernel for names in lists for kernel in names} - {"plan_kernel"} == expected
            whole = expert_ffn_backward.expert_ffn_backward(*given, *ALL)
            for got, full, need in zip(grads, whole, needs, strict=True):
                assert torch.equal(got, full) if need else got.shape == (0,)


def test_the_plan_beyond_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    args = layer(50, 16, 16, 3, 1, 5)
    expected, _ = expert_ffn.expert_ffn_forward(*args, False)
    monkeypatch.setattr(tiles, "ONE_PROGRAM", 16)
    monkeypatch.setattr(tiles, "PLAN", configs.Config(32, 0, 0, num_warps=4, num_stages=1))
    aids.turn_programs_around(monkeypatch)
    got, _ = expert_ffn.expert_ffn_forward(*args, False)
    assert torch.equal(got, expected)


def test_more_tiles_than_a_band_and_same_bits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    args = layer(60, 16, 80, 2, 0, 12, experts=12)
    pre = check_forward(args)
    check_backward(args, pre)
    x, slots, offsets, weights, w_in, _, w_out, b_out, name = args
    given = (torch.randn(x.shape), x, slots, offsets, weights, w_in, w_out, b_out, pre, name)

    def run() -> list[Tensor]:
        out, _ = expert_ffn.expert_ffn_forward(*args, False)
        return [out, *expert_ffn_backward.expert_ffn_backward(*given, *ALL)]

    first = run()
    aids.turn_programs_around(monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))


def test_bad_slots_act_as_minus_one_and_bad_offsets_do_no_harm() -> None:
    args = layer(24, 16, 16, 2, 0, 8)
    x, slots, offsets, weights, w_in, b_in, w_out, b_out, name = args
    bad, good = slots.clone(), slots.clone()
    bad[3], bad[9], bad[20] = 48, -7, 2**31 - 1
    good[[3, 9, 20]] = -1
    grad = torch.randn(x.shape)
    results = []
    for given in (bad, good):
        out, pre = expert_ffn.expert_ffn_forward(
            x, given, offsets, weights, w_in, b_in, w_out, b_out, name, True
        )
        grads = expert_ffn_backward.expert_ffn_backward(
            grad, x, given, offsets, weights, w_in, w_out, b_out, pre, name, *ALL
        )
        results.append((out, *grads))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert not bool(one.isnan().any())
    for bounds in ([0, 99, 40, -5, 7, 2**31 - 1, 3, 48, 9], [48] * 4 + [0] * 5):
        memory = aids.Guarded()
        odd = torch.tensor(bounds, dtype=torch.int32)
        safe = [memory.of(each) for each in (x, slots, odd, weights, w_in, b_in, w_out, b_out)]
        expert_ffn.expert_ffn_forward(*safe, name, True)
        memory.check()


def test_bad_arguments_raise_in_the_words_of_the_reference() -> None:
    for row in aids.bad_calls("expert_ffn_forward", "expert_ffn_backward"):
        aids.refuses(row)


def test_synchronising_check_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPMOE_OPS_CHECK", "1")
    rows = aids.bad_values("expert_ffn_forward", "expert_ffn_backward")
    assert rows
    for row in rows:
        aids.refuses(row)
