"""What today's equilibrium solvers get wrong, and `equilibrium` must not."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from equilibrium_problems import EXACT, Layer, assert_all_close, iterated, unrolled_gradients
from torch import Tensor, nn

from ppmoe_ops import EquilibriumWarning, SolverOptions, equilibrium

pytestmark = pytest.mark.kernel


def test_unknown_options_are_errors() -> None:
    for unknown in ("stop_mode", "tol", "f_max_iter", "n_states", "tau"):
        with pytest.raises(TypeError, match=unknown):
            equilibrium(lambda z: z / 2, torch.zeros(1, 1), **{unknown: 1})
        with pytest.raises(TypeError, match=unknown):
            SolverOptions(**{unknown: 1})
    kinds = {each.kind for each in inspect.signature(equilibrium).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


@pytest.mark.parametrize("tolerance", [{"atol": 1e-3, "rtol": 0.0}, {"atol": 0.0, "rtol": 1e-3}])
def test_both_tolerances_have_an_effect(tolerance: dict[str, float]) -> None:
    """The point where each stops is where its own rule first holds."""
    layer = Layer(norm=0.9)
    with torch.no_grad():
        x, info = equilibrium(
            layer, layer.start, solver="fixed_point", keep_trace=True, max_iter=300, **tolerance
        )
        z, norms = layer.start, []
        for _ in range(info.evaluations):
            z = layer(z)
            norms.append(z.norm(dim=1))
    assert info.trace is not None
    limits = tolerance["atol"] + tolerance["rtol"] * torch.stack(norms)
    first = (info.trace <= limits).int().argmax(0) + 1
    assert info.steps.tolist() == first.tolist()
    assert x.isfinite().all()


def test_options_reach_the_solvers_of_both_directions() -> None:
    layer = Layer(samples=6, width=12, norm=0.95)
    counts: dict[str, list[int]] = {"forward": [], "backward": []}
    for options in ({}, {"history": 1}, {"damping": 0.3}, {"solver": "fixed_point"}):
        asked: Any = {"rtol": 1e-9, "max_iter": 600, **options}
        x, info = equilibrium(layer, layer.start, backward_options=SolverOptions(**asked), **asked)
        layer.gradients(x)
        assert info.backward is not None
        counts["forward"].append(info.evaluations)
        counts["backward"].append(info.backward.evaluations)
    for direction, came in counts.items():
        assert len(set(came)) == 4, direction
        assert min(came) == came[0], direction


def test_anderson_at_tight_tolerance_is_faster_than_plain_iteration() -> None:
    """A ridge that is not scaled turns the weights into an average once residuals are small."""
    layer = Layer(samples=4, width=64, dtype=torch.float32)
    symmetric = layer.weight.detach() + layer.weight.detach().T
    symmetric *= 0.95 / torch.linalg.matrix_norm(symmetric, 2)
    for scale in (1.0, 1e-4):

        def f(z: Tensor, scale: float = scale) -> Tensor:
            return scale * torch.tanh(z / scale @ symmetric + layer.u)

        with torch.no_grad():
            _, plain = equilibrium(f, layer.start, solver="fixed_point", rtol=1e-5, max_iter=400)
            _, mixed = equilibrium(f, layer.start, rtol=1e-5, max_iter=400)
        assert mixed.converged.all()
        assert 2 * mixed.evaluations < plain.evaluations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_short_states_have_gradients(solver: str, dtype: torch.dtype) -> None:
    """Forward, backward and their default tolerance: nothing warns, nothing overflows."""
    layer = Layer(samples=6, width=48, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EquilibriumWarning)
        rtol = 4 * torch.finfo(dtype).eps
        x, _ = equilibrium(layer, layer.start, solver=solver, rtol=rtol, max_iter=80)
        came = layer.gradients(x)
    wide = Layer(samples=6, width=48)
    wide.weight, wide.u, wide.grad = (
        each.detach().double().requires_grad_() for each in (layer.weight, layer.u, layer.grad)
    )
    wide.grad = wide.grad.detach()
    for one, other in zip(came, unrolled_gradients(wide, 100), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < 24 * torch.finfo(dtype).eps * other.norm()


class Prompt(nn.Module):
    """A module that keeps its input as an attribute, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5, dtype=torch.float64)
        with torch.no_grad():
            self.inner.weight.mul_(0.8)

    def step(self, z: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.u)

    def forward(self, u: Tensor, **options: Any) -> Tensor:
        self.u = u
        x, self.info = equilibrium(self.step, torch.zeros_like(u), **EXACT, **options)
        return x

    def unrolled(self, u: Tensor) -> Tensor:
        self.u = u
        return iterated(self.step, torch.zeros_like(u), 200)


TIGHT = SolverOptions(rtol=1e-13, max_iter=200)


def test_one_module_twice_in_one_graph() -> None:
    module = Prompt()
    u = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    leaves = [u, *module.parameters()]

    def twice(solve: Any) -> Tensor:
        first = solve(u)
        return (first * solve(first.sin() + 1)).sum()

    came = torch.autograd.grad(twice(lambda u: module(u, backward_options=TIGHT)), leaves)
    assert_all_close(came, torch.autograd.grad(twice(module.unrolled), leaves), 1e-9)


def test_an_equilibrium_inside_an_equilibrium() -> None:
    inner_weight = (torch.randn(3, 3, dtype=torch.float64) / 5).requires_grad_()
    u = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def outer(z: Tensor, solve: Any) -> Tensor:
        return solve(lambda y: torch.tanh(y @ inner_weight + z / 2 + u))

    def implicit(f: Any) -> Tensor:
        return equilibrium(f, torch.zeros_like(u), backward_options=TIGHT, **EXACT)[0]

    def unrolled(f: Any) -> Tensor:
        return iterated(f, torch.zeros_like(u), 40)

    leaves = [inner_weight, u]
    came = torch.autograd.grad(implicit(lambda z: outer(z, implicit)).sum(), leaves)
    wanted = torch.autograd.grad(unrolled(lambda z: outer(z, unrolled)).sum(), leaves)
    assert_all_close(came, wanted, 1e-9)


@pytest.mark.parametrize("linear", [True, False])
def test_a_second_derivative_is_refused_where_it_would_be_wrong(linear: bool) -> None:
    layer = Layer()
    x, _ = equilibrium(layer, layer.start, solver="broyden", backward="shine")
    loss = x.sum() if linear else x.square().sum()
    first = torch.autograd.grad(loss, [layer.weight, layer.u], create_graph=True)
    for leaf in (layer.weight, layer.u):
        with pytest.raises(RuntimeError, match="backward is 'shine', which has no second deriv"):
            torch.autograd.grad(first[1].square().sum(), leaf, retain_graph=True)


MODES_TWICE: tuple[dict[str, Any], ...] = (
    {"backward": "ift", "backward_options": TIGHT},
    {"backward": "unroll", "solver": "fixed_point"},
    {"backward": "phantom", "phantom_steps": 60, "phantom_damping": 1.0},
)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("mode", MODES_TWICE, ids=lambda mode: mode["backward"])
def test_the_second_derivative_is_right(mode: dict[str, Any], linear: bool) -> None:
    """f closes over leaves, and over a value that comes from the same leaves."""
    layer = Layer()

    def f_of(u: Tensor) -> Any:
        inner = u.sin() + u @ layer.weight
        return lambda z: torch.tanh(z @ layer.weight + inner + u)

    def second(x: Tensor) -> tuple[Tensor, ...]:
        leaves = [layer.weight, layer.u]
        loss = x.sum() if linear else x.square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        mixed = sum(each.square().sum() for each in first) + x.sum()
        return torch.autograd.grad(mixed, leaves)

    x, _ = equilibrium(f_of(layer.u), layer.start, **mode, **EXACT)
    wanted = second(iterated(f_of(layer.u), layer.start))
    assert_all_close(second(x), wanted, 1e-7, 1e-7)


def test_gradgradcheck_of_ift() -> None:
    layer = Layer(samples=1, width=2, norm=0.3)

    def solution(weight: Tensor, u: Tensor) -> Tensor:
        inner = u.sin()
        f = lambda z: torch.tanh(z @ weight + inner)  # noqa: E731
        return equilibrium(f, layer.start, backward_options=TIGHT, **EXACT)[0]

    assert torch.autograd.gradgradcheck(solution, (layer.weight, layer.u))


def test_a_third_derivative_of_ift() -> None:
    layer = Layer(samples=2, width=3)

    def third(x: Tensor) -> tuple[Tensor, ...]:
        (one,) = torch.autograd.grad(x.square().sum(), layer.u, create_graph=True)
        (two,) = torch.autograd.grad(one.square().sum(), layer.u, create_graph=True)
        return torch.autograd.grad(two.square().sum(), [layer.weight, layer.u])

    x, _ = equilibrium(layer, layer.start, backward_options=TIGHT, **EXACT)
    assert_all_close(third(x), third(iterated(layer, layer.start, 60)), 1e-6, 1e-6)


def test_first_derivatives_are_the_same_recorded_or_not() -> None:
    """At a point far from the solution, for some leaves alone, and with a backward in between."""
    layer = Layer()
    x, _ = equilibrium(layer, layer.start, max_iter=2, warn=False, backward_options=TIGHT)
    wanted = layer.gradients(x, retain_graph=True)
    for number, leaf in enumerate((layer.weight, layer.u)):
        (came,) = torch.autograd.grad(x, leaf, layer.grad, create_graph=True)
        torch.testing.assert_close(came, wanted[number], atol=1e-11, rtol=0)
        plain = layer.gradients(x, retain_graph=True)
        assert_all_close(plain, wanted, 0)
    assert_all_close(layer.gradients(x, create_graph=True), wanted, 1e-11)


def test_the_second_derivative_wants_the_same_f() -> None:
    """An attribute that was set anew, as a second use of a module does, is noticed."""
    module = Prompt()
    u = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    x = module(u)
    module(u + 1)
    with pytest.raises(RuntimeError, match="f gives another result than it gave in the forward"):
        torch.autograd.grad(x.sum(), u, create_graph=True)


def test_jfb_second_derivative_is_that_of_one_step() -> None:
    layer = Layer()
    x, _ = equilibrium(layer, layer.start, backward="jfb", **EXACT)
    z = x.detach()

    def second(x: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(x.square().sum(), layer.u, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [layer.weight, layer.u])

    assert_all_close(second(x), second(layer(z)), 1e-9)


def test_everything_is_made_where_the_state_is() -> None:
    """A tensor without a device would land on the default one."""
    layer = Layer()
    modes: tuple[dict[str, Any], ...] = (
        {"solver": "anderson"},
        {"solver": "anderson", "bounded": True},
        {"solver": "broyden", "backward": "shine"},
        {"solver": "newton_krylov"},
        {"solver": "fixed_point", "backward": "unroll"},
    )
    with torch.device("meta"):
        for mode in modes:
            x, info = equilibrium(layer, layer.start, **mode)
            assert {each.device.type for each in (x, info.steps, info.residual)} == {"cpu"}
            layer.gradients(x)
        x, _ = equilibrium(
            lambda z, index: z / 2 + layer.u[index], layer.start, compact=True, backward="phantom"
        )
        assert x.device.type == "cpu"


def test_options_mean_the_same_bounded_or_not() -> None:
    layer = Layer()
    x, info = equilibrium(layer, layer.start, rtol=1e-6, max_iter=40)
    y, bounded = equilibrium(layer, layer.start, rtol=1e-6, max_iter=40, bounded=True)
    assert bounded.evaluations == 40
    assert torch.equal(info.steps, bounded.steps)
    assert torch.equal(info.converged, bounded.converged)
    torch.testing.assert_close(x, y, atol=1e-12, rtol=0)
    assert_all_close(layer.gradients(x), layer.gradients(y), 1e-7)


def test_the_bounded_form_reads_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()

    def read(*_: Any) -> Any:
        raise AssertionError("a value was read on the host")

    for name in ("__bool__", "item", "tolist", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(Tensor, name, read)
    x, info = equilibrium(layer, layer.start, max_iter=3, bounded=True, rtol=0.0)
    layer.gradients(x)
    monkeypatch.undo()
    assert not info.converged.any()  # and nobody warned


def test_a_gradient_comes_out_inside_a_frozen_network() -> None:
    """Only what feeds f, or only what f is made of, asks for a gradient."""
    layer = Layer()
    frozen = layer.weight.detach()
    x, _ = equilibrium(lambda z: torch.tanh(z @ frozen + layer.u), layer.start, **EXACT)
    assert x.requires_grad
    u = layer.u.detach()
    y, _ = equilibrium(lambda z: torch.tanh(z @ layer.weight + u), layer.start, **EXACT)
    assert y.requires_grad
    wanted = unrolled_gradients(layer)
    came = (
        *torch.autograd.grad(y, layer.weight, layer.grad),
        *torch.autograd.grad(x, layer.u, layer.grad),
    )
    assert_all_close(came, wanted, 1e-7)
    # An input with a history, whose own gradient is asked for.
    inner = layer.u * 1
    x, _ = equilibrium(lambda z: torch.tanh(z @ frozen + inner), layer.start, **EXACT)
    (grad,) = torch.autograd.grad(x, inner, layer.grad)
    torch.testing.assert_close(grad, wanted[1], atol=1e-7, rtol=0)


def test_steps_are_those_that_were_made() -> None:
    """Not those of the best iterate, and a trace is not filled up to max_iter."""
    layer = Layer(norm=0.9)
    with torch.no_grad():
        _, info = equilibrium(layer, layer.start, max_iter=90, rtol=1e-4, keep_trace=True)
    assert layer.calls == info.evaluations == int(info.steps.max()) < 90
    assert info.trace is not None
    assert len(info.trace) == layer.calls
    # A limit that is never met: every evaluation counts, though the best came long before.
    with torch.no_grad():
        _, info = equilibrium(layer, layer.start, max_iter=90, rtol=0.0, warn=False)
    best = info.residual
    assert (info.steps[~info.converged] == 90).all()
    assert (best < 1e-12).all()


def test_one_hard_sample_does_not_hold_the_others() -> None:
    rate = torch.full((8, 1), 0.2)
    rate[5] = 0.95
    rows = 0

    def f(z: Tensor, index: Tensor) -> Tensor:
        nonlocal rows
        rows += len(z)
        return rate[index] * z + 1

    with torch.no_grad():
        _, info = equilibrium(
            f, torch.zeros(8, 3), compact=True, solver="fixed_point", rtol=1e-5, max_iter=400
        )
    assert info.converged.all()
    assert rows == int(info.steps.sum())
    assert info.steps[5] > 3 * info.steps[0]


class Reversed(torch.autograd.Function):
    """A user's own step with a user's own backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, u: Tensor) -> Tensor:
        return z / 2 + u

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad / 2, grad


def test_a_users_own_backward_is_used() -> None:
    u = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    x, _ = equilibrium(
        lambda z: Reversed.apply(z, u), torch.zeros_like(u), backward_options=TIGHT, **EXACT
    )
    x.sum().backward()
    torch.testing.assert_close(u.grad, torch.full_like(u, 2.0), atol=1e-10, rtol=0)
