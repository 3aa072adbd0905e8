"""Cases of equilibrium solves: prompt layers, layers on images, counts, and each operator.

Also a pytest-benchmark file: `pytest bench --benchmark-only` gives absolute times and JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import ppmoe_ops

from . import equilibrium_cases, equilibrium_counts
from .equilibrium_inputs import Images, Prompt, Rows, Solver, States
from .harness import Baseline, Case, Problem
from .inputs import build

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
WIDTHS = (8, 16, 32, 64, 128, 256)
# Eight images of 224x224, and what of the family can be called with one row or a small map.
LION = Images(8, 224)
MILD = dataclasses.replace(LION, mild=True)
STATE = States(8, 3 * 224 * 224)
TOKENS = (128, 1576)
STOPS: tuple[tuple[equilibrium_counts.Mode, float], ...] = (
    ("abs", 1e-2), ("abs", 1e-3), ("abs", 1e-4), ("rel", 1e-3), ("rel", 1e-4)
)  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prompt(tokens: int, step: bool = False, mild: bool = False, **options: Any) -> Case:
    """An MLP prompt layer from tokens to prompts."""
    work = Prompt(tokens, mild)
    kind = "forward+backward" if step else "forward"
    target = f"prompt {kind}" + f" {tokens} tokens" * (not step)
    return Case(
        operator="equilibrium_cell",
        label=f"prompt layer {tokens}x{work.dim} r={work.width} rel {work.rtol:g} {kind}"
        + ", mild" * mild,
        dtype=_name(work.dtype),
        build=partial(equilibrium_cases.prompt, work, step=step),
        target=target,
        **{"quick": False, **options},
    )


def images(fused: bool, work: Images = LION, step: bool = False, **options: Any) -> Case:
    """A prompt layer on images, fused or of torch's own layers."""
    kind = "forward+backward" if step else "forward"
    how = "fused" if fused else "of torch's layers"
    size = f"{work.batch}x{work.channels}x{work.side}x{work.side} r={work.width}"
    target = "" if step or work.width != LION.width else f"{'fused ' * fused}layer on images"
    return Case(
        operator="equilibrium_conv_cell" if fused else "anderson_mix",
        label=f"layer on images {how} {size} rel {work.rtol:g} {kind}" + ", mild" * work.mild,
        dtype=_name(work.dtype),
        build=partial(equilibrium_cases.images, work, fused=fused, step=step),
        target=target,
        **{"quick": False, **options},
    )


def evaluations(mode: equilibrium_counts.Mode, tolerance: float, **options: Any) -> Case:
    """How often f is evaluated."""
    size, batch = equilibrium_counts.SIZE, equilibrium_counts.BATCH
    return Case(
        operator="anderson_mix",
        label=f"evaluations of f, {mode} {tolerance:g}, B={batch} d={size}",
        dtype="float32",
        build=partial(equilibrium_counts.evaluations, mode, tolerance),
        target="evaluations",
        **{"quick": True, **options},
    )


def hard_sample(**options: Any) -> Case:
    """Seven easy samples and a hard one."""
    return Case(
        operator="anderson_mix",
        label="one hard sample of eight, compacted, d=256 rel 0.0001",
        dtype="float32",
        build=equilibrium_counts.hard_sample,
        target="one hard sample",
        **options,
    )


def history(solver: str, **options: Any) -> Case:
    """Memory by iterations."""
    return Case(
        operator="anderson_mix",
        label=f"memory of {solver}, history 6, B=8 d=32768",
        dtype="float32",
        build=partial(equilibrium_counts.history, solver),
        target="history",
        **options,
    )


def operator(name: str, work: Rows | Images | States, *, quick: bool = False) -> Case:
    """One operator by itself."""
    if isinstance(work, Rows):
        label = f"N={work.rows} r={work.width}"
    elif isinstance(work, Images):
        label = f"{work.batch}x{work.channels}x{work.side}x{work.side} r={work.width}"
    else:
        label = f"B={work.batch} d={work.size} history {work.history}"
    if not isinstance(work, States) and not name.endswith("_backward"):
        label += f" {work.solver} rel {work.rtol:g}"
    if not isinstance(work, States) and work.activation != "tanh":
        label += f" {work.activation}"
    return Case(
        operator=name,
        label=label,
        dtype=_name(work.dtype),
        build=partial(equilibrium_cases.operator, name, work),
        quick=quick,
    )


SMALLEST: dict[str, Rows | Images | States] = {
    "equilibrium_cell": Rows(1, 8),
    "equilibrium_conv_cell": Images(1, 8),
    "anderson_mix": States(1, 64),
}


def call_cost(name: str, device: torch.device) -> Problem:
    """One row, or a small map, beside the cheapest call that PyTorch has."""
    work = SMALLEST[name]
    x = torch.ones(1, device=device)
    cheapest = (Baseline("x.mul(1)", x.mul, (1,), same_result=False),)
    if isinstance(work, States):
        return Problem(build(name, work, device), cheapest)
    # A residual is known to the tolerance alone.
    solved = equilibrium_cases.operator(name, work, device)
    return Problem(solved.args, cheapest, check=solved.check)


def _quick() -> Iterator[Case]:
    yield prompt(128, quick=True, headline="prompt layer, 128 tokens")
    yield prompt(128, mild=True, quick=True)
    yield prompt(1576, quick=True, headline="prompt layer, 1576 tokens")
    yield prompt(128, step=True, quick=True, headline="prompt layer and backward, 128 tokens")
    yield images(False, quick=True, headline="layer on images, any f")
    yield images(True, quick=True, headline="layer on images, fused")
    yield images(False, MILD, quick=True)
    yield images(True, MILD, quick=True)
    for mode, tolerance in STOPS:
        yield evaluations(mode, tolerance)
    yield hard_sample()
    for solver in ("anderson", "broyden"):
        yield history(solver)
    cell, maps = Rows(128, 16), Images(8, 56)
    yield operator("equilibrium_cell", cell, quick=True)
    yield operator("equilibrium_cell_backward", cell, quick=True)
    yield operator("equilibrium_conv_cell", maps, quick=True)
    yield operator("equilibrium_conv_cell_backward", maps, quick=True)
    yield operator("anderson_mix", STATE, quick=True)
    for name in SMALLEST:
        yield Case(
            operator=name,
            label="one small sample",
            dtype="float32",
            build=partial(call_cost, name),
            function=getattr(ppmoe_ops, name),
        )


def _full() -> Iterator[Case]:
    for tokens in TOKENS:
        for step in (False, True):
            for mild in (False, True):
                yield prompt(tokens, step, mild)
    for fused in (False, True):
        yield images(fused, step=True)
        yield images(fused, MILD, step=True)
        for width in (16, 32):
            yield images(fused, dataclasses.replace(LION, width=width))
    solvers: tuple[Solver, ...] = ("fixed_point", "anderson", "newton")
    for width in WIDTHS:
        for dtype in (FLOAT32, BFLOAT16):
            for solver in solvers:
                yield operator("equilibrium_cell", Rows(128, width, dtype, solver))
            yield operator("equilibrium_cell_backward", Rows(128, width, dtype))
        yield operator("equilibrium_cell", Rows(1576, width))
        yield operator("equilibrium_cell_backward", Rows(1576, width))
    for activation in ("relu", "gelu", "silu", "sigmoid", "leaky_relu"):
        yield operator("equilibrium_cell", Rows(128, 16, activation=activation))
    for width in (8, 16, 32):
        for dtype in (FLOAT32, BFLOAT16):
            work = dataclasses.replace(LION, width=width, dtype=dtype)
            yield operator("equilibrium_conv_cell", work)
            yield operator("equilibrium_conv_cell_backward", work)
    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        for batch, size in ((1, STATE.size), (128, 768), (128, 2048)):
            yield operator("anderson_mix", States(batch, size, dtype))
        yield operator("anderson_mix", dataclasses.replace(STATE, dtype=dtype))


def cases() -> list[Case]:
    """Quick cases, then the rest; a case of both is listed once."""
    found: dict[str, Case] = {}
    for each in (*_quick(), *_full()):
        found.setdefault(each.key, each)
    return list(found.values())


def test_equilibrium(benchmark: Any, bench_call: Callable[[], Any]) -> None:
    """One absolute row of pytest-benchmark; `conftest.py` makes the cases."""
    benchmark(bench_call)
