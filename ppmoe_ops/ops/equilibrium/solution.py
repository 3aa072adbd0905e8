"""What a solve is asked for and gives, and the bookkeeping that all solvers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ppmoe_ops.ops.equilibrium.anderson_mix import (
    ANDERSON_MIX,
    BEST,
    CONVERGED,
    RESIDUAL,
    RUNNING,
    STATUS,
    STEPS,
    Work,
    buffers,
)
from ppmoe_ops.ops.equilibrium.options import OP, SolverOptions

# f(z, index): z [A, d] holds the samples that `index` [A] (int64) names, or all of them where it is
# None, as it always is without `compact`. Called without recording a graph. Its result has the
# shape of z; it is read before the next call, and never written.
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
        steps: [B] int32, evaluations of f that the sample took part in while it was not done; a
            Jacobian-vector product counts as one.
        residual: [B] |f(z) - z|_2, float32 (float64 for float64); inf where the sample diverged.
        converged: [B] bool.
        trace: [evaluations, B] the residual after every evaluation (a sample that is done keeps
            its last one), or None.
        evaluations: calls of f, on all samples or on some.
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


def some(x: Tensor, rows: Tensor | None) -> Tensor:
    """The samples `rows` of x."""
    return x if rows is None else x.index_select(0, rows)


def among(x: Tensor, rows: Tensor | None, rest: Tensor) -> Tensor:
    """`rest` with x as the samples `rows`."""
    return x if rows is None else rest.index_copy(0, rows, x)


_LONGEST = 300.0  # a step, in units of the plain one


def proportionate(step: Tensor, g: Tensor) -> Tensor:
    """The step; g where it overflowed, and cut where it is out of all proportion to g."""
    norms = [torch.linalg.vector_norm(each, dim=1) for each in (g, step)]
    share = _LONGEST * norms[0] / norms[1].clamp_min(torch.finfo(step.dtype).tiny)
    return torch.where(norms[1].isfinite()[:, None], step * share.clamp_max(1)[:, None], g)


# The work space of the last large solve on a CPU, for the next one of the same size: fresh memory
# costs more than the passes over it, page by page.
_KEPT: list[Work] = []
_LEAST_KEPT, _MOST_KEPT = 1 << 20, 1 << 27  # bytes


def _plain(tensor: Tensor) -> bool:
    """Whether it is memory, and nothing that records or stands for something."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _take_work(z0: Tensor, history: int) -> Work | None:
    if torch.compiler.is_compiling() or not _plain(z0):
        return None
    try:
        work = _KEPT.pop()
    except IndexError:
        return None
    z, _, _, df = work
    fits = (
        z.shape == z0.shape and z.dtype == z0.dtype and df.size(1) == history + 1
        and z.is_inference() == torch.is_inference_mode_enabled()
    )  # fmt: skip
    return work if fits else None


def _keep_work(work: Work) -> None:
    if torch.compiler.is_compiling() or not _plain(work[0]):
        return
    if _LEAST_KEPT <= sum(each.nbytes for each in work) <= _MOST_KEPT:
        _KEPT[:] = [work]


class Track:
    """The points of a solve, the residual of each, and which samples still run.

    `anderson_mix` judges every evaluation. With a history it makes the next points too; without
    one it takes a plain step, which a solver may then replace by writing `z`.
    """

    def __init__(
        self, f: Function, z0: Tensor, options: SolverOptions, history: int, *,
        compact: bool, keep_trace: bool, bounded: bool,
    ) -> None:  # fmt: skip
        self.f, self.options, self.bounded = f, options, bounded
        self.z, self.before, *self.state = buffers(z0, history, _take_work(z0, history))
        self.work: Work = self.z, self.before, self.state[2], self.state[3]
        self.counters, self.values = self.state[-1], self.state[-2]
        self.wide = self.state[3].dtype
        self.rows: Tensor | None = None  # the samples that run, where not all do
        self.index = torch.arange(z0.size(0), device=z0.device) if compact else None
        self.count = z0.size(0)
        self.trace: list[Tensor] | None = [] if keep_trace else None
        self.evaluations = 0
        self.products: Tensor | None = None  # steps that were Jacobian-vector products

    @property
    def running(self) -> Tensor:
        """[B] bool."""
        return self.counters[:, STATUS] == RUNNING

    @property
    def residual(self) -> Tensor:
        """[B] of the last evaluation."""
        return self.values[:, RESIDUAL].to(self.wide, copy=True)

    def call(self, z: Tensor, rows: Tensor | None) -> Tensor:
        """f at points of the samples `rows`, or of all."""
        self.evaluations += 1
        value = self.f(z, self.index if rows is None else rows)
        if value.shape != z.shape:
            raise ValueError(
                f"{OP}: f returned shape {list(value.shape)}; expected {list(z.shape)} (as z)"
            )
        return value if value.dtype == z.dtype else value.to(z.dtype)

    def evaluate(self) -> Tensor:
        """f at the current points of the samples that run."""
        return self.call(some(self.z, self.rows), self.rows)

    def judge(self, value: Tensor, *, damping: float = 1.0) -> bool:
        """Take f at the current points and go on to the next ones; whether there is more to do."""
        options = self.options
        last = self.evaluations >= options.max_iter
        running = ANDERSON_MIX.overload(
            value, self.z, self.before, *self.state, self.rows, options.atol, options.rtol,
            damping, last,
        )  # fmt: skip
        self.z, self.before = self.before, self.z
        self.note()
        if last or self.bounded:
            return not last
        count = int(running)
        if self.index is not None and 0 < count < self.count:
            self.rows, self.count = self.running.nonzero()[:, 0], count
        return count > 0

    def note(self) -> None:
        """Put the residuals of this moment into the trace."""
        if self.trace is not None:
            self.trace.append(self.residual)

    def solution(self, secant: Secant | None = None) -> Solution:
        _keep_work(self.work)
        steps = self.counters[:, STEPS]
        return Solution(
            z=self.state[0],
            x=self.state[1],
            steps=steps.clone() if self.products is None else steps + self.products,
            residual=self.values[:, BEST].to(self.wide, copy=True),
            converged=self.counters[:, STATUS] == CONVERGED,
            trace=None if self.trace is None else torch.stack(self.trace),
            evaluations=self.evaluations,
            secant=secant,
        )
