"""`ppmoe_ops._host`: what the package knows of its build and of this CPU."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ppmoe_ops import _host, _load

ORDER = ["baseline", "avx2", "avx512", "avx512_bf16"]
# Flags of /proc/cpuinfo that an instruction set stands for.
FLAGS = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "bmi2", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
}


def selected(**environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "PPMOE_OPS_CPU_CAPABILITY"}
    parent = str(Path(_load.__file__).resolve().parents[1])
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {parent!r})\n"
         "import importlib.util\n"
         f"spec = importlib.util.spec_from_file_location('_host', {_host.__file__!r})\n"
         "host = importlib.util.module_from_spec(spec)\n"
         "spec.loader.exec_module(host)\n"
         "print(host.selected_isa())"],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


def test_built_isas_are_a_growing_list() -> None:
    built = _host.built_isas()
    assert built[0] == "baseline"
    assert built == [isa for isa in ORDER if isa in built]


def test_cpu_capability_is_what_the_cpu_says() -> None:
    assert _host.cpu_capability() in ORDER
    if platform.machine() != "x86_64":
        assert _host.cpu_capability() == "baseline"
        return
    match = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert match is not None
    flags, best = set(match.group(1).split()), "baseline"
    for isa in ORDER:
        if not FLAGS[isa] <= flags:
            break
        best = isa
    assert _host.cpu_capability() == best


def test_the_best_usable_instruction_set_is_selected() -> None:
    built, best = _host.built_isas(), ORDER.index(_host.cpu_capability())
    usable = [isa for isa in built if ORDER.index(isa) <= best]
    assert selected().stdout.strip() == usable[-1]
    assert selected(PPMOE_OPS_CPU_CAPABILITY="").stdout.strip() == usable[-1]


@pytest.mark.parametrize("isa", _host.built_isas())
def test_a_lesser_one_can_be_asked_for_and_a_better_one_cannot(isa: str) -> None:
    run = selected(PPMOE_OPS_CPU_CAPABILITY=isa)
    if ORDER.index(isa) <= ORDER.index(_host.cpu_capability()):
        assert run.stdout.strip() == isa
    else:
        assert f"ValueError: PPMOE_OPS_CPU_CAPABILITY is '{isa}'" in run.stderr


def test_an_unknown_one_is_refused_with_what_is_allowed() -> None:
    run = selected(PPMOE_OPS_CPU_CAPABILITY="AVX2")
    assert run.returncode == 1
    assert "ValueError: PPMOE_OPS_CPU_CAPABILITY is 'AVX2'; allowed here: baseline" in run.stderr


def test_compiler_is_a_version() -> None:
    assert re.search(r"\d+\.\d+", _host.compiler())


def test_functions_are_documented() -> None:
    for name in ("built_isas", "cpu_capability", "selected_isa", "compiler"):
        assert getattr(_host, name).__doc__
    assert _host.__doc__


def test_needs_no_torch() -> None:
    # The module has no tensors in it: `selected` above loads it without torch.
    run = subprocess.run(["ldd", _host.__file__], capture_output=True, text=True, check=True)
    assert "torch" not in run.stdout
