"""The solvers behind `run`: counts, masks, ends of a solve, and what today's solvers get wrong."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mix_problems import contraction, elementwise, solve
from torch import Tensor

from ppmoe_ops.ops.equilibrium.options import SOLVERS
from ppmoe_ops.ops.equilibrium.solvers import Solution

pytestmark = pytest.mark.kernel
SOLVER = pytest.mark.parametrize("solver", SOLVERS)


def assert_honest(f: Any, found: Solution) -> None:
    """What is reported is what f says at the point that is returned."""
    assert torch.equal(found.x, f(found.z, None))
    wide = found.residual.dtype
    r = torch.linalg.vector_norm(found.x.to(wide) - found.z.to(wide), dim=1)
    torch.testing.assert_close(found.residual, r)


# Evaluations of f at which torchdeq's Broyden and plain iteration were done: fp32, 16 samples of
# 768, |W|_2 = 0.95, the median of five seeds.
TABLE = {
    "abs 1e-2": ((1e-2, 0.0), 18, 38), "abs 1e-3": ((1e-3, 0.0), 27, 62),
    "abs 1e-4": ((1e-4, 0.0), 34, 86), "rel 1e-3": ((0.0, 1e-3), 21, 45),
    "rel 1e-4": ((0.0, 1e-4), 30, 69),
}  # fmt: skip


@pytest.fixture(scope="module")
def table() -> list[Callable[..., Tensor]]:
    problems = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(768, 768, generator=generator)
        weight = weight + weight.T
        # The largest singular value of such a matrix, by its own iteration.
        v = torch.ones(768)
        for _ in range(200):
            v = torch.nn.functional.normalize(weight @ v, dim=0)
        weight = weight * (0.95 / (weight @ v).norm())
        x = 0.1 * torch.randn(16, 768, generator=generator)
        problems.append(
            lambda z, index, weight=weight, x=x: torch.tanh(
                z @ weight + (x if index is None else x[index])
            )
        )
    return problems


@pytest.mark.parametrize("stop", TABLE)
def test_anderson_takes_the_fewest_evaluations(stop: str, table: list[Any]) -> None:
    (atol, rtol), broyden, plain = TABLE[stop]
    counts = []
    for f in table:
        found = solve(f, torch.zeros(16, 768), "anderson", atol=atol, rtol=rtol, max_iter=200)
        assert found.converged.all()
        counts.append(int(found.steps.max()))
    assert statistics.median(counts) < broyden
    assert max(counts) < plain


@pytest.mark.parametrize("solver", ["broyden", "newton_krylov"])
def test_other_solvers_take_fewer_evaluations_than_plain_iteration(
    solver: str, table: list[Any]
) -> None:
    for stop in ("rel 1e-3", "rel 1e-4"):
        (atol, rtol), _, plain = TABLE[stop]
        found = solve(table[0], torch.zeros(16, 768), solver, atol=atol, rtol=rtol, max_iter=200)
        assert found.converged.all()
        assert found.steps.max() < plain - 5


@SOLVER
@pytest.mark.parametrize("max_iter", [1, 2])
def test_one_or_two_evaluations(solver: str, max_iter: int) -> None:
    f = contraction(3, 12)
    found = solve(f, torch.zeros(3, 12), solver, max_iter=max_iter, rtol=0.0)
    assert found.steps.tolist() == [max_iter] * 3
    assert found.evaluations == max_iter
    assert not found.converged.any()
    assert_honest(f, found)
    if max_iter == 1:
        assert torch.equal(found.z, torch.zeros(3, 12))


@SOLVER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(solver: str, dtype: torch.dtype) -> None:
    f = contraction(4, 30, dtype=dtype)
    rtol = 8 * torch.finfo(dtype).eps
    found = solve(f, torch.zeros(4, 30, dtype=dtype), solver, rtol=rtol, max_iter=250)
    assert found.z.dtype == found.x.dtype == dtype
    assert found.residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.converged.all()
    assert_honest(f, found)


@SOLVER
def test_a_warm_start_takes_one_step(solver: str) -> None:
    f = contraction(3, 20)
    first = solve(f, torch.zeros(3, 20), solver, rtol=1e-4)
    again = solve(f, first.z, solver, rtol=1e-4)
    assert again.steps.tolist() == [1] * 3
    assert again.evaluations == 1
    assert torch.equal(again.z, first.z)
    assert torch.equal(again.x, first.x)


@SOLVER
@pytest.mark.parametrize("bounded", [False, True])
def test_nothing_to_solve(solver: str, bounded: bool) -> None:
    found = solve(lambda z, index: z, torch.zeros(0, 7), solver, bounded=bounded, max_iter=3)
    assert found.z.shape == found.x.shape == (0, 7)
    assert found.steps.shape == found.residual.shape == (0,)


def hard_sample(width: int = 40) -> tuple[Callable[[Tensor, Tensor | None], Tensor], list[int]]:
    """Eight linear maps, the last with radius 0.99; notes how many samples it was given."""
    slopes = torch.linspace(-1, 1, width) * torch.tensor([0.05] * 7 + [0.99])[:, None]
    x = torch.ones(8, width)
    given_samples: list[int] = []

    def f(z: Tensor, index: Tensor | None) -> Tensor:
        given_samples.append(len(z))
        slope, offset = (slopes, x) if index is None else (slopes[index], x[index])
        return slope * z + offset

    return f, given_samples


@SOLVER
def test_one_hard_sample_costs_its_own_evaluations(solver: str) -> None:
    f, given_samples = hard_sample()
    found = solve(f, torch.zeros(8, 40), solver, rtol=1e-5, max_iter=2000, compact=True)
    assert found.converged.all()
    assert found.steps[7] > found.steps[:7].max()
    assert sum(given_samples) <= 1.1 * int(found.steps.sum())
    assert found.evaluations == len(given_samples) >= int(found.steps.max())


@SOLVER
def test_a_sample_does_not_depend_on_its_batch(solver: str) -> None:
    f = elementwise(6, 50)
    options: dict[str, Any] = {"rtol": 1e-5, "max_iter": 300}
    whole = solve(f, torch.zeros(6, 50), solver, **options)
    some = solve(f, torch.zeros(6, 50), solver, compact=True, **options)
    assert whole.converged.all()
    assert len(set(whole.steps.tolist())) > 1
    assert torch.equal(whole.steps, some.steps) or solver in ("broyden", "newton_krylov")
    for at in range(6):
        index = torch.tensor([at])
        alone = solve(lambda z, _, index=index: f(z, index), torch.zeros(1, 50), solver, **options)
        if solver in ("fixed_point", "anderson"):
            for came in (whole, some):
                assert torch.equal(alone.z[0], came.z[at])
                assert torch.equal(alone.x[0], came.x[at])
                assert alone.steps[0] == came.steps[at]
        torch.testing.assert_close(alone.x[0], whole.x[at], atol=2e-4, rtol=2e-4)


@SOLVER
def test_divergence_and_nan_end_their_own_sample(solver: str) -> None:
    x = torch.ones(4, 6)

    def f(z: Tensor, index: Tensor | None) -> Tensor:
        x_of = x if index is None else x[index]
        which = torch.arange(4) if index is None else index
        value = 0.5 * torch.tanh(z) + x_of
        value = torch.where((which == 1)[:, None], torch.nan, value)
        # Leaves every bound, however a solver goes about it.
        return torch.where((which == 2)[:, None], z.abs() * z.abs() * 1e3 + 10, value)

    for compact in (False, True):
        found = solve(f, torch.zeros(4, 6), solver, rtol=1e-5, max_iter=60, compact=compact)
        assert found.converged.tolist() == [True, False, False, True]
        assert found.residual[1:3].tolist() == [torch.inf] * 2
        assert found.steps[1] == 1
        assert found.steps[2] < 20
        assert found.x[2].isfinite().all()
        assert found.x[1].isnan().all()
        assert found.evaluations < 60


@SOLVER
def test_no_fixed_point(solver: str) -> None:
    found = solve(lambda z, _: z + 1, torch.zeros(2, 3), solver, max_iter=12)
    assert not found.converged.any()
    # Every residual is the same, so the first point is the best.
    if found.residual.isfinite().all():
        assert torch.equal(found.residual, torch.full((2,), 3.0).sqrt())
    assert torch.equal(found.z, torch.zeros(2, 3))
    assert torch.equal(found.x, torch.ones(2, 3))


@SOLVER
def test_several_fixed_points(solver: str) -> None:
    z0 = torch.tensor([[0.5], [-0.5], [0.0]])
    found = solve(lambda z, _: torch.tanh(2 * z), z0, solver, rtol=1e-6, max_iter=100)
    assert found.converged.all()
    torch.testing.assert_close(found.x[:, 0].abs(), torch.tensor([0.95750, 0.95750, 0.0]))
    assert (found.x[:2, 0].sign() == torch.tensor([1.0, -1.0])).all()


@SOLVER
@pytest.mark.parametrize("radius", [0.99, 1.01])
def test_a_spectral_radius_near_one(solver: str, radius: float) -> None:
    slope = radius * torch.tensor([1.0, -0.5, 0.3, 0.1], dtype=torch.float64)

    def f(z: Tensor, index: Tensor | None) -> Tensor:
        return slope * z + 1

    z0 = torch.zeros(2, 4, dtype=torch.float64)
    found = solve(f, z0, solver, rtol=1e-9, max_iter=60)
    if solver == "fixed_point":
        assert not found.converged.any()
        assert found.steps.tolist() == [60, 60]
        assert_honest(f, found)
    else:
        assert found.converged.all()
        torch.testing.assert_close(found.x, (1 / (1 - slope)).expand(2, 4), rtol=1e-5, atol=1e-8)
        assert found.steps.max() < 50


@SOLVER
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_steps_do_not_depend_on_the_scale(solver: str, scale: float) -> None:
    f = contraction(4, 60)
    options: dict[str, Any] = {"rtol": 1e-4, "max_iter": 200}
    found = solve(f, torch.zeros(4, 60), solver, **options)
    scaled = solve(lambda z, _: scale * f(z / scale, None), torch.zeros(4, 60), solver, **options)
    assert torch.equal(scaled.steps, found.steps)
    torch.testing.assert_close(scaled.x / scale, found.x, atol=1e-5, rtol=1e-4)
