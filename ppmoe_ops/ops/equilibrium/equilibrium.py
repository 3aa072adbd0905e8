"""`equilibrium`: the fixed point of any differentiable function, and gradients through it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ppmoe_ops import _checks as check
from ppmoe_ops.ops.equilibrium import gradients
from ppmoe_ops.ops.equilibrium.equilibrium_info import (
    EquilibriumInfo,
    info_of,
    warn_unless_converged,
)
from ppmoe_ops.ops.equilibrium.options import OP, SolverOptions
from ppmoe_ops.ops.equilibrium.solvers import run

_THIS: Any = sys.modules[__name__]


def equilibrium(
    f: Callable[..., Any],
    z0: Any,
    *,
    solver: str = "anderson",
    atol: float = 0.0,
    rtol: float = 1e-3,
    max_iter: int = 50,
    history: int = 6,
    damping: float = 1.0,
    compact: bool = False,
    keep_trace: bool = False,
    backward: str = "ift",
    backward_options: SolverOptions | None = None,
    phantom_steps: int = 5,
    phantom_damping: float = 0.5,
    bounded: bool = False,
    warn: bool = True,
) -> tuple[Any, EquilibriumInfo]:
    """Solve z = f(z) for every sample on its own, and differentiate the solution.

    A sample is what stands at one index of the first axis. It has converged when
    |f(z) - z|_2 <= atol + rtol |f(z)|_2 over all of its elements, and then stays as it is, whatever
    the others do. What is returned is x = f(z) at the evaluated z with the smallest residual.

    Args:
        f: called as f(z) with a state like `z0`; returns the next one, of the same structure and
            shapes. It must treat samples on their own. With `compact` it is called as f(z, index):
            z has the samples that `index` (int64, ascending) names, so that f can cut its other
            inputs to them (`u[index]`).
        z0: the first point, a tensor [B, ...] or a tuple (list, dict) of such tensors with one B,
            float32, bfloat16, float16 or float64; several make one state in the widest of their
            dtypes. A former solution is a warm start. Norms are taken in float32 or wider.
        solver: `"fixed_point"`, `"anderson"`, `"broyden"` or `"newton_krylov"`.
        atol, rtol: the tolerance, see above. In bfloat16 and float16 f carries rounding errors of
            1e-2 and 1e-3 of |f(z)|; a smaller `rtol` may never be met.
        max_iter: the most evaluations of f, 1 or more.
        history: how much the solver remembers, see `SolverOptions`.
        damping: the share of the new value in a step, in (0, 1].
        compact: evaluate f in the forward solve for those samples alone that are not done. Not
            with `bounded` or `backward="unroll"`.
        keep_trace: keep the residuals of all evaluations.
        backward: how gradients are taken, with J = df/dz at the solution and g the gradient of x:
            `"ift"`, exact: solves w = g + J^T w, then w^T df/dtheta. `"shine"`: w from the inverse
            that Broyden's forward solve learnt, without a backward solve; needs
            `solver="broyden"`. `"jfb"`: w = g. `"phantom"`: `phantom_steps` damped steps from z are
            recorded, and the last state is what is returned. `"unroll"`: records the whole solve,
            plain damped iteration; needs `solver="fixed_point"`.
        backward_options: the solver of the backward, for `"ift"` alone. None is Anderson with up to
            50 evaluations and rtol 1e-6 (float64: 1e-10; where f computes in float16 or bfloat16,
            under autocast too: 2e-3 and 1e-2).
        phantom_steps, phantom_damping: for `"phantom"`; 1 or more, and in (0, 1].
        bounded: always `max_iter` evaluations (those of a converged sample change nothing), without
            a host synchronisation or a branch on data, so that `torch.compile(fullgraph=True)` and
            CUDA graphs capture forward and backward. The backward solve is bounded too. Never
            warns.
        warn: warn (`EquilibriumWarning`) where samples have not converged, forward or backward.

    Returns:
        x in the structure, shapes and dtypes of `z0`, and an `EquilibriumInfo` with steps,
        residual, converged and trace per sample.

    Raises:
        ValueError: an argument that is not as above, or an f whose result does not match `z0`.
        RuntimeError: a second derivative through `"shine"`; through `"ift"` where f gives another
            result when it is called again, as it is for that, and inside `torch.compile`.

    Gradient: to every tensor that f closes over; to `z0` with `"unroll"` alone. NaN for samples
    whose residual is inf, and for samples whose backward solve diverges.
    Saved for backward: the graph of f, recorded once (phantom: `phantom_steps` times, unroll: every
    evaluation), however many steps were made; shine keeps 2 * history * d elements per sample of d
    elements too. Under `torch.utils.checkpoint(use_reentrant=False)` that one graph of ift stays in
    memory. Inside `torch.compile` nothing but z is kept, and f is evaluated again. On a CPU the
    work space of the last large solve, up to 128 MiB, stays for the next one of its size.

    Source: deep equilibrium models (arXiv 1909.01377); Anderson's and Broyden's methods; jfb (arXiv
    2103.12803), phantom gradients (arXiv 2111.05177), shine (arXiv 2106.00553).

    Example:
        >>> import torch, ppmoe_ops
        >>> u = torch.tensor([[1.0], [3.0]], requires_grad=True)
        >>> x, info = ppmoe_ops.equilibrium(lambda z: z / 2 + u, torch.zeros(2, 1), rtol=1e-5)
        >>> x.detach().round(decimals=3).tolist(), info.converged.tolist()
        ([[2.0], [6.0]], [True, True])
        >>> x.sum().backward()  # dx/du = 1 / (1 - 1/2)
        >>> u.grad.round(decimals=3).tolist()
        [[2.0], [2.0]]
    """
    options = SolverOptions(solver, atol, rtol, max_iter, history, damping)
    _check_modes(f, options, backward, backward_options, phantom_steps, phantom_damping)
    for name, flag in (
        ("compact", compact),
        ("keep_trace", keep_trace),
        ("bounded", bounded),
        ("warn", warn),
    ):
        if not isinstance(flag, bool):
            raise ValueError(f"{OP}: {name} is {flag!r}; allowed: True, False")
    if compact and (bounded or backward == "unroll"):
        why = "bounded is True" if bounded else "backward is 'unroll'"
        raise ValueError(f"{OP}: compact is True; allowed: False ({why})")
    eagerly = torch.compiler.is_compiling() and not bounded
    solve = _THIS._solve_eagerly if eagerly else _solve
    return solve(
        _Problem(f, z0, compact),
        options,
        keep_trace,
        backward,
        backward_options,
        (phantom_steps, phantom_damping),
        bounded,
        warn,
    )


def _check_modes(
    f: object,
    options: SolverOptions,
    backward: str,
    backward_options: object,
    phantom_steps: object,
    phantom_damping: object,
) -> None:
    if not callable(f):
        raise ValueError(f"{OP}: f is {f!r}; allowed: a function")
    check.choice(OP, "backward", backward, gradients.BACKWARDS)
    needed = {"shine": "broyden", "unroll": "fixed_point"}.get(backward, options.solver)
    if options.solver != needed:
        raise ValueError(
            f"{OP}: solver is '{options.solver}'; allowed: {needed} (backward is '{backward}')"
        )
    if backward_options is not None and not isinstance(backward_options, SolverOptions):
        raise ValueError(
            f"{OP}: backward_options is {backward_options!r}; allowed: SolverOptions, None"
        )
    if backward_options is not None and backward != "ift":
        raise ValueError(
            f"{OP}: backward_options is {backward_options!r}; allowed: None (backward is "
            f"'{backward}', which solves nothing)"
        )
    if isinstance(phantom_steps, bool) or not isinstance(phantom_steps, int) or phantom_steps < 1:
        raise ValueError(f"{OP}: phantom_steps is {phantom_steps!r}; allowed: 1 or more")
    number = isinstance(phantom_damping, (int, float)) and not isinstance(phantom_damping, bool)
    if not number or not 0 < phantom_damping <= 1:  # type: ignore[operator]
        raise ValueError(
            f"{OP}: phantom_damping is {phantom_damping!r}; allowed: above 0, at most 1"
        )


class _Problem:
    """f and z0 as the solvers see them: one flat state [B, d]."""

    def __init__(self, f: Callable[..., Any], z0: Any, compact: bool) -> None:
        leaves, self.spec = tree_flatten(z0)
        self._check_leaves(leaves)
        self.f, self.compact, self.alone = f, compact, isinstance(z0, Tensor)
        self.shapes = [each.shape[1:] for each in leaves]
        self.dtypes = [each.dtype for each in leaves]
        self.widths = [math.prod(shape) for shape in self.shapes]
        self.dtype = self.dtypes[0]
        for each in self.dtypes[1:]:
            self.dtype = torch.promote_types(self.dtype, each)
        self.samples, self.device = leaves[0].size(0), leaves[0].device
        self.start = self.join(leaves)

    def _check_leaves(self, leaves: Sequence[Any]) -> None:
        if not leaves:
            raise ValueError(f"{OP}: z0 has no tensor; allowed: a tensor or a tuple of tensors")
        for each in leaves:
            if not isinstance(each, Tensor):
                raise ValueError(f"{OP}: z0 has a {type(each).__name__}; allowed: tensors")
            if each.dim() < 1:
                raise ValueError(f"{OP}: z0 has a tensor of 0 axes; expected 1 or more: [B, ...]")
            check.dtype(OP, "z0", each, check.FLOATS)
            check.size(OP, "z0", "B", each.size(0), leaves[0].size(0), "as its first tensor")
            if each.device != leaves[0].device:
                raise ValueError(
                    f"{OP}: z0 has a tensor on {each.device}; expected {leaves[0].device} (as its "
                    "first tensor)"
                )

    def join(self, leaves: Sequence[Tensor]) -> Tensor:
        flat = [
            each.reshape(each.size(0), width).to(self.dtype)
            for each, width in zip(leaves, self.widths, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

    def split(self, flat: Tensor) -> Any:
        if self.alone:
            return flat.view(flat.size(0), *self.shapes[0])
        leaves = [
            part.reshape(flat.size(0), *shape).to(dtype)
            for part, shape, dtype in zip(
                flat.split(self.widths, 1), self.shapes, self.dtypes, strict=True
            )
        ]
        return tree_unflatten(leaves, self.spec)

    def call(self, flat: Tensor, index: Tensor | None) -> Tensor:
        """f over the samples of `flat`."""
        state = self.split(flat)
        if self.compact:
            if index is None:
                index = torch.arange(flat.size(0), device=flat.device)
            came = self.f(state, index)
        else:
            came = self.f(state)
        # What is checked here costs time in every step.
        if self.alone and isinstance(came, Tensor):
            leaves = [came]
        else:
            leaves, spec = tree_flatten(came)
            if spec != self.spec:
                raise ValueError(f"{OP}: f returns {spec}; expected {self.spec} (as z0)")
        self._check_result(leaves, flat.size(0))
        # Under autocast f may answer in another dtype than it was asked in.
        return self.join([each.to(dtype) for each, dtype in zip(leaves, self.dtypes, strict=True)])

    def whole(self, flat: Tensor) -> Tensor:
        return self.call(flat, None)

    def _check_result(self, leaves: Sequence[Any], samples: int) -> None:
        for each, shape in zip(leaves, self.shapes, strict=True):
            if not isinstance(each, Tensor):
                raise ValueError(f"{OP}: f returns a {type(each).__name__}; allowed: tensors")
            if each.shape != (samples, *shape):
                raise ValueError(
                    f"{OP}: f returns shape {list(each.shape)}; expected {[samples, *shape]} "
                    "(as z0)"
                )
            check.dtype(OP, "the result of f", each, check.FLOATS)


def _solve(
    problem: _Problem,
    options: SolverOptions,
    keep_trace: bool,
    backward: str,
    backward_options: SolverOptions | None,
    phantom: tuple[int, float],
    bounded: bool,
    warn: bool,
) -> tuple[Any, EquilibriumInfo]:
    if backward == "unroll":
        x, solution = gradients.unroll(
            problem.whole, problem.start, options, keep_trace=keep_trace, bounded=bounded
        )
    else:
        call = _with_autocast(problem.call, problem.device)
        with torch.no_grad(), gradients.without_autocast(problem.device):
            solution = run(
                call,
                problem.start.detach(),
                options,
                compact=problem.compact,
                keep_trace=keep_trace,
                bounded=bounded,
            )
        x = solution.x
    info = info_of(solution)
    if warn and not bounded:
        warn_unless_converged(info, options, "the solve")
    if backward != "unroll" and torch.is_grad_enabled():
        if not torch.compiler.is_compiling():
            # A cast made without a graph must not serve with one; torch 2.13 sees to it itself.
            torch.clear_autocast_cache()
        f = problem.whole
        if backward == "phantom":
            x = gradients.phantom(f, solution, *phantom)
        elif backward == "jfb":
            x = gradients.jfb(f, solution)
        elif backward == "shine":
            assert solution.secant is not None
            x = gradients.shine(f, solution, solution.secant)
        else:
            asked = backward_options or gradients.adjoint_options(_compute_dtype(problem))
            plan = gradients.Plan(asked, info, bounded, warn)
            ift = gradients.traced_ift if torch.compiler.is_compiling() else gradients.ift
            x = ift(f, solution, plan)
    return problem.split(x), info


def __getattr__(name: str) -> Any:
    # A graph cannot stop when samples have converged; what f has of compiled code stays compiled.
    # Made where it is first asked for, as it imports the compiler.
    if name != "_solve_eagerly":
        raise AttributeError(name)
    made = globals()[name] = torch.compiler.disable(_solve)
    return made


def _compute_dtype(problem: _Problem) -> torch.dtype:
    """The shortest dtype that f computes in."""
    dtypes = list(problem.dtypes)
    if torch.is_autocast_enabled(problem.device.type):
        dtypes.append(torch.get_autocast_dtype(problem.device.type))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _with_autocast(
    call: Callable[[Tensor, Tensor | None], Tensor], device: torch.device
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`call` with the autocast that is on now, wherever it is called."""
    if not torch.is_autocast_enabled(device.type):
        return call
    dtype = torch.get_autocast_dtype(device.type)

    def called(flat: Tensor, index: Tensor | None) -> Tensor:
        with torch.autocast(device.type, dtype=dtype):
            return call(flat, index)

    return called
