"""Where the time of `expert_ffn` goes, by phase, beside what the machine allows each.

A kernel cannot be stopped between its phases, so each phase is timed as an operator of its own on
the same rows: the products as `grouped_linear` and its backward. Such a part writes its result to
memory, which the fused operator need not; the parts can therefore add up to more than the whole.
The whole less its products is what index, activation and merge cost in it, or save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppmoe_ops._library import OPERATORS

from . import expert_ffn_cases as ffn
from . import gate, inputs, pslt_phases, report, timer, units


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part: what is timed for it, its FLOPs, and the fewest bytes it moves."""

    name: str
    call: timer.Call
    flops: int = 0
    nbytes: int = 0

    @property
    def product(self) -> bool:
        return self.flops > 0

    def bound(self, gemm: float, copy: float) -> tuple[float, str]:
        """Seconds that the machine needs at least, and for what."""
        products, moving = self.flops / gemm, self.nbytes / copy
        return max(products, moving), "gemm" if products > moving else "copy"


@dataclasses.dataclass(frozen=True)
class Direction:
    """A whole operator and its phases."""

    name: str
    call: timer.Call
    phases: list[Phase]


def _operator(name: str, *args: Any) -> Phase:
    """A phase that is an operator, with the costs of its contract; FLOPs of products alone."""
    op = OPERATORS[name]
    flops = op.flops(*args) if name.startswith("grouped_linear") else 0
    return Phase(name, partial(op.overload, *args), flops, op.nbytes(*args))


def _renamed(name: str, phase: Phase) -> Phase:
    return dataclasses.replace(phase, name=f"{name} ({phase.name})")


def _plain(name: str, function: Callable[..., Any], *args: Any) -> Phase:
    """A phase in plain PyTorch; every argument is read and the result written once."""
    came = gate.outputs(function(*args))
    nbytes = sum(each.nbytes for each in (*args, *came) if isinstance(each, Tensor))
    return Phase(f"{name} (plain PyTorch)", partial(function, *args), nbytes=nbytes)


def _gather(x: Tensor, slots: Tensor, local: int, top_k: int) -> Phase:
    if local == slots.numel():
        return _renamed("gather", _operator("slice_rows", x, slots, top_k))
    # slice_rows would also write zeros for the slots of other ranks.
    return _plain("gather", torch.index_select, x, 0, slots[:local] // top_k)


def swiglu(pre: Tensor) -> Tensor:
    """The activation."""
    gate_half, up = pre.chunk(2, -1)
    return F.silu(gate_half) * up


def swiglu_backward(grad: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both halves."""
    gate_half, up = pre.chunk(2, -1)
    shared: Tensor = torch.ops.aten.silu_backward(grad * up, gate_half)
    return shared, grad * F.silu(gate_half)


def directions(work: inputs.Workload, device: torch.device) -> Iterator[Direction]:
    """Forward, then backward; both are checked before anything is timed."""
    backward = inputs.build("expert_ffn_backward", work, device)
    grad, x, slots, offsets, weights, w_in, w_out, _, pre, *_ = backward
    args = (x, slots, offsets, weights, w_in, None, w_out, None, "swiglu")
    for name, given in (("expert_ffn", args), ("expert_ffn_backward", backward)):
        verdict = gate.check(name, given, OPERATORS[name].overload(*given))
        if not verdict.passed:
            raise SystemExit(f"profile: {name} is refused: {verdict.reason}")
    local, top_k = int(offsets[-1]), weights.size(1)
    pre = pre[:local]
    hidden = swiglu(pre)
    token = slots[:local] // top_k
    rows, grad_rows = x.index_select(0, token), grad.index_select(0, token)
    ids = inputs.expert_ids(work).to(device)
    # Rows past the last local slot stand for slots of other ranks; merging skips them.
    padded = F.pad(OPERATORS["grouped_linear"].overload(hidden, offsets, w_out, None),
                   (0, 0, 0, slots.numel() - local))  # fmt: skip
    yield Direction(
        "forward",
        partial(OPERATORS["expert_ffn"].overload, *args),
        [
            _renamed("index", _operator("expert_index", ids, work.first_expert, work.local)),
            _gather(x, slots, local, top_k),
            _renamed("first product", _operator("grouped_linear", rows, offsets, w_in, None)),
            _plain("activation", swiglu, pre),
            _renamed("second product", _operator("grouped_linear", hidden, offsets, w_out, None)),
            _renamed("merge", _operator("merge_rows", padded, slots, weights)),
        ],
    )
    into_hidden = OPERATORS["grouped_linear_backward"].overload(
        grad_rows, hidden, offsets, w_out, True, False, False
    )[0]
    pre_grad = torch.cat(swiglu_backward(into_hidden, pre), -1)

    def product(name: str, out: Tensor, into: Tensor, weight: Tensor, to_rows: bool) -> Phase:
        needs = (to_rows, not to_rows, False)
        return _renamed(
            name, _operator("grouped_linear_backward", out, into, offsets, weight, *needs)
        )

    yield Direction(
        "backward",
        partial(OPERATORS["expert_ffn_backward"].overload, *backward),
        [
            _gather(grad, slots, local, top_k),
            product("into the activation", grad_rows, hidden, w_out, True),
            product("gradient of w_out", grad_rows, hidden, w_out, False),
            _plain("activation", swiglu_backward, into_hidden, pre),
            product("into x", pre_grad, rows, w_in, True),
            product("gradient of w_in", pre_grad, rows, w_in, False),
            _renamed("merge", _operator("slice_rows_backward", padded, slots, top_k)),
        ],
    )


def table(
    whole: float, phases: Sequence[Phase], seconds: Sequence[float], gemm: float, copy: float
) -> list[list[str]]:
    """A line a phase, then what they add up to."""
    lines = [["phase, timed alone", "time", "of the whole", "GFLOP/s", "roofline", "bound by"]]
    bounds = [phase.bound(gemm, copy) for phase in phases]
    for phase, time, (least, kind) in zip(phases, seconds, bounds, strict=True):
        rate = units.giga(phase.flops / time) if phase.product else units.NONE
        share = units.percent(time / whole)
        lines.append([phase.name, units.seconds(time), share, rate, units.seconds(least), kind])
    pairs = list(zip(phases, seconds, bounds, strict=True))
    products = sum(time for phase, time, _ in pairs if phase.product)
    least = sum(bound for phase, _, (bound, _) in pairs if phase.product)
    flops = sum(phase.flops for phase in phases)
    for name, time, bound in (
        ("products together", products, least),
        ("whole less products", whole - products, 0.0),
        ("whole", whole, flops / gemm),
    ):
        rate = units.giga(flops / time) if bound else units.NONE
        shown = units.seconds(time) if time >= 0 else f"-{units.seconds(-time)}"
        share = f"{time / whole:.0%}"
        lines.append([name, shown, share, rate, units.seconds(bound) if bound else units.NONE, ""])
    return lines


def _rates(phases: Sequence[Phase], seconds: Sequence[float]) -> list[float]:
    return [phase.flops / time for phase, time in zip(phases, seconds, strict=True)]


def run(operator: str, device: torch.device, seconds: float, threads: int | None) -> int:
    """Print forward and backward for each dtype, on all experts and on one rank of four.

    `pslt` is the whole model, see `pslt_phases`.
    """
    if operator == "pslt":
        return pslt_phases.run(device, seconds, threads)
    if operator != "expert_ffn":
        raise SystemExit(f"profile: no phases of '{operator}'; allowed: expert_ffn, pslt")
    report.prepare(threads)
    clock = timer.clock_for(device)
    copy = max(timer.measure_copies(device, clock), key=lambda each: each.nbytes).bytes_per_second
    model = inputs.FINE_GRAINED
    for dtype in (ffn.FLOAT32, ffn.BFLOAT16):
        gemm = timer.measure_gemm(dtype, device, clock)
        for ranks in (1, 4):
            work = inputs.Workload(model, 2048, dtype, local_experts=model.experts // ranks)
            for direction in directions(work, device):
                calls = {"whole": direction.call}
                calls |= {phase.name: phase.call for phase in direction.phases}
                result = timer.interleave(calls, clock=clock, seconds=seconds)
                times = [result.timing(phase.name).median for phase in direction.phases]
                name = str(dtype).removeprefix("torch.")
                print(f"\n{direction.name}, {model.name}, T=2048 R={ranks}, {name}")
                whole = result.timing("whole").median
                # A product that ran faster than the square ones before it raises the roof.
                gemm = max(gemm, *_rates(direction.phases, times))
                report.print_table(table(whole, direction.phases, times, gemm, copy))
                print(f"roofline: copies at {units.giga(copy)} GB/s, products at "
                      f"{units.giga(gemm)} GFLOP/s, the fastest seen")  # fmt: skip
    return 0
