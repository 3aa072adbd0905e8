"""`equilibrium` under torch.compile, checkpoints, autocast and data parallelism."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from equilibrium_problems import EXACT, Layer, assert_all_close, unrolled_gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppmoe_ops import SolverOptions, equilibrium

pytestmark = pytest.mark.kernel
HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_compile_captures_one_graph(solver: str) -> None:
    """Forward and backward, bounded, against eager mode."""
    layer = Layer(samples=3, width=4)
    asked = SolverOptions(solver=solver, rtol=1e-10, max_iter=3)

    def solved(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shifted = u + 1
        x, info = equilibrium(
            lambda z: torch.tanh(z @ weight + shifted),
            torch.zeros_like(u),
            solver=solver,
            rtol=1e-8,
            max_iter=4,
            bounded=True,
            backward_options=asked,
        )
        return x, info.steps, info.residual

    wanted, steps, residual = solved(layer.weight, layer.u)
    torch._dynamo.reset()
    compiled = torch.compile(solved, fullgraph=True, backend="aot_eager")
    came, compiled_steps, compiled_residual = compiled(layer.weight, layer.u)
    torch.testing.assert_close(came, wanted, atol=1e-9, rtol=0)
    assert torch.equal(compiled_steps, steps)
    torch.testing.assert_close(compiled_residual, residual, atol=1e-9, rtol=0)
    assert_all_close(layer.gradients(came), layer.gradients(wanted), 1e-7)


@pytest.mark.parametrize("backward", ["phantom", "unroll"])
def test_compile_captures_every_mode(backward: str) -> None:
    layer = Layer(samples=3, width=4)
    solver = "fixed_point" if backward == "unroll" else "anderson"

    def solved(weight: Tensor, u: Tensor) -> Tensor:
        first = (torch.zeros_like(u), torch.zeros(3, 2, dtype=torch.float64))
        (x, y), _ = equilibrium(
            lambda s: (torch.tanh(s[0] @ weight + u), s[1] / 2 + s[0][:, :2]),
            first,
            solver=solver,
            max_iter=3,
            bounded=True,
            backward=backward,
        )
        return x * y.sum(1, keepdim=True)

    torch._dynamo.reset()
    compiled = torch.compile(solved, fullgraph=True, backend="aot_eager")
    came, wanted = compiled(layer.weight, layer.u), solved(layer.weight, layer.u)
    torch.testing.assert_close(came, wanted)
    assert_all_close(layer.gradients(came), layer.gradients(wanted), 1e-10)


def test_compile_leaves_the_unbounded_form_to_eager_mode() -> None:
    layer = Layer()

    def solved(u: Tensor) -> Tensor:
        x, _ = equilibrium(lambda z: torch.tanh(z @ layer.weight + u), layer.start, rtol=1e-8)
        return x * 2

    torch._dynamo.reset()
    compiled = torch.compile(solved, backend="aot_eager")
    came, wanted = compiled(layer.u), solved(layer.u)
    torch.testing.assert_close(came, wanted)
    assert_all_close(layer.gradients(came), layer.gradients(wanted), 1e-9)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) <= 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward", ["ift", "phantom", "jfb", "shine", "unroll"])
def test_checkpoint(backward: str, reentrant: bool) -> None:
    layer = Layer()
    solver = {"shine": "broyden", "unroll": "fixed_point"}.get(backward, "anderson")

    def block(u: Tensor) -> Tensor:
        hidden = torch.sin(u) * 2

        def f(z: Tensor) -> Tensor:
            layer.calls += 1
            return torch.tanh(z @ layer.weight + hidden)

        x, _ = equilibrium(f, layer.start, solver=solver, backward=backward, **EXACT)
        return x.sin()

    wanted_x = block(layer.u)
    wanted = layer.gradients(wanted_x)
    layer.calls = 0
    x = checkpoint(block, layer.u, use_reentrant=reentrant)
    torch.testing.assert_close(x, wanted_x)
    once = layer.calls
    layer.weight.grad = layer.u.grad = None
    x.backward(layer.grad)
    assert_all_close((layer.weight.grad, layer.u.grad), wanted, 1e-10)  # type: ignore[arg-type]
    # The region runs once more, and not once for every step of the backward solve.
    assert layer.calls <= 2 * once + 60


def test_checkpoint_inside_f() -> None:
    layer = Layer()
    x, _ = equilibrium(
        lambda z: checkpoint(layer, z, use_reentrant=False),
        layer.start,
        backward_options=SolverOptions(rtol=1e-12),
        **EXACT,
    )
    assert_all_close(layer.gradients(x), unrolled_gradients(layer), 1e-9)


@pytest.mark.parametrize("cast_before", [True, False])
@pytest.mark.parametrize("solver", ["anderson", "broyden", "newton_krylov"])
def test_autocast(solver: str, cast_before: bool) -> None:
    """f computes in bfloat16, the solver in float32; parameters keep their gradients."""
    layer = Layer(samples=4, width=32, dtype=torch.float32)
    seen = set()

    def f(z: Tensor) -> Tensor:
        product = z @ layer.weight
        seen.add((z.dtype, product.dtype, torch.is_autocast_enabled("cpu")))
        return torch.tanh(product + layer.u)

    rtol = 2e-2 if solver == "newton_krylov" else 5e-3
    with torch.autocast("cpu", torch.bfloat16):
        if cast_before:  # and kept, with its graph
            _ = layer.start @ layer.weight
        x, info = equilibrium(f, layer.start, solver=solver, rtol=rtol)
        inside = torch.is_autocast_enabled("cpu")
    assert inside
    assert seen == {(torch.float32, torch.bfloat16, True)}
    assert x.dtype == torch.float32
    assert info.converged.all()
    came = layer.gradients(x)
    assert info.backward is not None
    assert info.backward.converged.all()
    for one, other in zip(came, unrolled_gradients(layer, 100), strict=True):
        assert (one - other).norm() < 0.06 * other.norm()


def test_autocast_in_the_backward_changes_nothing() -> None:
    layer = Layer(dtype=torch.float32)
    x, _ = equilibrium(layer, layer.start, rtol=1e-6)
    wanted = layer.gradients(x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        came = layer.gradients(x)
    # The products of f's own graph are autocast's; the solve is not.
    for one, other in zip(came, wanted, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_nothing_outlives_the_result() -> None:
    """No cycle keeps f's graph: memory goes when the result does, without a collection."""
    gc.disable()
    try:
        for mode in (
            {"backward": "ift"},
            {"backward": "shine", "solver": "broyden"},
            {"backward": "ift", "bounded": True},
        ):
            layer = Layer()
            x, info = equilibrium(layer, layer.start, **mode)  # type: ignore[arg-type]
            layer.gradients(x)
            gone = weakref.ref(layer)
            assert info.steps.numel()
            del layer, x
            assert gone() is None, mode
    finally:
        gc.enable()


def test_nothing_outlives_a_second_derivative() -> None:
    """Where it was prepared, and never taken."""
    gc.disable()
    try:
        layer = Layer()
        x, _ = equilibrium(layer, layer.start)
        (first,) = torch.autograd.grad(x.sum(), layer.u, create_graph=True)
        gone = weakref.ref(layer)
        del layer, x, first
        assert gone() is None
    finally:
        gc.enable()


def test_ddp_on_two_processes() -> None:
    """Two uses of one module, halves of a batch: the gradients of one process with all of it."""
    run = subprocess.run(
        [sys.executable, str(HERE / "equilibrium_two_processes.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_threads_and_streams_of_backwards() -> None:
    """Backwards of one graph run from another thread than the forward's."""
    import threading

    layer = Layer()
    wanted = unrolled_gradients(layer)
    x, _ = equilibrium(layer, layer.start, backward_options=SolverOptions(rtol=1e-12), **EXACT)
    came: list[Any] = []
    thread = threading.Thread(target=lambda: came.append(layer.gradients(x)))
    thread.start()
    thread.join()
    assert_all_close(came[0], wanted, 1e-9)
