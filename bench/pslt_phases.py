"""Where the time of a PSLT image goes: by part of the model, then by operator of a ladder block.

Parts are timed where they are, inside calls of the whole model, by hooks on its modules; the
package's fused model and the plain one take turns. The fused model's convolutions are one module,
whose time is shared out by where torch's profiler sees them begin. A ladder block is one operator,
which cannot be stopped on its way, so its parts are timed apart, as the operators that are
differentiable, beside plain PyTorch.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from ppmoe_ops._library import OPERATORS

from . import gate, inputs, ladder_cases, pslt_cases, report, timer, units
from .ladder_inputs import Maps

ROUNDS = (5, 30)
# How many convolutions each of the first parts has.
CONVOLUTIONS = {"stem": 3, "stage 1, convolutions": 9, "stage 2, convolutions": 9, "down": 3}


def parts(model: Any) -> dict[str, list[nn.Module]]:
    """The modules of a model's parts, in the order they run in."""
    convolutions, (first, second) = list(model.conv_layers), model.layers
    return {
        "stem": [model.patch_embed],
        "stage 1, convolutions": convolutions[:3],
        "stage 2, convolutions": convolutions[3:6],
        "down": convolutions[6:],
        "stage 3, ladder": list(first.blocks),
        "merge": [first.downsample],
        "stage 4, ladder": list(second.blocks),
        "head": [model.norm, model.head],
    }


class Watch:
    """Adds up what `reading` counts while each part of a model runs."""

    def __init__(self, model: nn.Module, reading: Callable[[], float] = time.perf_counter) -> None:
        self.model = model
        self._reading = reading
        self._begun = 0.0
        self.sums: dict[str, float] = dict.fromkeys(parts(model), 0.0)
        self._hooks = [
            hook
            for name, modules in parts(model).items()
            for module in modules
            for hook in (
                module.register_forward_pre_hook(self._start),
                module.register_forward_hook(partial(self._stop, name)),
            )
        ]

    def _start(self, *_: Any) -> None:
        self._begun = self._reading()

    def _stop(self, name: str, *_: Any) -> None:
        self.sums[name] += self._reading() - self._begun

    def run(self, x: torch.Tensor) -> dict[str, float]:
        """One call: its parts, what is between them, and the whole."""
        self.sums = dict.fromkeys(self.sums, 0.0)
        start = self._reading()
        pslt_cases.infer(self.model, x)
        whole = self._reading() - start
        return {**self.sums, "between": whole - sum(self.sums.values()), "whole": whole}

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def convolution_shares(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Of the time of a fused model's convolutions."""
    pslt_cases.infer(model, x)
    with profile(use_kineto=False) as seen:
        for _ in range(ROUNDS[0]):
            pslt_cases.infer(model, x)
    events: list[Any] = list(seen.function_events or [])
    names = ("mkldnn::_convolution_pointwise", "aten::conv2d")
    starts = sorted(each.time_range.start for each in events if each.name in names)
    runs = []
    for each in events:
        if each.name.endswith("::pslt_convolutions"):
            first, last = each.time_range.start, each.time_range.end
            within = [start for start in starts if first <= start < last]
            runs.append(_shares([first, *within[1:], last]))
    found = _medians(runs)
    return {name: share / sum(found.values()) for name, share in found.items()}


def _shares(begun: list[float]) -> dict[str, float]:
    """From when each convolution began, and the end; a batch may be worked on in pieces."""
    count, each_piece = len(begun) - 1, sum(CONVOLUTIONS.values())
    if count < 1 or count % each_piece:
        raise SystemExit(f"profile: saw {count} convolutions; expected {each_piece} a piece")
    sums, at = dict.fromkeys(CONVOLUTIONS, 0.0), 0
    while at < count:
        for name, steps_of_part in CONVOLUTIONS.items():
            sums[name] += begun[at + steps_of_part] - begun[at]
            at += steps_of_part
    return {name: each / (begun[-1] - begun[0]) for name, each in sums.items()}


def flops_by_part(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """By torch's counter; whole windows."""
    with FlopCounterMode(display=False) as counter:
        watch = Watch(model, lambda: float(counter.get_total_flops()))
        found = watch.run(x)
    watch.close()
    return found


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def by_part(
    ours: nn.Module, theirs: nn.Module, x: torch.Tensor, seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each part, in turns; the first round warms up."""
    watches = Watch(ours), Watch(theirs)
    runs: tuple[list[dict[str, float]], ...] = ([], [])
    least, most = ROUNDS
    start = time.perf_counter()
    while len(runs[0]) <= least or (time.perf_counter() - start < seconds and len(runs[0]) < most):
        for watch, found in zip(watches, runs, strict=True):
            found.append(watch.run(x))
    for watch in watches:
        watch.close()
    mine, other = _medians(runs[0][1:]), _medians(runs[1][1:])
    together = mine["stem"]
    for name, share in convolution_shares(ours, x).items():
        mine[name] = share * together
    return mine, other


def table(
    ours: dict[str, float], theirs: dict[str, float], flops: dict[str, float], gemm: float
) -> list[list[str]]:
    """A line a part; FLOPs are nominal, and so is the floor that they give."""
    lines = [["part", "time", "of the whole", "GFLOP/s", "floor", "plain PSLT", "times as fast"]]
    for name, seconds in ours.items():
        count = flops[name]
        rate = units.giga(count / seconds) if count else units.NONE
        floor = units.seconds(count / gemm) if count else units.NONE
        share = f"{seconds / ours['whole']:.0%}"
        shown, other = units.seconds(max(seconds, 0.0)), units.seconds(max(theirs[name], 0.0))
        times = units.times(theirs[name] / seconds) if seconds > 0 else units.NONE
        lines.append([name, shown, share, rate, floor, other, times])
    return lines


@dataclasses.dataclass(frozen=True)
class Step:
    """An operator of a block, how often it runs there, both sides of it, and its FLOPs."""

    name: str
    count: int
    ours: timer.Call
    theirs: timer.Call
    flops: int


def steps(work: Maps, device: torch.device) -> Iterator[Step]:
    """The block at inference, then its operators."""
    make = partial(_step, device=device)
    yield make("ladder_block", "ladder_block", work)
    for index, shift in enumerate(work.steps):
        branch = dataclasses.replace(work, shift=shift, given=index > 0)
        yield make(f"ladder_attention, branch {index}", "ladder_attention", branch)
    yield make("ladder_ffn, three times", "ladder_ffn", work, count=3)
    yield make("pixel_adaptive_fusion", "pixel_adaptive_fusion", work)


def _step(shown: str, name: str, work: Maps, *, device: torch.device, count: int = 1) -> Step:
    problem = ladder_cases.problem(name, work, device)
    call = partial(OPERATORS[name].overload, *inputs.build(name, work, device))
    verdict = problem.check(call()) if problem.check is not None else gate.Verdict(True)
    if not verdict.passed:
        raise SystemExit(f"profile: {name} is refused: {verdict.reason}")
    rival = [each for each in problem.baselines if each.same_result][-1]
    return Step(shown, count, call, rival.call(), problem.flops or 0)


def block_table(
    found: Sequence[Step], ours: Sequence[float], theirs: Sequence[float], gemm: float
) -> list[list[str]]:
    """A line an operator; FLOPs are executed ones."""
    lines = [["operator, timed alone", "time", "of the block", "GFLOP/s", "floor",
              "plain PyTorch", "times as fast"]]  # fmt: skip
    block, *rest = [
        (step.name, step.count * mine, step.count * other, step.count * step.flops)
        for step, mine, other in zip(found, ours, theirs, strict=True)
    ]
    together = ("operators together", sum(each[1] for each in rest),
                sum(each[2] for each in rest), sum(each[3] for each in rest))  # fmt: skip
    for name, mine, other, flops in (*rest, together, block):
        share = f"{mine / block[1]:.0%}"
        lines.append([name, units.seconds(mine), share, units.giga(flops / mine),
                      units.seconds(flops / gemm), units.seconds(other),
                      units.times(other / mine)])  # fmt: skip
    return lines


def run(device: torch.device, seconds: float, threads: int | None) -> int:
    """Print both tables for one image and for sixteen."""
    report.prepare(threads)
    clock = timer.clock_for(device)
    gemm = timer.measure_gemm(torch.float32, device, clock)
    pair = pslt_cases.models()
    ours: Any = pair.ours.to(device).eval()
    ours = ours.fuse_for_inference()
    theirs = pair.plain.to(device).eval()
    for batch in (1, 16):
        x = pslt_cases.images(batch, torch.float32).to(device)
        flops = flops_by_part(theirs, x)
        count = torch.get_num_threads()
        threads_shown = f"{count} thread{'s' * (count > 1)}"
        print(f"\nPSLT inference, B={batch}, 224x224, float32, {threads_shown}")
        report.print_table(table(*by_part(ours, theirs, x, seconds), flops, gemm))
    for batch in (1, 16):
        for name, work in (("3", pslt_cases.stage3(batch)), ("4", Maps(batch, 7, 192, 8))):
            found = list(steps(work, device))
            calls = {f"{side} {at}": getattr(step, side)
                     for at, step in enumerate(found) for side in ("ours", "theirs")}  # fmt: skip
            result = timer.interleave(calls, clock=clock, seconds=seconds)
            times = [[result.timing(f"{side} {at}").median for at in range(len(found))]
                     for side in ("ours", "theirs")]  # fmt: skip
            print(f"\na ladder block of stage {name}, B={batch}, float32")
            report.print_table(block_table(found, times[0], times[1], gemm))
    print(f"\nfloor: FLOPs at {units.giga(gemm)} GFLOP/s, the best dense product before")
    return 0
