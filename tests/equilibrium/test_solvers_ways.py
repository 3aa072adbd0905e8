"""The solvers behind `run`: memory, traces, one graph, each solver's own ways, options."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mix_problems import contraction, elementwise, solve
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppmoe_ops.ops.equilibrium import solution
from ppmoe_ops.ops.equilibrium.options import SOLVERS, SolverOptions

pytestmark = pytest.mark.kernel
SOLVER = pytest.mark.parametrize("solver", SOLVERS)


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def _gone(self, address: int, size: int) -> None:
        self.now -= size
        self.seen.discard(address)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in self.seen:
                address, size = each.untyped_storage().data_ptr(), each.untyped_storage().nbytes()
                self.seen.add(address)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(each, self._gone, address, size)
        return result


@pytest.mark.parametrize(("solver", "states"), [("anderson", 2), ("broyden", 4)])
@pytest.mark.parametrize("history", [2, 8])
def test_memory_is_bounded_by_the_history(solver: str, states: int, history: int) -> None:
    width = 20000
    f = elementwise(1, width)
    most = []
    for steps in (12, 40):
        with Live() as live:
            found = solve(
                f, torch.zeros(1, width), solver, rtol=0.0, max_iter=steps, history=history
            )
        assert found.steps.tolist() == [steps]
        most.append(live.most / (4 * width))
    assert most[1] <= most[0] + 0.5
    assert most[1] <= states * (history + 1) + 24


@SOLVER
def test_the_trace_is_every_evaluation(solver: str) -> None:
    f = contraction(3, 20)
    z0 = torch.zeros(3, 20)
    kept = z0.clone()
    found = solve(f, z0, solver, rtol=1e-4, keep_trace=True)
    assert found.trace is not None
    assert found.trace.shape == (found.evaluations, 3)
    torch.testing.assert_close(found.trace.min(0).values, found.residual)
    assert torch.equal(z0, kept)
    assert solve(f, z0, solver, rtol=1e-4).trace is None


@SOLVER
def test_a_float64_trace_falls_and_nothing_is_recorded(solver: str) -> None:
    shift = torch.ones(3, 20, dtype=torch.float64, requires_grad=True)
    z0 = torch.zeros(3, 20, dtype=torch.float64)
    found = solve(lambda z, _: 0.5 * torch.sin(z) + shift, z0, solver, keep_trace=True)
    assert found.trace is not None
    assert (found.trace[0] > 2 * found.trace[-1]).all()
    assert not found.x.requires_grad
    assert not found.z.requires_grad
    assert (found.secant is None) == (solver != "broyden")


@SOLVER
def test_f_may_return_its_own_argument_or_another_dtype(solver: str) -> None:
    z0 = torch.randn(2, 5)
    found = solve(lambda z, _: z, z0, solver)
    assert found.converged.all()
    assert torch.equal(found.x, z0)
    found = solve(lambda z, _: (0.5 * z).bfloat16(), z0, solver, rtol=1e-2)
    assert found.x.dtype == torch.float32


def test_f_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"f returned shape \[2, 4\]; expected \[2, 5\]"):
        solve(lambda z, _: z[:, :4], torch.zeros(2, 5), "anderson")


@SOLVER
def test_damping(solver: str) -> None:
    # Plain iteration of slope -1.2 needs it.
    f = lambda z, _: torch.tensor([-1.2, 0.5]) * z + 1  # noqa: E731
    found = solve(f, torch.zeros(1, 2), solver, damping=0.6, rtol=1e-5, max_iter=100)
    assert found.converged.all()
    torch.testing.assert_close(found.x, torch.tensor([[1 / 2.2, 2.0]]), rtol=1e-4, atol=1e-4)


def test_newton_takes_differences_where_there_is_no_forward_mode() -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return 0.5 * torch.sin(z) + 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    def f(z: Tensor, index: Tensor | None) -> Tensor:
        return Half.apply(z)  # type: ignore[no-untyped-call]

    def exact(z: Tensor, index: Tensor | None) -> Tensor:
        return 0.5 * torch.sin(z) + 1

    z0 = torch.rand(3, 8, dtype=torch.float64)
    found = solve(f, z0, "newton_krylov", rtol=1e-8)
    wanted = solve(exact, z0, "newton_krylov", rtol=1e-8)
    assert found.converged.all()
    torch.testing.assert_close(found.x, wanted.x, rtol=1e-7, atol=1e-7)
    assert found.steps.max() <= wanted.steps.max() + 4


def test_newton_counts_every_call() -> None:
    calls = []

    def f(z: Tensor, index: Tensor | None) -> Tensor:
        calls.append(len(z))
        return torch.tanh(z.flip(1) * 0.9) + 0.1

    found = solve(f, torch.zeros(2, 9), "newton_krylov", rtol=1e-5)
    assert found.evaluations == len(calls)
    assert found.steps.max() <= len(calls)
    assert found.converged.all()


def test_broyden_meets_the_last_secant_equation() -> None:
    weight = torch.randn(9, 9, dtype=torch.float64)
    weight = 0.7 * weight / torch.linalg.matrix_norm(weight, 2)
    points: list[Tensor] = []

    def f(z: Tensor, index: Tensor | None) -> Tensor:
        points.append(z.clone())
        return z @ weight + 1

    for max_iter, history in ((7, 20), (9, 3)):
        found = solve(
            f, torch.zeros(2, 9, dtype=torch.float64), "broyden", rtol=0.0, max_iter=max_iter,
            history=history,
        )  # fmt: skip
        assert found.secant is not None
        # What the last evaluation says comes too late for it.
        step = points[-2] - points[-3]
        y = step - step @ weight
        u, v = found.secant.u, found.secant.v
        assert u.shape == v.shape == (2, history, 9)
        came = y + torch.einsum("bld,bl->bd", u, torch.einsum("bld,bd->bl", v, y))
        torch.testing.assert_close(came, step, rtol=1e-8, atol=1e-10)


@SOLVER
def test_bounded_is_one_graph(solver: str) -> None:
    f = contraction(2, 8)

    def whole(z0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = solve(f, z0, solver, max_iter=4, history=2, bounded=True, rtol=1e-2)
        return found.x, found.steps, found.residual

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for came, wanted in zip(compiled(torch.zeros(2, 8)), whole(torch.zeros(2, 8)), strict=True):
        torch.testing.assert_close(came, wanted)


@SOLVER
def test_bounded_finds_the_same(solver: str) -> None:
    f = elementwise(3, 40)
    options: dict[str, Any] = {"rtol": 1e-4, "max_iter": 60}
    found = solve(f, torch.zeros(3, 40), solver, **options)
    bounded = solve(f, torch.zeros(3, 40), solver, bounded=True, **options)
    assert bounded.evaluations == 60
    if solver != "newton_krylov":
        assert torch.equal(bounded.steps, found.steps)
        assert torch.equal(bounded.x, found.x)
    assert bounded.converged.all()


def test_bounded_and_compact_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="compact is True; allowed: False where bounded is True"):
        solve(lambda z, _: z, torch.zeros(1, 1), "anderson", bounded=True, compact=True)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(SOLVERS), st.integers(1, 4), st.integers(1, 9), st.integers(1, 4),
    st.integers(1, 25), st.sampled_from([0.3, 0.9, 1.5]), st.booleans(),
)  # fmt: skip
def test_any_problem(
    solver: str, samples: int, width: int, history: int, max_iter: int, norm: float, compact: bool
) -> None:
    f = contraction(samples, width, norm, torch.float64, seed=max_iter)
    z0 = torch.zeros(samples, width, dtype=torch.float64)
    found = solve(f, z0, solver, rtol=1e-7, max_iter=max_iter, history=history, compact=compact)
    assert found.steps.max() <= found.evaluations <= max_iter
    assert found.steps.min() >= 1
    r = torch.linalg.vector_norm(f(found.z) - found.z, dim=1)
    torch.testing.assert_close(found.residual, r, atol=1e-12, rtol=1e-6)
    done = r <= 1e-7 * torch.linalg.vector_norm(found.x, dim=1) * (1 + 1e-6)
    assert (~found.converged | done).all()
    first = torch.linalg.vector_norm(f(z0) - z0, dim=1)
    assert (found.residual <= first * (1 + 1e-9)).all()


BAD = {
    "solver": (
        "newton",
        "solver is 'newton'; allowed: fixed_point, anderson, broyden, newton_kryl",
    ),
    "atol": (-1e-3, "atol is -0.001; allowed: 0 or more, finite"),
    "rtol": (float("nan"), "rtol is nan; allowed: 0 or more, finite"),
    "max_iter": (0, "max_iter is 0; allowed: 1 or more"),
    "history": (17, "history is 17; allowed: 1 to 16 (for anderson)"),
    "damping": (1.5, "damping is 1.5; allowed: above 0, at most 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name: str) -> None:
    value, words = BAD[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        SolverOptions(**{name: value})
    assert str(caught.value).startswith(f"equilibrium: {words}")


@pytest.mark.parametrize(("name", "value"), [
    ("max_iter", 2.0), ("max_iter", True), ("history", 0), ("rtol", "1e-3"), ("damping", 0.0),
    ("atol", float("inf")), ("rtol", True),
])  # fmt: skip
def test_bad_options_of_other_kinds(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"equilibrium: {name} is "):
        SolverOptions(**{name: value})


def test_unknown_options_are_errors() -> None:
    with pytest.raises(TypeError, match="stop_mode"):
        SolverOptions(stop_mode="rel")  # type: ignore[call-arg]
    assert SolverOptions("broyden", history=40).history == 40


def test_a_large_solve_keeps_its_work_space_and_nothing_of_its_result() -> None:
    width = 40000
    f, g = elementwise(2, width), elementwise(2, width, torch.float64)
    z0 = torch.zeros(2, width)
    first = solve(f, z0, "anderson", rtol=1e-4)
    kept = first.z.clone(), first.x.clone()
    (work,) = solution._KEPT
    again = solve(lambda z, _: f(z, None) + 1, z0, "anderson", rtol=1e-4)
    assert solution._KEPT[0][3].data_ptr() == work[3].data_ptr()
    assert torch.equal(first.z, kept[0])
    assert torch.equal(first.x, kept[1])
    assert not torch.equal(again.x, first.x)
    assert torch.equal(solve(f, z0, "anderson", rtol=1e-4).x, first.x)
    # Another size, dtype or history, and a solve inside another one, have work space of their own.
    for call in (
        lambda: solve(g, z0.double(), "anderson", rtol=1e-4),
        lambda: solve(f, z0, "anderson", rtol=1e-4, history=2),
    ):
        assert call().converged.all()
    assert torch.equal(solve(f, z0, "anderson", rtol=1e-4).x, first.x)
    inside = solve(
        lambda z, _: f(z, None) + 0 * solve(f, z, "anderson").x, z0, "anderson", rtol=1e-4
    )
    assert torch.equal(inside.x, first.x)
    solution._KEPT.clear()
    with torch.inference_mode():
        assert torch.equal(solve(f, z0, "anderson", rtol=1e-4).x, first.x)
    assert torch.equal(solve(f, z0, "anderson", rtol=1e-4).x, first.x)
