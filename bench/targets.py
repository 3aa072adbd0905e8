"""What rows are held to: the least that a change may leave, and what is aimed at.

Nothing fails for a target that is missed: a report says what was measured beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from . import units
from .timer import Spread

BEST, READ = "the best baseline", "read bandwidth"
DENSE, LOOP = "dense GEMM chain", "index_select loop"
EAGER, GROUPED = "transformers eager", "transformers grouped_mm"
COMPILED_GROUPED = "torch.compile of grouped_mm"
GEMMS = "the GEMMs alone"
BALANCED, IN_FLOAT32 = "itself, balanced", "itself in float32"
MANUAL, SDPA = "roll and mask", "roll and mask, SDPA"
COMPILED_MANUAL, COMPILED_SDPA = f"torch.compile of {MANUAL}", f"torch.compile of {SDPA}"
FLEX = "torch.compile of FlexAttention"
PLAIN, LAST = "plain PSLT", "plain PSLT, SDPA, channels last"
LAST_MANUAL = f"{PLAIN}, channels last"
COMPILED_PLAIN, COMPILED_LAST = f"torch.compile of {PLAIN}", f"torch.compile of {LAST}"
ITSELF_COMPILED = "itself under torch.compile"
TORCHDEQ, ROWS_LOOP, WHOLE_LOOP = "torchdeq", "plain loop in r dimensions", "plain loop"
RATE, KEPT, COMPILING = "GFLOP/s", "bytes kept for backward", "time to compile"
"""What a target may be held against that is not a speed: a row's own numbers."""
BROYDEN, FEWEST = (
    "evaluations of f relative to Broyden's",
    "evaluations of f relative to the fewest",
)
WORK = "evaluated samples relative to each solved alone"
GROWTH = "peak memory at four times the iterations, relative"
OWN = (RATE, KEPT, COMPILING, BROYDEN, FEWEST, WORK, GROWTH)
LINEAR, FLAT = 0.05, 0.05
"""How far from a line, and from level, the times of the `growth` command may be."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One number that a row is held to.

    Attributes:
        against: the name of a baseline, or `BEST` of those that compute the same, or `READ`, or
            the fastest of `TORCHDEQ`'s solvers, or one of a row's own numbers: `RATE` executed,
            `KEPT` by the baseline that keeps least relative to what the operator keeps,
            `COMPILING`, and what a problem counted itself.
        must, aim: how many times as fast; of `READ`, the share of it; of the row's own numbers,
            what they are to be.
        slower: instead, how many times as slow it may be, or how high the number.
    """

    against: str
    must: float
    aim: float
    slower: bool = False

    def show(self, value: float) -> str:
        """A number as this target is written."""
        if self.against == COMPILING:
            return units.seconds(value)
        if self.against == RATE:
            return units.giga(value)
        return units.percent(value) if self.against in (READ, DENSE) else units.times(value)

    @property
    def words(self) -> str:
        """The target without its numbers."""
        if self.against == READ:
            return f"share of {READ}"
        if self.against == DENSE:
            return f"share of the {DENSE}'s rate"
        if self.against in OWN and self.against != KEPT:
            return self.against
        if self.against == KEPT:
            return f"{KEPT}, the baseline's relative to its own"
        whom = f"the fastest of {TORCHDEQ}" if self.against == TORCHDEQ else self.against
        return f"{'time' if self.slower else 'speed'} relative to {whom}"


@dataclasses.dataclass(frozen=True)
class Judged:
    """A target and what was measured; None where its baseline did not run.

    `incomplete` marks the best of baselines of which some were left out.
    """

    target: Target
    value: float | None
    incomplete: bool = False

    @property
    def verdict(self) -> str:
        """`aim`, `must`, `missed` or `not measured`."""
        if self.value is None:
            return "not measured"
        sign = -1 if self.target.slower else 1
        for name, limit in (("aim", self.target.aim), ("must", self.target.must)):
            if sign * self.value >= sign * limit:
                return name
        return "missed"

    def cells(self) -> list[str]:
        """What, measured, must, aim, verdict."""
        measured = units.NONE if self.value is None else self.target.show(self.value)
        limits = [self.target.show(each) for each in (self.target.must, self.target.aim)]
        words = self.target.words + " that ran" * self.incomplete
        return [words, measured, *limits, self.verdict]


HEAD = ["Target", "Measured", "Must", "Aim", "Verdict"]

_ONE_RANK = (Target(GROUPED, 3.0, 3.5), Target(LOOP, 1.12, 1.25))
_ONE_RANK_STEP = (Target(GROUPED, 1.5, 1.8), Target(LOOP, 1.15, 1.3))
_READ = Target(READ, 0.80, 0.92)
_ROUTING = (Target(BALANCED, 1.15, 1.05, slower=True),)

TARGETS: dict[str, tuple[Target, ...]] = {
    "forward R=1 float32": (Target(DENSE, 0.92, 0.97), Target(BEST, 1.0, 1.1)),
    "forward R=1 bfloat16": (Target(DENSE, 0.85, 0.95), Target(BEST, 1.25, 1.5)),
    "forward R=1 float16": (Target(BEST, 3.0, 3.0), Target(IN_FLOAT32, 1.1, 1.0, slower=True)),
    "forward R=4 float32": _ONE_RANK,
    "forward R=4 bfloat16": _ONE_RANK,
    "forward+backward R=1 float32": (Target(BEST, 1.2, 1.35),),
    "forward+backward R=1 bfloat16": (Target(BEST, 1.4, 1.7),),
    "forward+backward R=4 float32": _ONE_RANK_STEP,
    "forward+backward R=4 bfloat16": _ONE_RANK_STEP,
    "decode float32": (_READ,),
    "decode bfloat16": (_READ, Target(BEST, 1.6, 1.6)),
    "decode bfloat16, four rows an expert": (_READ, Target(BEST, 2.5, 2.5)),
    "routing": _ROUTING,
    "window core float32": (Target(RATE, 50e9, 70e9), Target(BEST, 2.2, 3.0)),
    "window core bfloat16": (Target(BEST, 2.0, 3.0),),
    "ladder core forward float32 B=1": (Target(BEST, 1.2, 1.7),),
    "ladder core forward float32 B=16": (Target(BEST, 1.2, 1.6),),
    "ladder core forward bfloat16": (Target(BEST, 1.6, 2.5),),
    "ladder core forward+backward": (Target(BEST, 1.4, 1.8),),
    "PSLT inference B=1": (Target(PLAIN, 1.6, 2.3),),
    "PSLT inference B=16": (Target(PLAIN, 2.0, 3.0),),
    "PSLT step": (Target(PLAIN, 1.3, 1.6),),
    "ladder block kept": (Target(KEPT, 5.0, 11.0),),
    "PSLT inference compiled": (Target(COMPILED_PLAIN, 1.0, 1.0),),
    "PSLT compiling": (Target(COMPILING, 60.0, 20.0, slower=True),),
    "prompt forward 128 tokens": (Target(TORCHDEQ, 50.0, 100.0), Target(ROWS_LOOP, 4.0, 4.0)),
    "prompt forward 1576 tokens": (Target(TORCHDEQ, 40.0, 80.0),),
    "prompt forward+backward": (Target(TORCHDEQ, 30.0, 80.0),),
    "layer on images": (Target(TORCHDEQ, 1.3, 1.5),),
    "fused layer on images": (Target(TORCHDEQ, 2.5, 5.0),),
    "evaluations": (Target(BROYDEN, 1.1, 1.0, slower=True), Target(FEWEST, 1.0, 1.0, slower=True)),
    "one hard sample": (Target(WORK, 1.3, 1.1, slower=True),),
    "history": (Target(GROWTH, 1.01, 1.01, slower=True),),
}
SLOW = ("PSLT inference compiled", "PSLT compiling")
"""Targets whose baselines take minutes, so that the full set alone has them."""


def judge(
    name: str,
    speedups: Mapping[str, Spread],
    rivals: Sequence[str],
    read: float | None,
    own: Mapping[str, float] | None = None,
    left_out: Collection[str] = (),
) -> list[Judged]:
    """The targets called `name`, on a row's speeds relative to its baselines.

    `own` are the row's own numbers, `left_out` are baselines that did not run.
    """
    numbers = dict(own or {})

    def measured(target: Target) -> float | None:
        if target.against == READ:
            return read
        if target.against in OWN:
            return numbers.get(target.against)
        names = rivals if target.against == BEST else [target.against]
        if target.against == TORCHDEQ:
            names = [each for each in rivals if each.startswith(TORCHDEQ)]
        found = [speedups[each].median for each in names if each in speedups]
        if not found:
            return None
        return 1 / min(found) if target.slower else min(found)

    missing = {
        BEST: bool({COMPILED_MANUAL, COMPILED_SDPA, FLEX}.intersection(left_out)),
        TORCHDEQ: any(each.startswith(TORCHDEQ) for each in left_out),
    }
    return [
        Judged(target, measured(target), missing.get(target.against, False))
        for target in TARGETS.get(name, ())
    ]
