"""Numbers for people: three significant digits and a unit."""

from __future__ import annotations

from .timer import Spread

NONE = "-"
TIMES = "\N{MULTIPLICATION SIGN}"


def digits(value: float, significant: int = 3) -> str:
    """`value` in plain notation with so many significant digits."""
    if value == 0:
        return "0"
    magnitude = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if magnitude == 0:
        return f"{value:.{significant}g}" if abs(value) >= 1e-3 else f"{value:.1e}"
    return f"{value:,.{max(significant - magnitude, 0)}f}"


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    for factor, unit in steps:
        if value >= factor:
            return f"{digits(value / factor)} {unit}"
    factor, unit = steps[-1]
    return f"{digits(value / factor)} {unit}"


def seconds(value: float) -> str:
    """A duration: `6.12 ms`."""
    return _scaled(value, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")))


def size(value: float) -> str:
    """A number of bytes in binary units: `64.0 MiB`."""
    if value < 1024:
        return f"{int(value)} B"
    return _scaled(value, ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")))


def giga(value: float) -> str:
    """A rate in units of 1e9, without the unit."""
    return digits(value / 1e9)


def percent(share: float) -> str:
    """A share of one: `87%`."""
    return f"{share * 100:.0f}%" if share >= 0.1 else f"{share * 100:.1f}%"


def times(value: float) -> str:
    """A ratio: `7.92` and the multiplication sign."""
    return (f"{value:.2f}" if value < 10 else f"{value:.1f}") + TIMES


def times_range(value: Spread) -> str:
    """A ratio and its quartiles."""
    return f"{times(value.median)} [{value.low:.2f} to {value.high:.2f}]"
