"""Makes `pytest bench --benchmark-only` collect the benchmark files and their cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import harness, timer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all cases, not the quick ones alone")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        module: pytest.Module = pytest.Module.from_parent(parent, path=file_path)
        return module
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench_call" in metafunc.fixturenames:
        quick = not metafunc.config.getoption("--full")
        found = [case for case in metafunc.module.cases() if case.quick or not quick]
        metafunc.parametrize("bench_call", found, ids=[case.key for case in found], indirect=True)


@pytest.fixture(scope="session", autouse=True)
def memory_policy() -> str:
    """The allocator setting that the report uses too."""
    return timer.recycle_memory()


@pytest.fixture
def bench_call(request: pytest.FixtureRequest) -> Iterator[Callable[[], Any]]:
    """The call of one case, after its result has been checked."""
    case: harness.Case = request.param
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with harness.thread_count(case.threads):
        _, call, verdict = harness.ready(case, device)
        if not verdict.passed:
            pytest.fail(f"refused: {verdict.reason}")

        def finished() -> None:
            call()
            torch.cuda.synchronize()

        yield call if device.type == "cpu" else finished
