"""What `equilibrium` tells about its solves, and how it warns."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ppmoe_ops import _library
from ppmoe_ops.ops.equilibrium.options import OP, SolverOptions
from ppmoe_ops.ops.equilibrium.solvers import Solution

_INSIDE = tuple(str(Path(each).parent) for each in (torch.__file__, _library.__file__))


class EquilibriumWarning(UserWarning):
    """A forward or backward solve of `equilibrium` ended before every sample had converged."""


@dataclasses.dataclass
class EquilibriumInfo:
    """How a solve went.

    Attributes:
        steps: [B] int32, the evaluations of f that each sample took (of `newton_krylov`, its
            Jacobian-vector products too).
        residual: [B] |f(z) - z|_2 at the evaluated point whose f(z) is returned, float32 (float64
            for float64); inf where the sample diverged or met NaN.
        converged: [B] bool.
        trace: [evaluations, B] the residuals of all evaluations where `keep_trace`, else None. A
            sample that is done keeps its last one.
        evaluations: calls of f that the solver made. Recording f for the backward is not among
            them: once more for ift, shine and jfb, `phantom_steps` times for phantom.
        backward: the same of the last backward solve, None before it has run. Only
            `backward="ift"` has such a solve, and a compiled one does not report it.
    """

    steps: Tensor
    residual: Tensor
    converged: Tensor
    trace: Tensor | None
    evaluations: int
    backward: EquilibriumInfo | None = None


def info_of(solution: Solution) -> EquilibriumInfo:
    return EquilibriumInfo(
        steps=solution.steps,
        residual=solution.residual,
        converged=solution.converged,
        trace=solution.trace,
        evaluations=solution.evaluations,
    )


def warn_unless_converged(info: EquilibriumInfo, options: SolverOptions, what: str) -> None:
    """Warn at the caller's line. Reads the flags on the host."""
    samples, failed = info.converged.numel(), int((~info.converged).sum())
    if not failed:
        return
    worst = float(info.residual[~info.converged].max())
    warnings.warn(
        f"{OP}: {what} of {failed} of {samples} samples has not converged after "
        f"{info.evaluations} evaluations; the worst residual is {worst:.3g} (solver "
        f"'{options.solver}', atol {options.atol:g}, rtol {options.rtol:g}, max_iter "
        f"{options.max_iter})",
        EquilibriumWarning,
        stacklevel=_levels_to_the_caller(),
    )


def _levels_to_the_caller() -> int:
    """How far up the first frame is that is neither this package's nor torch's."""
    frame, levels = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, levels = frame.f_back, levels + 1
    return levels
