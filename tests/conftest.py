"""What every test starts from: a seed, poisoned memory, pinned settings, and counted skips.

The package is imported inside fixtures alone: the interpret tier sets its environment first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Threads that wait for work sleep, as tests share their cores. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A fused multiply-add rounds once where two operations round twice; tests compare the latter.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")

import pytest
import torch

TESTS = Path(__file__).resolve().parent
for folder in (TESTS, TESTS.parent / "csrc"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from tiers import excess_skips, tier_of  # noqa: E402

_SKIPS: list[tuple[str, str]] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernel: enough tests to catch a wrong kernel, but fast")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20240229)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """NaN where a CPU test reads memory that nobody wrote."""
    if tier_of(request.node.nodeid).name != "cpu":
        yield
        return
    from ppmoe_ops.testing import poison_memory

    with poison_memory():
        yield


@pytest.fixture(autouse=True)
def exact_subnormals() -> Iterator[None]:
    """Subnormals are kept, and a test that changes the thread count does not leave it so."""
    threads = torch.get_num_threads()
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


def _note_skip(nodeid: str, report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _SKIPS.append((nodeid, reason.removeprefix("Skipped: ")))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report.nodeid, report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report.nodeid, report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if excess_skips(_SKIPS) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    complaints = excess_skips(_SKIPS)
    if complaints:
        terminalreporter.section("skips beyond tests/tiers.py", red=True)
        for line in complaints:
            terminalreporter.write_line(line)
