"""`equilibrium_conv_cell`: values against the reference and against torch's convolutions."""

from __future__ import annotations

import pytest
import torch
from conv_cell_problems import (
    ACTIVATIONS,
    BACKWARD,
    DTYPES,
    NAMES,
    OP,
    cell,
    dtype_name,
    norm,
    plain_f,
    solve,
)
from torch import Tensor

import ppmoe_ops

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

# Sizes of u, r and C.
SIZES: dict[str, tuple[tuple[int, int, int, int], int, int]] = {
    "one_pixel": ((2, 1, 1, 1), 1, 1),
    "one_row": ((1, 2, 1, 19), 3, 2),
    "one_column": ((1, 3, 23, 1), 5, 1),
    "prime": ((2, 3, 7, 13), 8, 3),
    "a_vector": ((1, 1, 3, 16), 4, 2),
    "past_a_vector": ((1, 5, 2, 17), 9, 5),
    "past_two_vectors": ((1, 3, 5, 33), 16, 4),
    "odd_hidden": ((2, 4, 6, 6), 33, 3),
    "many_inputs": ((1, 11, 4, 9), 7, 3),
    "many_channels": ((1, 2, 5, 4), 6, 13),
    "bands": ((2, 3, 61, 35), 23, 3),
}


def assert_near(came: Tensor, wanted: Tensor, dtype: torch.dtype, what: str, factor: float) -> None:
    scale = wanted.double().abs().max().clamp(min=1e-3)
    error = (came.double() - wanted.double()).abs().max() / scale
    assert error <= factor * TOLERANCE[dtype], f"{what}: {error:.2e}"


def check(args: dict[str, Tensor], activation: str, **options: object) -> None:
    """Kernel against reference, forward and backward."""
    dtype = args["u"].dtype
    came = solve(args, activation=activation, **options)
    wanted = OP.reference(*args.values(), activation=activation, **options)
    assert came[0].is_contiguous()
    assert came[0].dtype == dtype
    assert torch.equal(came[1], wanted[1])
    assert_near(came[0], wanted[0], dtype, "z", 1)
    # A residual is a difference: its error is that of the values, not of itself.
    assert came[2].dtype == wanted[2].dtype
    close = TOLERANCE[dtype if dtype == torch.float64 else torch.float32] * norm(wanted[0])
    assert ((came[2] - wanted[2]).abs() <= close).all()
    grad = torch.randn_like(wanted[0].double()).to(dtype)
    inputs = (grad, *list(args.values())[:7], wanted[0], wanted[2], activation)
    for name, one, other in zip(
        NAMES, BACKWARD.overload(*inputs), BACKWARD.reference(*inputs), strict=True
    ):
        assert one.is_contiguous()
        assert_near(one, other, dtype, name, 10)


@DTYPE
@pytest.mark.parametrize("name", SIZES)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    check(cell(*SIZES[name], dtype), "silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("solver", ["fixed_point", "anderson"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_solvers(activation: str, solver: str, dtype: torch.dtype) -> None:
    # A slope that jumps differs where rounding decides on the side: float64 alone is checked.
    if activation in ("relu", "leaky_relu"):
        dtype = torch.float64
    check(cell((2, 3, 9, 21), 8, 3, dtype), activation, solver=solver, rtol=1e-4)


@DTYPE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_a_fixed_point(activation: str, dtype: torch.dtype) -> None:
    args = cell((2, 3, 11, 18), 8, 2, dtype)
    z, steps, residual = solve(args, activation=activation, rtol=1e-5, max_iter=200)
    wide = {name: each.double() for name, each in args.items()}
    size = norm(plain_f(z.double(), activation, **wide) - z)
    eps = torch.finfo(dtype).eps
    assert (size <= (1e-5 + 2 * eps) * norm(z)).all()
    assert (residual <= 1.001e-5 * norm(z)).all()
    assert (steps < 40).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("max_iter", [1, 2, 3])
def test_the_residual_is_honest(max_iter: int, dtype: torch.dtype) -> None:
    # The residual belongs to the point before: z = f(point).
    args = cell((2, 3, 8, 10), 8, 3, dtype)
    points = [torch.zeros(2, 3, 8, 10, dtype=dtype)]
    for _ in range(max_iter):
        points.append(plain_f(points[-1], "tanh", **args))
    z, steps, residual = solve(args, solver="fixed_point", rtol=0.0, max_iter=max_iter)
    tolerance = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(z, points[-1], rtol=tolerance, atol=tolerance)
    wanted = norm(points[-1] - points[-2]).to(residual.dtype)
    torch.testing.assert_close(residual, wanted, rtol=1e-4, atol=0.0)
    assert steps.tolist() == [max_iter] * 2


def test_parameters_reach_the_result() -> None:
    # Each argument on its own changes the solution, at a rate that f's own derivative predicts.
    args = cell((1, 2, 5, 6), 4, 2, torch.float64)
    z = solve(args, rtol=1e-13, max_iter=100)[0]
    for name in NAMES:
        other = {**args, name: args[name] + 0.1}
        moved = solve(other, rtol=1e-13, max_iter=100)[0]
        assert norm(moved - z) > 1e-3
        assert norm(plain_f(moved, "tanh", **other) - moved) < 1e-11


def test_the_public_function() -> None:
    args = cell((2, 3, 6, 7), 4, 3, torch.float64)
    came = ppmoe_ops.equilibrium_conv_cell(**args, activation="gelu", solver="fixed_point")
    for one, other in zip(came, solve(args, activation="gelu", solver="fixed_point"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_maps(sizes: tuple[int, int, int, int]) -> None:
    args = {name: each.requires_grad_() for name, each in cell(sizes, 4, 2).items()}
    z, steps, residual = solve(args)
    assert z.shape == (sizes[0], 2, *sizes[2:])
    assert steps.tolist() == [1] * sizes[0]
    assert residual.tolist() == [0.0] * sizes[0]
    for name, grad in zip(NAMES, torch.autograd.grad(z.sum(), list(args.values())), strict=True):
        assert torch.equal(grad, torch.zeros_like(args[name])), name
