"""Solvers of z = f(z) over flat states [B, d], every sample on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ppmoe_ops.ops.equilibrium.mixing import DIVERGED
from ppmoe_ops.ops.equilibrium.options import SolverOptions

# f(z, index): z [A, d] holds the samples that `index` [A] (int64) names, or all of them where it is
# None, as it always is without `compact`. Called without recording a graph. Its result has the
# shape of z; what it holds is read before the next call, and never written.
Function = Callable[[Tensor, Tensor | None], Tensor]


@dataclasses.dataclass(frozen=True)
class Secant:
    """Broyden's inverse of I - df/dz: H = I + sum_j u_j v_j^T; u, v [B, L, d], zero if unused."""

    u: Tensor
    v: Tensor


@dataclasses.dataclass(frozen=True)
class Solution:
    """What a solve found.

    Attributes:
        z: [B, d] the evaluated point with the smallest residual, of every sample.
        x: [B, d] f(z), as it was evaluated then.
        steps: [B] int32, evaluations of f that the sample took part in while it was not done.
        residual: [B] |f(z) - z|_2, float32 (float64 for float64); inf where the sample diverged.
        converged: [B] bool.
        trace: [evaluations, B] the residual of every evaluation (a sample that is done keeps its
            last one), or None.
        evaluations: calls of f.
        secant: what Broyden learnt, or None.
    """

    z: Tensor
    x: Tensor
    steps: Tensor
    residual: Tensor
    converged: Tensor
    trace: Tensor | None
    evaluations: int
    secant: Secant | None = None


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

    compact: f is given only the samples that are not done yet.
    bounded: always `max_iter` evaluations, without a host read and without data-dependent control
        flow, so that a compiler captures it as one graph; excludes `compact`.
    """
    if bounded and compact:
        raise ValueError("equilibrium: compact is True; allowed: False where bounded is True")
    # Placeholder of the fused solvers: plain iteration.
    wide = torch.float64 if z0.dtype == torch.float64 else torch.float32
    z = z0.clone()
    best_z, best_x = z0.clone(), z0.clone()
    best = torch.full((z0.size(0),), float("inf"), dtype=wide, device=z0.device)
    steps = torch.zeros(z0.size(0), dtype=torch.int32, device=z0.device)
    converged = torch.zeros(z0.size(0), dtype=torch.bool, device=z0.device)
    diverged = torch.zeros_like(converged)
    limit, last, trace, evaluations = best, best, [], 0
    for k in range(options.max_iter):
        active = ~(converged | diverged)
        if compact and not bool(active.all()):
            index = active.nonzero()[:, 0]
            x = z.clone()
            x[index] = f(z[index], index)
        else:
            x = f(z, None)
        evaluations += 1
        norm = x.to(wide).norm(dim=1)
        r = (x.to(wide) - z.to(wide)).norm(dim=1)
        if k == 0:
            limit = DIVERGED * (z.to(wide).norm(dim=1) + norm)
        steps += active
        better = active & ((r < best) | torch.tensor(k == 0))
        best_z, best_x = (
            torch.where(better[:, None], new, old) for new, old in ((z, best_z), (x, best_x))
        )
        best = torch.where(better, r, best)
        last = torch.where(active, r, last)
        trace.append(last)
        now = active & ~(r.isfinite() & (r <= limit))
        diverged = diverged | now
        converged = converged | (active & ~now & (r <= options.atol + options.rtol * norm))
        active = ~(converged | diverged)
        z = torch.where(active[:, None], z + options.damping * (x - z), z)
        if not bounded and not bool(active.any()):
            break
    residual = torch.where(diverged, float("inf"), best)
    kept = torch.stack(trace) if keep_trace else None
    return Solution(best_z, best_x, steps, residual, converged, kept, evaluations)
