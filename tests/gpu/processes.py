"""What the gpu tier runs in a process of its own, under compute-sanitizer too."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CANNOT_RUN = re.compile(r"not supported|unable to|insufficient|permission|failed to init", re.I)


def run_python(code: str, *prefix: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `code` behind the command `prefix`, with this process's modules."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    return subprocess.run(
        [*prefix, sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def check_sanitized(code: str, kind: str, **variables: str) -> None:
    """Fail unless `code`, which prints "done" last, is clean; skip where the tool cannot run."""
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    tool = shutil.which("compute-sanitizer") or (str(usual) if usual.is_file() else None)
    if tool is None:
        pytest.skip("no compute-sanitizer on this machine")
    prefix = (tool, "--tool", kind, "--error-exitcode", "9")
    run = run_python(code, *prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **variables)
    text = run.stdout + run.stderr
    if run.returncode != 0 and "done" not in text and CANNOT_RUN.search(text):
        pytest.skip("compute-sanitizer cannot run on this machine")
    assert run.returncode == 0, text[-4000:]
    assert "done" in text
