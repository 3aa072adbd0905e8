"""The backward modes of `equilibrium`, over flat states [B, d]."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from ppmoe_ops.ops.equilibrium.equilibrium_info import (
    EquilibriumInfo,
    info_of,
    warn_unless_converged,
)
from ppmoe_ops.ops.equilibrium.mixing import DIVERGED
from ppmoe_ops.ops.equilibrium.options import OP, SolverOptions
from ppmoe_ops.ops.equilibrium.recording import Recording
from ppmoe_ops.ops.equilibrium.solvers import Secant, Solution, run

BACKWARDS = ("ift", "phantom", "jfb", "shine", "unroll")

State = Callable[[Tensor], Tensor]  # f over all samples

_CHANGED = (
    f"{OP}: f gives another result than it gave in the forward (dropout, or an attribute that was "
    "set anew); allowed: the same one, where gradients through 'ift' are differentiated"
)

# A vector-Jacobian product in a short dtype carries its rounding; no solve gets below that.
_ADJOINT_RTOL = {
    torch.float64: 1e-10,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


def adjoint_options(dtype: torch.dtype) -> SolverOptions:
    """What `backward_options=None` means where f computes in `dtype`."""
    return SolverOptions(rtol=_ADJOINT_RTOL[dtype])


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Solvers keep their own precision; f and its graph have theirs."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)


class _Start(torch.autograd.Function):
    """The point that f is recorded at: part of the graph, but the end of its gradient.

    A leaf would be given the gradient that passes through it in every backward.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, anchor: Tensor) -> Tensor:
        return z.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class _Implicit(torch.autograd.Function):
    """x as it is; the gradient g that comes back becomes `solve(g)`.

    Where gradients are recorded it becomes `solve_twice(g, y)`, y being the result.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, solve: State, solve_twice: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.solve, ctx.solve_twice = solve, solve_twice
        ctx.set_materialize_grads(False)
        y = x.detach()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:  # `Recording.replace` has ended it
            return None, None, None
        with without_autocast(grad.device):
            if torch.is_grad_enabled():
                solved = ctx.solve_twice(grad, ctx.saved_tensors[0])
            else:
                solved = ctx.solve(grad)
        return solved, None, None


class _Refused(torch.autograd.Function):
    """Tied to all that x came from, so that no second derivative passes by unnoticed."""

    @staticmethod
    def forward(ctx: Any, solved: Tensor, x: Tensor) -> Tensor:
        return solved.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            f"{OP}: backward is 'shine', which has no second derivative; allowed: ift, phantom, "
            "jfb, unroll (where gradients are differentiated)"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a backward solve goes, and whom it reports to."""

    options: SolverOptions
    info: EquilibriumInfo
    bounded: bool
    warn: bool

    def report(self, found: EquilibriumInfo) -> None:
        self.info.backward = found
        if self.warn and not self.bounded:
            warn_unless_converged(found, self.options, "the backward solve")


def ift(f: State, solution: Solution, plan: Plan) -> Tensor:
    """f at the solution; its gradient g becomes w = g + J^T w, from the graph of this one call."""
    anchor = torch.zeros((), device=solution.z.device, requires_grad=True)
    z = _apply(_Start, solution.z, anchor)
    device = z.device.type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with _kept_here():
        x = f(z)
    if not x.requires_grad:  # a constant
        return x
    recorded = Recording(get_gradient_edge(z), get_gradient_edge(x))
    if not recorded.depends():
        return x.detach()
    lost = torch.isinf(solution.residual)

    def product(w: Tensor) -> Tensor | None:
        return torch.autograd.grad(
            [recorded.end], [recorded.start], [w], retain_graph=True, allow_unused=True
        )[0]

    def solve(grad: Tensor) -> Tensor:
        recorded.forget()
        w, found, _ = _adjoint(product, grad, lost, plan)
        plan.report(found)
        return w

    def solve_twice(grad: Tensor, y: Tensor) -> Tensor:
        """w with a graph, and f's graph made to hand on gradients that have one."""
        recorded.forget()
        point = solution.z + (y - y.detach())  # with the history of the solution
        with torch.autocast(device, enabled=autocast[0], dtype=autocast[1]):
            again = f(point)
        if not _same(again, y):
            raise RuntimeError(_CHANGED)

        def turned(w: Tensor) -> Tensor | None:
            recording = torch.is_grad_enabled()
            return torch.autograd.grad(
                again, point, w, retain_graph=True, create_graph=recording, allow_unused=True
            )[0]

        _, found, adjoint = _adjoint(turned, grad, lost, plan)
        plan.report(found)
        w = ift(_linear(turned, grad), adjoint, dataclasses.replace(plan, info=found, warn=False))
        w = w.masked_fill((~found.converged & torch.isinf(found.residual))[:, None], torch.nan)
        ends = get_gradient_edge(point), get_gradient_edge(again)
        recorded.replace(*ends, w.to(grad.dtype))
        return w.detach().to(grad.dtype)

    return _apply(_Implicit, x, solve, solve_twice)


def _same(one: Tensor, other: Tensor) -> bool:
    """Up to what the order of a sum changes, and no more."""
    if not other.numel():
        return True
    most = 1e-2 * float(other.detach().nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(one, other, rtol=1e-2, atol=most, equal_nan=True)


def _linear(product: Callable[[Tensor], Tensor | None], grad: Tensor) -> State:
    """The map whose fixed point is the adjoint, w -> grad + product(w), in float32 or wider."""
    right = grad if grad.dtype == torch.float64 else grad.float()

    def mapped(w: Tensor) -> Tensor:
        turned = product(w.to(grad.dtype))
        return right.clone() if turned is None else right + turned

    return mapped


def _adjoint(
    product: Callable[[Tensor], Tensor | None], grad: Tensor, lost: Tensor, plan: Plan
) -> tuple[Tensor, EquilibriumInfo, Solution]:
    """w = grad + product(w); NaN for samples that were lost, unless nothing is asked of them."""
    mapped, first = _linear(product, grad.detach()), grad.detach()
    first = first if first.dtype == torch.float64 else first.float()
    solution = run(lambda w, _: mapped(w), first, plan.options, bounded=plan.bounded)
    idle = (grad == 0).all(1)
    lost = (lost | torch.isinf(solution.residual)) & ~idle
    w = torch.where(idle[:, None], 0, solution.x).masked_fill(lost[:, None], torch.nan)
    found = info_of(solution)
    found.converged = (found.converged | idle) & ~lost
    found.residual = torch.where(lost, torch.inf, found.residual)
    return w.to(grad.dtype), found, solution


class _TracedImplicit(torch.autograd.Function):
    """`_Implicit` for a compiler: f is evaluated again, as graphs of calls cannot be captured."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, residual: Tensor, f: State, plan: Plan) -> Tensor:
        ctx.save_for_backward(z, residual)
        ctx.f, ctx.plan = f, plan
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        z, residual = ctx.saved_tensors
        pulled: Any = torch.func.vjp(ctx.f, z)

        def product(w: Tensor) -> Tensor:
            return pulled[1](w)[0]

        return _adjoint(product, grad, torch.isinf(residual), ctx.plan)[0], None, None, None, None


def traced_ift(f: State, solution: Solution, plan: Plan) -> Tensor:
    """`ift` inside `torch.compile`, bounded."""
    z = solution.z.detach()
    return _apply(_TracedImplicit, f(z), z, solution.residual, f, plan)


def shine(f: State, solution: Solution, secant: Secant) -> Tensor:
    """f at the solution; its gradient g becomes H^T g with Broyden's H = I + sum_j u_j v_j^T."""
    x = f(solution.z)
    if not x.requires_grad:
        return x
    lost = torch.isinf(solution.residual)

    def solve(grad: Tensor) -> Tensor:
        wide = secant.u.dtype
        shares = torch.einsum("bld,bd->bl", secant.u, grad.to(wide))
        w = grad.to(wide) + torch.einsum("bl,bld->bd", shares, secant.v)
        lost_here = lost & (grad != 0).any(1)
        return w.masked_fill(lost_here[:, None], torch.nan).to(grad.dtype)

    def refused(grad: Tensor, y: Tensor) -> Tensor:
        return _apply(_Refused, solve(grad.detach()), y)

    return _apply(_Implicit, x, solve, refused)


def phantom(f: State, solution: Solution, steps: int, damping: float) -> Tensor:
    """`steps` damped steps from the solution, recorded."""
    z = solution.z
    for _ in range(steps):
        z = z + damping * (f(z) - z)
    return z


def jfb(f: State, solution: Solution) -> Tensor:
    """One step from the solution, recorded."""
    return f(solution.z)


def unroll(
    f: State, z: Tensor, options: SolverOptions, *, keep_trace: bool, bounded: bool
) -> tuple[Tensor, Solution]:
    """Damped plain iteration, recorded whole; stops as `run` does."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    samples, device = z.size(0), z.device
    best_z = best_x = z
    best = torch.full((samples,), torch.inf, dtype=wide, device=device)
    steps = torch.zeros(samples, dtype=torch.int32, device=device)
    converged = torch.zeros(samples, dtype=torch.bool, device=device)
    diverged = torch.zeros_like(converged)
    limit, last, trace = best, best, []
    for step in range(options.max_iter):
        active = ~(converged | diverged)
        x = f(z)
        with torch.no_grad():
            norm = x.to(wide).norm(dim=1)
            residual = (x.to(wide) - z.to(wide)).norm(dim=1)
            if step == 0:
                limit = DIVERGED * (z.to(wide).norm(dim=1) + norm)
            steps = steps + active
            gone = active & ~(residual.isfinite() & (residual <= limit))
            better = active & ((residual < best) if step else torch.ones_like(active))
            best = torch.where(better, residual, best)
            last = torch.where(active, residual, last)
            trace.append(last)
            converged = converged | (
                active & ~gone & (residual <= options.atol + options.rtol * norm)
            )
            diverged = diverged | gone
        best_x = torch.where(better[:, None], x, best_x)
        best_z = torch.where(better[:, None], z, best_z)
        active = ~(converged | diverged)
        if not bounded and not bool(active.any()):
            break
        z = torch.where(active[:, None], z + options.damping * (x - z), z)
    best = best.masked_fill(diverged, torch.inf)
    kept = torch.stack(trace) if keep_trace else None
    solution = Solution(best_z.detach(), best_x.detach(), steps, best, converged, kept, len(trace))
    return best_x, solution


def _kept_here() -> contextlib.AbstractContextManager[Any]:
    """Keep what f saves in memory, where the caller wants it packed away.

    The backward solve walks the graph of f many times. A checkpoint would compute its whole region
    again for every walk.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None and top(False) is None:
        return contextlib.nullcontext()
    return saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
