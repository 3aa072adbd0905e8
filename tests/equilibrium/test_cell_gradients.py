"""Gradients of `equilibrium_cell`: against unrolling, by gradcheck, and where there is none."""

from __future__ import annotations

import pytest
import torch
from cell_problems import (
    ACTIVATIONS,
    BACKWARD,
    DTYPES,
    SOLVERS,
    assert_same,
    cell,
    dtype_name,
    plain,
    solve,
)
from torch import Tensor

import ppmoe_ops
from ppmoe_ops.testing import assert_error_rule

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)


def leaves(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return a.detach().requires_grad_(), c.detach().requires_grad_()


def upstream(c: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(c.shape, generator=draw).to(torch.bfloat16).to(c.dtype)


def unrolled(a: Tensor, c: Tensor, activation: str, grad: Tensor) -> tuple[Tensor, ...]:
    a, c = leaves(a, c)
    return torch.autograd.grad(plain(a, c, activation, 120), (a, c), grad)


def implicit(
    a: Tensor, c: Tensor, activation: str, grad: Tensor, solver: str
) -> tuple[Tensor, ...]:
    a, c = leaves(a, c)
    x = ppmoe_ops.equilibrium_cell(a, c, None, activation, solver, 0.0, 0.0, 100)[0]
    return torch.autograd.grad(x, (a, c), grad)


@ACTIVATION
@DTYPE
def test_match_unrolling(dtype: torch.dtype, activation: str) -> None:
    for rows, r in ((37, 2), (300, 7), (40, 16), (24, 33)):
        a, c = cell(rows, r, 0.6, dtype)
        if activation.endswith("relu"):
            # No pre-activation so near the kink that a rounding changes its slope.
            a, c = a / 3, c + c.sign()
        grad = upstream(c)
        came = implicit(a, c, activation, grad, "anderson")
        exact = unrolled(a.double(), c.double(), activation, grad.double())
        for name, one, by_torch, wanted in zip(
            ("a", "c"), came, unrolled(a, c, activation, grad), exact, strict=True
        ):
            assert one.is_contiguous()
            assert_error_rule(one, by_torch, wanted, 3.0, f"{rows} rows of {r}: {name}")


@ACTIVATION
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck(solver: str, activation: str) -> None:
    for rows, r in ((3, 4), (9, 1), (2, 9)):
        a, c = leaves(*cell(rows, r, 0.8, torch.float64))

        def function(
            a: Tensor, c: Tensor, solver: str = solver, activation: str = activation
        ) -> Tensor:
            x: Tensor = ppmoe_ops.equilibrium_cell(a, c, None, activation, solver, 0.0, 1e-14, 200)[
                0
            ]
            return x

        assert torch.autograd.gradcheck(function, (a, c))


@DTYPE
@pytest.mark.parametrize("width", [64, 100, 200, 256])
def test_wide_cells(width: int, dtype: torch.dtype) -> None:
    """Against iteration: MKL's LU fails in poisoned memory."""
    a, c = cell(20, width, 0.7, dtype)
    x, _, residual = solve(a, c, None, "tanh", "anderson", 0.0, 1e-5, 60)
    grad = upstream(c)
    came = BACKWARD.overload(grad, a, c, x, residual, "tanh")

    def iterated(a: Tensor, c: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        turn = 1 - torch.tanh(x @ a.T + c) ** 2
        v = torch.zeros_like(grad)
        for _ in range(130):
            v = turn * (v @ a + grad)
        return v.T @ x, v

    exact = iterated(*(each.double() for each in (a, c, x, grad)))
    for one, by_torch, wanted in zip(came, iterated(a, c, x, grad), exact, strict=True):
        assert_error_rule(one, by_torch, wanted, 3.0)


def test_adjoints_that_iteration_does_not_settle() -> None:
    """act' a with eigenvalues of 3: only a direct solve has the gradient."""
    for width in (16, 130):
        a, c = cell(5, width, 3.0, torch.float64)
        x, residual = torch.randn_like(c), torch.zeros(5, dtype=torch.float64)
        grad = upstream(c)
        came = BACKWARD.overload(grad, a, c, x, residual, "leaky_relu")
        wanted = BACKWARD.reference(grad, a, c, x, residual, "leaky_relu")
        for one, other in zip(came, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * other.abs().max().item())


def test_pivots() -> None:
    """A diagonal of zeros: I - a with nothing on it but one."""
    turned = torch.eye(6, dtype=torch.float64) - torch.roll(torch.eye(6, dtype=torch.float64), 1, 0)
    a = turned.clone()
    c = torch.full((20, 6), 0.5, dtype=torch.float64)
    x, residual = torch.ones_like(c), torch.zeros(20, dtype=torch.float64)
    grad = torch.randn_like(c)
    came = BACKWARD.overload(grad, a, c + 5, x, residual, "relu")
    wanted = BACKWARD.reference(grad, a, c + 5, x, residual, "relu")
    for one, other in zip(came, wanted, strict=True):
        torch.testing.assert_close(one, other)
    # Newton on the same matrix: f(z) = a z + c where that is positive.
    x = solve(a, c, x, "leaky_relu", "newton", 0.0, 1e-12, 60)[0]
    again = torch.nn.functional.leaky_relu(x @ a.T + c)
    torch.testing.assert_close(again, x)


@DTYPE
def test_a_flagged_row_has_no_gradient(dtype: torch.dtype) -> None:
    a, c = cell(21, 5, 0.6, dtype)
    whole = implicit(a, c, "tanh", upstream(c), "anderson")[1]
    c[7, 2] = float("nan")
    a, c = leaves(a, c)
    x, _, residual = ppmoe_ops.equilibrium_cell(a, c, max_iter=100, rtol=0.0)
    assert residual[7].isinf()
    grads = torch.autograd.grad(x, (a, c), upstream(c))
    assert grads[0].isnan().all()
    assert grads[1][7].isnan().all()
    rest = torch.arange(21) != 7
    assert_same((grads[1][rest],), (whole[rest],))


def test_a_diverged_row_has_no_gradient_though_its_x_is_finite() -> None:
    a, c = leaves(torch.tensor([[1.5]]), torch.tensor([[1.0], [-1.0]]))
    x, _, residual = ppmoe_ops.equilibrium_cell(a, c, None, "relu", "fixed_point", max_iter=60)
    assert x.isfinite().all()
    assert residual.isinf().tolist() == [True, False]
    grads = torch.autograd.grad(x.sum(), (a, c))
    assert grads[0].isnan().all()
    assert grads[1].isnan().flatten().tolist() == [True, False]


def test_what_is_differentiable() -> None:
    a, c = leaves(*cell(4, 3))
    x0 = torch.zeros(4, 3, requires_grad=True)
    x, steps, residual = ppmoe_ops.equilibrium_cell(a, c, x0)
    assert x.requires_grad
    assert not steps.requires_grad
    assert not residual.requires_grad
    x.sum().backward()
    assert x0.grad is None
    both = (a.grad, c.grad)
    for at in range(2):
        pair = [each.detach().requires_grad_(at == i) for i, each in enumerate((a, c))]
        solve(*pair)[0].sum().backward()
        assert pair[1 - at].grad is None
        one, other = pair[at].grad, both[at]
        assert one is not None
        assert other is not None
        assert_same((one,), (other,))


def test_double_backward_is_refused() -> None:
    a, c = leaves(*cell(4, 3))
    x = ppmoe_ops.equilibrium_cell(a, c)[0]
    (grad,) = torch.autograd.grad(x.square().sum(), c, create_graph=True)
    with pytest.raises(RuntimeError, match="equilibrium_cell has no second derivative"):
        grad.sum().backward()


def test_no_rows_have_a_gradient_of_zero() -> None:
    a, c = leaves(torch.randn(4, 4), torch.zeros(0, 4))
    ppmoe_ops.equilibrium_cell(a, c)[0].sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad, torch.zeros(4, 4))


def test_many_rows_are_summed() -> None:
    """More rows than one part of the sum has."""
    a, c = cell(1000, 6, 0.6)
    came = implicit(a, c, "tanh", upstream(c), "anderson")
    exact = unrolled(a.double(), c.double(), "tanh", upstream(c).double())
    torch.testing.assert_close(came[0].double(), exact[0], rtol=1e-5, atol=1e-4)
