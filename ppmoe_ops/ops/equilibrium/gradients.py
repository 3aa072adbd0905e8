"""The backward modes of `equilibrium`, over flat states [B, d]."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ppmoe_ops.ops.equilibrium.equilibrium_info import (
    EquilibriumInfo,
    info_of,
    warn_unless_converged,
)
from ppmoe_ops.ops.equilibrium.mixing import DIVERGED
from ppmoe_ops.ops.equilibrium.options import OP, SolverOptions
from ppmoe_ops.ops.equilibrium.solvers import Secant, Solution, run

BACKWARDS = ("ift", "phantom", "jfb", "shine", "unroll")

State = Callable[[Tensor], Tensor]  # f over all samples

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
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


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
    """x as it is; the gradient g that comes back becomes `solve(g)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, solve: State, mode: str) -> Tensor:
        ctx.x, ctx.solve, ctx.mode = x, solve, mode
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad(), without_autocast(grad.device):
            solved = ctx.solve(grad)
        if torch.is_grad_enabled():
            solved = _apply(_Refused, solved, ctx.x, ctx.mode)
        return solved, None, None


class _Refused(torch.autograd.Function):
    """Tied to all that x came from, so that no second derivative passes by unnoticed."""

    @staticmethod
    def forward(ctx: Any, solved: Tensor, x: Tensor, mode: str) -> Tensor:
        ctx.mode = mode
        return solved.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            f"{OP}: backward '{ctx.mode}' has no second derivative, as its solve is not recorded; "
            "allowed: backward 'phantom', 'jfb' or 'unroll' where gradients are differentiated"
        )


def _depends(edge: GradientEdge, start: Any) -> bool:
    """Whether anything but `start` wants a gradient: a parameter or input that f closes over."""
    pending: list[Any] = [edge.node]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen or node is start:
            continue
        # Nodes older than the recording are inputs of f that have a history.
        if hasattr(node, "variable") or node._sequence_nr() < start._sequence_nr():
            return True
        seen.add(node)
        pending.extend(each for each, _ in node.next_functions)
    return False


def ift(
    f: State,
    solution: Solution,
    options: SolverOptions,
    info: EquilibriumInfo,
    *,
    bounded: bool,
    warn: bool,
) -> Tensor:
    """f at the solution; its gradient g becomes w = g + J^T w, from the graph of this one call."""
    anchor = torch.zeros((), device=solution.z.device, requires_grad=True)
    z = _apply(_Start, solution.z, anchor)
    with _kept_here():
        x = f(z)
    start, end = get_gradient_edge(z), get_gradient_edge(x)
    if not _depends(end, start.node):
        return x.detach()
    dtype, lost = x.dtype, torch.isinf(solution.residual)

    def product(w: Tensor) -> Tensor | None:
        return torch.autograd.grad(
            [end], [start], [w.to(dtype)], retain_graph=True, allow_unused=True
        )[0]

    def solve(grad: Tensor) -> Tensor:
        adjoint, found = _adjoint(product, grad, lost, options, bounded)
        info.backward = found
        if warn and not bounded:
            warn_unless_converged(found, options, "the backward solve")
        return adjoint

    return _apply(_Implicit, x, solve, "ift")


def _adjoint(
    product: Callable[[Tensor], Tensor | None],
    grad: Tensor,
    lost: Tensor,
    options: SolverOptions,
    bounded: bool,
) -> tuple[Tensor, EquilibriumInfo]:
    """w = grad + product(w); NaN for samples that were lost, unless nothing is asked of them."""
    right = grad if grad.dtype == torch.float64 else grad.float()

    def adjoint(w: Tensor, index: Tensor | None) -> Tensor:
        turned = product(w)
        return right.clone() if turned is None else right + turned

    solution = run(adjoint, right, options, bounded=bounded)
    idle = (right == 0).all(1)
    lost = (lost | torch.isinf(solution.residual)) & ~idle
    w = torch.where(idle[:, None], 0, solution.x).masked_fill(lost[:, None], torch.nan)
    found = info_of(solution)
    found.converged = (found.converged | idle) & ~lost
    return w.to(grad.dtype), found


class _TracedImplicit(torch.autograd.Function):
    """`_Implicit` for a compiler: f is evaluated again, as graphs of calls cannot be captured."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, residual: Tensor, f: State, options: SolverOptions
    ) -> Tensor:
        ctx.save_for_backward(z, residual)
        ctx.f, ctx.options = f, options
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        z, residual = ctx.saved_tensors
        pulled: Any = torch.func.vjp(ctx.f, z)

        def product(w: Tensor) -> Tensor:
            return pulled[1](w.to(z.dtype))[0]

        w, _ = _adjoint(product, grad, torch.isinf(residual), ctx.options, True)
        return w, None, None, None, None


def traced_ift(f: State, solution: Solution, options: SolverOptions) -> Tensor:
    """`ift` inside `torch.compile`, bounded."""
    z = solution.z.detach()
    return _apply(_TracedImplicit, f(z), z, solution.residual, f, options)


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

    return _apply(_Implicit, x, solve, "shine")


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
