"""Rows of a device run: an operator's, or a baseline's, checked, timed and held to its target."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops._library import OPERATORS

from . import device_cases as device_list
from . import device_timer, gate, inputs
from . import expert_ffn_cases as ffn
from . import plain_expert_ffn as plain
from . import plain_moe_peers as peers
from .baseline import Baseline
from .device_cases import DeviceCase
from .harness import served_by
from .roofline_model import H200
from .timer import Spread

WITH_RESPECT_TO = (0, 2, 3, 4)
DIFFERENT = 0.05
"""How far, in norm, a baseline may be from the operator in bfloat16, gradients included."""


@dataclasses.dataclass
class DeviceRow:
    """What a run says of a case. Times are in seconds of device time.

    Attributes:
        by: the backend, or the baseline's name.
        how: `graph`, or how else it was timed and why.
        inputs: how many sets of inputs took turns, and whether they stayed in the L2 cache.
        waits: host synchronisations of a call.
        peak, bound, reserve: bytes allocated beyond the inputs at most, how many may be touched
            (X, the pre-activation of local slots, and outputs), and what is allocated beside that
            and never touched: the pre-activation's rows for slots that are not local.
        held: what the target says of it: its words, measured, must, aim, verdict.
    """

    key: str
    operator: str
    label: str
    by: str
    refused: str = ""
    seconds: Spread | None = None
    how: str = ""
    inputs: str = ""
    flops: float = 0.0
    nbytes: float = 0.0
    waits: int | None = None
    same_bits: bool | None = None
    peak: int | None = None
    bound: int = 0
    reserve: int = 0
    bound_seconds: float = 0.0
    predicted: float | None = None
    dense: float | None = None
    copy: float | None = None
    held: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Made:
    """A case with its tensors: calls that take turns, and how one of their results is judged."""

    calls: list[Callable[[], Any]]
    rotation: str
    check: Callable[[Any], gate.Verdict]
    args: tuple[Any, ...]
    flops: float
    nbytes: float
    bound: int = 0
    reserve: int = 0
    defined: Callable[[list[Tensor]], list[Tensor]] = list
    derivative: dict[str, Any] = dataclasses.field(default_factory=dict)


def make(case: DeviceCase, device: torch.device) -> Made:
    """Tensors and calls of the operator's own side."""
    if case.operator == "expert_ffn":
        return _layer(case, device)
    args = inputs.build(case.operator, case.work, device)
    op = OPERATORS[case.operator]
    sets = device_timer.copies(args)
    forward = args
    flops = float(op.flops(*args))
    if case.operator.startswith("expert_ffn"):
        backward = case.operator.endswith("_backward")
        forward = ffn.forward_args(args) if backward else args
        flops = float(ffn.executed_flops(forward) * (2 if backward else 1))
    chosen = gate.DEFINED.get(case.operator)
    defined: Callable[[list[Tensor]], list[Tensor]] = partial(chosen, args) if chosen else list
    return Made(
        [partial(op.overload, *each) for each in sets],
        device_timer.rotation(sets),
        partial(gate.check, case.operator, args),
        args,
        flops,
        op.nbytes(*args),
        defined=defined,
    )


def _layer(case: DeviceCase, device: torch.device) -> Made:
    work = case.work
    backward = inputs.build("expert_ffn_backward", work, device) if case.step else ()
    args = ffn.forward_args(backward) if case.step else inputs.build("expert_ffn", work, device)
    given = ffn.layer_args(work, args)
    sets = device_timer.copies(given)
    derivative: dict[str, Any] = {}
    if case.step:
        derivative = {"wrt": WITH_RESPECT_TO, "grads": backward[:1], "step": True}
    calls = [Baseline("operator", plain.layer, each, **derivative).call() for each in sets]
    check = partial(ffn.check_step, args, backward) if case.step else partial(
        gate.check, "expert_ffn", args)  # fmt: skip
    ways = ("expert_ffn_forward", (*args, case.step)), ("expert_ffn_backward", backward)
    nbytes = sum(OPERATORS[name].nbytes(*each) for name, each in ways[: 1 + case.step])
    flops = ffn.executed_flops(args) * (3 if case.step else 1)
    x, offsets, weights, w_in, w_out = args[0], args[2], args[3], args[4], args[6]
    row = w_in.size(1) * x.element_size()
    touched = int(offsets[-1]) * row
    reserved = work.tokens * min(work.model.top_k, work.local) * row
    grads = (x, weights, w_in, w_out) if case.step else ()
    outputs = x.nbytes + sum(each.nbytes for each in grads)
    return Made(
        calls, device_timer.rotation(sets), check, given, flops, nbytes,
        bound=x.nbytes + touched + outputs, reserve=reserved - touched if case.step else 0,
        derivative=derivative,
    )  # fmt: skip


def measure(case: DeviceCase, device: torch.device, seconds: float = 0.4) -> DeviceRow:
    """Check, count and time the operator; a wrong result or an error gives a row without a time."""
    row = DeviceRow(case.key, case.operator, case.label, served_by(case.operator, device))
    try:
        made = make(case, device)
        verdict = made.check(made.calls[0]())
        if not verdict.passed:
            row.refused = verdict.reason
            return row
        _fill(row, made, case, device, seconds)
        row.same_bits = device_timer.same_bits(made.calls[0], device, made.defined)
        _yardsticks(row, made, case, device, seconds / 2)
        if device.type == "cuda":
            # Predictions and targets are a GPU's.
            row.predicted = _predicted(case)
            _hold(row, case, made)
    except Exception as error:
        row.refused = row.refused or _words(error)
    return row


def _words(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]


def _fill(
    row: DeviceRow, made: Made, case: DeviceCase, device: torch.device, seconds: float
) -> None:
    row.flops, row.nbytes, row.inputs = made.flops, made.nbytes, made.rotation
    row.bound, row.reserve = made.bound, made.reserve
    if device.type == "cuda":
        row.bound_seconds = H200.bound(made.flops, made.nbytes)[0]
    row.waits = device_timer.synchronisations(made.calls[0], device)
    row.peak = device_timer.peak_bytes(made.calls[0], device)
    timed = device_timer.device_time(made.calls, device, seconds, row.waits)
    row.seconds, row.how = timed.seconds, timed.how


def _predicted(case: DeviceCase) -> float | None:
    """Seconds by `roofline.py`; None where the tile sizes cannot be read."""
    try:
        from . import roofline

        return roofline.predict(case).seconds()
    except ImportError:
        return None


def _yardsticks(
    row: DeviceRow, made: Made, case: DeviceCase, device: torch.device, seconds: float
) -> None:
    """A copy of as many bytes and, of products, dense ones of equal FLOPs, in the same process."""
    if not made.flops:
        row.copy = device_timer.copy_time(int(made.nbytes), device, seconds)
    elif case.operator == "expert_ffn":
        call = _dense(case, made.args, device)
        row.dense = device_timer.device_time([call], device, seconds).seconds.median


def _dense(case: DeviceCase, given: tuple[Any, ...], device: torch.device) -> Callable[[], Any]:
    x, ids, w_in, w_out = given[0], given[1], given[3], given[4]
    local = ids - case.work.first_expert
    total = int(((local >= 0) & (local < w_in.size(0))).sum())
    count = -(-total // w_in.size(0))
    source = torch.Generator(device).manual_seed(1)

    def rows(width: int) -> Tensor:
        shape = (w_in.size(0), count, width)
        return torch.randn(shape, generator=source, device=device).to(x.dtype)

    products = (rows(x.size(1)), w_in, rows(w_out.size(2)), w_out)
    if not case.step:
        return partial(peers.balanced_dense, *products)
    return partial(peers.balanced_dense_step, *products, rows(x.size(1)))


def _hold(row: DeviceRow, case: DeviceCase, made: Made) -> None:
    if not case.target or row.seconds is None:
        return
    target = device_list.TARGETS[case.target]
    took = row.seconds.median
    if target.what == device_list.RATE:
        value = made.flops / took / 1e12
    elif target.what == device_list.MICROSECONDS:
        value = 1e6 * took
    elif target.what == device_list.READING:
        _, ids, _, w_in, w_out = made.args[:5]
        hit = int(torch.unique(ids).numel())
        value = hit * (w_in[0].nbytes + w_out[0].nbytes) / H200.bandwidth / took
    else:
        value = row.bound_seconds / took
    row.held = [target.what, *map(target.show, (value, target.must, target.aim)),
                target.verdict(value)]  # fmt: skip


def compare(
    case: DeviceCase, peer: peers.Peer, device: torch.device, seconds: float = 0.4
) -> DeviceRow:
    """The same case by a baseline, whose result must be near the operator's."""
    row = DeviceRow(case.key, case.operator, case.label, peer.name)
    if peer.slow and case.step:
        row.refused = "seconds a call"
        return row
    try:
        function = peer.make(case.work)
        made = _layer(case, device)
        args = _theirs(case, made.args)
        sets = device_timer.copies(args)
        calls = [Baseline(peer.name, function, each, **made.derivative).call() for each in sets]
        pairs = zip(gate.outputs(calls[0]()), gate.outputs(made.calls[0]()), strict=True)
        apart = [_apart(theirs, ours) for theirs, ours in pairs]
        if not all(each <= DIFFERENT for each in apart):
            row.refused = "its results are " + ", ".join(f"{each:.2g}" for each in apart) + " away"
            return row
        counted = dataclasses.replace(made, calls=calls, rotation=device_timer.rotation(sets))
        _fill(row, counted, case, device, seconds)
        row.same_bits = device_timer.same_bits(calls[0], device)
    except Exception as error:
        row.refused = _words(error) if not isinstance(error, ValueError) else str(error)[:200]
    return row


def _theirs(case: DeviceCase, given: tuple[Any, ...]) -> tuple[Any, ...]:
    x, ids, weights, w_in, w_out, first = given
    near = ids.long() - first
    foreign = (near < 0) | (near >= case.work.local)
    near = near.masked_fill(foreign, case.work.local)
    return x, near, weights.masked_fill(foreign, 0).to(x.dtype), w_in, w_out


def _apart(came: Tensor, ours: Tensor) -> float:
    """Distance as a share of the norm; NaN is never near."""
    scale = torch.linalg.vector_norm(ours.float()).clamp(min=1e-30)
    return float(torch.linalg.vector_norm(came.float() - ours.float()) / scale)


def small(case: DeviceCase) -> DeviceCase:
    """The same case at a size that a CPU rehearses in a moment."""
    model = dataclasses.replace(case.work.model, hidden=64, width=32, experts=8, top_k=2, groups=1,
                                top_groups=1)  # fmt: skip
    tokens = min(case.work.tokens, 48)
    work = dataclasses.replace(case.work, model=model, tokens=tokens,
                               local_experts=8 // case.ranks)  # fmt: skip
    return dataclasses.replace(case, work=work)


def wanted(group: str, device: torch.device) -> list[DeviceCase]:
    """The cases of a group; on a CPU small, and each once."""
    found = device_list.cases(group)
    if device.type == "cuda":
        return found
    by_key = {each.key: each for each in itertools.chain(map(small, found))}
    return list(by_key.values())
