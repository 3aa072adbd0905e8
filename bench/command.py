"""The command line of `python -m ppmoe_ops.bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import compare, harness, report, result, units

_USAGE = """\
python -m ppmoe_ops.bench report            the quick set, written to reports/
       python -m ppmoe_ops.bench list              the cases
       python -m ppmoe_ops.bench compare REV [OPERATOR...]   against a git revision, in turns
       python -m ppmoe_ops.bench OPERATOR...       rows of these operators"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ppmoe_ops.bench", usage=_USAGE)
    parser.add_argument("words", nargs="+", metavar="report | list | compare REV | OPERATOR")
    parser.add_argument("--full", action="store_true", help="all cases, not the quick ones alone")
    parser.add_argument("--seconds", type=float, help="measuring time of a row (2, compare: 4)")
    parser.add_argument("--threads", type=int, help="CPU threads (all that the process may use)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile the baselines")
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder of the report")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code, 1 where an operator was refused."""
    parser = _parser()
    given = parser.parse_args(arguments)
    command, *rest = given.words
    operators = tuple(given.words)
    if command in ("report", "list"):
        operators = tuple(rest)
    elif command == "compare":
        if not rest:
            parser.error("compare needs a git revision")
        operators = tuple(rest[1:])
    try:
        cases = harness.cases(not given.full, operators)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device(given.device) if given.device else report.default_device()
    if command == "list":
        for case in cases:
            print(case.key)
        return 0
    if command == "compare":
        return compare.run(
            rest[0],
            [case.key for case in cases],
            device=device,
            seconds=given.seconds or 4.0,
            threads=given.threads,
        )
    options = report.Options(
        device=device,
        quick=not given.full,
        operators=operators,
        seconds=given.seconds or 2.0,
        threads=given.threads,
        compiled=given.compile,
    )
    done = report.run(options)
    if command == "report":
        report.print_summary(done, report.write(done, given.out))
    else:
        _print_rows(done)
    return report.exit_code(done)


def _print_rows(done: result.Report) -> None:
    lines = [["operator", "case", "backend", "time", "IQR", "ceiling", "speed [quartiles] against"]]
    for row in done.rows:
        start = [row.operator, f"{row.label}, {row.dtype}", row.backend]
        if row.seconds is None:
            lines.append([*start, "refused", "", "", row.refused])
            continue
        ratios = [f"{units.times_range(each)} {name}" for name, each in row.speedups.items()]
        time, spread = units.seconds(row.seconds.median), units.percent(row.seconds.relative)
        lines.append([*start, time, spread, result.ceiling(row), "; ".join(ratios)])
    report.print_table(lines)
    for row in done.rows:
        for name, why in row.skipped.items():
            print(f"did not run: {row.operator}, {row.label}, {row.dtype}: {name}: {why}")
    for notice in done.notices:
        print(f"note: {notice}")
