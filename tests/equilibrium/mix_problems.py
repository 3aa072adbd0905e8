"""Contractions, and Anderson's method written with least squares, for tests of the solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops.ops.equilibrium.anderson_mix import buffers
from ppmoe_ops.ops.equilibrium.options import SolverOptions
from ppmoe_ops.ops.equilibrium.solvers import Solution, run

NAMES = ("z", "z_next", "best_z", "best_f", "dg", "df", "gram", "values", "counters")


def contraction(
    samples: int, width: int, norm: float = 0.8, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """z -> tanh(W z + x), W symmetric with that spectral norm; takes the index of solvers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, width, generator=generator, dtype=torch.float64)
    weight = weight + weight.T
    weight = (norm * weight / torch.linalg.matrix_norm(weight, 2)).to(dtype)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64).to(dtype)

    def f(z: Tensor, index: Tensor | None = None) -> Tensor:
        return torch.tanh(z @ weight + (x if index is None else x[index]))

    return f


def elementwise(
    samples: int, width: int, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A map that gives a sample the same bits whatever comes with it."""
    slope = torch.linspace(-0.9, 0.9, width).to(dtype)
    x = torch.randn(samples, width, generator=torch.Generator().manual_seed(5)).to(dtype)

    def f(z: Tensor, index: Tensor | None = None) -> Tensor:
        return slope * torch.roll(torch.sin(z), 1, 1) + (x if index is None else x[index])

    return f


def start(z0: Tensor, history: int) -> list[Tensor]:
    """The state of a solve, with zeros where nothing was written."""
    state = list(buffers(z0, history))
    for each in state[1:6]:
        each.zero_()
    return state


def exchanged(state: list[Tensor]) -> list[Tensor]:
    return [state[1], state[0], *state[2:]]


def plain_anderson(
    f: Callable[[Tensor], Tensor], z: Tensor, history: int, steps: int, damping: float = 1.0
) -> list[Tensor]:
    """The points of one sample [d], by least squares; starts anew after a worse mixed step."""
    points, values, residuals, mixed = [z], [], [], False
    kept: list[tuple[Tensor, Tensor]] = []
    for _ in range(steps):
        values.append(f(z))
        residuals.append(values[-1] - z)
        g = residuals[-1]
        if len(values) > 1:
            if mixed and g.norm() > residuals[-2].norm():
                kept = []
            else:
                kept.append((g - residuals[-2], values[-1] - values[-2]))
                kept = kept[-history:]
        mixed = bool(kept)
        new, rest = values[-1], g
        if kept:
            dg, df = (torch.stack(each, 1) for each in zip(*kept, strict=True))
            gamma = torch.linalg.lstsq(dg, g[:, None]).solution[:, 0]
            new, rest = new - df @ gamma, g - dg @ gamma
        z = new - (1 - damping) * rest
        points.append(z)
    return points


def solve(f: Any, z0: Tensor, solver: str, **options: Any) -> Solution:
    flags = {name: options.pop(name) for name in ("compact", "keep_trace", "bounded")
             if name in options}  # fmt: skip
    return run(f, z0, SolverOptions(solver, **options), **flags)
