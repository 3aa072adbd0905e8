"""`expert_ffn` copies no weights, touches no more memory than it says, and leaks none."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import BAD_CALLS, BadCall
from test_memory import ALLOWED, growth

from ppmoe_ops._library import OPERATORS

HERE = Path(__file__).resolve().parent


def test_no_copy_of_the_weights_and_no_touch_of_what_is_reserved() -> None:
    run = subprocess.run(
        [sys.executable, str(HERE / "peak_memory.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 9
    beyond = [line for line in lines if int(line[1]) > int(line[2])]
    assert not beyond, run.stdout


# An error in the string, in a shape after it, in the offsets, and in the slots.
REFUSED = ("allowed: gelu, ", "w_in has H = 4", "holds 3 after 5", "holds 1 twice")


@pytest.mark.parametrize("op", ["expert_ffn_forward", "expert_ffn_backward"])
@pytest.mark.parametrize("message", REFUSED)
def test_refused_calls_keep_no_memory(op: str, message: str) -> None:
    rows: list[BadCall] = [row for row in BAD_CALLS if row.op == op and message in row.message]
    # The longest: a string that does not fit into a short one.
    row = max(rows, key=lambda row: len(str(row.changes.get("activation", ""))))
    args, function = row.args(), OPERATORS[op].overload

    def call() -> None:
        with contextlib.suppress(ValueError, IndexError):
            function(*args)

    assert growth(call) < ALLOWED
