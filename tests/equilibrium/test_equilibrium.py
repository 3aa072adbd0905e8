"""`equilibrium`: values, states of any structure, options, what is reported, bad input."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from equilibrium_problems import EXACT, Layer, iterated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppmoe_ops import EquilibriumInfo, EquilibriumWarning, SolverOptions, equilibrium

pytestmark = pytest.mark.kernel

SOLVERS = ("fixed_point", "anderson", "broyden", "newton_krylov")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("norm", [0.3, 0.9])
def test_finds_the_fixed_point(solver: str, norm: float) -> None:
    layer = Layer(norm=norm)
    before = layer.calls
    with torch.no_grad():
        x, info = equilibrium(
            layer, layer.start, solver=solver, rtol=1e-10, max_iter=400, keep_trace=True
        )
    assert layer.calls - before == info.evaluations
    # Newton's inner solves differ in length, and a sample waits for the others.
    assert info.evaluations == int(info.steps.max()) or solver == "newton_krylov"
    assert info.converged.all()
    torch.testing.assert_close(x, iterated(layer, layer.start).detach(), atol=1e-8, rtol=0)
    assert info.steps.dtype == torch.int32
    assert info.residual.dtype == torch.float64
    assert info.trace is not None
    assert info.trace.shape == (info.evaluations, 4)
    assert (info.residual <= 1e-10 * x.norm(dim=1)).all()
    assert torch.equal(info.trace[-1], info.residual)
    if solver != "newton_krylov":
        last = info.trace.gather(0, info.steps[None].long() - 1)[0]
        assert torch.equal(last, info.residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_dtypes(solver: str, dtype: torch.dtype) -> None:
    """bfloat16 and float16 with sums in float32; norms beyond float16's range are no trouble."""
    layer = Layer(samples=3, width=64, dtype=dtype)
    scale = 256.0

    def scaled(z: Tensor) -> Tensor:
        return scale * layer(z / scale)

    rtol = max(8 * torch.finfo(dtype).eps, 1e-5)
    with torch.no_grad():
        x, info = equilibrium(scaled, layer.start, solver=solver, rtol=rtol)
        exact = Layer(samples=3, width=64)
        exact.weight, exact.u = layer.weight.double(), layer.u.double()
        wanted = scale * iterated(exact, exact.start)
    assert info.converged.all()
    assert x.dtype == dtype
    assert info.residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (x.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert (error < 4 * rtol).all()


def coupled(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    a, b = state
    mean = b.flatten(1).mean(1).to(a.dtype)
    return torch.tanh(0.3 * a + mean[:, None] + 1), 0.2 * b + a.sum(1).to(b.dtype)[:, None, None]


def test_a_tuple_is_one_state() -> None:
    first = (torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 2, 5, dtype=torch.float32))
    (a, b), info = equilibrium(coupled, first, rtol=1e-6, max_iter=100)
    assert a.shape == (3, 4)
    assert b.shape == (3, 2, 5)
    assert (a.dtype, b.dtype) == (torch.float64, torch.float32)
    assert info.steps.shape == (3,)
    assert info.residual.dtype == torch.float64
    again = coupled((a, b))
    for one, other in zip((a, b), again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_state_of_several_dtypes_has_the_widest() -> None:
    first = (torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.float64))
    (a, b), info = equilibrium(lambda s: (s[0] / 2 + 1, s[1] / 2 + 1), first, rtol=1e-11)
    assert info.residual.dtype == torch.float64
    assert (a == 2).all()
    assert ((b - 2).abs() < 1e-10).all()


def test_the_residual_is_over_all_tensors_of_a_state() -> None:
    first = (torch.zeros(2, 1), torch.zeros(2, 1))
    _, info = equilibrium(lambda s: (s[0] + 3, s[1] + 4), first, max_iter=1, warn=False)
    assert info.residual.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("first", [[torch.zeros(2, 3)], {"a": torch.zeros(2, 3)}])
def test_lists_and_dicts(first: Any) -> None:
    def f(state: Any) -> Any:
        if isinstance(state, dict):
            return {"a": state["a"] / 2 + 1}
        return [state[0] / 2 + 1]

    x, _ = equilibrium(f, first, rtol=1e-6)
    assert type(x) is type(first)
    leaf = x["a"] if isinstance(x, dict) else x[0]
    torch.testing.assert_close(leaf, torch.full((2, 3), 2.0), atol=1e-4, rtol=0)


def test_tuple_states_have_gradients() -> None:
    shift = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    first = (torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))

    def f(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = state
        return 0.5 * b + shift, 0.5 * a

    # a = b / 2 + s and b = a / 2, so a = 4 s / 3 and b = 2 s / 3.
    (a, b), _ = equilibrium(f, first, **EXACT)
    (grad,) = torch.autograd.grad(a.sum() + 10 * b.sum(), shift)
    torch.testing.assert_close(grad.item(), 2 * (4 / 3 + 20 / 3))
    (a, _), _ = equilibrium(f, first, **EXACT)  # one of them alone
    torch.testing.assert_close(torch.autograd.grad(a.sum(), shift)[0].item(), 8 / 3)


def test_a_converged_sample_stays_as_it_is() -> None:
    """Bits of a sample do not depend on the others, though one of them takes far longer."""
    rate = torch.tensor([0.1, 0.99, 0.5], dtype=torch.float64)[:, None]
    u = torch.randn(3, 6, dtype=torch.float64)

    def f(z: Tensor, index: Tensor) -> Tensor:
        return rate[index] * torch.sin(z) + u[index]

    first = torch.zeros(3, 6, dtype=torch.float64)
    for compact in (False, True):
        x, info = equilibrium(
            f if compact else (lambda z: f(z, torch.arange(3))),
            first,
            compact=compact,
            solver="fixed_point",
            max_iter=300,
        )
        assert info.converged.all()
        for each in range(3):
            one, alone = equilibrium(
                lambda z, each=each: f(z, torch.tensor([each])),
                first[:1],
                solver="fixed_point",
                max_iter=300,
            )
            assert torch.equal(one[0], x[each])
            assert alone.steps[0] == info.steps[each]


def test_compact_evaluates_active_samples_alone() -> None:
    rate = torch.tensor([0.0, 0.0, 0.9, 0.0])[:, None].requires_grad_()
    rows = []

    def f(z: Tensor, index: Tensor) -> Tensor:
        assert index.dtype == torch.int64
        assert len(index) == len(z)
        rows.append(len(z))
        return rate[index] * z + 1

    x, info = equilibrium(f, torch.ones(4, 2), compact=True, solver="fixed_point", max_iter=200)
    assert info.steps[2] > 20
    assert rows[-1] == 4  # recorded for the gradient
    assert sum(rows[:-1]) == int(info.steps.sum())
    torch.testing.assert_close(x[2, 0].item(), 10.0, atol=0.1, rtol=0)
    x.sum().backward()
    assert rate.grad is not None
    torch.testing.assert_close(rate.grad[2].item(), 200.0, atol=3, rtol=0)


def test_a_warm_start_takes_one_step() -> None:
    layer = Layer()
    cold, info = equilibrium(layer, layer.start, rtol=1e-8)
    assert info.steps.min() > 3
    warm, info = equilibrium(layer, cold.detach(), rtol=1e-7)
    assert info.steps.tolist() == [1] * 4
    torch.testing.assert_close(warm, cold, atol=1e-7, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("most", [1, 2])
def test_one_and_two_evaluations(solver: str, most: int) -> None:
    layer = Layer()
    with torch.no_grad():
        x, info = equilibrium(layer, layer.start, solver=solver, max_iter=most, warn=False)
    assert info.steps.tolist() == [most] * 4
    assert not info.converged.any()
    first = layer(layer.start).detach()
    wanted = (first - layer.start).norm(dim=1)
    if most == 1:
        assert torch.equal(x, first)
        torch.testing.assert_close(info.residual, wanted)
    else:
        assert (info.residual <= wanted).all()


def test_no_fixed_point_warns_and_is_flagged() -> None:
    """z + 1 has none; z^2 + 1 diverges; both are told apart from a good sample."""

    def f(z: Tensor) -> Tensor:
        return torch.cat([z[:1] / 2 + 1, z[1:2] + 1, z[2:] ** 2 + 1])

    with pytest.warns(EquilibriumWarning, match=r"solve of 2 of 3 samples .* inf .*fixed_point"):
        x, info = equilibrium(f, torch.ones(3, 1), solver="fixed_point", max_iter=40)
    assert info.converged.tolist() == [True, False, False]
    assert info.residual[1] == 1.0
    assert info.residual[2] == torch.inf
    assert info.steps[2] < 12 < info.steps[1] == 40
    assert x.isfinite().all()


@pytest.mark.parametrize("solver", ["fixed_point", "anderson"])
def test_several_fixed_points(solver: str) -> None:
    """tanh(2 z) = z at 0 and at +-0.957; the first point decides."""
    first = torch.tensor([[0.5], [-0.5], [0.0]], dtype=torch.float64)
    x, info = equilibrium(lambda z: torch.tanh(2 * z), first, solver=solver, rtol=1e-9)
    assert info.converged.all()
    root = 0.9575040240772687
    torch.testing.assert_close(x[:, 0].tolist(), [root, -root, 0.0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("radius", [0.999, 1.001])
def test_spectral_radius_about_one(radius: float) -> None:
    """Plain iteration needs thousands of steps or never ends; Anderson does neither care."""
    rates = torch.linspace(-0.5, radius, 6, dtype=torch.float64)
    first = torch.zeros(1, 6, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EquilibriumWarning)
        x, info = equilibrium(lambda z: rates * z + 1, first, rtol=1e-6, max_iter=60)
        _, plain = equilibrium(
            lambda z: rates * z + 1, first, rtol=1e-6, max_iter=60, solver="fixed_point"
        )
    assert not plain.converged.any()
    assert info.residual[0] < plain.residual[0]
    assert info.converged.all()
    torch.testing.assert_close(x[0], 1 / (1 - rates), rtol=1e-2, atol=0)


def test_a_nan_sample_is_flagged_alone() -> None:
    layer = Layer()
    start = layer.start.clone()
    start[2, 1] = torch.nan
    with pytest.warns(EquilibriumWarning, match="1 of 4"), torch.no_grad():
        x, info = equilibrium(layer, start, rtol=1e-8)
    assert info.converged.tolist() == [True, True, False, True]
    assert info.residual[2] == torch.inf
    assert info.steps[2] == 1
    wanted = iterated(layer, layer.start).detach()
    for each in (0, 1, 3):
        torch.testing.assert_close(x[each], wanted[each], atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_nothing(solver: str, shape: tuple[int, int]) -> None:
    u = torch.zeros(shape, requires_grad=True)
    x, info = equilibrium(lambda z: z / 2 + u, torch.zeros(shape), solver=solver)
    assert x.shape == shape
    assert info.steps.shape == info.residual.shape == info.converged.shape == (shape[0],)
    assert info.converged.all()
    x.sum().backward()
    assert u.grad is not None


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(0, 5),
    shape=st.lists(st.integers(1, 4), max_size=3),
    solver=st.sampled_from(SOLVERS),
    strided=st.booleans(),
)
def test_shapes(batch: int, shape: list[int], solver: str, strided: bool) -> None:
    u = torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True)
    first = torch.zeros(batch, *shape, dtype=torch.float64)
    if strided and len(shape) > 1:
        first = first.transpose(1, -1).contiguous().transpose(1, -1)
    x, info = equilibrium(lambda z: z.cos() / 2 + u, first, solver=solver, rtol=1e-9)
    assert x.shape == first.shape
    assert info.converged.all()
    torch.testing.assert_close(x, x.cos() / 2 + u, atol=1e-7, rtol=0)
    (grad,) = torch.autograd.grad(x.sum(), u)
    torch.testing.assert_close(grad, 1 / (1 + x.sin() / 2), atol=1e-6, rtol=0)


def test_the_result_may_be_changed_in_place() -> None:
    u = torch.ones(2, 3, requires_grad=True)
    x, _ = equilibrium(lambda z: z / 2 + u, torch.zeros(2, 3), rtol=1e-6)
    x += 1
    x.relu_()
    x.sum().backward()
    torch.testing.assert_close(u.grad, torch.full((2, 3), 2.0), atol=1e-4, rtol=0)


def test_the_warning_names_the_callers_line() -> None:
    layer = Layer()
    asked = SolverOptions(max_iter=1)
    with pytest.warns(EquilibriumWarning) as forward:
        x, _ = equilibrium(layer, layer.start, max_iter=1, backward_options=asked)
    with pytest.warns(EquilibriumWarning) as backward:
        x.sum().backward()
    assert [each.filename for each in (*forward, *backward)] == [__file__] * 2


def test_info_is_a_record() -> None:
    _, info = equilibrium(lambda z: z / 2, torch.ones(2, 3))
    assert isinstance(info, EquilibriumInfo)
    assert info.trace is None
    assert info.backward is None


A_STATE = torch.zeros(2, 3)
BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"f": None}, "f is None; allowed: a function"),
    ({"z0": ()}, "z0 has no tensor; allowed: a tensor or a tuple of tensors"),
    ({"z0": (A_STATE, 1.0)}, "z0 has a float; allowed: tensors"),
    ({"z0": torch.zeros(())}, "z0 has a tensor of 0 axes; expected 1 or more: [B, ...]"),
    ({"z0": A_STATE.long()}, "z0 has dtype int64; allowed: float32, bfloat16, float16, float64"),
    ({"z0": (A_STATE, torch.zeros(3))}, "z0 has B = 3; expected 2 (as its first tensor)"),
    ({"solver": "newton"}, "solver is 'newton'; allowed: fixed_point, anderson, broyden, newton_k"),
    ({"backward": "bptt"}, "backward is 'bptt'; allowed: ift, phantom, jfb, shine, unroll"),
    ({"atol": -1.0}, "atol is -1.0; allowed: 0 or more, finite"),
    ({"rtol": float("inf")}, "rtol is inf; allowed: 0 or more, finite"),
    ({"max_iter": 0}, "max_iter is 0; allowed: 1 or more"),
    ({"history": 0}, "history is 0; allowed: 1"),
    ({"damping": 0.0}, "damping is 0.0; allowed: above 0, at most 1"),
    ({"compact": 1}, "compact is 1; allowed: True, False"),
    ({"warn": None}, "warn is None; allowed: True, False"),
    ({"compact": True, "bounded": True}, "compact is True; allowed: False (bounded is True)"),
    (
        {"compact": True, "backward": "unroll", "solver": "fixed_point"},
        "compact is True; allowed: False (backward is 'unroll')",
    ),
    ({"backward": "shine"}, "solver is 'anderson'; allowed: broyden (backward is 'shine')"),
    ({"backward": "unroll"}, "solver is 'anderson'; allowed: fixed_point (backward is 'unroll')"),
    ({"backward_options": {"rtol": 1}}, "backward_options is {'rtol': 1}; allowed: SolverOptions"),
    ({"backward_options": SolverOptions(), "backward": "jfb"}, "allowed: None (backward is 'jfb'"),
    ({"phantom_steps": 0}, "phantom_steps is 0; allowed: 1 or more"),
    ({"phantom_damping": 1.5}, "phantom_damping is 1.5; allowed: above 0, at most 1"),
    ({"f": lambda z: z[:1]}, "f returns shape [1, 3]; expected [2, 3] (as z0)"),
    ({"f": lambda z: (z, z)}, "f returns "),
    ({"f": lambda z: z.long()}, "the result of f has dtype int64; allowed: float32"),
    ({"f": lambda z: 1.0}, "f returns a float; allowed: tensors"),
)


@pytest.mark.parametrize(("changed", "message"), BAD, ids=[each[1] for each in BAD])
def test_bad_input(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"f": lambda z: z / 2, "z0": A_STATE, **changed}
    with pytest.raises(ValueError, match=r"^equilibrium: ") as caught:
        equilibrium(arguments.pop("f"), arguments.pop("z0"), **arguments)
    assert message in str(caught.value)
