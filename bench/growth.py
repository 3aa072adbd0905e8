"""How the time of `expert_ffn` grows: with local slots, foreign slots, and experts that none hits.

The points of one sweep are timed in turns, each after its result has been checked. All of them
start at the router's ids, so `expert_index`, which reads foreign ids too, is in the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from . import expert_ffn_cases as ffn
from . import gate, inputs, report, targets, timer, units
from . import plain_expert_ffn as plain


@dataclasses.dataclass(frozen=True)
class Point:
    """One call of a sweep, and the value of what is swept."""

    value: int
    call: timer.Call


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What grows, what the time should then do, and the points."""

    name: str
    linear: bool
    points: list[Point]

    def deviations(self, ratios: Sequence[float]) -> list[float]:
        """How far times, as ratios to the first, are off a line through them, or off the first."""
        if not self.linear:
            return [each - 1 for each in ratios]
        values = torch.tensor([float(point.value) for point in self.points], dtype=torch.float64)
        times = torch.tensor(list(ratios), dtype=torch.float64)
        # Relative errors are what is shown, so they are what the line makes small.
        sides = torch.stack([torch.ones_like(values), values], 1) / times.unsqueeze(1)
        found = torch.linalg.lstsq(sides, torch.ones_like(times).unsqueeze(1)).solution
        line: Tensor = sides @ found
        return [float(1 / each - 1) for each in line.flatten()]


def _point(value: int, ids: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor) -> Point:
    """A call on ids whose first local expert is 0, after its result has been checked."""
    weights = torch.full(ids.shape, 1 / ids.size(1), device=x.device)
    call = partial(plain.layer, x, ids, weights, w_in, w_out, 0)
    slots, offsets = torch.ops.ppmoe_ops.expert_index(ids, 0, w_in.size(0))
    args = (x, slots, offsets, weights, w_in, None, w_out, None, "swiglu")
    verdict = gate.check("expert_ffn", args, call())
    if not verdict.passed:
        raise SystemExit(f"growth: refused: {verdict.reason}")
    return Point(value, call)


def sweeps(
    dtype: torch.dtype,
    device: torch.device,
    model: inputs.Model = inputs.FINE_GRAINED,
    tokens: int = 2048,
) -> Iterator[Sweep]:
    """The three sweeps; what stays fixed is said in their names."""
    work = inputs.Workload(model, 2 * tokens, dtype)
    x, _, _, _, w_in, _, w_out, *_ = inputs.build("expert_ffn", work, device)
    points = []
    for count in (tokens // 4, tokens // 2, tokens, 2 * tokens):
        ids = inputs.expert_ids(dataclasses.replace(work, tokens=count)).to(device)
        points.append(_point(ids.numel(), ids, x[:count], w_in, w_out))
    yield Sweep(f"local slots (tokens grow; all {model.experts} experts)", True, points)

    # One local choice a token, the same one always; the others are foreign.
    local = max(1, model.experts // model.top_k)
    near = (torch.arange(tokens, dtype=torch.int32) % local).unsqueeze(1)
    points = []
    for foreign in (0, 1, 3, 7, 15):
        far = torch.arange(foreign, dtype=torch.int32).expand(tokens, -1) + local
        ids = torch.cat([near, far], 1).to(device)
        points.append(_point(ids.numel() - tokens, ids, x[:tokens], w_in[:local], w_out[:local]))
    yield Sweep(f"foreign slots (choices grow; {tokens} slots are local)", False, points)

    points = []
    for held in sorted({local, 2 * local, model.experts}):
        ids = near.to(device)
        points.append(_point(held - local, ids, x[:tokens], w_in[:held], w_out[:held]))
    yield Sweep(f"local experts without a slot ({local} have slots)", False, points)


def table(sweep: Sweep, seconds: Sequence[float], ratios: Sequence[float]) -> list[list[str]]:
    """A line a point; the last column says whether the target is met."""
    limit = targets.LINEAR if sweep.linear else targets.FLAT
    off = "off the line" if sweep.linear else "off the first"
    lines = [[sweep.name, "time", off, f"within {units.percent(limit)}"]]
    for point, time, share in zip(sweep.points, seconds, sweep.deviations(ratios), strict=True):
        # A flat sweep may not cost more; that it costs less is no fault.
        held = abs(share) <= limit if sweep.linear else share <= limit
        shown = f"{share:+.1%}"
        lines.append([f"{point.value:,}", units.seconds(time), shown, "yes" if held else "no"])
    return lines


def run(device: torch.device, seconds: float, threads: int | None) -> int:
    """Print the sweeps for each dtype."""
    report.prepare(threads)
    clock = timer.clock_for(device)
    for dtype in (ffn.FLOAT32, ffn.BFLOAT16):
        for sweep in sweeps(dtype, device):
            calls = {str(point.value): point.call for point in sweep.points}
            result = timer.interleave(calls, clock=clock, seconds=seconds)
            times = [result.timing(name).median for name in calls]
            print(f"\nexpert_ffn, {inputs.FINE_GRAINED.name}, {str(dtype).removeprefix('torch.')}")
            # As everywhere, a ratio is formed within a round.
            ratios = [result.speedup(next(iter(calls)), name).median for name in calls]
            report.print_table(table(sweep, times, ratios))
    return 0
