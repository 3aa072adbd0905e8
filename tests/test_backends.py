"""What serves an operator when something is forced, missing or broken; each in its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from ppmoe_ops import _backends, _host, _load
from ppmoe_ops._library import OPERATORS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_PARENT = Path(_load.__file__).resolve().parents[1]
KERNELS = [op.name for op in OPERATORS.values() if not op.composite]
LIBRARY = _load.library_directory() / _load.LIBRARIES["cpp"]

# Calls every operator on its first sample and prints what happened as the last line.
CALL_ALL = """
import json, logging, sys, torch
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger("ppmoe_ops").addHandler(Keep())
import ppmoe_ops
from ppmoe_ops import _backends
from ppmoe_ops._library import OPERATORS

def attempt(op, args, options):
    try:
        op.overload(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"

torch.manual_seed(0)
outcomes = {}
for op in OPERATORS.values():
    for dtype in (torch.float32, torch.float64):
        try:
            args, options = next(iter(op.samples(torch.device("cpu"), dtype)))
        except RuntimeError as error:  # a sample needs another operator's result
            outcomes[op.name] = f"{type(error).__name__}: {error}"
            continue
        outcomes[op.name] = attempt(op, args, options)
chosen = {name: {device: [c.backend, c.missing] for device, c in each.items()}
          for name, each in _backends.choices().items()}
maps = open("/proc/self/maps").read()
print(json.dumps({"outcomes": outcomes, "choices": chosen, "log": records,
                  "cpp_loaded": "_C_cpu.so" in maps,
                  "modules": sorted(m for m in sys.modules if "." not in m)}))
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code with this package and these variables alone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PPMOE_OPS_", "TRITON_"))}
    kept[_load.DIRECTORY_VARIABLE] = str(_load.library_directory())
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**kept, "PYTHONPATH": str(PACKAGE_PARENT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def call_all(before: str = "", **environment: str) -> dict[str, Any]:
    run = python(textwrap.dedent(before) + CALL_ALL, **environment)
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def test_default_is_the_compiled_kernels_and_logs_nothing() -> None:
    result = call_all()
    assert set(result["outcomes"].values()) == {"ok"}
    assert {each["cpu"][0] for each in result["choices"].values()} == {"cpp"}
    assert result["log"] == []
    assert result["cpp_loaded"]


def test_importing_starts_nothing_heavy() -> None:
    run = python(
        """
        import sys, torch
        import ppmoe_ops
        heavy = ("torch.distributed.tensor", "torch._inductor", "ppmoe_ops.kernels", "sympy")
        assert not [name for name in heavy if name in sys.modules]
        assert not torch.cuda.is_initialized()
        """
    )
    assert run.returncode == 0, run.stderr


def test_forced_reference_loads_no_library() -> None:
    result = call_all(PPMOE_OPS_BACKEND="reference")
    assert set(result["outcomes"].values()) == {"ok"}
    for name, each in result["choices"].items():
        for device in ("cpu", "cuda"):
            backend, missing = each[device]
            assert backend == "reference", name
            assert set(missing.values()) == {"PPMOE_OPS_BACKEND=reference"}
    # It was asked for, so there is nothing to say.
    assert result["log"] == []
    assert not result["cpp_loaded"]


def test_forced_cpp_serves_the_cpu_alone() -> None:
    result = call_all(PPMOE_OPS_BACKEND="cpp")
    assert set(result["outcomes"].values()) == {"ok"}
    assert {each["cpu"][0] for each in result["choices"].values()} == {"cpp"}
    assert {each["cuda"][0] for each in result["choices"].values()} == {None}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_forced_gpu_backend_refuses_cpu_tensors_with_the_reason(backend: str) -> None:
    result = call_all(PPMOE_OPS_BACKEND=backend)
    for name in KERNELS:
        outcome = result["outcomes"][name]
        assert outcome.startswith("RuntimeError: ")
        assert f"PPMOE_OPS_BACKEND={backend} cannot serve cpu tensors (" in outcome
        assert not outcome.endswith("()")
        assert result["choices"][name]["cpu"][0] is None
    assert not result["cpp_loaded"]
    wanted = "no kernels for this device" if backend == "cuda" else "Triton"
    assert all(wanted in result["outcomes"][name] for name in ("grouped_linear",))


def test_forced_cpp_without_a_library_refuses_with_the_reason(tmp_path: Path) -> None:
    result = call_all(PPMOE_OPS_BACKEND="cpp", PPMOE_OPS_LIBRARY_DIR=str(tmp_path))
    assert result["outcomes"]["route"] == (
        "RuntimeError: route: PPMOE_OPS_BACKEND=cpp cannot serve cpu tensors "
        f"(_C_cpu.so is not in {tmp_path})"
    )


def test_an_unknown_backend_stops_the_import() -> None:
    run = python("import ppmoe_ops", PPMOE_OPS_BACKEND="nonsense")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "ValueError: PPMOE_OPS_BACKEND is 'nonsense'; allowed: reference, cpp, cuda, triton"
    )


def test_an_empty_variable_forces_nothing() -> None:
    run = python(
        """
        from ppmoe_ops import _backends
        assert _backends.forced() is None
        assert _backends.choices()["route"]["cpu"].backend == "cpp"
        """,
        PPMOE_OPS_BACKEND="",
    )
    assert run.returncode == 0, run.stderr


def test_without_the_library_the_reference_serves_and_says_so_once(tmp_path: Path) -> None:
    result = call_all(PPMOE_OPS_LIBRARY_DIR=str(tmp_path))
    assert set(result["outcomes"].values()) == {"ok"}
    for name in KERNELS:
        backend, missing = result["choices"][name]["cpu"]
        assert backend == "reference"
        assert missing["cpp"] == f"_C_cpu.so is not in {tmp_path}"
        # Called for two dtypes, and by samples of other operators; said once.
        said = [line for line in result["log"] if line.startswith(f"{name}: ")]
        assert len(said) == 1
        assert "the plain-PyTorch reference serves cpu tensors" in said[0]
        assert f"_C_cpu.so is not in {tmp_path}" in said[0]
    assert len(result["log"]) == len(KERNELS)


@pytest.mark.parametrize("content", ["text", "cut short", "another library"])
def test_a_broken_library_is_a_reason_and_not_a_crash(content: str, tmp_path: Path) -> None:
    broken = tmp_path / "_C_cpu.so"
    if content == "text":
        broken.write_text("not a shared object\n")
    elif content == "cut short":
        broken.write_bytes(LIBRARY.read_bytes()[:40])
    else:
        shutil.copy(_host.__file__, broken)
    result = call_all(PPMOE_OPS_LIBRARY_DIR=str(tmp_path))
    assert set(result["outcomes"].values()) == {"ok"}
    for name in KERNELS:
        backend, missing = result["choices"][name]["cpu"]
        assert backend == "reference"
        assert "_C_cpu.so" in missing["cpp"]
    assert len(result["log"]) == len(KERNELS)


def test_gradients_and_compile_work_on_the_reference(tmp_path: Path) -> None:
    run = python(
        """
        import torch, ppmoe_ops
        from torch.autograd import gradcheck
        x = torch.randn(5, 8).double().requires_grad_()
        assert gradcheck(lambda x: ppmoe_ops.route(x, 2, "sigmoid")[0], (x,))
        rows = torch.randn(6, 3).double().requires_grad_()
        weight = torch.randn(2, 4, 3).double().requires_grad_()
        offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
        assert gradcheck(lambda r, w: ppmoe_ops.grouped_linear(r, offsets, w), (rows, weight))
        compiled = torch.compile(ppmoe_ops.grouped_linear, fullgraph=True, backend="aot_eager")
        wanted = ppmoe_ops.grouped_linear(rows, offsets, weight)
        assert torch.equal(compiled(rows, offsets, weight), wanted)
        """,
        PPMOE_OPS_LIBRARY_DIR=str(tmp_path),
    )
    assert run.returncode == 0, run.stderr


WITHOUT_TRITON = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def test_without_triton_everything_works() -> None:
    result = call_all(WITHOUT_TRITON)
    assert set(result["outcomes"].values()) == {"ok"}
    assert "triton" not in result["modules"]
    for name, each in result["choices"].items():
        missing = each["cuda"][1]
        expected = "Triton is not installed" if OPERATORS[name].triton else "no Triton kernel"
        assert missing["triton"] == expected


def test_forced_triton_that_is_not_installed_says_so() -> None:
    result = call_all(WITHOUT_TRITON, PPMOE_OPS_BACKEND="triton", TRITON_INTERPRET="1")
    for name in KERNELS:
        if OPERATORS[name].triton:
            assert "(Triton is not installed)" in result["outcomes"][name]


def test_reasons_here_name_what_is_missing() -> None:
    for name in KERNELS:
        for choice in _backends.choices()[name].values():
            assert all(reason for reason in choice.missing.values())
            assert choice.backend not in choice.missing


def usable_isas() -> list[str]:
    built = list(_load.build_info()["isas"])
    best = _host.cpu_capability()
    return built[: built.index(best) + 1] if best in built else built


# One call of everything that differs between instruction sets: vectors, conversions, panels.
PARITY = (
    "test_matches_the_reference or test_every_top_k or test_non_finite_logits or test_gradient or "
    "test_matches_the_composition or test_merge_matches or test_slice_copies or too_large or "
    "test_any_range_of_local"
)


@pytest.mark.parametrize("isa", usable_isas())
def test_every_instruction_set_gives_right_results(isa: str) -> None:
    selected = python(
        "from ppmoe_ops import _host; print(_host.selected_isa())", PPMOE_OPS_CPU_CAPABILITY=isa
    )
    assert selected.stdout.strip() == isa
    if isa == _host.selected_isa():
        return  # every other test runs with it
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "expert_slice"), "-q"]
    run = subprocess.run(
        [*command, "-k", PARITY, "-m", "kernel", "-p", "no:cacheprovider", "--tb=short"],
        env={**os.environ, "PPMOE_OPS_CPU_CAPABILITY": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]


def test_an_unknown_instruction_set_is_refused_at_the_first_call() -> None:
    run = python(
        """
        import torch, ppmoe_ops
        for attempt in range(2):
            try:
                ppmoe_ops.route(torch.randn(2, 4), 1)
            except ValueError as error:
                print(error)
        """,
        PPMOE_OPS_CPU_CAPABILITY="avx9000",
    )
    assert run.returncode == 0, run.stderr
    allowed = ", ".join(usable_isas())
    wanted = f"PPMOE_OPS_CPU_CAPABILITY is 'avx9000'; allowed here: {allowed}"
    assert run.stdout.splitlines() == [wanted, wanted]
