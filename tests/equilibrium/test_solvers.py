"""The solvers behind `run`: counts, masks, ends of a solve, and what today's solvers get wrong."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mix_problems import contraction, elementwise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppmoe_ops.ops.equilibrium import solution
from ppmoe_ops.ops.equilibrium.options import SOLVERS, SolverOptions
from ppmoe_ops.ops.equilibrium.solvers import Solution, run

pytestmark = pytest.mark.kernel
SOLVER = pytest.mark.parametrize("solver", SOLVERS)


def solve(f: Any, z0: Tensor, solver: str, **options: Any) -> Solution:
    flags = {name: options.pop(name) for name in ("compact", "keep_trace", "bounded")
             if name in options}  # fmt: skip
    return run(f, z0, SolverOptions(solver, **options), **flags)


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
    # Another size, dtype or history, and one solve inside another, have work space of their own.
    for call in (
        lambda: solve(g, z0.double(), "anderson", rtol=1e-4),
        lambda: solve(f, z0, "anderson", rtol=1e-4, history=2),
        lambda: solve(lambda z, _: f(z, None) + 0 * solve(f, z, "anderson").x, z0, "anderson"),
    ):
        assert call().converged.all()
    with torch.inference_mode():
        assert torch.equal(solve(f, z0, "anderson", rtol=1e-4).x, first.x)
    assert torch.equal(solve(f, z0, "anderson", rtol=1e-4).x, first.x)
