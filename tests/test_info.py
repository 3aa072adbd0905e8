"""`python -m ppmoe_ops.info` tells what is there, what is not, and why, whatever is missing."""

from __future__ import annotations

import doctest
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ppmoe_ops import _matrix, info
from ppmoe_ops._library import OPERATORS

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("PPMOE_OPS", "TRITON_"))}
    settings["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-m", "ppmoe_ops.info", *words],
        env={**settings, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@functools.cache
def facts(**environment: str) -> Any:
    """`--json` of a process of its own; `info.report` of it is the text."""
    done = run("--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def served(found: Any, device: str = "cpu") -> set[str | None]:
    entries = found["operators"].values()
    return {entry[device]["backend"] for entry in entries if "composite_of" not in entry}


def test_text_names_every_operator_version_and_build_line() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    for name in OPERATORS:
        assert f"\n  {name} " in done.stdout
    assert f"torch   {torch.__version__}\n" in done.stdout
    for line in info.collect()["build"]["summary"]:
        assert f"  {line}\n" in done.stdout
    assert len(info.collect()["build"]["summary"]) == 5


def test_json_is_what_collect_returns() -> None:
    assert facts() == info.collect()
    assert facts()["operators"].keys() == set(OPERATORS)


def test_composites_point_to_their_operator() -> None:
    entry = facts()["operators"]["router_losses"]
    assert entry == {"composite_of": "router_losses_forward"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_reason_stands_for_every_backend_that_was_passed_over(device: str) -> None:
    order = {"cpu": ["cpp", "triton"], "cuda": ["cuda", "triton"]}[device]
    for name, entry in facts()["operators"].items():
        if "composite_of" in entry:
            continue
        chosen, missing = entry[device]["backend"], entry[device]["missing"]
        before = order[: order.index(chosen)] if chosen in order else order
        assert list(missing) == before, name
        assert all(missing.values()), name


def test_never_built(tmp_path: Path) -> None:
    found = facts(PPMOE_OPS_LIBRARY_DIR=str(tmp_path))
    assert found["build"]["summary"] == []
    assert "never built" in found["build"]["missing"]
    assert served(found) == {"reference"}
    assert "never built" in info.report(found)
    assert "cpp for cpu tensors: _C_cpu.so is not in" in info.report(found)


def test_host_module_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ppmoe_ops._host", None)
    found = info.collect()
    assert found["cpu"]["in_use"] is None
    assert "ppmoe_ops._host does not import" in info.report(found)


def test_triton_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_installed", lambda name: None)
    assert "triton  not installed" in info.report(info.collect())


def test_a_damaged_library_is_reported_and_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "_C_cpu.so").write_text("not a library")
    found = facts(PPMOE_OPS_LIBRARY_DIR=str(tmp_path))
    assert served(found) == {"reference"}
    assert "does not load" in found["operators"]["route"]["cpu"]["missing"]["cpp"]


def test_forced_backends() -> None:
    assert served(facts(PPMOE_OPS_BACKEND="reference")) == {"reference"}
    assert served(facts(PPMOE_OPS_BACKEND="cpp")) == {"cpp"}
    found = facts(PPMOE_OPS_BACKEND="cuda")
    assert served(found) == {None}
    assert "(PPMOE_OPS_BACKEND=cuda)" in info.report(found)
    assert "refused" in info.report(found)


def test_a_misspelt_backend_is_refused() -> None:
    done = run(PPMOE_OPS_BACKEND="cpu")
    assert done.returncode != 0
    assert "PPMOE_OPS_BACKEND is 'cpu'; allowed: reference, cpp, cuda, triton" in done.stderr


def test_capability_can_be_lowered() -> None:
    assert facts(PPMOE_OPS_CPU_CAPABILITY="baseline")["cpu"]["in_use"] == "baseline"
    found = facts(PPMOE_OPS_CPU_CAPABILITY="fast")
    assert found["cpu"]["in_use"] is None
    assert "PPMOE_OPS_CPU_CAPABILITY is 'fast'; allowed here: baseline" in found["cpu"]["missing"]


def test_matrix_is_printed_and_is_a_table() -> None:
    done = run("--matrix")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == _matrix.markdown()
    widths = {line.count(" | ") for line in done.stdout.strip().splitlines()}
    assert widths == {len(_matrix.HEADER) - 1}


def test_matrix_needs_a_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_matrix, "CSRC", tmp_path / "csrc")
    assert info.main(["--matrix"]) == 1
    assert "Run it in a source tree" in capsys.readouterr().err


def test_output_may_be_cut_short() -> None:
    command = f"{sys.executable} -m ppmoe_ops.info | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("ppmoe_ops ")
    assert "Traceback" not in done.stderr


def test_docstring_example() -> None:
    failed, tried = doctest.testmod(info)
    assert tried
    assert failed == 0
