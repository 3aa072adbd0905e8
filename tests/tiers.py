"""The test tiers, and how many tests each may skip and for which reason.

`conftest.py` counts the skips of a run and fails it where a tier skips more than this table allows,
so that a test that quietly stops running is noticed.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Tier:
    """A set of tests that runs in one process.

    Attributes:
        name: as in `make test-<name>`.
        folder: its folder under `tests/`; the cpu tier has everything that no other tier has.
        allowed: pattern of a skip's reason -> how many tests may be skipped for it.
    """

    name: str
    folder: str
    allowed: dict[str, int]


TIERS = (
    Tier("cpu", "", {r"(torchvision|timm) does not import": 4}),
    Tier("interpret", "interpret", {r"a process of its own": 900}),
    Tier("compile", "compile", {r"\bnvcc\b": 8}),
    Tier("gpu", "gpu", {r"compute-sanitizer": 12, r"no (CUDA )?GPU|CUDA is not available": 500}),
)


def tier_of(test: str) -> Tier:
    """The tier of a test, from its node id or path below `tests/`."""
    folders = re.split(r"[/\\]", test.split("::")[0])
    for tier in TIERS[1:]:
        if tier.folder in folders:
            return tier
    return TIERS[0]


def excess_skips(skips: Iterable[tuple[str, str]]) -> list[str]:
    """Complaints about (test, reason) pairs that go beyond the table, one line each."""
    counts: Counter[tuple[str, str | None]] = Counter()
    unexpected = []
    for test, reason in skips:
        tier = tier_of(test)
        pattern = next((each for each in tier.allowed if re.search(each, reason)), None)
        if pattern is None:
            unexpected.append(f"{tier.name}: {test} was skipped, which is not allowed: {reason}")
        counts[tier.name, pattern] += 1
    beyond = [
        f"{tier.name}: {counts[tier.name, pattern]} tests were skipped for '{pattern}'; "
        f"allowed: {most}"
        for tier in TIERS
        for pattern, most in tier.allowed.items()
        if counts[tier.name, pattern] > most
    ]
    return unexpected + beyond
