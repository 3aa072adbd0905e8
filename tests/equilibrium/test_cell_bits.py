"""Bits of `equilibrium_cell`: what they do not depend on."""

from __future__ import annotations

import pytest
import torch
from cell_problems import (
    ACTIVATIONS,
    BACKWARD,
    DTYPES,
    FORWARD,
    SOLVERS,
    assert_same,
    cell,
    dtype_name,
    solve,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppmoe_ops.testing import poison_memory

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
SOLVER = pytest.mark.parametrize("solver", SOLVERS)


def uneven(rows: int, r: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows that need very different numbers of steps."""
    a, c = cell(rows, r, 0.95, dtype)
    return a, c * torch.linspace(-6, 4, rows)[:, None].exp().to(dtype)


@SOLVER
@DTYPE
def test_a_row_is_the_same_whatever_is_beside_it(dtype: torch.dtype, solver: str) -> None:
    for rows, r, activation in ((75, 5, "tanh"), (300, 17, "tanh")):
        a, c = uneven(rows, r, dtype)
        start = 0.3 * torch.randn(rows, r).to(dtype)
        args = (activation, solver, 0.0, 1e-5, 40)
        whole = solve(a, c, start, *args)
        assert whole[1].unique().numel() > (1 if solver == "newton" else 4)
        order = torch.randperm(rows)
        mixed = solve(a, c[order], start[order], *args)
        assert_same(mixed, tuple(each[order] for each in whole))
        for row in range(0, rows, 1 + rows // 60):
            one = solve(a, c[row : row + 1], start[row : row + 1], *args)
            assert_same(one, tuple(each[row : row + 1] for each in whole))


@SOLVER
@DTYPE
def test_threads(dtype: torch.dtype, solver: str) -> None:
    a, c = uneven(700, 17, dtype)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found = solve(a, c, None, "tanh", solver, 0.0, 1e-4, 30)
        grads = BACKWARD.overload(c, a, c, found[0], found[2], "tanh")
        results.append((*found, *grads))
    for each in results[1:]:
        assert_same(each, results[0])


def test_repeated_calls() -> None:
    a, c = uneven(129, 16)
    first = solve(a, c)
    for _ in range(5):
        assert_same(solve(a, c), first)


@SOLVER
def test_a_hard_row_costs_the_others_nothing(solver: str) -> None:
    a, c = cell(64, 8, 0.5, torch.float64)
    c[:, 7] = 0
    a[7], a[:, 7] = 0, 0
    a[7, 7] = 0.999  # an element of its own, slow where c is not zero
    easy = solve(a, c, None, "leaky_relu", solver, 0.0, 1e-8, 4000)
    c[20, 7] = 1e-3
    mixed = solve(a, c, None, "leaky_relu", solver, 0.0, 1e-8, 4000)
    others = torch.arange(64) != 20
    assert_same(tuple(each[others] for each in mixed), tuple(each[others] for each in easy))
    if solver == "fixed_point":
        assert mixed[1][20] > 50 * mixed[1][others].max()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_shape_and_stride(data: st.DataObject) -> None:
    draw = data.draw
    rows, r = draw(st.integers(0, 70)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(DTYPES))
    activation, solver = draw(st.sampled_from(list(ACTIVATIONS))), draw(st.sampled_from(SOLVERS))
    a, c = cell(rows, r, draw(st.sampled_from([0.3, 0.8])), dtype, draw(st.integers(0, 9)))
    start = draw(st.sampled_from([None, torch.randn(rows, r).to(dtype)]))
    options = (
        activation,
        solver,
        draw(st.sampled_from([0.0, 1e-2])),
        1e-3,
        draw(st.integers(1, 30)),
    )

    def laid_out(tensor: Tensor) -> Tensor:
        layout = draw(st.sampled_from(["closed", "turned", "spread", "in_a_wider_one"]))
        if layout == "turned":
            return tensor.T.contiguous().T
        if layout == "spread":
            wide = torch.full((*tensor.shape, 3), float("nan"), dtype=dtype)
            wide[..., 1] = tensor
            return wide[..., 1]
        if layout == "in_a_wider_one":
            wide = torch.full((tensor.size(0) + 1, tensor.size(1) + 2), float("nan"), dtype=dtype)
            wide[1:, 1:-1] = tensor
            return wide[1:, 1:-1]
        return tensor

    torch.set_num_threads(draw(st.sampled_from([1, 2, 3])))
    with poison_memory():
        closed = solve(a, c, start, *options)
        turned = solve(
            laid_out(a), laid_out(c), None if start is None else laid_out(start), *options
        )
        assert_same(turned, closed)
        wanted = FORWARD.reference(a, c, start, *options)
        even = closed[1] == wanted[1]
        assert int(even.count_nonzero()) >= rows - 1 - rows // 6
        near = max(2e-3, 4 * torch.finfo(dtype).eps)
        scale = wanted[0].double().norm(dim=-1).max().item() if rows else 0.0
        torch.testing.assert_close(closed[0][even], wanted[0][even], rtol=near, atol=near * scale)
        grad = torch.randn(rows, r).to(dtype)
        residual = closed[2]
        came = BACKWARD.overload(
            *(laid_out(each) for each in (grad, a, c, closed[0])), residual, activation
        )
        assert_same(came, BACKWARD.overload(grad, a, c, closed[0], residual, activation))
        by_torch = BACKWARD.reference(grad, a, c, closed[0], residual, activation)
        for one, other in zip(came, by_torch, strict=True):
            size = other.double().abs().max().item() if other.numel() else 0.0
            near = max(1e-4, 4 * torch.finfo(dtype).eps)
            torch.testing.assert_close(one, other, rtol=near, atol=near * size)
