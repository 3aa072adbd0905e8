"""`slice_rows` and `merge_rows` on compiled kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from slicing import (
    DTYPES,
    call,
    check_gradients,
    check_result,
    distinct_ids,
    dtype_name,
    plain_merge,
    plain_slice,
    wide,
)
from torch import Tensor

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import assert_error_rule, cast_sample

pytestmark = pytest.mark.kernel

# T, K, experts, local ones, H: some slots foreign, all local, none local, primes, one, none.
SHAPES = (
    (6, 2, 8, 3, 16),
    (17, 3, 8, 8, 33),
    (4, 2, 8, 0, 19),
    (0, 2, 4, 4, 8),
    (7, 1, 4, 2, 0),
    (1, 1, 1, 1, 1),
    (13, 8, 16, 7, 70),
    (3, 70, 80, 40, 17),
)


def shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def slots_of(tokens: int, top_k: int, experts: int, local: int, first: int = 0) -> Tensor:
    ids = distinct_ids(tokens, top_k, experts)
    slots: Tensor = call("expert_index", (ids, first, local))[0]
    return slots


def layouts(rows: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors [rows, width] that lie in memory in different ways."""
    return {
        "closed": torch.randn(rows, width).to(dtype),
        "columns_of_wider": torch.randn(rows, width + 5).to(dtype)[:, 1 : width + 1],
        "every_other_row": torch.randn(2 * rows, width).to(dtype)[::2],
        "transposed": torch.randn(width, rows).to(dtype).t(),
        "every_other_column": torch.randn(rows, 2 * width).to(dtype)[:, ::2],
        "expanded_row": torch.randn(1, width).to(dtype).expand(rows, width),
        "expanded_column": torch.randn(rows, 1).to(dtype).expand(rows, width),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_slice_copies_exactly(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, top_k, experts, local, width = shape
    slots = slots_of(tokens, top_k, experts, local, first=experts - local)
    for name, x in layouts(tokens, width, dtype).items():
        out = call("slice_rows", (x, slots, top_k))
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert torch.equal(out, plain_slice(x, slots, top_k)), name
        assert torch.equal(out, OPERATORS["slice_rows"].reference(x, slots, top_k)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_merge_matches_the_composition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, top_k, experts, local, width = shape
    slots = slots_of(tokens, top_k, experts, local)
    weights = (
        torch.randn(tokens, top_k, dtype=wide(dtype)),
        torch.randn(top_k, tokens, dtype=wide(dtype)).t(),
        torch.randn(tokens, 1, dtype=wide(dtype)).expand(tokens, top_k),
    )
    for rows, weight in zip(
        layouts(tokens * top_k, width, dtype).values(), cycle(weights), strict=False
    ):
        check_result("merge_rows", (rows, slots, weight), plain_merge)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, top_k, experts, local, width = shape
    slots = slots_of(tokens, top_k, experts, local)
    weights = torch.randn(tokens, top_k, dtype=wide(dtype)).requires_grad_()
    for name in ("closed", "columns_of_wider", "transposed"):
        x = layouts(tokens, width, dtype)[name].requires_grad_()
        check_gradients(lambda *args: call("slice_rows", args), plain_slice, (x, slots, top_k))
        rows = layouts(tokens * top_k, width, dtype)[name].requires_grad_()
        check_gradients(lambda *args: call("merge_rows", args), plain_merge, (rows, slots, weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_backward_operators_take_any_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, top_k, experts, local, width = shape
    slots = slots_of(tokens, top_k, experts, local)
    weights = torch.randn(tokens, top_k, dtype=wide(dtype))
    rows = list(layouts(tokens * top_k, width, dtype).values())
    compare("slice_rows_backward", *((each, slots, top_k) for each in rows))
    grads = list(layouts(tokens, width, dtype).values())
    pairs = [*zip(grads, rows, strict=True), *zip(grads, rows[3:] + rows[:3], strict=True)]
    compare("merge_rows_backward", *((grad, each, slots, weights) for grad, each in pairs))


def compare(name: str, *calls: tuple[Any, ...]) -> None:
    """The error rule over the results of several calls, taken together."""
    reference: Callable[..., Any] = OPERATORS[name].reference

    def results(function: Callable[..., Any], dtype: torch.dtype | None) -> list[Tensor]:
        found = [function(*(cast_sample(args, dtype) if dtype else args)) for args in calls]
        rows = [[each] if isinstance(each, Tensor) else each for each in found]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    actual = results(OPERATORS[name].overload, None)
    plain, exact = results(reference, None), results(reference, torch.float64)
    for three in zip(actual, plain, exact, strict=True):
        assert_error_rule(*three, factor=3.0, name=name)


@pytest.mark.parametrize(
    ("dtype", "width"), [*((dtype, 1024) for dtype in DTYPES), (torch.bfloat16, 1003)]
)
def test_results_too_large_for_the_caches(dtype: torch.dtype, width: int) -> None:
    # Beyond 4 MiB rows are stored past the caches, where they lie on whole cache lines.
    tokens, top_k = (17 << 18) // (width * dtype.itemsize) + 1, 2
    slots = slots_of(tokens, top_k, 8, 5)
    x = torch.randn(tokens, width + 1).to(dtype)[:, 1:]
    rows = torch.randn(top_k * tokens, width).to(dtype)
    index = slots.clamp(min=0).long()
    expected = x[index // top_k].masked_fill((slots < 0).unsqueeze(-1), 0)
    assert torch.equal(call("slice_rows", (x, slots, top_k)), expected)
    weights = torch.randn(tokens, top_k, dtype=wide(dtype))
    check_result("merge_rows", (rows, slots, weights), OPERATORS["merge_rows"].reference)
    compare("slice_rows_backward", (rows, slots, top_k))
    compare("merge_rows_backward", (x, rows, slots, weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_rows_of_foreign_slots_are_never_read(dtype: torch.dtype) -> None:
    slots = slots_of(9, 3, 8, 4)
    rows = torch.randn(27, 21).to(dtype)
    rows[slots < 0] = torch.nan
    weights = torch.rand(9, 3, dtype=wide(dtype))
    listed = torch.zeros(27, dtype=torch.bool)
    listed[slots[slots >= 0].long()] = True
    weights[~listed.view(9, 3)] = torch.nan
    out = call("merge_rows", (rows, slots, weights))
    assert out.isfinite().all()
    grad_rows, grad_weights = call("merge_rows_backward", (out, rows, slots, weights))
    assert grad_rows.isfinite().all()
    assert torch.equal(grad_rows[slots < 0], torch.zeros_like(grad_rows[slots < 0]))
    assert torch.equal(
        grad_weights[~listed.view(9, 3)], grad_weights.new_zeros(int((~listed).sum()))
    )
    assert call("slice_rows_backward", (rows, slots, 3)).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_in_their_token(dtype: torch.dtype, value: float) -> None:
    x = torch.randn(5, 40).to(dtype)
    x[2, 3], x[2, 38] = value, value
    slots = slots_of(5, 2, 4, 4)
    rows = call("slice_rows", (x, slots, 2))
    assert torch.equal(rows.nan_to_num(), plain_slice(x, slots, 2).nan_to_num())
    check_result("merge_rows", (rows, slots, torch.rand(5, 2, dtype=wide(dtype))), plain_merge)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_nan_of_any_payload_stays_nan(dtype: torch.dtype) -> None:
    # All bits set: adding to such a number's bits to round them would overflow to zero.
    weights = torch.full((3, 1), -1).to(torch.int64 if dtype == torch.float64 else torch.int32)
    slots = torch.arange(3, dtype=torch.int32)
    rows = torch.ones(3, 70, dtype=dtype)
    out = call("merge_rows", (rows, slots, weights.view(wide(dtype))))
    assert out.isnan().all()
    args = (rows, rows, slots, weights.view(wide(dtype)))
    assert call("merge_rows_backward", args)[0].isnan().all()


def test_tokens_without_a_local_expert_get_exact_zeros() -> None:
    slots = torch.tensor([2, 3, -1, -1, -1, -1], dtype=torch.int32)
    out = call("merge_rows", (torch.randn(6, 50), slots, -torch.rand(3, 2)))
    assert torch.equal(out[[0, 2]], torch.zeros(2, 50))
    assert not out[[0, 2]].signbit().any()


def test_no_choices_at_all() -> None:
    empty = torch.empty(0, dtype=torch.int32)
    out = call("merge_rows", (torch.empty(0, 6), empty, torch.empty(4, 0)))
    assert torch.equal(out, torch.zeros(4, 6))


def test_slots_with_strides() -> None:
    slots = slots_of(12, 2, 8, 5)
    spread = torch.stack((slots, slots), 1)[:, 0]
    assert spread.stride() == (2,)
    x, rows, weights = torch.randn(12, 9), torch.randn(24, 9), torch.rand(12, 2)
    assert torch.equal(call("slice_rows", (x, spread, 2)), call("slice_rows", (x, slots, 2)))
    args = (rows, slots, weights)
    assert torch.equal(call("merge_rows", (rows, spread, weights)), call("merge_rows", args))


def test_choices_are_added_in_their_order() -> None:
    # In float32 the sum depends on the order: the large terms cancel first.
    rows = torch.tensor([[1.0], [1e8], [-1e8]])
    slots = torch.tensor([2, 0, 1], dtype=torch.int32)
    out = call("merge_rows", (rows, slots, torch.ones(1, 3)))
    assert out.item() == 1.0
    slots = torch.tensor([0, 1, 2], dtype=torch.int32)
    assert call("merge_rows", (rows, slots, torch.ones(1, 3))).item() == 0.0
