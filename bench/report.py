"""Runs the benchmarks and writes `index.html`, `report.md` and `report.json`."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from . import harness, machine, page, result, timer, units

# Above these shares of the processors, other processes are worth a note or make numbers void.
BUSY, VOID = 0.05, 0.25


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run: which cases, on what, and for how long each."""

    device: torch.device
    quick: bool = True
    operators: tuple[str, ...] = ()
    text: str = ""
    seconds: float = 2.0
    threads: int | None = None
    compiled: bool = False


class Progress:
    """A bar on stderr; a line now and then where stderr is no terminal."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._start = time.monotonic()
        self._said = self._start
        self._terminal = sys.stderr.isatty()

    def step(self, name: str) -> None:
        """Say that `name` has begun."""
        now = time.monotonic()
        width = 24
        filled = width * self._done // max(self._total, 1)
        elapsed = f"{now - self._start:4.0f} s"
        counted = f"{self._done}/{self._total}"
        if self._terminal:
            bar = "█" * filled + "░" * (width - filled)
            sys.stderr.write(f"\r\x1b[K{bar} {counted} {elapsed}  {name[:60]}")
            sys.stderr.flush()
        elif now - self._said > 10 or self._done == 0:
            self._said = now
            print(f"{counted} {elapsed}  {name}", file=sys.stderr, flush=True)
        self._done += 1

    def close(self) -> None:
        """Clear the bar."""
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
        elapsed = time.monotonic() - self._start
        print(f"{self._total} measurements in {elapsed:.0f} s", file=sys.stderr, flush=True)


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(threads: int | None) -> str:
    """Pin the thread count and the memory policy; return the latter in words."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    return timer.recycle_memory()


def run(options: Options) -> result.Report:
    """Measure the ceilings and every case."""
    memory = prepare(options.threads)
    found = harness.cases(options.quick, options.operators, options.text)
    progress = Progress(len(found) + 1)
    load = machine.OtherLoad()
    clock = timer.clock_for(options.device)
    progress.step("ceilings: copies and dense products")
    dtypes = sorted({case.dtype for case in found} & {"float32", "bfloat16", "float16"})
    ceilings = timer.measure_ceilings(
        options.device, [getattr(torch, name) for name in dtypes], clock
    )
    # A row with fewer threads has a ceiling of its own.
    for count, name in sorted({(case.threads, case.dtype) for case in found if case.threads}):
        with harness.thread_count(count):
            roof = harness.Row("", "", name, "", threads=count).roof
            dtype = getattr(torch, name)
            ceilings.gemm[roof] = timer.measure_gemm(dtype, options.device, clock)
    rows = []
    for case in found:
        progress.step(case.key)
        rows.append(
            harness.measure(
                case,
                options.device,
                clock,
                seconds=options.seconds,
                compiled=options.compiled,
            )
        )
    progress.close()
    ceilings = harness.relate(rows, ceilings)
    return result.Report(
        title=f"ppmoe_ops on {_device_name(options.device)}",
        subtitle=_subtitle(options, rows),
        facts=machine.facts(options.device),
        ceilings=ceilings,
        rows=rows,
        method=[
            *result.METHOD,
            *([f"CPU memory: {memory}."] if options.device.type == "cpu" else []),
        ],
        notices=_notices(rows, load.share(), found, options),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return machine.processor().split(",")[0]


def _subtitle(options: Options, rows: list[harness.Row]) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if options.device.type == "cpu" else ""
    kind = "Quick set" if options.quick else "Full set"
    return f"{kind}, {len(rows)} rows, {today}{threads}."


def _notices(
    rows: list[harness.Row], share: float, found: list[harness.Case], options: Options
) -> list[str]:
    notices = []
    if share > BUSY:
        verdict = "ratios hold better than absolute times."
        if share > VOID:
            verdict = "do not quote these numbers; run it again on a quiet machine."
        used = f"Other processes used {units.percent(share)} of the processors during the run"
        notices.append(f"{used}: {verdict}")
    by_reference = sorted({row.operator for row in rows if row.backend == "reference"})
    if by_reference:
        notices.append(
            "Served by the plain-PyTorch reference, for want of a kernel: "
            + ", ".join(by_reference)
        )
    missing = harness.missing_operators(found)
    if missing and not options.operators:
        notices.append("Not measured: " + ", ".join(missing))
    return notices


def write(report: result.Report, out: Path) -> list[Path]:
    """Write the three files into `out`; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "index.html": page.render(report),
        "report.md": result.to_markdown(report),
        "report.json": json.dumps(result.to_json(report), indent=1),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def print_summary(report: result.Report, files: Iterable[Path] = ()) -> None:
    """The headline rows, what was refused, and where the files are."""
    lines = [["", "time", "speed [quartiles]", "against", "ceiling"], *result.summary_lines(report)]
    print_table(lines)
    for row in report.rows:
        if row.refused:
            print(f"refused: {row.operator}, {row.label}, {row.dtype}: {row.refused}")
    for notice in report.notices:
        print(f"note: {notice}")
    shown = [os.path.relpath(path) for path in files]
    if shown:
        print("written: " + ", ".join(shown))


def print_table(lines: list[list[str]]) -> None:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def exit_code(report: result.Report) -> int:
    """1 where an operator was refused."""
    return int(any(row.refused for row in report.rows))
