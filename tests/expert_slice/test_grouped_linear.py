"""`grouped_linear` on compiled kernels: every cut of a product into panels and blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slicing import (
    DTYPES,
    call,
    check_gradients,
    check_result,
    dtype_name,
    plain_grouped_linear,
)
from torch import Tensor

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import assert_error_rule, cast_sample

pytestmark = pytest.mark.kernel


def offsets_of(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def problem(
    bounds: tuple[int, ...], rows: int, width: int, out: int, dtype: torch.dtype, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    local = len(bounds) - 1
    return (
        torch.randn(rows, width).to(dtype),
        offsets_of(*bounds),
        (torch.randn(local, out, width) / max(width, 1) ** 0.5).to(dtype),
        torch.randn(local, out).to(dtype) if bias else None,
    )


# Offsets, R, K_in, N.
SHAPES: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    "small": ((0, 3, 3, 8), 9, 5, 7),
    "one_row_one_column": ((0, 1), 1, 1, 1),
    "one_column": ((0, 13, 20), 20, 17, 1),
    "one_input": ((0, 7, 19), 25, 1, 33),
    "no_input": ((0, 2, 5), 6, 0, 4),
    "no_output": ((0, 2, 5), 6, 4, 0),
    "no_rows": ((0, 0, 0), 0, 4, 3),
    "no_experts": ((2,), 5, 4, 3),
    "offsets_above_zero": ((3, 5, 5, 9), 14, 8, 20),
    "experts_without_rows": ((0, 0, 0, 11, 11, 12, 12), 12, 9, 6),
    "all_rows_on_one_expert": ((0, 0, 0, 40, 40), 40, 33, 17),
    "one_to_four_rows": ((0, 1, 3, 6, 10), 10, 70, 10),
    "twelve_to_eighteen_rows": ((0, 12, 27, 43, 60, 78), 78, 50, 22),
    "few_rows_deep": ((0, 3, 7, 8), 8, 601, 37),
    "few_columns": ((0, 30, 77), 77, 40, 3),
    "tile_edges": ((0, 12, 25, 49), 50, 64, 32),
    "beyond_tile_edges": ((0, 13, 37), 37, 65, 33),
    "odd_depth": ((0, 10, 24), 24, 511, 34),
    "two_depth_panels": ((0, 6, 15), 16, 513, 40),
    "three_depth_panels": ((0, 9, 14), 14, 1029, 35),
    "row_panels": ((0, 241, 250), 251, 20, 18),
    "row_blocks": ((0, 385, 1154), 1156, 12, 10),
    "column_blocks": ((0, 5, 14), 15, 21, 193),
    "many_column_blocks": ((0, 5, 12), 12, 10, 400),
    "rows_columns_and_depth": ((1, 490, 500), 503, 520, 200),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_composition(shape: str, dtype: torch.dtype) -> None:
    for bias in (True, False):
        args = problem(*SHAPES[shape], dtype, bias)
        out = call("grouped_linear", args)
        assert out.shape == (args[0].size(0), args[2].size(1))
        assert out.dtype == dtype
        assert out.is_contiguous()
        check_result("grouped_linear", args, plain_grouped_linear)
        first, last = int(args[1][0]), int(args[1][-1])
        assert not out[:first].any()
        assert not out[last:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: str, dtype: torch.dtype) -> None:
    rows, offsets, weight, bias = problem(*SHAPES[shape], dtype)
    assert bias is not None
    args = (rows.requires_grad_(), offsets, weight.requires_grad_(), bias.requires_grad_())
    check_gradients(lambda *args: call("grouped_linear", args), plain_grouped_linear, args)


def check_backward(args: tuple[Any, ...]) -> None:
    actual = call("grouped_linear_backward", args)
    plain = OPERATORS["grouped_linear_backward"].reference(*args)
    exact = OPERATORS["grouped_linear_backward"].reference(*cast_sample(args, torch.float64))
    for needed, *three in zip(args[4:], actual, plain, exact, strict=True):
        assert (three[0].numel() > 0) == needed or three[1].numel() == 0
        assert_error_rule(*three, factor=3.0)


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_only_the_gradients_that_are_asked_for(needs: tuple[int, ...]) -> None:
    rows, offsets, weight, _ = problem((2, 7, 7, 12), 14, 20, 33, torch.float32)
    grad = torch.randn(14, 33)
    check_backward((grad, rows, offsets, weight, *(bool(each) for each in needs)))


@pytest.mark.parametrize("asking", [{0}, {2}, {3}, {0, 2}, {2, 3}, {0, 3}])
def test_autograd_asks_for_what_it_needs(asking: set[int]) -> None:
    args = problem((0, 4, 9), 9, 7, 11, torch.float32)
    for position in asking:
        value = args[position]
        assert value is not None
        value.requires_grad_()
    check_gradients(lambda *args: call("grouped_linear", args), plain_grouped_linear, args)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in memory with other strides."""
    wider = tensor.new_zeros(*tensor.shape[:-1], tensor.size(-1) + 3)
    wider[..., 1:-2] = tensor
    spread = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.size(-1))
    spread[..., ::2] = tensor
    return {
        "closed": tensor.contiguous(),
        "inside_wider": wider[..., 1:-2],
        "spread": spread[..., ::2],
        "transposed": tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
        "last_first": tensor.movedim(-1, 0).contiguous().movedim(0, -1),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_strides_do_not_change_a_bit(dtype: torch.dtype) -> None:
    rows, offsets, weight, bias = problem((1, 30, 30, 47), 50, 37, 41, dtype)
    grad = torch.randn(50, 41).to(dtype)
    expected = call("grouped_linear", (rows, offsets, weight, bias))
    needs = (True, True, True)
    backward = call("grouped_linear_backward", (grad, rows, offsets, weight, *needs))
    for name, turned in layouts(weight).items():
        for other in layouts(rows).values():
            out = call("grouped_linear", (other, offsets, turned, layouts(bias)["spread"]))
            assert torch.equal(out, expected), name
        for slope in layouts(grad).values():
            args = (slope, layouts(rows)[name], offsets, turned, *needs)
            for came, wanted in zip(call("grouped_linear_backward", args), backward, strict=True):
                assert torch.equal(came, wanted), name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("tall", [1, 2, 3, 4, 5, 11, 15, 16])
def test_few_rows_in_any_layout(tall: int, dtype: torch.dtype) -> None:
    # Few rows may be multiplied straight from memory, in another order than packed ones.
    rows, offsets, weight, bias = problem((0, tall, 2 * tall), 2 * tall, 83, 49, dtype)
    expected = call("grouped_linear", (rows, offsets, weight, bias))
    grad = torch.randn(2 * tall, 49).to(dtype)
    needs = (True, True, True)
    for name, turned in layouts(weight).items():
        for what, other in layouts(rows).items():
            args = (other, offsets, turned, bias)
            check_result("grouped_linear", args, plain_grouped_linear)
            if {name, what} <= {"closed", "inside_wider"}:
                assert torch.equal(call("grouped_linear", args), expected), (name, what)
        for slope in layouts(grad).values():
            check_backward((slope, layouts(rows)[name], offsets, turned, *needs))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_expanded_inputs(dtype: torch.dtype) -> None:
    offsets = offsets_of(0, 5, 12)
    row, column = torch.randn(1, 19).to(dtype), torch.randn(12, 1).to(dtype)
    weight = torch.randn(1, 23, 19).to(dtype).expand(2, 23, 19)
    bias = torch.randn(1, 23).to(dtype).expand(2, 23)
    for rows in (row.expand(12, 19), column.expand(12, 19)):
        check_result("grouped_linear", (rows, offsets, weight, bias), plain_grouped_linear)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_expanded_upstream_gradient(dtype: torch.dtype) -> None:
    rows, offsets, weight, bias = problem((0, 5, 12), 12, 19, 23, dtype)
    assert bias is not None
    leaves = [rows.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    out = call("grouped_linear", (rows, offsets, weight, bias))
    summed = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    closed = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for came, wanted in zip(summed, closed, strict=True):
        assert torch.equal(came, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_of_no_expert_are_never_read(dtype: torch.dtype, value: float) -> None:
    rows, offsets, weight, bias = problem((2, 4, 9), 12, 30, 35, dtype)
    rows[:2], rows[9:] = value, value
    out = call("grouped_linear", (rows, offsets, weight, bias))
    assert out.isfinite().all()
    grad = out.clone()
    grad[:2], grad[9:] = value, value
    for each in call("grouped_linear_backward", (grad, rows, offsets, weight, True, True, True)):
        assert each.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_in_their_row(dtype: torch.dtype, value: float) -> None:
    rows, offsets, weight, bias = problem((0, 20, 31), 31, 50, 40, dtype)
    expected = call("grouped_linear", (rows, offsets, weight, bias))
    rows[7, 11] = value
    out = call("grouped_linear", (rows, offsets, weight, bias))
    assert not out[7].isfinite().any()
    keep = torch.arange(31) != 7
    assert torch.equal(out[keep], expected[keep])


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_name)
def test_sums_are_kept_in_float32(dtype: torch.dtype) -> None:
    # 4096 ones and a small last term: a half-precision sum would stop growing long before.
    rows = torch.ones(3, 4097, dtype=dtype)
    weight = torch.ones(1, 2, 4097, dtype=dtype)
    weight[:, 1] *= -1
    out = call("grouped_linear", (rows, offsets_of(0, 3), weight, None))
    assert torch.equal(out, torch.tensor([[4097.0, -4097.0]] * 3).to(dtype))


def test_a_result_too_large_for_its_dtype_is_infinite() -> None:
    rows, weight = torch.full((2, 64), 100.0).half(), torch.full((1, 3, 64), 100.0).half()
    out = call("grouped_linear", (rows, offsets_of(0, 2), weight, None))
    assert torch.equal(out, torch.full((2, 3), torch.inf).half())


# Not bfloat16: the dot-product instruction takes subnormal numbers as zero, whatever is set.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=dtype_name)
def test_subnormal_values(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    rows = (torch.randn(9, 24, dtype=torch.float64) * tiny).to(dtype)
    weight = torch.randn(1, 10, 24).to(dtype)
    args = (rows, offsets_of(0, 9), weight, None)
    out = call("grouped_linear", args)
    exact = plain_grouped_linear(*cast_sample(args, torch.float64))
    eps = torch.finfo(dtype).eps
    allowed = 24 * tiny * eps + 4 * eps * exact.abs().max().item()
    assert (out.double() - exact).abs().max().item() <= allowed
