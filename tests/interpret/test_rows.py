"""The Triton launchers of `slice_rows`, `merge_rows` and their backwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.kernels.expert_slice import rows as kernels
from ppmoe_ops.testing import poison_memory

from .aids import (
    DTYPES,
    Guarded,
    bad_calls,
    bad_values,
    call,
    check,
    counted,
    outputs,
    refuses,
    turn_programs_around,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinities

NAMES = ("slice_rows", "slice_rows_backward", "merge_rows", "merge_rows_backward")
# T, K, local of 8 experts, H.
SHAPES = [
    (6, 2, 3, 19),
    (5, 3, 8, 64),
    (4, 2, 0, 8),
    (11, 5, 4, 140),
    (2, 1, 8, 2080),
    (9, 8, 5, 1),
    (1, 7, 6, 136),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poison_memory():
        yield


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def slots_of(tokens: int, top_k: int, local: int) -> Tensor:
    ids = torch.rand(tokens, 8).argsort(-1)[:, :top_k]
    return OPERATORS["expert_index"].reference(ids, 0, local)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "local", "hidden"), SHAPES)
def test_rows(tokens: int, top_k: int, local: int, hidden: int, dtype: torch.dtype) -> None:
    slots = slots_of(tokens, top_k, local)
    x = torch.randn(tokens, hidden).to(dtype)
    (sliced,) = check("slice_rows", (x, slots, top_k))
    assert torch.equal(sliced, OPERATORS["slice_rows"].reference(x, slots, top_k))
    rows = torch.randn(tokens * top_k, hidden).to(dtype)
    # The tail must not be read: whatever it holds would reach a token.
    rows[slots < 0] = torch.nan
    weights = torch.rand(tokens, top_k, dtype=wide(dtype))
    check("slice_rows_backward", (rows, slots, top_k))
    check("merge_rows", (rows, slots, weights))
    check("merge_rows_backward", (x, rows, slots, weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite(dtype: torch.dtype) -> None:
    slots = slots_of(6, 3, 8)
    x, rows = torch.randn(6, 40).to(dtype), torch.randn(18, 40).to(dtype)
    weights = torch.rand(6, 3, dtype=wide(dtype))
    for tensor in (x, rows, weights):
        tensor[1, 0], tensor[2, 1], tensor[3, 2] = torch.nan, torch.inf, -torch.inf
    check("slice_rows_backward", (rows, slots, 3))
    check("merge_rows", (rows, slots, weights))
    check("merge_rows_backward", (x, rows, slots, weights))
    got = call("slice_rows", (x, slots, 3))
    torch.testing.assert_close(
        got, OPERATORS["slice_rows"].reference(x, slots, 3), rtol=0, atol=0, equal_nan=True
    )


def test_a_sum_keeps_the_order_of_the_choices() -> None:
    # In float32 only ((1e8 + 1) - 1e8) + 3 is 3, and five choices are more than one group of four.
    rows = torch.tensor([[3.0], [-1e8], [1.0], [1e8], [0.5]])
    slots = torch.tensor([3, 2, 1, 0, 4], dtype=torch.int32)
    assert call("merge_rows", (rows, slots, torch.ones(1, 5))).item() == 3.5
    assert call("slice_rows_backward", (rows, slots, 5)).item() == 3.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype: torch.dtype) -> None:
    slots = slots_of(7, 3, 5)
    for x in (
        torch.randn(7, 40)[:, 3:20],
        torch.randn(7, 48)[:, 8:40],
        torch.randn(21, 7).T,
        torch.randn(1, 24).expand(7, 24),
    ):
        check("slice_rows", (x.to(dtype), slots, 3))
    rows = torch.randn(16, 21).to(dtype).T
    weights = torch.rand(3, 7, dtype=wide(dtype)).T
    grad = torch.ones((), dtype=dtype).expand(7, 16)
    apart = torch.stack([slots, slots], -1).flatten()[::2]
    check("slice_rows_backward", (rows, apart, 3))
    check("merge_rows", (rows, apart, weights))
    check("merge_rows_backward", (grad, rows, apart, weights))


def test_units_are_as_wide_as_strides_allow() -> None:
    def unit(hidden: int, stride: int, dtype: torch.dtype) -> int:
        x = torch.empty(2 * stride, dtype=dtype).as_strided((2, hidden), (stride, 1))
        out, slots = x.new_empty(2, hidden), torch.empty(2, dtype=torch.int32)
        return kernels.slice_launch(x, slots, 1, out).arguments["UNIT"]

    half, full, double = torch.bfloat16, torch.float32, torch.float64
    assert [unit(64, 72, half), unit(64, 66, half), unit(20, 64, half)] == [8, 2, 4]
    assert [unit(64, 71, half), unit(7, 64, half)] == [1, 1]
    assert [unit(64, 72, full), unit(64, 66, full), unit(64, 66, double)] == [4, 2, 2]


def test_launches_and_many_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = slots_of(500, 3, 8)
    x, rows, weights = torch.randn(500, 3), torch.randn(1500, 3), torch.rand(500, 3)
    expected = {
        "slice_rows": ["slice_rows_kernel"],
        "slice_rows_backward": ["invert_slots_kernel", "merge_rows_kernel"],
        "merge_rows": ["invert_slots_kernel", "merge_rows_kernel"],
        "merge_rows_backward": ["invert_slots_kernel", "merge_rows_backward_kernel"],
    }
    args = ((x, slots, 3), (rows, slots, 3), (rows, slots, weights), (x, rows, slots, weights))
    for most in (kernels.ALONE, 256):  # the second: many programs invert
        monkeypatch.setattr(kernels, "ALONE", most)
        assert kernels.invert_launch(slots, slots).programs == (1 if most > 1500 else 6)
        for name, arguments in zip(NAMES, args, strict=True):
            with counted(kernels) as names:
                check(name, arguments)
            assert names == expected[name]


@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(0, 2, 8), (4, 0, 8), (4, 2, 0)])
def test_empty_inputs(tokens: int, top_k: int, hidden: int) -> None:
    slots = torch.full((tokens * top_k,), -1, dtype=torch.int32)
    x, rows = torch.randn(tokens, hidden), torch.randn(tokens * top_k, hidden)
    weights = torch.rand(tokens, top_k)
    with counted(kernels) as names:
        if top_k:
            assert call("slice_rows", (x, slots, top_k)).shape == rows.shape
            assert call("slice_rows_backward", (rows, slots, top_k)).shape == x.shape
        assert torch.equal(call("merge_rows", (rows, slots, weights)), torch.zeros(tokens, hidden))
        assert names == []
        grad_rows, grad_weights = call("merge_rows_backward", (x, rows, slots, weights))
    assert grad_rows.shape == rows.shape
    assert torch.equal(grad_weights, torch.zeros(tokens, top_k))


BAD = {2: 12, 7: -7, 8: 2**31 - 1, 9: -(2**31)}


def test_bad_slots_act_as_minus_one_and_touch_nothing_outside() -> None:
    slots = slots_of(6, 2, 8)
    bad, good = slots.clone(), slots.clone()
    for at, value in BAD.items():
        bad[at], good[at] = value, -1
    guarded = Guarded()
    x, rows = guarded.of(torch.randn(6, 16)), guarded.of(torch.randn(12, 16))
    weights, bad = guarded.of(torch.rand(6, 2)), guarded.of(bad)
    for name, (before, after) in {
        "slice_rows": ((x,), (2,)),
        "slice_rows_backward": ((rows,), (2,)),
        "merge_rows": ((rows,), (weights,)),
        "merge_rows_backward": ((x, rows), (weights,)),
    }.items():
        got = outputs(call(name, (*before, bad, *after)))
        for one, other in zip(got, outputs(call(name, (*before, good, *after))), strict=True):
            assert torch.equal(one, other)
    sliced, inverse = guarded.of(torch.zeros(12, 16)), guarded.of(bad)
    merged, grads = guarded.of(torch.zeros(6, 16)), guarded.of(torch.zeros(6, 2))
    for launch in (
        kernels.slice_launch(x, bad, 2, sliced),
        kernels.invert_launch(bad, inverse),
        kernels.merge_launch(rows, inverse, weights, 2, merged),
        kernels.merge_backward_launch(x, rows, bad, inverse, weights, sliced, grads),
    ):
        launch.run(x.device)
        guarded.check()


@pytest.mark.parametrize("alone", [1, 8192])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_slot_listed_twice_leaves_no_row_unwritten(
    monkeypatch: pytest.MonkeyPatch, backwards: bool, alone: int
) -> None:
    if backwards:
        turn_programs_around(monkeypatch)
    monkeypatch.setattr(kernels, "ALONE", alone)
    slots = torch.tensor([3, 3, 0, -1], dtype=torch.int32)
    grad, rows, weights = torch.randn(2, 5), torch.randn(4, 5), torch.rand(2, 2)
    grad_rows, grad_weights = call("merge_rows_backward", (grad, rows, slots, weights))
    expected = weights.flatten()[[3, 3, 0]].unsqueeze(-1) * grad[[1, 1, 0]]
    torch.testing.assert_close(grad_rows, torch.cat([expected, torch.zeros(1, 5)]))
    torch.testing.assert_close(grad_weights[1, 1], rows[1] @ grad[1])
    merged = call("merge_rows", (rows, slots, weights))
    torch.testing.assert_close(merged[1], weights[1, 1] * rows[1])


def test_the_order_of_programs_does_not_matter_nor_the_time() -> None:
    slots = slots_of(40, 3, 5)
    x, rows, weights = torch.randn(40, 70), torch.randn(120, 70), torch.rand(40, 3)

    def run() -> list[Tensor]:
        calls = ((x, slots, 3), (rows, slots, 3), (rows, slots, weights), (x, rows, slots, weights))
        pairs = zip(NAMES, calls, strict=True)
        return [each for name, args in pairs for each in outputs(call(name, args))]

    first, again = run(), run()
    with pytest.MonkeyPatch.context() as patch:
        turn_programs_around(patch)
        turned = run()
    for one, other, third in zip(first, again, turned, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@pytest.mark.parametrize("row", bad_values(*NAMES), ids=str)
def test_synchronising_check_raises(row: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPMOE_OPS_CHECK", "1")
    refuses(row)


@pytest.mark.parametrize("row", bad_calls(*NAMES), ids=str)
def test_refuses_in_the_words_of_the_reference(row: object) -> None:
    refuses(row)


def test_refuses_tensors_on_different_devices() -> None:
    slots, x = torch.zeros(6, dtype=torch.int32), torch.ones(3, 4)
    rows, weights = torch.ones(6, 4), torch.ones(3, 2)
    for name, args, argument in (
        ("slice_rows", (x, slots.to("meta"), 2), "slots"),
        ("slice_rows_backward", (rows, slots.to("meta"), 2), "slots"),
        ("merge_rows", (rows, slots, weights.to("meta")), "weights"),
        ("merge_rows_backward", (x.to("meta"), rows, slots, weights), "grad"),
        ("route", (x, 2, "softmax", True, torch.ones(4, device="meta")), "selection_bias"),
        ("router_losses_forward", (x, slots.view(3, 2).to("meta")), "experts"),
    ):
        operator = name.removesuffix("_forward")
        with pytest.raises(ValueError, match=f"^{operator}: {argument} is on meta; expected cpu$"):
            call(name, args)
