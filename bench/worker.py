"""One side of a comparison: a script that answers questions, a JSON line each, on its pipes.

`worker.py TREE DEVICE THREADS` imports `ppmoe_ops` from TREE but the benchmarks from beside
itself, so that both sides run the same ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

SAMPLE_SECONDS = 0.02
# After a parallel region OpenMP's threads spin for a while; the other side must not feel that.
PAUSE = 0.003


def load_benchmarks() -> None:
    """Make the folder of this file `ppmoe_ops.benchmarks`."""
    folder = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "ppmoe_ops.benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ppmoe_ops.benchmarks"] = module
    spec.loader.exec_module(module)


class Answers:
    """What this side knows: its cases, and the one that is prepared."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self._harness: Any = importlib.import_module("ppmoe_ops.benchmarks.harness")
        self._timer: Any = importlib.import_module("ppmoe_ops.benchmarks.timer")
        report: Any = importlib.import_module("ppmoe_ops.benchmarks.report")
        report.prepare(threads)
        self._device = device
        self._threads = torch.get_num_threads()
        self._cases = {case.key: case for case in self._harness.cases(quick=False)}
        self._call: Any = None
        self._clock: Any = None

    def prepare(self, key: str) -> dict[str, Any]:
        """Build, check and calibrate a case."""
        case = self._cases.get(key)
        if case is None:
            return {"refused": "has no such case"}
        self._call = None
        torch.set_num_threads(case.threads or self._threads)
        try:
            _, call, verdict = self._harness.ready(case, self._device)
        except Exception as error:
            return {"refused": f"{type(error).__name__}: {error}"}
        if not verdict.passed:
            return {"refused": verdict.reason}
        clock = self._timer.clock_for(self._device)
        self._clock = self._timer.HostClock(self._device) if case.function else clock
        self._call = call
        repeats, seconds = self._timer.calibrate(call, self._clock, SAMPLE_SECONDS)
        time.sleep(PAUSE)
        return {"repeats": repeats, "seconds": seconds}

    def sample(self, repeats: int) -> dict[str, Any]:
        """Time the prepared case, after a call that wakes this side's threads and caches."""
        self._call()
        seconds = self._clock.measure(self._call, repeats)
        time.sleep(PAUSE)
        return {"seconds": seconds}


def serve(answers: Answers, questions: TextIO, replies: TextIO) -> None:
    """Answer until the pipe closes."""
    for line in questions:
        question: dict[str, Any] = json.loads(line)
        if "prepare" in question:
            answer = answers.prepare(question["prepare"])
        else:
            answer = answers.sample(question["sample"])
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def main() -> None:
    """Keep the pipe for answers alone: whatever else prints goes to stderr."""
    tree, device, threads = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    imported = Path(importlib.import_module("ppmoe_ops").__path__[0]).resolve()
    if imported != Path(tree).resolve() / "ppmoe_ops":
        raise SystemExit(f"compare: ppmoe_ops came from {imported}; expected it in {tree}")
    load_benchmarks()
    serve(Answers(torch.device(device), int(threads)), sys.stdin, replies)


if __name__ == "__main__":
    main()
