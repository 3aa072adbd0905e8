"""`equilibrium_cell`: values, steps and residuals."""

from __future__ import annotations

import pytest
import torch
from cell_problems import (
    ACTIVATIONS,
    DTYPES,
    FORWARD,
    NEWTON_OR_MIXING,
    SOLVERS,
    assert_same,
    cell,
    dtype_name,
    image,
    plain,
    same,
    solve,
)

import ppmoe_ops
from ppmoe_ops.testing import assert_error_rule

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
SOLVER = pytest.mark.parametrize("solver", SOLVERS)

SIZES = ((49, 1), (65, 3), (99, 16), (40, 33))


@SOLVER
@ACTIVATION
@DTYPE
def test_values(dtype: torch.dtype, activation: str, solver: str) -> None:
    for rows, r in SIZES:
        a, c = cell(rows, r, 0.7, dtype)
        x, steps, residual = solve(a, c, None, activation, solver, 0.0, 0.0, 160)
        exact = plain(a.double(), c.double(), activation, 160)
        assert_error_rule(x, plain(a, c, activation, 160), exact, name=f"{rows} rows of {r}")
        assert x.is_contiguous()
        assert steps.dtype == torch.int32
        assert residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@SOLVER
@ACTIVATION
@DTYPE
def test_matches_the_reference(dtype: torch.dtype, activation: str, solver: str) -> None:
    for rtol in (1e-2, 1e-4):
        for rows, r in ((33, 16), (18, 41), (50, 7)):
            a, c = cell(rows, r, 0.8, dtype)
            start = cell(rows, r, dtype=dtype, seed=1)[1]
            args = (a, c, start, activation, solver, 0.0, rtol, 40)
            came, wanted = solve(*args), FORWARD.reference(*args)
            off = (came[1] - wanted[1]).abs()
            assert int(off.max()) <= 1
            assert int(off.count_nonzero()) <= 1 + rows // 8
            wide = wanted[0].double()
            near = 4 * rtol + 2 * torch.finfo(dtype).eps
            assert (came[0].double() - wide).norm() <= near * wide.norm()
            even = off == 0
            torch.testing.assert_close(came[2][even], wanted[2][even], rtol=0.05, atol=2e-6)


@SOLVER
def test_residual_is_that_of_the_point_before(solver: str) -> None:
    """tanh can be undone, so that x = f(z) tells z."""
    a, c = cell(9, 6, 0.9, torch.float64)
    for rtol in (1e-1, 1e-3, 1e-6):
        x, steps, residual = solve(a, c, None, "tanh", solver, 0.0, rtol, 100)
        z = torch.linalg.solve(a, (torch.atanh(x) - c).T).T
        torch.testing.assert_close(residual, (x - z).norm(dim=1), rtol=1e-6, atol=1e-12)
        assert (residual <= rtol * x.norm(dim=1)).all()
        assert (steps > 1).all()


@SOLVER
def test_both_tolerances(solver: str) -> None:
    a, c = cell(30, 8, 0.9)
    absolute = solve(a, c, None, "tanh", solver, 0.05, 0.0, 100)
    assert (absolute[2] <= 0.05).all()
    both = solve(a, c, None, "tanh", solver, 0.05, 0.1, 100)
    assert (both[2] <= 0.05 + 0.1 * both[0].norm(dim=1)).all()
    assert both[1].sum() < absolute[1].sum()
    assert (both[2] > 0.05).any()


@SOLVER
def test_one_evaluation_and_two(solver: str) -> None:
    a, c = cell(19, 5, 0.9)
    start = torch.randn(19, 5)
    once = image(a, c, start, "tanh")
    x, steps, residual = solve(a, c, start, "tanh", solver, 0.0, 1e-9, 1)
    torch.testing.assert_close(x, once)
    torch.testing.assert_close(residual, (once - start).norm(dim=1))
    assert (steps == 1).all()
    x, steps, residual = solve(a, c, start, "tanh", solver, 0.0, 1e-9, 2)
    assert (steps == 2).all()
    assert (residual <= (once - start).norm(dim=1)).all()
    if solver != "newton":
        twice = image(a, c, once, "tanh")
        better = (twice - once).norm(dim=1) < (once - start).norm(dim=1)
        torch.testing.assert_close(x, torch.where(better[:, None], twice, once))


@SOLVER
@DTYPE
def test_warm_start_takes_one_step(dtype: torch.dtype, solver: str) -> None:
    a, c = cell(21, 12, 0.8, dtype)
    rtol = max(1e-4, 4 * torch.finfo(dtype).eps)
    x = solve(a, c, None, "tanh", solver, 0.0, rtol / 4, 50)[0]
    again, steps, residual = solve(a, c, x, "tanh", solver, 0.0, rtol, 50)
    assert (steps == 1).all()
    near = 2 * torch.finfo(dtype).eps + rtol
    torch.testing.assert_close(again, x, rtol=near, atol=near)
    assert (residual <= rtol * x.float().norm(dim=1)).all()


@pytest.mark.parametrize("width", [1, 2, 5, 8, 15, 100, 256])
@pytest.mark.parametrize("solver", NEWTON_OR_MIXING)
def test_widths(solver: str, width: int) -> None:
    rows = 18 if width < 100 else 3
    a, c = cell(rows, width, 0.8)
    x, steps, _ = solve(a, c, None, "silu", solver, 0.0, 1e-5, 50)
    exact = plain(a.double(), c.double(), "silu")
    assert (x - exact).norm(dim=1).max() < 1e-4 * exact.norm(dim=1).max()
    assert (steps < 15).all()


def test_no_rows() -> None:
    x, steps, residual = ppmoe_ops.equilibrium_cell(torch.randn(4, 4), torch.zeros(0, 4))
    assert x.shape == (0, 4)
    assert steps.shape == residual.shape == (0,)


@SOLVER
def test_a_cell_without_a_fixed_point(solver: str) -> None:
    """x = relu(1.5 x + 1) grows for ever."""
    a, c = torch.tensor([[1.5]]), torch.tensor([[1.0], [-1.0], [1.0]])
    x, steps, residual = solve(a, c, None, "relu", solver, 0.0, 1e-4, 60)
    assert (residual[[0, 2]] > 1e-4 * x[[0, 2], 0]).all()
    assert x[1] == residual[1] == 0
    assert steps[1] == 1
    if solver == "fixed_point":
        # A residual of 1.5^k is beyond 1e4 after 23 steps, and the first one was the best.
        assert residual[[0, 2]].isinf().all()
        assert (steps[[0, 2]] == 24).all()
        assert (x[[0, 2]] == 1).all()


def test_the_best_point_is_kept() -> None:
    """Plain iteration of tanh(-3 x) leaves the root for a cycle: its first point is its best."""
    a, c, start = torch.tensor([[-3.0]]), torch.zeros(2, 1), torch.tensor([[0.01], [0.02]])
    x, steps, residual = solve(a, c, start, "tanh", "fixed_point", 0.0, 1e-6, 30)
    assert (steps == 30).all()
    torch.testing.assert_close(x, torch.tanh(-3 * start))
    torch.testing.assert_close(residual, (x - start).abs()[:, 0])


@SOLVER
def test_several_fixed_points(solver: str) -> None:
    a, c = torch.tensor([[2.0]]), torch.zeros(3, 1)
    start = torch.tensor([[0.7], [-0.7], [0.0]])
    x, steps, _ = solve(a, c, start, "tanh", solver, 0.0, 1e-6, 100)
    root = 0.95750402
    torch.testing.assert_close(x, torch.tensor([[root], [-root], [0.0]]))
    assert steps[2] == 1


@pytest.mark.parametrize("radius", [0.99, 1.01])
def test_spectral_radius_about_one(radius: float) -> None:
    a, c = cell(40, 12, 1.0, torch.float64)
    a = (a + a.T) / 2
    a = a * (radius / torch.linalg.eigvalsh(a).abs().max())
    x, _, residual = solve(a, c, None, "leaky_relu", "newton", 0.0, 1e-9, 60)
    found = residual <= 1e-9 * x.norm(dim=1)
    torch.testing.assert_close(x[found], image(a, c, x, "leaky_relu")[found], rtol=1e-8, atol=1e-8)
    assert found.float().mean() > 0.99
    mixed = solve(a, c, None, "leaky_relu", "anderson", 0.0, 1e-4, 100)
    if radius < 1:
        assert (mixed[2] <= 1e-4 * mixed[0].norm(dim=1)).all()
        many = solve(a, c, None, "leaky_relu", "fixed_point", 0.0, 1e-4, 1000)
        assert mixed[1].sum() < many[1].sum() / 2


def test_newton_halves_its_step() -> None:
    """f(z) - z for tanh(8 z - 4) turns so sharply that a whole step overshoots."""
    a, c = torch.tensor([[-8.0]]), torch.tensor([[4.0]])
    x, steps, residual = solve(a, c, torch.tensor([[1.0]]), "tanh", "newton", 0.0, 1e-6, 60)
    torch.testing.assert_close(x, image(a, c, x, "tanh"), rtol=1e-4, atol=1e-5)
    assert residual <= 1e-6 * x.abs()
    wanted = FORWARD.reference(a, c, torch.tensor([[1.0]]), "tanh", "newton", 0.0, 1e-6, 60)
    assert abs(int(steps) - int(wanted[1])) <= 1


@SOLVER
@DTYPE
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_flags_its_row_alone(
    value: float, dtype: torch.dtype, solver: str
) -> None:
    a, c = cell(37, 11, 0.8, dtype)
    start = torch.zeros_like(c)
    wanted = solve(a, c, start, "leaky_relu", solver, 0.0, 1e-3, 30)
    bad = torch.zeros(37, dtype=torch.bool)
    bad[[3, 20]] = True
    c[3, 5] = value
    start[20, 10] = value
    x, steps, residual = solve(a, c, start, "leaky_relu", solver, 0.0, 1e-3, 30)
    assert residual[bad].isinf().all()
    assert (steps[bad] == 1).all()
    assert not x[bad].isfinite().all(1).any()
    assert_same((x[~bad], steps[~bad], residual[~bad]), tuple(each[~bad] for each in wanted))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e12, 1e30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_does_not_matter(solver: str, scale: float) -> None:
    """leaky_relu commutes with positive factors; squares of these norms do not fit float32."""
    a, c = cell(25, 9, 0.8)
    power = 2.0 ** round(torch.tensor(scale).log2().item())
    one = solve(a, c, None, "leaky_relu", solver, 0.0, 1e-4, 50)
    other = solve(a, c * power, None, "leaky_relu", solver, 0.0, 1e-4, 50)
    assert same(other[0], one[0] * power)
    assert torch.equal(other[1], one[1])
    torch.testing.assert_close(other[2], one[2] * power)


def test_a_far_start_does_not_end_a_row() -> None:
    a, c = cell(20, 6, 0.5)
    start = torch.full_like(c, 1e25)
    x, _, residual = solve(a, c, start, "tanh", "fixed_point", 0.0, 1e-5, 60)
    torch.testing.assert_close(x, plain(a, c), rtol=1e-4, atol=1e-5)
    assert (residual <= 1e-5 * x.norm(dim=1)).all()


def test_tanh_near_zero_and_far_from_it() -> None:
    c = torch.cat([torch.logspace(-38, 2, 2000), -torch.logspace(-38, 2, 2000)])[:, None]
    for dtype in (torch.float32, torch.float64):
        x = solve(torch.zeros(1, 1).to(dtype), c.to(dtype), None, "tanh", "fixed_point")[0]
        exact = torch.tanh(c.to(dtype).double())
        assert ((x - exact).abs() <= 3 * torch.finfo(dtype).eps * exact.abs()).all()
        assert (x.abs() <= 1).all()
