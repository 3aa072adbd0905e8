"""Every backward mode of `equilibrium` against unrolling, and against its formula done densely."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import warnings
from typing import Any

import pytest
import torch
from equilibrium_problems import (
    EXACT,
    Layer,
    assert_all_close,
    exact_adjoint,
    iterated,
    unrolled_gradients,
)
from torch import Tensor

import ppmoe_ops
from ppmoe_ops import EquilibriumWarning, SolverOptions, equilibrium
from ppmoe_ops.ops.equilibrium.solvers import run

pytestmark = pytest.mark.kernel

SOLVERS = ("fixed_point", "anderson", "broyden", "newton_krylov")
TIGHT = SolverOptions(rtol=1e-13, max_iter=200)


@pytest.mark.parametrize("solver", SOLVERS)
def test_ift_is_unrolling(solver: str) -> None:
    layer = Layer()
    x, info = equilibrium(layer, layer.start, solver=solver, backward_options=TIGHT, **EXACT)
    assert info.converged.all()
    assert info.backward is None
    assert_all_close(layer.gradients(x), unrolled_gradients(layer), 1e-8)
    torch.testing.assert_close(x, iterated(layer, layer.start), atol=1e-10, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_ift_with_any_backward_solver(solver: str) -> None:
    layer = Layer()
    asked = SolverOptions(solver=solver, rtol=1e-12, max_iter=200, history=9)
    x, info = equilibrium(layer, layer.start, backward_options=asked, **EXACT)
    came = layer.gradients(x)
    assert_all_close(came, unrolled_gradients(layer), 1e-8)
    assert info.backward is not None
    assert info.backward.converged.all()
    assert info.backward.steps.shape == (4,)
    assert 2 < info.backward.evaluations <= 200
    assert (info.backward.residual < 1e-10).all()


def test_ift_solves_the_adjoint_at_the_returned_point() -> None:
    """Dense algebra at a point that is no solution at all: one evaluation."""
    layer = Layer()
    x, info = equilibrium(layer, layer.start, max_iter=1, warn=False, backward_options=TIGHT)
    torch.testing.assert_close(x, layer(layer.start))
    assert info.steps.tolist() == [1] * 4
    wanted = layer.pulled(layer.start, exact_adjoint(layer, layer.start))
    assert_all_close(layer.gradients(x), wanted, 1e-10)


def test_jfb_is_one_step() -> None:
    layer = Layer()
    x, info = equilibrium(layer, layer.start, backward="jfb", **EXACT)
    z = iterated(layer, layer.start).detach()
    assert_all_close(layer.gradients(x), layer.pulled(z, layer.grad), 1e-10)
    assert info.backward is None


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (5, 0.5), (3, 0.7), (40, 1.0)])
def test_phantom_is_a_damped_neumann_sum(steps: int, damping: float) -> None:
    layer = Layer()
    x, _ = equilibrium(
        layer,
        layer.start,
        backward="phantom",
        phantom_steps=steps,
        phantom_damping=damping,
        **EXACT,
    )
    z = iterated(layer, layer.start).detach()
    eye = torch.eye(5, dtype=torch.float64)
    step = damping * layer.jacobians(z).transpose(1, 2) + (1 - damping) * eye
    term, total = layer.grad[:, :, None], torch.zeros(4, 5, 1, dtype=torch.float64)
    for _ in range(steps):
        total, term = total + damping * term, step @ term
    assert_all_close(layer.gradients(x), layer.pulled(z, total[:, :, 0]), 1e-9)
    torch.testing.assert_close(x, z, atol=1e-10, rtol=0)


def test_shine_uses_what_broyden_learnt() -> None:
    layer = Layer()
    options = SolverOptions("broyden", 0.0, 1e-9, 50, 12)
    x, _ = equilibrium(
        layer, layer.start, solver="broyden", rtol=1e-9, history=12, backward="shine"
    )
    with torch.no_grad():
        solution = run(lambda z, index: layer(z), layer.start, options)
    secant = solution.secant
    assert secant is not None
    eye = torch.eye(5, dtype=torch.float64).expand(4, 5, 5)
    inverse = eye + torch.einsum("bli,blj->bij", secant.u.double(), secant.v.double())
    w = torch.einsum("bij,bi->bj", inverse, layer.grad)
    came = layer.gradients(x)
    assert_all_close(came, layer.pulled(solution.z, w), 1e-9)
    # A far better direction than jfb's, though no backward solve has run.
    exact = unrolled_gradients(layer)
    one_step = layer.pulled(solution.z, layer.grad)
    for mine, true, plain in zip(came, exact, one_step, strict=True):
        assert (mine - true).norm() < 0.5 * (plain - true).norm()


def test_unroll_is_unrolling() -> None:
    layer = Layer()
    start = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"solver": "fixed_point", "damping": 0.8, "max_iter": 7}
    x, info = equilibrium(layer, start, backward="unroll", rtol=0.0, warn=False, **options)
    z = start
    for _ in range(6):
        z = z + 0.8 * (layer(z) - z)
    wanted = layer(z)
    torch.testing.assert_close(x, wanted)
    leaves = [layer.weight, layer.u, start]
    came = torch.autograd.grad(x, leaves, layer.grad)
    assert_all_close(came, torch.autograd.grad(wanted, leaves, layer.grad), 1e-12)
    assert info.steps.tolist() == [7] * 4
    assert info.evaluations == 7
    torch.testing.assert_close(info.residual, (wanted - z).norm(dim=1).detach())


def test_unroll_stops_every_sample_for_itself() -> None:
    rate = torch.tensor([[0.0], [0.5], [0.9]], dtype=torch.float64)
    start = torch.ones(3, 1, dtype=torch.float64)
    x, info = equilibrium(
        lambda z: rate * z + 1,
        start,
        solver="fixed_point",
        backward="unroll",
        rtol=1e-3,
        keep_trace=True,
        max_iter=200,
    )
    alone = [
        equilibrium(
            lambda z, each=each: rate[each] * z + 1,
            start[each],
            solver="fixed_point",
            backward="unroll",
            rtol=1e-3,
            max_iter=200,
        )
        for each in ([0], [1], [2])
    ]
    assert torch.equal(x, torch.cat([each for each, _ in alone]))
    assert torch.equal(info.steps, torch.cat([each.steps for _, each in alone]))
    assert info.converged.all()
    assert info.trace is not None
    assert info.trace.shape == (info.evaluations, 3)
    assert info.steps[0] == 1 < info.steps[1] < info.steps[2] == info.evaluations


@pytest.mark.parametrize(
    "mode",
    [
        {"backward": "ift", "backward_options": TIGHT},
        {"backward": "unroll", "solver": "fixed_point"},
        {"backward": "phantom", "phantom_steps": 20, "phantom_damping": 1.0},
    ],
    ids=lambda mode: mode["backward"],
)
def test_gradcheck(mode: dict[str, Any]) -> None:
    layer = Layer(samples=2, width=2, norm=0.2)

    def solution(weight: Tensor, u: Tensor) -> Tensor:
        x, _ = equilibrium(lambda z: torch.tanh(z @ weight + u), layer.start, **mode, **EXACT)
        return x

    assert torch.autograd.gradcheck(solution, (layer.weight, layer.u))
    if mode["backward"] != "ift":
        assert torch.autograd.gradgradcheck(solution, (layer.weight, layer.u))


@pytest.mark.parametrize("backward", ["ift", "jfb", "phantom", "shine"])
def test_the_first_point_gets_no_gradient(backward: str) -> None:
    layer = Layer()
    start = layer.start.clone().requires_grad_()
    x, _ = equilibrium(layer, start, solver="broyden", backward=backward)
    assert torch.autograd.grad(x.sum(), start, allow_unused=True) == (None,)


@pytest.mark.parametrize("backward", ["ift", "jfb", "phantom", "shine", "unroll"])
def test_no_graph_where_nothing_wants_a_gradient(backward: str) -> None:
    layer = Layer()
    solver = "fixed_point" if backward == "unroll" else "broyden"
    with torch.no_grad():
        x, info = equilibrium(layer, layer.start, solver=solver, backward=backward)
    assert not x.requires_grad
    assert layer.calls == info.evaluations
    frozen = layer.u.detach()
    x, _ = equilibrium(lambda z: (z + frozen) / 2, layer.start, solver=solver, backward=backward)
    assert not x.requires_grad


@pytest.mark.parametrize("backward", ["ift", "jfb", "phantom", "shine", "unroll"])
def test_f_may_ignore_its_state(backward: str) -> None:
    solver = {"shine": "broyden", "unroll": "fixed_point"}.get(backward, "anderson")
    options: dict[str, Any] = {"solver": solver, "backward": backward, "phantom_damping": 1.0}
    u = torch.ones(3, 2, requires_grad=True)
    x, info = equilibrium(lambda z: u * 2, torch.zeros(3, 2), **options)
    assert info.steps.tolist() == [2] * 3
    torch.testing.assert_close(torch.autograd.grad(x.sum(), u)[0], torch.full((3, 2), 2.0))
    x, _ = equilibrium(lambda z: u.detach() * 2, torch.zeros(3, 2), **options)
    assert not x.requires_grad


def test_f_is_recorded_once_however_many_steps() -> None:
    """Memory does not grow with the steps: the graph of one call is kept."""
    layer = Layer(norm=0.95)
    kept = []
    for rtol in (1e-1, 1e-12):
        before = layer.calls
        sizes: list[int] = []
        x, info = equilibrium(layer, layer.start, rtol=rtol, max_iter=400, solver="fixed_point")
        assert layer.calls - before == info.evaluations + 1
        calls, nodes, pending = layer.calls, set(), [x.grad_fn]
        while pending:
            node = pending.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                pending += [each for each, _ in node.next_functions]
        kept.append(len(nodes))
        layer.gradients(x)
        assert layer.calls == calls, "f was called again in the backward"
        assert not sizes
    assert kept[0] == kept[1]


def test_backward_may_run_again() -> None:
    layer = Layer()
    x, info = equilibrium(layer, layer.start, **EXACT)
    once = layer.gradients(x, retain_graph=True)
    first = info.backward
    again = layer.gradients(x)
    assert info.backward is not first
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        layer.gradients(x)


def test_backward_warns_where_it_has_not_converged() -> None:
    layer = Layer(norm=0.9)
    asked = SolverOptions(max_iter=2, rtol=1e-12)
    x, info = equilibrium(layer, layer.start, backward_options=asked, **EXACT)
    with pytest.warns(EquilibriumWarning, match=r"backward solve of 4 of 4 samples .* 2 eval"):
        layer.gradients(x)
    assert info.backward is not None
    assert info.backward.steps.tolist() == [2] * 4
    assert not info.backward.converged.any()
    x, _ = equilibrium(layer, layer.start, backward_options=asked, warn=False, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.gradients(x)


def test_a_lost_sample_has_no_gradient_and_harms_no_other() -> None:
    layer = Layer()
    u = layer.u.detach().clone()
    u[1] = torch.nan
    u.requires_grad_()
    with pytest.warns(EquilibriumWarning, match=r"1 of 4 samples .* worst residual is inf"):
        x, _ = equilibrium(lambda z: torch.tanh(z @ layer.weight + u), layer.start, **EXACT)
    with pytest.warns(EquilibriumWarning, match=r"backward solve of 1 of 4"):
        (grad,) = torch.autograd.grad(x, u, layer.grad)
    assert grad[1].isnan().all()
    wanted = unrolled_gradients(layer)[1]
    good = [0, 2, 3]
    torch.testing.assert_close(grad[good], wanted[good], atol=1e-8, rtol=0)


def test_a_diverged_sample_that_is_left_out_of_the_loss_is_harmless() -> None:
    rate = torch.tensor([[0.5], [3.0]], dtype=torch.float64, requires_grad=True)
    x, info = equilibrium(
        lambda z: rate * z + 1, torch.ones(2, 1).double(), solver="fixed_point", warn=False
    )
    assert info.residual[1] == torch.inf
    (grad,) = torch.autograd.grad(x[info.converged].sum(), rate, retain_graph=True)
    assert grad[1] == 0
    torch.testing.assert_close(grad[0].item(), 4.0, atol=2e-2, rtol=0)
    (grad,) = torch.autograd.grad(x.sum(), rate)
    assert grad[1].isnan()
    torch.testing.assert_close(grad[0].item(), 4.0, atol=2e-2, rtol=0)


def test_it_is_public_and_described() -> None:
    for name in ("EquilibriumInfo", "EquilibriumWarning", "SolverOptions", "equilibrium"):
        assert name in ppmoe_ops.__all__
    assert issubclass(EquilibriumWarning, UserWarning)
    doc = inspect.getdoc(equilibrium) or ""
    for section in ("Args:", "Returns:", "Raises:", "Gradient:", "Saved for backward:", "Source:"):
        assert section in doc
    described = doc.split("Args:")[1].split("Returns:")[0]
    parameters = inspect.signature(equilibrium).parameters
    assert [name for name in parameters if name not in described] == []
    # Forward options have the defaults of a backward solve's, but for its tolerance.
    for field in dataclasses.fields(SolverOptions):
        assert parameters[field.name].default == field.default


def test_the_example_runs() -> None:
    results = [
        doctest.DocTestRunner().run(each)
        for each in doctest.DocTestFinder(recurse=False).find(equilibrium, "equilibrium")
    ]
    assert sum(each.attempted for each in results) >= 5
    assert not any(each.failed for each in results)
