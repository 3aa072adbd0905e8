"""Calls of compiled operators keep no memory: no tensor, no string, not when they raise either."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ppmoe_ops._library import OPERATORS, Operator

# The smallest thing that a call could leave behind takes 32 bytes.
CALLS = 20000
ALLOWED = 32 * CALLS - (128 << 10)
KERNELS = [op for op in OPERATORS.values() if not op.composite]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(call: Callable[[], Any]) -> int:
    """Bytes that the process has grown by after many calls."""
    for _ in range(CALLS // 10):
        call()
    before = resident_bytes()
    for _ in range(CALLS):
        call()
    return resident_bytes() - before


@pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
def test_calls_keep_no_memory(op: Operator) -> None:
    args, options = next(iter(op.samples(torch.device("cpu"), torch.float32)))
    plain = [each.detach() if isinstance(each, torch.Tensor) else each for each in args]
    assert growth(lambda: op.overload(*plain, **options)) < ALLOWED


@pytest.mark.parametrize("score", ["sigmoid", "a score that is longer than a short string"])
def test_strings_are_freed(score: str) -> None:
    route = OPERATORS["route"].overload
    logits = torch.randn(1, 8)

    def call() -> None:
        with contextlib.suppress(ValueError):
            route(logits, 2, score)

    assert growth(call) < ALLOWED


def test_refused_calls_keep_no_memory() -> None:
    # The error is found before and after the string argument has been looked at.
    route = OPERATORS["route"].overload
    for logits, top_k in ((torch.randn(8), 2), (torch.randn(1, 8), 9)):

        def call(logits: torch.Tensor = logits, top_k: int = top_k) -> None:
            with contextlib.suppress(ValueError):
                route(logits, top_k, "softmax")

        assert growth(call) < ALLOWED
