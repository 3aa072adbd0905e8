"""Problems of equilibrium layers: all sides solve to one tolerance, which is checked first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import ppmoe_ops
from ppmoe_ops._library import OPERATORS

from . import equilibrium_inputs, gate, targets
from . import plain_equilibrium as plain
from .equilibrium_inputs import Images, Prompt, Rows, States
from .harness import AUTOGRAD, OPERATOR, Baseline, Problem, thread_count
from .inputs import build
from .plain_equilibrium import Map

# How far a gradient may be off, in norm: its solution is known to the tolerance of the forward.
GRADIENT = 1e-2
# How many times as large as another side's the operator's residual may be.
FAIR = 30.0
# Wider batches of matrices fail in some builds' LU (MKL's xLASWP) on more than one thread.
WIDEST_LU = 128
LU_FAILS = f"batched LU is not reliable beyond {WIDEST_LU} on more than one thread"
# Maps with a longer side are checked in float32, which is far below their tolerance.
LARGE = 64


@dataclasses.dataclass(frozen=True)
class Contest:
    """Sides that were asked for one fixed point, and what is known of it.

    Attributes:
        f: of what all of them solve; in float64, but for large images.
        rtol: what they were asked for.
        slack: what rounding of the result adds to a residual.
        exact: the result and its gradients, where there are any.
    """

    f: Map
    rtol: float
    slack: float = 0.0
    exact: Sequence[Tensor] = ()
    dtype: torch.dtype = torch.float64

    def fault(self, came: Sequence[Tensor]) -> str:
        """What is wrong with a side's results; empty where nothing is."""
        residual = self.residual(came)
        # Written so that a NaN is a fault.
        if not residual <= self.rtol + self.slack:
            return f"relative residual {residual:.2g}; {self.rtol:g} was asked for"
        for index, (found, exact) in enumerate(zip(came[1:], self.exact[1:], strict=False)):
            error = _relative(found, exact)
            if not error <= GRADIENT:
                return f"gradient {index}: error {error:.2g} in norm is above {GRADIENT:g}"
        return ""

    def residual(self, came: Sequence[Tensor]) -> float:
        """The largest of all samples, measured anew."""
        return plain.largest_residual(self.f, came[0].to(self.dtype))

    def error(self, came: Sequence[Tensor]) -> float:
        """The largest of the gradients' errors, in norm."""
        pairs = zip(came[1:], self.exact[1:], strict=True)
        return max((_relative(found, exact) for found, exact in pairs), default=0.0)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def meet(
    contest: Contest, ours: Baseline, rivals: Sequence[Baseline]
) -> tuple[list[Baseline], dict[str, str], tuple[str, ...], str]:
    """Who may be timed, who is left out and why, what they reached, and why nobody may be."""
    came = gate.outputs(ours.call()())
    reached = {"ours": came}
    kept, left_out = [], {}
    for rival in rivals:
        if rival.name.startswith(targets.TORCHDEQ) and not plain.INSTALLED:
            left_out[rival.name] = plain.ABSENT
            continue
        try:
            found = gate.outputs(rival.call()())
        except Exception as error:
            left_out[rival.name] = str(error).splitlines()[0] if str(error) else repr(error)
            continue
        fault = contest.fault(found)
        if fault:
            left_out[rival.name] = fault
            continue
        kept.append(rival)
        reached[rival.name] = found
    residuals = {name: contest.residual(found) for name, found in reached.items()}
    shown = [f"largest relative residual: {_listed(residuals)}"]
    if contest.exact[1:]:
        errors = {name: contest.error(found) for name, found in reached.items()}
        shown.append(f"largest error of a gradient, in norm: {_listed(errors)}")
    least = min(residuals, key=lambda name: residuals[name])
    unfair = ""
    if residuals["ours"] > FAIR * residuals[least]:
        unfair = f"residual {residuals['ours']:.2g} beside {residuals[least]:.2g} of {least}"
    return kept, left_out, tuple(shown), unfair


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in values.items())


def _problem(
    contest: Contest, ours: Baseline, rivals: Sequence[Baseline], flops: int, nbytes: int
) -> Problem:
    kept, left_out, notes, unfair = meet(contest, ours, rivals)

    def check(came: Any) -> gate.Verdict:
        fault = contest.fault(gate.outputs(came)) or unfair
        return gate.Verdict(not fault, fault)

    return Problem(
        ours.args, tuple(kept), timed=ours, check=check, flops=flops, nbytes=nbytes,
        composed=True, left_out=left_out, notes=notes,
    )  # fmt: skip


def _sides(how: Callable[[str], Baseline], more: dict[str, Baseline]) -> list[Baseline]:
    theirs = [
        dataclasses.replace(how(name), name=f"{targets.TORCHDEQ} {name}") for name in plain.SOLVERS
    ]
    return theirs + [dataclasses.replace(each, name=name) for name, each in more.items()]


def prompt(work: Prompt, device: torch.device, step: bool = False) -> Problem:
    """An MLP prompt layer from tokens to prompts; with `step`, gradients of all six as well."""
    args = equilibrium_inputs.prompt(work, device)
    given = (work.rtol, work.max_iter, work.rtol if step else 0.0, *args)
    grad = equilibrium_inputs.prompt(dataclasses.replace(work, seed=work.seed + 1), device)[0]
    derivative: dict[str, Any] = {"wrt": tuple(range(4, 10)), "grads": (grad,), "step": True}
    options = derivative if step else {}
    ours = Baseline(OPERATOR, plain.folded, ("ours", *given), **options)
    rivals = _sides(
        lambda name: Baseline("", plain.prompt, (name, *given), **options),
        {
            targets.ROWS_LOOP: Baseline("", plain.folded, ("loop", *given), **options),
            targets.WHOLE_LOOP: Baseline("", plain.prompt, ("loop", *given), **options),
        },
    )
    wide = gate.in_float64(args)
    exact: list[Tensor] = []
    if step:
        tight = ("loop", 1e-12, 1000, 1e-12, *wide)
        exact = gate.outputs(
            Baseline("", plain.folded, tight, (4, 5, 6, 7, 8, 9), (grad.double(),), True).call()()
        )
    contest = Contest(plain.prompt_map(*wide), work.rtol, exact=exact)
    n, d, r = work.tokens, work.dim, work.width
    flops = 4 * n * d * r + 2 * r * r * d
    nbytes = 4 * (2 * n * d + 3 * r * d)
    return _problem(contest, ours, rivals, (1 + 2 * step) * flops, (1 + step) * nbytes)


def images(work: Images, device: torch.device, fused: bool, step: bool = False) -> Problem:
    """A layer on images: `equilibrium` with the layers as torch has them, or the fused cell.

    A backward solves to 1e-6 on all sides, as the fused cell's always does.
    """
    args = equilibrium_inputs.images(work, device)
    adjoint = 1e-6 if step else 0.0
    given = (work.rtol, work.max_iter, adjoint, *args)
    grad = equilibrium_inputs.images(dataclasses.replace(work, seed=work.seed + 1), device)[0]
    places = tuple(range(4, 12))
    options: dict[str, Any] = {}
    if step:
        options = {"wrt": places, "grads": (grad,), "step": True}
    whole = Baseline(OPERATOR, plain.images, ("ours", *given), **options)
    ours, more = whole, {}
    if fused:
        less = {**options, "wrt": tuple(range(2, 10))} if step else {}
        ours = Baseline(OPERATOR, plain.images_fused, (*given[:2], *args), **less)
        more["equilibrium with torch's layers"] = whole
        more[targets.WHOLE_LOOP] = Baseline("", plain.images, ("loop", *given), **options)
    rivals = _sides(lambda name: Baseline("", plain.images, (name, *given), **options), more)
    exact: list[Tensor] = []
    if step:
        tight = ("loop", 1e-6, 100, 1e-6, *args)
        exact = gate.outputs(Baseline("", plain.images, tight, **options).call()())
    contest = _on_images(work, args, exact)
    evaluated = 0 if step else _evaluated(work, args, fused)
    nbytes = 4 * args[0].numel() * (1 + step)
    problem = _problem(contest, ours, rivals, evaluated * image_flops(work) // work.batch, nbytes)
    if fused or step:
        return problem
    times = round(evaluated / work.batch)
    alone = Baseline("f alone, as often", plain.images_f, (times, *args), same_result=False)
    return dataclasses.replace(problem, baselines=(*problem.baselines, alone))


def _on_images(work: Images, args: tuple[Tensor, ...], exact: Sequence[Tensor] = ()) -> Contest:
    # In float64 torch's convolutions of large maps take seconds each.
    wide = torch.float64 if work.side <= LARGE else torch.float32
    slack = 0.0 if work.dtype == torch.float32 else 2 * torch.finfo(work.dtype).eps
    f = plain.images_map(*(each.to(wide) for each in args))
    return Contest(f, work.rtol, slack, exact, wide)


def _evaluated(work: Images, args: tuple[Tensor, ...], fused: bool) -> int:
    """How many images f is evaluated for in one solve."""
    if fused:
        given = (*args, None, work.activation, "anderson", 0.0, work.rtol, work.max_iter)
        return int(OPERATORS["equilibrium_conv_cell"].overload(*given)[1].sum())
    counted = plain.Counted(plain.images_map(*args))
    with torch.no_grad():
        z0 = torch.zeros_like(args[0])
        ppmoe_ops.equilibrium(counted, z0, rtol=work.rtol, max_iter=work.max_iter)
    return counted.samples


def image_flops(work: Images) -> int:
    """Of one evaluation of f on all images."""
    c, r = work.channels, work.width
    return 2 * work.batch * work.side**2 * (2 * c * r + 9 * r * r)


def operator(name: str, work: Rows | Images | States, device: torch.device) -> Problem:
    """One operator by itself."""
    return _MAKE[name](work, device)


def _rows(work: Rows, device: torch.device) -> Problem:
    args = build("equilibrium_cell", work, device)
    a, c = args[:2]
    contest = Contest(
        plain.cell_map(a.double(), c.double(), work.activation),
        work.rtol,
        2 * torch.finfo(work.dtype).eps,
    )
    hows = {targets.ROWS_LOOP: "loop"}
    if work.solver == "newton" and work.width <= WIDEST_LU:
        hows["batched Newton"] = "newton"
    given = (a, c, work.activation)
    rivals = [
        Baseline(name, plain.cell, (*given, how, work.rtol, work.max_iter))
        for name, how in hows.items()
    ]
    r = work.width
    solve = 2 * r**3 // 3 if work.solver == "newton" else 0
    return _solved("equilibrium_cell", args, contest, rivals, 2 * r * r + solve)


def _maps(work: Images, device: torch.device) -> Problem:
    args = build("equilibrium_conv_cell", work, device)
    contest = _on_images(work, args[:8])
    given = ("loop", work.rtol, work.max_iter, 0.0, *args[:8])
    rival = Baseline(targets.WHOLE_LOOP, plain.images, given)
    each_step = image_flops(work) // work.batch
    return _solved("equilibrium_conv_cell", args, contest, [rival], each_step)


def _solved(
    name: str, args: tuple[Any, ...], contest: Contest, rivals: Sequence[Baseline], each_step: int
) -> Problem:
    """An operator whose samples stop for themselves; `each_step` are the FLOPs of one step."""
    max_iter = args[-1]

    def check(came: Sequence[Tensor]) -> gate.Verdict:
        _, steps, residual = came
        fault = contest.fault(came[:1])
        if not fault and not (steps.min() >= 1 and steps.max() <= max_iter):
            fault = f"steps from {int(steps.min())} to {int(steps.max())}"
        if not fault and not bool(residual.isfinite().all()):
            fault = "a residual is not finite"
        return gate.Verdict(not fault, fault)

    overload = OPERATORS[name].overload
    steps = overload(*args)[1]
    flops = int(steps.sum()) * each_step
    kept, left_out, notes, _ = meet(contest, Baseline("", overload, args), rivals)
    count = f"steps: {float(steps.float().mean()):.1f} on average, {int(steps.max())} at most"
    return Problem(
        args, tuple(kept), check=check, left_out=left_out, notes=(*notes, count),
        composed=True, flops=flops, nbytes=OPERATORS[name].nbytes(*args),
    )  # fmt: skip


def _rows_backward(work: Rows, device: torch.device) -> Problem:
    args = build("equilibrium_cell_backward", work, device)
    grad, a, c, x, _, activation = args
    rival = Baseline("batched dense solves", plain.cell_adjoint, (grad, a, c, x, activation))
    if work.width <= WIDEST_LU:
        return Problem(args, (rival,), composed=True)

    def check(came: Sequence[Tensor]) -> gate.Verdict:
        with thread_count(1):
            return gate.check("equilibrium_cell_backward", args, came)

    return Problem(args, check=check, composed=True, left_out={rival.name: LU_FAILS})


def _maps_backward(work: Images, device: torch.device) -> Problem:
    args = build("equilibrium_conv_cell_backward", work, device)
    grad, u, *weights = args[:8]
    inputs = build("equilibrium_conv_cell", work, device)
    b3, z = inputs[7], args[8]
    given = (1e-6, 100, grad, z, u, *weights, b3)
    rival = Baseline(targets.WHOLE_LOOP, plain.images_adjoint, given)
    tight = (1e-12, 1000, *gate.in_float64(given[2:]))
    exact = plain.images_adjoint(*(tight if work.side <= LARGE else given))

    def check(came: Sequence[Tensor]) -> gate.Verdict:
        return gate.agree_in_norm(came, rival.call()(), [each.double() for each in exact])

    fair = Baseline(
        AUTOGRAD, OPERATORS["equilibrium_conv_cell"].overload, inputs, tuple(range(8)), (grad,)
    )
    # The steps of its adjoint are not known, so no FLOPs are.
    return Problem(args, (rival,), fair, check=check, composed=True, flops=0)


# Where `anderson_mix` has its values and counters.
_STATE = slice(8, 10)


def _states(work: States, device: torch.device) -> Problem:
    """One step on a full history; what tells the step from the next one is put back each time."""
    args = build("anderson_mix", work, device)
    f, z, *_ = args
    state = tuple(each.clone() for each in args[_STATE])
    ours = Baseline(OPERATOR, _again, (args, state))
    m = work.history
    dg, df = (each[:, :m].clone() for each in args[5:7])
    points = tuple(each.to(dg.dtype) for each in (f, z))
    before = torch.randn_like(points[0]), torch.randn_like(points[1])
    kept = torch.empty_like(before[0]), torch.empty_like(before[1])
    rival = Baseline("batched products", plain.mix, (*points, dg, df, before, kept))

    def check(came: Tensor) -> gate.Verdict:
        op = OPERATORS["anderson_mix"]
        found = []
        for function, given in (
            (op.overload, args), (op.reference, args), (op.reference, gate.in_float64(args))
        ):  # fmt: skip
            own = [each.clone() if isinstance(each, Tensor) else each for each in given]
            own[_STATE] = [each.clone() for each in state]
            running = function(*own)
            found.append([own[2].double(), running])
        ours, plainly, exact = found
        if not torch.equal(came, exact[1]):
            return gate.Verdict(False, f"{int(came)} samples running; expected {int(exact[1])}")
        return gate.agree_in_norm(ours[:1], plainly[:1], exact[:1], 1e-3)

    return Problem(args, (rival,), timed=ours, check=check, composed=True)


def _again(args: tuple[Any, ...], state: tuple[Tensor, ...]) -> Tensor:
    for each, before in zip(args[_STATE], state, strict=True):
        each.copy_(before)
    running: Tensor = torch.ops.ppmoe_ops.anderson_mix(*args)
    return running


_MAKE: dict[str, Callable[[Any, torch.device], Problem]] = {
    "equilibrium_cell": _rows,
    "equilibrium_cell_backward": _rows_backward,
    "equilibrium_conv_cell": _maps,
    "equilibrium_conv_cell_backward": _maps_backward,
    "anderson_mix": _states,
}
