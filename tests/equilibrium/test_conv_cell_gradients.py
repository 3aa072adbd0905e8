"""`equilibrium_conv_cell`: gradients against finite differences and against unrolling."""

from __future__ import annotations

import math

import pytest
import torch
from conv_cell_problems import (
    ACTIVATIONS,
    BACKWARD,
    DTYPES,
    NAMES,
    SMOOTH,
    cell,
    dtype_name,
    plain_f,
    solve,
    unrolled,
)
from torch import Tensor

pytestmark = pytest.mark.kernel
TIGHT = {"rtol": 1e-13, "max_iter": 100}


def leaves(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.detach().clone().requires_grad_() for name, each in args.items()}


def gradients(z: Tensor, args: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    return dict(zip(NAMES, torch.autograd.grad(z, list(args.values()), grad), strict=True))


@pytest.mark.parametrize("solver", ["anderson", "fixed_point"])
@pytest.mark.parametrize("activation", SMOOTH)
def test_gradcheck(activation: str, solver: str) -> None:
    args = cell((2, 2, 3, 4), 3, 2, torch.float64)

    def f(*each: Tensor) -> Tensor:
        given = dict(zip(NAMES, each, strict=True))
        return solve(given, activation=activation, solver=solver, **TIGHT)[0]

    inputs = tuple(leaves(args).values())
    assert torch.autograd.gradcheck(f, inputs, fast_mode=solver == "fixed_point")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("sizes", "hidden", "channels"),
    [((2, 3, 6, 19), 8, 3), ((1, 8, 5, 3), 11, 2), ((1, 1, 61, 35), 16, 1)],
    ids=str,
)
def test_against_unrolling(
    sizes: tuple[int, int, int, int], hidden: int, channels: int, activation: str
) -> None:
    if hidden == 16 and activation != "tanh":
        return  # bands do not depend on the activation
    args = cell(sizes, hidden, channels, torch.float64)
    plain, ours = leaves(args), leaves(args)
    wanted = unrolled(plain, activation, 120)
    grad = torch.randn_like(wanted)
    z, _, residual = solve(ours, activation=activation, **TIGHT)
    assert (residual < 1e-9).all()
    torch.testing.assert_close(z, wanted, rtol=1e-8, atol=1e-8)
    expected = gradients(wanted, plain, grad)
    for name, came in gradients(z, ours, grad).items():
        torch.testing.assert_close(came, expected[name], rtol=1e-7, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_name)
def test_in_lower_precision(dtype: torch.dtype) -> None:
    args = cell((2, 3, 13, 18), 8, 3, dtype)
    exact = leaves({name: each.double() for name, each in args.items()})
    ours = leaves(args)
    grad = torch.randn(2, 3, 13, 18).to(dtype)
    wanted = gradients(solve(exact, **TIGHT)[0], exact, grad.double())
    came = gradients(solve(ours, rtol=1e-6, max_iter=60)[0], ours, grad)
    eps = torch.finfo(dtype).eps
    for name in NAMES:
        scale = wanted[name].abs().max()
        assert came[name].dtype == dtype
        error = (came[name].double() - wanted[name]).abs().max()
        assert error <= (8 * eps + 2e-5) * scale, f"{name}: {error / scale:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_the_adjoint_is_solved_to_its_own_tolerance(dtype: torch.dtype) -> None:
    # f at the point given is differentiated, however loose the forward solve was.
    args = cell((1, 2, 7, 9), 6, 2, dtype, gain=1.5)
    z = torch.randn(1, 2, 7, 9, dtype=dtype)
    grad = torch.randn(1, 2, 7, 9, dtype=dtype)
    residual = torch.zeros(1, dtype=dtype)
    inputs = (grad, *list(args.values())[:7], z, residual, "tanh")
    point, wide = z.double().requires_grad_(), leaves({n: e.double() for n, e in args.items()})
    value = plain_f(point, "tanh", **wide)
    v = grad.double()
    for _ in range(300):
        (v,) = torch.autograd.grad(value, point, v, retain_graph=True)
        v = v + grad
    wanted = gradients_at(value, wide, v)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for name, came in zip(NAMES, BACKWARD.overload(*inputs), strict=True):
        error = (came - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error <= tolerance, name
    loose = BACKWARD.overload(*inputs, rtol=0.5)
    assert (loose[0] - wanted["u"]).abs().max() > 1e-3 * wanted["u"].abs().max()
    for solver in ("anderson", "fixed_point"):
        one = BACKWARD.overload(*inputs, solver=solver, max_iter=1)
        (jv,) = torch.autograd.grad(value, point, grad.double(), retain_graph=True)
        first = gradients_at(value, wide, grad.double() + jv)
        for name, came in zip(NAMES, one, strict=True):
            torch.testing.assert_close(came.double(), first[name], rtol=1e-3, atol=1e-4, msg=name)


def gradients_at(value: Tensor, args: dict[str, Tensor], v: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(value, list(args.values()), v, retain_graph=True)
    return dict(zip(NAMES, grads, strict=True))


def test_an_adjoint_that_diverges_is_nan() -> None:
    # relu that multiplies by 3: the solve cannot converge, so a point is given that pretends to.
    one = torch.ones(1, 1)
    w2 = torch.zeros(1, 1, 3, 3)
    w2[0, 0, 1, 1] = 3
    zero = torch.zeros(1)
    u = torch.ones(2, 1, 2, 2)
    u[1] = -10  # relu is off: nothing flows back
    z = torch.ones(2, 1, 2, 2)
    grads = BACKWARD.overload(
        torch.ones_like(z), u, one, one, zero, w2, zero, one, z, torch.zeros(2), "relu",
        "fixed_point", max_iter=1000,
    )  # fmt: skip
    assert grads[0][0].isnan().all()
    assert torch.equal(grads[0][1], torch.zeros(1, 2, 2))
    for grad in grads[1:]:
        assert grad.isnan().all()


def test_the_start_has_no_gradient() -> None:
    args = cell((1, 2, 4, 5), 4, 2, torch.float64)
    z0 = torch.zeros(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    z, steps, residual = solve(leaves(args), z0=z0)
    assert not steps.requires_grad
    assert not residual.requires_grad
    assert torch.autograd.grad(z.sum(), z0, allow_unused=True) == (None,)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradient_that_is_asked_for(name: str) -> None:
    args = cell((2, 2, 4, 5), 4, 2)
    every = leaves(args)
    whole = gradients(solve(every)[0], every, torch.ones(2, 2, 4, 5))
    one = {**args, name: args[name].clone().requires_grad_()}
    solve(one)[0].backward(torch.ones(2, 2, 4, 5))
    grad = one[name].grad
    assert grad is not None
    assert torch.equal(grad, whole[name])


def test_double_backward_is_refused() -> None:
    args = leaves(cell((1, 2, 3, 4), 3, 2, torch.float64))
    (grad,) = torch.autograd.grad(solve(args)[0].sum(), args["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_gradients_of_an_image_that_diverged_are_nan() -> None:
    args = cell((2, 2, 3, 4), 3, 2)
    z = torch.zeros(2, 2, 3, 4)
    residual = torch.tensor([1e-4, math.inf])
    grads = BACKWARD.overload(z, *list(args.values())[:7], z, residual, "tanh")
    assert grads[0][0].isfinite().all()
    assert grads[0][1].isnan().all()
    assert all(each.isnan().all() for each in grads[1:])
