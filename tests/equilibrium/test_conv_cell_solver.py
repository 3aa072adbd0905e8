"""`equilibrium_conv_cell`: when images stop, what they return, and that they stay by themselves."""

from __future__ import annotations

import math

import pytest
import torch
from conv_cell_problems import DTYPES, OP, cell, dtype_name, norm, plain_f, same_bits, solve
from torch import Tensor

pytestmark = pytest.mark.kernel
SOLVER = pytest.mark.parametrize("solver", ["fixed_point", "anderson"])


def with_grads(args: dict[str, Tensor], **options: object) -> list[Tensor]:
    leaves = {name: each.detach().requires_grad_() for name, each in args.items()}
    z, steps, residual = solve(leaves, **options)
    grads = torch.autograd.grad(z, list(leaves.values()), torch.ones_like(z))
    return [z.detach(), steps, residual, *grads]


@pytest.mark.parametrize("sizes", [(5, 3, 7, 9), (2, 3, 70, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bits_do_not_depend_on_threads(
    dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> None:
    args = cell(sizes, 24, 3, dtype)
    torch.set_num_threads(1)
    wanted = with_grads(args)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for came, one in zip(with_grads(args), wanted, strict=True):
            assert torch.equal(came, one), threads


@SOLVER
@pytest.mark.parametrize("sizes", [(4, 3, 7, 9), (3, 3, 70, 40)], ids=str)
def test_an_image_does_not_depend_on_its_batch(
    sizes: tuple[int, int, int, int], solver: str
) -> None:
    args = cell(sizes, 24, 2)
    args["u"] *= torch.tensor([0.01, 1e3, 1.0, 4.0])[: sizes[0], None, None, None]
    z, steps, residual = solve(args, solver=solver)
    assert len(set(steps.tolist())) > 1
    grad_u = with_grads(args, solver=solver)[3]
    for image in range(sizes[0]):
        own = {**args, "u": args["u"][image : image + 1]}
        alone = with_grads(own, solver=solver)
        assert torch.equal(alone[0][0], z[image])
        assert alone[1] == steps[image]
        assert alone[2] == residual[image]
        assert torch.equal(alone[3][0], grad_u[image])


@SOLVER
def test_a_warm_start_saves_steps(solver: str) -> None:
    args = cell((2, 3, 8, 11), 8, 3)
    z, cold, _ = solve(args, solver=solver)
    again, steps, residual = solve(args, z0=z, solver=solver)
    assert steps.tolist() == [1, 1]
    assert (cold > 2).all()
    assert (residual <= 1e-3 * norm(again)).all()
    near = {**args, "u": args["u"] + 0.01}
    assert (solve(near, z0=z, solver=solver)[1] < cold).all()


def test_a_start_belongs_to_its_image() -> None:
    args = cell((3, 2, 5, 20), 4, 3)
    z0 = torch.randn(3, 3, 5, 20)
    z, _, residual = solve(args, z0=z0, max_iter=1)
    wanted = plain_f(z0, "tanh", **args)
    torch.testing.assert_close(z, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(residual.double(), norm(wanted - z0), rtol=1e-5, atol=0.0)


@SOLVER
def test_tolerances_add_up(solver: str) -> None:
    args = cell((1, 3, 8, 9), 8, 3, torch.float64)
    for atol, rtol in ((0.0, 1e-2), (1e-2, 0.0), (0.3, 1e-3), (0.0, 1e-8)):
        z, steps, residual = solve(args, solver=solver, atol=atol, rtol=rtol, max_iter=100)
        assert residual <= atol + rtol * norm(z)
        if steps > 1:
            before = solve(args, solver=solver, rtol=0.0, max_iter=int(steps) - 1)
            assert before[2] > atol + rtol * norm(before[0])


def test_anderson_needs_fewer_evaluations() -> None:
    args = cell((2, 3, 16, 16), 8, 3, torch.float64, gain=4.0)
    options = {"rtol": 1e-8, "max_iter": 500}
    plain = solve(args, solver="fixed_point", **options)
    mixed = solve(args, solver="anderson", **options)
    torch.testing.assert_close(plain[0], mixed[0], rtol=1e-6, atol=1e-6)
    assert (mixed[1] * 2 < plain[1]).all()


def test_the_best_iterate_is_returned() -> None:
    # Far from a contraction the residual goes up and down: the smallest one counts.
    args = cell((1, 3, 9, 12), 8, 3, torch.float64, gain=9.0)
    best = math.inf
    for max_iter in range(1, 25):
        z, steps, residual = solve(args, rtol=0.0, max_iter=max_iter)
        assert steps == max_iter
        assert residual <= best
        best = min(best, float(residual))
    wanted = OP.reference(*args.values(), rtol=0.0, max_iter=24)
    torch.testing.assert_close(z, wanted[0], rtol=1e-4, atol=1e-4)


@SOLVER
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_cell_without_a_fixed_point_ends(dtype: torch.dtype, solver: str) -> None:
    args = cell((2, 2, 6, 7), 6, 2, dtype, gain=8.0)
    args["u"][1] *= 0  # relu with biases that drive it: grows without bound
    for name in ("w1", "w2", "w3", "b1", "b2", "b3"):
        args[name] = args[name].abs()
    z, steps, residual = solve(args, activation="relu", solver="fixed_point", max_iter=2000)
    assert residual.tolist() == [math.inf, math.inf]
    assert (steps < 100).all()
    assert z.isfinite().all() or dtype == torch.float16
    wanted = OP.reference(*args.values(), activation="relu", solver="fixed_point", max_iter=2000)
    assert torch.equal(steps, wanted[1])
    # With Anderson's method it ends too, whatever it finds.
    _, steps, residual = solve(args, activation="relu", solver=solver, max_iter=60)
    assert (steps <= 60).all()
    assert not residual.isnan().any()


@SOLVER
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sizes", [(3, 2, 6, 7), (3, 2, 70, 40)], ids=str)
def test_a_bad_image_is_flagged_alone_and_early(
    sizes: tuple[int, int, int, int], bad: float, solver: str
) -> None:
    args = cell(sizes, 20, 2)
    wanted = with_grads(args, solver=solver, activation="gelu")
    args["u"][1, 0, 3, 4] = bad
    came = with_grads(args, solver=solver, activation="gelu")
    z, steps, residual = came[:3]
    others = [0, 2]
    assert residual[1] == math.inf
    assert steps[1] == 1
    assert not z[1].isfinite().all()
    for at in range(3):
        assert torch.equal(came[at][others], wanted[at][others])
    assert torch.equal(came[3][others], wanted[3][others])
    assert came[3][1].isnan().all()
    for grad in came[4:]:
        assert grad.isnan().all()


def test_a_bad_start_is_flagged() -> None:
    args = cell((2, 2, 4, 5), 4, 2)
    z0 = torch.zeros(2, 2, 4, 5)
    z0[0, 1, 2, 2] = math.nan
    came = solve(args, z0=z0)
    wanted = OP.reference(*args.values(), z0=z0)
    assert came[2][0] == wanted[2][0] == math.inf
    assert came[2][1] < 1
    assert torch.equal(came[1], wanted[1])
    assert same_bits(came[0].isnan(), wanted[0].isnan())


def one_pixel(radius: float) -> tuple[Tensor, ...]:
    """relu on its linear side: f(z) = radius (z + 1)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    w2 = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    w2[0, 0, 1, 1] = radius
    zero = torch.zeros(1, dtype=torch.float64)
    return one[:, :, None, None], one, one, zero, w2, zero, one, zero


def test_the_best_iterate_need_not_be_the_last() -> None:
    options = {"activation": "relu", "solver": "fixed_point"}
    first = OP.overload(*one_pixel(1.2), **options, max_iter=1)
    z, steps, residual = OP.overload(*one_pixel(1.2), **options, max_iter=6)
    assert steps == 6
    assert torch.equal(z, first[0])
    assert torch.equal(residual, first[2])


@pytest.mark.parametrize("radius", [0.9, 0.99, 1.01, 1.2])
def test_near_a_spectral_radius_of_one(radius: float) -> None:
    args = one_pixel(radius)
    options = {"activation": "relu", "rtol": 1e-9, "max_iter": 300}
    z, steps, residual = OP.overload(*args, solver="fixed_point", **options)
    if radius < 1:
        assert steps == 300 or residual <= 1e-9 * z.norm()
    else:
        assert residual > 1e-3
        assert residual == math.inf or steps == 300
    mixed, steps, _ = OP.overload(*args, **options)
    if radius < 1:
        torch.testing.assert_close(mixed.sum().item(), radius / (1 - radius), rtol=1e-6, atol=0.0)
        assert steps <= 5
