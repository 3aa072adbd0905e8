"""The command line of `python -m ppmoe_ops.bench`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from . import (
    compare,
    device_page,
    growth,
    harness,
    phases,
    report,
    result,
    roofline_page,
    targets,
    units,
)  # fmt: skip

_USAGE = """\
python -m ppmoe_ops.bench report            the quick set, written to reports/
       python -m ppmoe_ops.bench list              the cases
       python -m ppmoe_ops.bench compare REV [OPERATOR...]   against a git revision, in turns
       python -m ppmoe_ops.bench OPERATOR...       rows of operators or families, and their targets
       python -m ppmoe_ops.bench profile WHAT      its time by phase (expert_ffn, pslt)
       python -m ppmoe_ops.bench growth            how the time of expert_ffn grows
       python -m ppmoe_ops.bench roofline          what expert slicing must and should take
       python -m ppmoe_ops.bench device [FILE]     the page of GPU runs; stores a device.json"""
# What a shell makes of a program whose reader went away.
PIPE_CLOSED = 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ppmoe_ops.bench", usage=_USAGE)
    parser.add_argument("words", nargs="+", metavar="COMMAND | OPERATOR")
    parser.add_argument("--full", action="store_true", help="all cases, not the quick ones alone")
    parser.add_argument("--case", default="", help="only cases whose key, as in `list`, holds this")
    parser.add_argument("--seconds", type=float, help="measuring time of a row (2, compare: 4)")
    parser.add_argument("--threads", type=int, help="CPU threads (all that the process may use)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile the baselines")
    parser.add_argument("--out", type=Path, help="folder of the report (reports)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code, 1 where an operator was refused."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # `list | head` has read enough; Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return code


def _run(arguments: list[str] | None) -> int:
    parser = _parser()
    given = parser.parse_intermixed_args(arguments)
    command, *rest = given.words
    operators = tuple(given.words)
    if command in ("report", "list"):
        operators = tuple(rest)
    elif command == "compare":
        if not rest:
            parser.error("compare needs a git revision")
        operators = tuple(rest[1:])
    elif command in ("growth", "profile", "roofline"):
        if len(rest) != (command == "profile"):
            parser.error("profile needs one operator, growth and roofline none")
        operators = tuple(each for each in rest if each != "pslt")
    elif command == "device":
        if len(rest) > 1:
            parser.error("device needs one file at most")
        operators = ()
    try:
        cases = harness.cases(not given.full, operators, given.case)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device(given.device) if given.device else report.default_device()
    if command == "list":
        for case in cases:
            print(case.key)
        return 0
    if command in ("device", "roofline"):
        try:
            if command == "device":
                return device_page.run("".join(rest), given.out)
            return roofline_page.run(given.out)
        except ImportError as error:
            parser.error(f"bench: the kernels' tiles cannot be read without Triton ({error})")
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if command == "growth":
        return growth.run(device, given.seconds or 4.0, given.threads)
    if command == "profile":
        return phases.run(rest[0], device, given.seconds or 3.0, given.threads)
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
        text=given.case,
        seconds=given.seconds or 2.0,
        threads=given.threads,
        compiled=given.compile,
    )
    done = report.run(options)
    if command == "report":
        report.print_summary(done, report.write(done, given.out or Path("reports")))
    else:
        _print_rows(done)
    return report.exit_code(done)


def _print_rows(done: result.Report) -> None:
    lines = [["operator", "case", "backend", "time", "IQR", "GFLOP/s", "ceiling",
              "speed [quartiles] against"]]  # fmt: skip
    for row in done.rows:
        start = [row.operator, f"{row.label}, {row.dtype}", row.backend]
        if row.seconds is None:
            lines.append([*start, "refused", "", "", "", row.refused])
            continue
        time, spread = units.seconds(row.seconds.median), units.percent(row.seconds.relative)
        against = "; ".join(result.relative(row))
        lines.append([*start, time, spread, result.gflops(row), result.ceiling(row), against])
    report.print_table(lines)
    held = result.target_lines(done.rows)
    if held:
        print()
        report.print_table([["case", *(name.lower() for name in targets.HEAD)], *held])
        print()
    for case, note in result.note_lines(done.rows):
        print(f"{case}: {note}")
    skipped: dict[tuple[str, str], list[str]] = {}
    for row in done.rows:
        for each in row.skipped.items():
            skipped.setdefault(each, []).append(f"{row.operator}, {row.label}, {row.dtype}")
    for (name, why), rows in skipped.items():
        more = f" and {len(rows) - 1} more" * (len(rows) > 1)
        print(f"did not run: {name}: {why} ({rows[0]}{more})")
    for notice in done.notices:
        print(f"note: {notice}")
