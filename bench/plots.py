"""Plots as inline SVG, coloured by the page's CSS classes and readable at 360 pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from . import units
from .harness import Row
from .timer import Ceilings

WIDTH = 400
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letter(index: int) -> str:
    """The mark of a case in the plots of its operator."""
    return LETTERS[index] if index < len(LETTERS) else str(index + 1)


def _text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _figure(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _short(words: str, room: int) -> str:
    return words if len(words) <= room else words[: room - 1] + "…"


def describe(row: Row) -> str:
    """A case in one line."""
    return f"{row.label}, {row.dtype}" + (f" ({row.scaled})" if row.scaled else "")


def ratio_bars(operator: str, rows: Sequence[Row]) -> str:
    """How many times faster than each baseline, with quartiles; the line at 1 is equal speed."""
    top = max([spread.high for row in rows for spread in row.speedups.values()], default=1.0)
    left, right = 4.0, WIDTH - 58.0
    scale = (right - left) / max(top, 1.25)
    one = left + scale
    parts: list[str] = []
    y = 0.0
    for index, row in enumerate(rows):
        y += 20
        parts.append(_text(left, y, f"{letter(index)}  {row.label}, {row.dtype}", "case"))
        if row.scaled:
            y += 16
            parts.append(_text(left, y, row.scaled, "note"))
        for name, spread in row.speedups.items():
            y += 17
            parts.append(_text(left, y, _short(name, 60), "note"))
            y += 5
            kind = "bar" if spread.median >= 1 else "bar slower"
            end = left + spread.median * scale
            parts.append(
                f'<rect x="{left}" y="{y:.1f}" width="{end - left:.1f}" height="11" '
                f'rx="2" class="{kind}"/>'
            )
            low, high = left + spread.low * scale, left + spread.high * scale
            parts.append(_line(low, y + 5.5, high, y + 5.5, "whisker"))
            parts.append(_line(one, y - 1, one, y + 13, "equal"))
            # A value short of the line at 1 stands beyond it, so that the two do not cross.
            after = max(end, high) + 6
            after = max(after, one + 6) if after < one + 6 < after + 40 else after
            parts.append(_text(after, y + 10, units.times(spread.median), "value"))
            y += 11
        y += 10
    parts.append(
        _text(one, y + 8, f"1{units.TIMES} equal speed", "note", "middle" if one > 60 else "start")
    )
    return _figure(y + 14, f"{operator}: speed relative to each baseline", parts)


class _Axis:
    """A logarithmic axis whose ends and ticks are 1, 2 or 5 times a power of ten."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        positive = [value for value in values if value > 0]
        steps = _steps(min(positive) / 10, max(positive) * 10)
        self.low = max(step for step in steps if step <= min(positive) * 0.8)
        self.high = min(step for step in steps if step >= max(positive) * 1.25)
        self._start, self._end = start, end
        inside = [step for step in steps if self.low <= step <= self.high]
        wide = self.high > 150 * self.low
        self.ticks = [step for step in inside if not wide or _is_decade(step)]

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self._start + share * (self._end - self._start)


def _steps(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in (1, 2, 5)]


def _is_decade(value: float) -> bool:
    power = math.log10(value)
    return abs(power - round(power)) < 1e-9


def _frame(x: _Axis, y: _Axis, x_unit: str, y_unit: str, height: float) -> list[str]:
    parts = []
    for value in y.ticks:
        at = y.at(value)
        parts.append(_line(x.at(x.low), at, x.at(x.high), at, "grid"))
        parts.append(_text(x.at(x.low) - 5, at + 4, _decade(value), "tick", "end"))
    for value in x.ticks:
        at = x.at(value)
        parts.append(_line(at, y.at(y.low), at, y.at(y.high), "grid"))
        parts.append(_text(at, y.at(y.low) + 15, _decade(value), "tick", "middle"))
    parts.append(_text(4, 12, y_unit, "note"))
    parts.append(_text(WIDTH - 6, height - 6, x_unit, "note", "end"))
    return parts


def _decade(value: float) -> str:
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:g}"


# Where the letter of a dot may stand, the best place first.
_PLACES = ((8.0, 4.0), (-15.0, 4.0), (-3.0, -8.0), (-3.0, 17.0), (18.0, 4.0), (28.0, 4.0))


def _points(rows: Sequence[Row], where: Sequence[tuple[float, float]]) -> list[str]:
    """Dots with letters, each letter clear of the other dots and letters where there is room."""
    dots = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="dot">'
        f"<title>{escape(describe(row))}</title></circle>"
        for row, (x, y) in zip(rows, where, strict=True)
    ]
    taken = [(x - 4, y + 4) for x, y in where]
    letters = []
    for index, (x, y) in enumerate(where):
        spots = [(x + right, y + down) for right, down in _PLACES]
        free = [
            spot
            for spot in spots
            if all(abs(spot[0] - a) >= 9 or abs(spot[1] - b) >= 10 for a, b in taken)
        ]
        spot = (free or spots)[0]
        taken.append(spot)
        letters.append(_text(*spot, letter(index), "case"))
    return dots + letters


def roofline(operator: str, rows: Sequence[Row], ceilings: Ceilings) -> str:
    """Rates against the measured ceilings: by intensity, or by bytes moved without FLOPs."""
    rows = [row for row in rows if row.seconds is not None]
    if any(row.flops for row in rows):
        return _flop_roofline(operator, rows, ceilings)
    return _byte_roofline(operator, rows, ceilings)


def _flop_roofline(operator: str, rows: Sequence[Row], ceilings: Ceilings) -> str:
    height, left, bottom = 222.0, 46.0, 180.0
    copy = ceilings.memory.bytes_per_second
    intensity = [row.flops / max(row.nbytes, 1) for row in rows]
    gemm = {
        name: rate for name, rate in ceilings.gemm.items() if name in {row.roof for row in rows}
    }
    knees = [rate / copy for rate in gemm.values()]
    x = _Axis([*intensity, *knees, min([*knees, *intensity]) / 8], left, WIDTH - 10)
    rates = [row.flop_rate / 1e9 for row in rows]
    y = _Axis([*rates, *(rate / 1e9 for rate in gemm.values())], bottom, 22)
    parts = _frame(x, y, "FLOP per byte moved", "GFLOP/s", height)
    start = max(x.low, y.low * 1e9 / copy)
    stop = max(knees, default=x.high)
    ends = [(x.at(value), y.at(value * copy / 1e9)) for value in (start, stop)]
    parts.append(_line(*ends[0], *ends[1], "ceiling"))
    parts.append(_text(ends[0][0] + 12, ends[0][1] - 4, "copy", "roof"))
    for name, rate in gemm.items():
        at = y.at(rate / 1e9)
        parts.append(_line(x.at(rate / copy), at, x.at(x.high), at, "ceiling"))
        words = f"GEMM {name} {units.giga(rate)}"
        parts.append(_text(WIDTH - 12, at - 5, words, "roof", "end"))
    where = [
        (x.at(each), y.at(row.flop_rate / 1e9)) for each, row in zip(intensity, rows, strict=True)
    ]
    return _figure(height, f"{operator}: roofline", parts + _points(rows, where))


def _byte_roofline(operator: str, rows: Sequence[Row], ceilings: Ceilings) -> str:
    height, left, bottom = 222.0, 46.0, 180.0
    copies = sorted(ceilings.copies, key=lambda copy: copy.nbytes)
    x = _Axis([*(row.nbytes for row in rows), *(copy.nbytes for copy in copies)], left, WIDTH - 10)
    rates = [row.byte_rate / 1e9 for row in rows]
    roofs = [copy.bytes_per_second / 1e9 for copy in copies]
    y = _Axis([*rates, *roofs], bottom, 22)
    parts = _frame(x, y, "bytes moved a call", "GB/s", height)
    line = " ".join(
        f"{x.at(copy.nbytes):.1f},{y.at(roof):.1f}"
        for copy, roof in zip(copies, roofs, strict=True)
    )
    parts.append(f'<polyline points="{line}" class="ceiling"/>')
    words = f"copy, {units.digits(roofs[-1])} GB/s from memory"
    parts.append(_text(WIDTH - 12, min(y.at(roof) for roof in roofs) - 7, words, "roof", "end"))
    where = [(x.at(row.nbytes), y.at(rate)) for row, rate in zip(rows, rates, strict=True)]
    return _figure(height, f"{operator}: bandwidth against a copy", parts + _points(rows, where))


def call_bars(rows: Sequence[Row]) -> str:
    """Microseconds of one call on one token."""
    rows = [row for row in rows if row.seconds is not None]
    times = [row.seconds.median * 1e6 for row in rows if row.seconds is not None]
    left, right = 4.0, WIDTH - 64.0
    scale = (right - left) / max([*times, 1e-3])
    parts: list[str] = []
    y = 4.0
    for row, microseconds in zip(rows, times, strict=True):
        y += 15
        parts.append(_text(left, y, row.operator, "case"))
        y += 5
        width = microseconds * scale
        parts.append(
            f'<rect x="{left}" y="{y:.1f}" width="{width:.1f}" height="11" rx="2" class="bar"/>'
        )
        words = units.seconds(microseconds / 1e6)
        parts.append(_text(left + width + 6, y + 10, words, "value"))
        y += 16
    return _figure(y + 4, "Cost of one call on one token", parts)
