"""Solvers of z = f(z) over flat states [B, d], every sample on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops.ops.equilibrium.anderson import anderson
from ppmoe_ops.ops.equilibrium.broyden import broyden
from ppmoe_ops.ops.equilibrium.newton_krylov import newton_krylov
from ppmoe_ops.ops.equilibrium.options import OP, SolverOptions
from ppmoe_ops.ops.equilibrium.solution import Function as Function
from ppmoe_ops.ops.equilibrium.solution import Secant as Secant
from ppmoe_ops.ops.equilibrium.solution import Solution as Solution
from ppmoe_ops.ops.equilibrium.solution import Track

_SOLVERS = {
    "fixed_point": anderson,
    "anderson": anderson,
    "broyden": broyden,
    "newton_krylov": newton_krylov,
}


@torch.no_grad()
def run(
    f: Function,
    z0: Tensor,
    options: SolverOptions,
    *,
    compact: bool = False,
    keep_trace: bool = False,
    bounded: bool = False,
) -> Solution:
    """Solve z = f(z) for every row of `z0` [B, d]; nothing is recorded for autograd.

    A sample that has converged or diverged is left alone from then on. `z0` is not written.

    compact: f is given only the samples that are not done yet.
    bounded: always `max_iter` evaluations, without a host read and without data-dependent control
        flow, so that a compiler captures it as one graph; excludes `compact`.
    """
    check.dim(OP, "z0", z0, "B, d")
    check.dtype(OP, "z0", z0, check.FLOATS)
    if bounded and compact:
        raise ValueError(f"{OP}: compact is True; allowed: False where bounded is True")
    history = options.history if options.solver == "anderson" else 0
    track = Track(f, z0, options, history, compact=compact, keep_trace=keep_trace, bounded=bounded)
    return _SOLVERS[options.solver](track)
