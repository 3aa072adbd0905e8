"""A report's content, its method in words, and its Markdown and JSON forms."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import targets, units
from .harness import Row
from .timer import Ceilings, Spread

METHOD = (
    "Every row comes from one timer. A round times all candidates of a row, each in turn and in "
    "an order that changes; a ratio is formed inside each round. Shown are the median over rounds "
    "and, in brackets, the quartiles; IQR is the distance between the quartiles as a share of the "
    "median.",
    "A row is timed only after its result agreed with the plain-PyTorch reference on the same "
    "inputs in the same run: max|y - y64| <= f max|t - y64| + eps max|y64|, y64 being the "
    "reference in float64, t the reference in the dtype, f = 2 or, for gradients, 3; integers "
    "must be equal (ids chosen by score + bias may change places within 4 ulp).",
    "GB/s counts the fewest bytes that any implementation must move. The ceiling 'copy' is a copy "
    "of as many bytes, timed in turns with the operator, into new or into existing memory, "
    "whichever is faster; 'gemm' is the best dense product of the dtype in this run. The "
    "one that takes longer is the one that binds. An operator whose inputs partly stay in a cache "
    "can be a little above 100% of a copy. The ceiling 'read', of few tokens, is reading the "
    "weights of the experts that are hit as fast as the best reduction over 256 MiB.",
    "GFLOP/s are of what is executed; where a contract counts whole windows and a map has smaller "
    "ones at its border, the rate by that count stands in brackets. The ceiling 'gemm' is then the "
    "floor of the whole operation: what it executes, at the rate of the best dense product with as "
    "many threads.",
    "Rows of ladder attention say how many threads they have where that is not all. Biases and "
    "masks are made before the call for baselines without a gradient, and 'core alone' gives them "
    "windows that are cut already. A row of 'slow baselines' has them under torch.compile, too, as "
    "one graph of fixed shapes; compiling is not in the time. PSLT rows are checked on two images, "
    "and the plain model has the same weights; a training step has no optimizer.",
    "Rows of expert_ffn begin with the router's ids, on both sides; FLOPs are those of local "
    "slots. 'forward+backward' is both in one call, with gradients of x, routing weights and "
    "experts. In 'decode' every call has other ids and weights, read last 256 MiB ago or more.",
    "Equilibrium rows solve to one tolerance on every side, by one stop rule for each sample. The "
    "residual of what each side returned is measured anew before anything is timed: who is above "
    "the tolerance is left out, and if that is the operator the row is refused. torchdeq's "
    "solvers are called without their module forward, and through it with a backward, which then "
    "has the same solver. The linear part of every layer has a 2-norm of 0.95. Plain iteration is "
    "about as slow as that allows, and two to three times as fast in the 'mild' layers of normal "
    "draws. A prompt layer's 'r dimensions' solve x = act(W1 W2 x + c), products included.",
    "Backward operators are called directly for time and rates; against a baseline that is "
    "differentiated by autograd they are called through autograd too.",
    "Inputs are reused between calls, so those that fit a CPU's caches are found there, as they "
    "are behind the operator that wrote them. On a GPU the L2 cache is evicted before every call.",
    "'Kept for backward' is what autograd holds beyond inputs and results, for the operator and "
    "for each baseline. Shapes are of the named models; 'n of m experts' is one rank's share.",
)


@dataclasses.dataclass
class Report:
    """Everything that is written."""

    title: str
    subtitle: str
    facts: dict[str, str]
    ceilings: Ceilings
    rows: list[Row]
    method: list[str]
    notices: list[str]

    def ceiling_facts(self) -> list[tuple[str, str]]:
        """The ceilings as names and values."""
        memory, fastest = (
            self.ceilings.memory,
            max(self.ceilings.copies, key=lambda copy: copy.bytes_per_second),
        )
        found = [
            (
                "Copy from memory",
                f"{units.giga(memory.bytes_per_second)} GB/s "
                f"({units.size(memory.nbytes)} moved, {memory.how})",
            ),
            (
                "Copy from cache",
                f"{units.giga(fastest.bytes_per_second)} GB/s ({units.size(fastest.nbytes)} moved)",
            ),
        ]
        if self.ceilings.read:
            read = self.ceilings.read
            shown = f"{units.giga(read.bytes_per_second)} GB/s ({read.how})"
            found.append(("Read from memory", shown))
        for name, rate in self.ceilings.gemm.items():
            found.append((f"Dense GEMM {name}", f"{units.giga(rate)} GFLOP/s"))
        return found


def fastest_baseline(row: Row) -> tuple[str, Spread] | None:
    """The baseline that is hardest to beat, and the speed relative to it."""
    found = {name: each for name, each in row.speedups.items() if name not in row.yardsticks}
    if not found:
        return None
    return min(found.items(), key=lambda item: item[1].median)


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data; rates and shares included, so that nobody must recompute them."""
    data = dataclasses.asdict(report)
    data["schema"] = 1
    for row, plain in zip(report.rows, data["rows"], strict=True):
        plain |= {"flop_rate": row.flop_rate, "byte_rate": row.byte_rate}
        plain["nominal_rate"] = row.nominal_rate
        plain["targets"] = [dict(zip(targets.HEAD, each.cells(), strict=True))
                            for each in row.judged()]  # fmt: skip
    return data


def summary_lines(report: Report) -> list[list[str]]:
    """The headline rows: what, time, ratio, baseline, ceiling."""
    lines = []
    for row in report.rows:
        if not row.headline:
            continue
        if row.seconds is None:
            lines.append([row.headline, "refused", "", row.refused, ""])
            continue
        baseline = fastest_baseline(row)
        name, ratio = units.NONE, units.NONE
        if baseline is not None:
            name, ratio = baseline[0], units.times_range(baseline[1])
        lines.append([row.headline, units.seconds(row.seconds.median), ratio, name, ceiling(row)])
    return lines


def target_lines(rows: list[Row]) -> list[list[str]]:
    """Rows with targets: case, then what each target says."""
    lines = []
    for row in rows:
        shape = f"{row.label}, {row.dtype}"
        lines += [[shape, *judged.cells()] for judged in row.judged()]
    return lines


def note_lines(rows: list[Row]) -> list[list[str]]:
    """Rows with notes: case, then each note."""
    return [[f"{row.label}, {row.dtype}", note] for row in rows for note in row.notes]


def ceiling(row: Row) -> str:
    """`87% of copy`."""
    if row.ceiling_share is None:
        return units.NONE
    return f"{units.percent(row.ceiling_share)} of {row.ceiling}"


def gflops(row: Row) -> str:
    """The rate of what is executed; where that is less than the contract's count, that too."""
    if not row.flops or row.call_cost:
        return units.NONE
    shown = units.giga(row.flop_rate)
    return f"{shown} ({units.giga(row.nominal_rate)})" if row.nominal else shown


def relative(row: Row) -> list[str]:
    """What the row is faster than, how much, and how long that took to compile."""
    lines = []
    for name, each in row.speedups.items():
        took = row.compile_seconds.get(name)
        more = f", compiled in {units.seconds(took)}" if took is not None else ""
        lines.append(f"{units.times_range(each)} {name}{more}")
    return lines


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, lines)])


def _targets(report: Report) -> list[str]:
    lines = target_lines(report.rows)
    return ["## Targets", table(["Case", *targets.HEAD], lines)] if lines else []


def _notes(report: Report) -> list[str]:
    lines = note_lines(report.rows)
    return ["## Notes", table(["Case", "Counted or checked"], lines)] if lines else []


def to_markdown(report: Report) -> str:
    """The report for a terminal or a pull request."""
    rows = []
    for row in report.rows:
        shape = row.label + (f" ({row.scaled})" if row.scaled else "")
        start = [f"`{row.operator}`", shape, "call cost" if row.call_cost else row.dtype]
        if row.seconds is None:
            rows.append([*start, row.backend, f"refused: {row.refused}", *[""] * 6])
            continue
        plain = not row.call_cost
        rows.append(
            [
                *start,
                row.backend,
                units.seconds(row.seconds.median),
                units.percent(row.seconds.relative),
                gflops(row),
                units.giga(row.byte_rate) if plain else units.NONE,
                ceiling(row),
                "; ".join(relative(row)),
                units.NONE if row.saved is None else units.size(row.saved),
            ]
        )
    facts = [[name, value] for name, value in [*report.facts.items(), *report.ceiling_facts()]]
    parts = [
        f"# {report.title}",
        report.subtitle,
        *(f"**Note:** {notice}" for notice in report.notices),
        "## Summary",
        table(["What", "Time", "Speed", "against", "Ceiling"], summary_lines(report)),
        "## Measured on",
        table(["", ""], facts),
        "## All rows",
        table(
            [
                "Operator",
                "Shape",
                "Data",
                "Backend",
                "Time",
                "IQR",
                "GFLOP/s",
                "GB/s",
                "Ceiling",
                "Speed relative to",
                "Kept for backward",
            ],
            rows,
        ),
        *_targets(report),
        *_notes(report),
        "## Method",
        *report.method,
    ]
    return "\n\n".join(parts) + "\n"
