"""Measures this tree against another git revision, the two taking turns.

Both run these benchmarks, each in a process of its own with its own `ppmoe_ops`; a process waits
on a pipe while the other measures, and ratios are formed round by round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from . import machine, report, timer, units

ROUNDS = (7, 60)


class Side(Protocol):
    """One of the two revisions, ready to be asked for samples of one case."""

    def prepare(self, key: str) -> dict[str, Any]: ...
    def sample(self, repeats: int) -> float: ...


class Worker:
    """A process that holds one revision's package and answers on a pipe."""

    def __init__(self, tree: Path, device: torch.device, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
        environment.pop("PPMOE_OPS_LIBRARY_DIR", None)
        script = Path(__file__).resolve().parent / "worker.py"
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(tree), device.type, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"compare: a worker ended with code {self._process.wait()}")
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    def prepare(self, key: str) -> dict[str, Any]:
        """Build and check a case: `repeats` and `seconds`, or `refused`."""
        return self._ask(prepare=key)

    def sample(self, repeats: int) -> float:
        """Seconds a call, averaged over `repeats`."""
        return float(self._ask(sample=repeats)["seconds"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One case on both sides; `speedup` above 1 says that this tree is faster."""

    key: str
    ours: timer.Spread | None = None
    theirs: timer.Spread | None = None
    speedup: timer.Spread | None = None
    refused: str = ""


def take_turns(
    key: str, ours: Side, theirs: Side, seconds: float, shuffle: random.Random
) -> Comparison:
    """Measure one case on both sides, one process at a time, in an order that changes."""
    answers = {"this tree": ours.prepare(key), "the revision": theirs.prepare(key)}
    for name, answer in answers.items():
        if "refused" in answer:
            return Comparison(key, refused=f"{name}: {answer['refused']}")
    repeats = [int(answer["repeats"]) for answer in answers.values()]
    samples: list[list[float]] = [[], []]
    spent, least, most = 0.0, *ROUNDS
    while len(samples[0]) < least or (spent < seconds and len(samples[0]) < most):
        order = [0, 1]
        shuffle.shuffle(order)
        passes: list[list[float]] = [[], []]
        # There and back: a drift within the round then weighs on both alike.
        for side in (*order, *reversed(order)):
            value = (ours, theirs)[side].sample(repeats[side])
            passes[side].append(value)
            spent += value * repeats[side]
        for side in (0, 1):
            samples[side].append(statistics.mean(passes[side]))
    ratios = [b / a for a, b in zip(*samples, strict=True)]
    return Comparison(key, timer.spread(samples[0]), timer.spread(samples[1]), timer.spread(ratios))


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A temporary checkout of `revision`, built in place."""
    root = machine.ROOT
    if not machine.revision():
        raise SystemExit(
            f"compare: {root} is not a git checkout. Run it from a clone, with the package on the "
            "path or installed with pip install --no-build-isolation -e ."
        )
    git = ["git", "-C", str(root)]
    with tempfile.TemporaryDirectory(prefix="ppmoe_ops_compare_") as folder:
        tree = Path(folder) / "tree"
        added = subprocess.run(
            [*git, "worktree", "add", "--detach", str(tree), revision],
            capture_output=True,
            text=True,
            check=False,
        )
        if added.returncode != 0:
            raise SystemExit(f"compare: {added.stderr.strip()}")
        try:
            _build(tree)
            yield tree
        finally:
            subprocess.run(
                [*git, "worktree", "remove", "--force", str(tree)], capture_output=True, check=False
            )


def _build(tree: Path) -> None:
    if not (tree / "setup.py").is_file():
        print("compare: the revision has no setup.py; its references are measured", file=sys.stderr)
        return
    print("compare: building the revision", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"compare: the revision does not build\n{done.stdout[-4000:]}")


def run(
    revision: str, keys: Sequence[str], *, device: torch.device, seconds: float, threads: int | None
) -> int:
    """Compare all `keys`; print a row each; 1 where a side was refused."""
    count = threads or len(os.sched_getaffinity(0))
    results: list[Comparison] = []
    with worktree(revision) as tree:
        ours, theirs = Worker(machine.ROOT, device, count), Worker(tree, device, count)
        progress = report.Progress(len(keys))
        try:
            for key in keys:
                progress.step(key)
                results.append(take_turns(key, ours, theirs, seconds, random.Random(0)))
        finally:
            ours.close()
            theirs.close()
        progress.close()
    print_results(revision, results)
    return int(any(each.refused for each in results))


def print_results(revision: str, results: Sequence[Comparison]) -> None:
    """A line a case; above 1 this tree is faster."""
    lines = [["case", "this tree", revision, "speedup [quartiles]"]]
    for each in results:
        if each.ours is None or each.theirs is None or each.speedup is None:
            lines.append([each.key, units.NONE, units.NONE, each.refused])
            continue
        lines.append(
            [
                each.key,
                units.seconds(each.ours.median),
                units.seconds(each.theirs.median),
                units.times_range(each.speedup),
            ]
        )
    report.print_table(lines)
