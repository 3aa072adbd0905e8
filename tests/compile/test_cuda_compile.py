"""Every CUDA source through nvcc, with warnings as errors, and what the result asks of a GPU.

Nothing here runs on a GPU: registers, spills and shared memory are read from ptxas, and the linked
library is loaded by a torch that may have no CUDA.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

kernels = import_module("build")  # csrc/build.py
NVCC = kernels.nvcc_path()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")

TORCH = Path(torch.__file__).parent
STATIC_SHARED_LIMIT = 48 * 1024
# With 80 registers, three blocks of 256 threads fit on a multiprocessor; memory-bound kernels want
# that many loads in flight.
REGISTER_LIMIT = 80
# More, where another bound on the warps of a multiprocessor comes first.
REGISTERS = {
    "losses_kernel": 128,  # the grid has one block of 512 threads for a multiprocessor
    "route_any_kernel<double>": 96,  # gradcheck's, of whom nobody asks for speed
}
STABLE_SHIMS = re.compile(r"(aoti_)?torch_\w+$")
RUNTIMES = ("GLIBC", "CXXABI", "GCC")
UNVERSIONED = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    run = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    cleaned = (
        re.sub(r"\(anonymous namespace\)::|ppmoe::|^void ", "", name.replace("(int)", ""))
        for name in run.stdout.splitlines()
    )
    return [name.split("(")[0] for name in cleaned]


def resource_usage(log: str) -> list[Usage]:
    """One row per kernel and architecture out of the log of `ptxas -v`."""
    rows = []
    for part in log.split("Compiling entry function ")[1:]:
        name, arch = re.findall(r"'([^']+)'", part)[:2]

        def number(pattern: str, text: str = part) -> int:
            found = re.search(pattern, text)
            return int(found.group(1)) if found else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        rows.append(
            Usage(
                name,
                arch,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes smem"),
                number(r"(\d+) bytes stack frame"),
                spills,
            )
        )
    names = demangle([row.kernel for row in rows])
    return [dataclasses.replace(row, kernel=name) for row, name in zip(rows, names, strict=True)]


def table(rows: list[Usage]) -> str:
    lines = [f"{'kernel':58} {'arch':8} {'regs':>4} {'shared':>7} {'stack':>5} {'spills':>6}"]
    for row in sorted(rows, key=lambda row: (row.arch, row.kernel)):
        lines.append(
            f"{row.kernel:58} {row.arch:8} {row.registers:4} {row.shared:7} {row.stack:5} "
            f"{row.spills:6}"
        )
    return "\n".join(lines)


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Usage]]]:
    """Object file and resource usage of every source, for all architectures of the build."""
    folder = tmp_path_factory.mktemp("cuda")
    result = {}
    for source in kernels.CUDA_SOURCES:
        target = folder / (source.replace("/", "-") + ".o")
        command = [
            str(NVCC),
            *kernels.CUDA_FLAGS,
            *kernels.gencode_flags(kernels.CUDA_ARCHS),
            "-Werror=all-warnings",
            "-Xcompiler=-Wall,-Wextra",
            "--resource-usage",
            f"-I{kernels.CSRC / 'include'}",
            f"-isystem={TORCH / 'include'}",
            "-c",
            str(kernels.CSRC / source),
            "-o",
            str(target),
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        result[source] = (target, resource_usage(run.stdout + run.stderr))
    rows = [row for _, usage in result.values() for row in usage]
    print(table(rows))
    reports = kernels.ROOT / "reports"
    reports.mkdir(exist_ok=True)
    (reports / "cuda_resources.txt").write_text(table(rows) + "\n")
    return result


@pytest.fixture(scope="session")
def library(
    objects: dict[str, tuple[Path, list[Usage]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("linked") / "_C_cuda.so"
    link = [str(NVCC), "-shared", "-cudart=static", *(str(item[0]) for item in objects.values())]
    link += ["-o", str(path), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-Xlinker=-z,defs"]
    subprocess.run(link, check=True)
    return path


@pytest.mark.parametrize("source", kernels.CUDA_SOURCES)
def test_kernels_fit_and_do_not_spill(
    objects: dict[str, tuple[Path, list[Usage]]], source: str
) -> None:
    _, rows = objects[source]
    assert len({row.arch for row in rows}) == len(kernels.CUDA_ARCHS)
    for row in rows:
        assert row.spills == 0, row
        assert row.stack == 0, row
        assert row.shared <= STATIC_SHARED_LIMIT, row
        named = [limit for name, limit in REGISTERS.items() if row.kernel.startswith(name)]
        assert 0 < row.registers <= (named[0] if named else REGISTER_LIMIT), row


def test_library_imports_stable_shims_and_runtimes_only(library: Path) -> None:
    run = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    foreign = []
    for line in run.stdout.splitlines():
        symbol, _, version = line.split()[-1].partition("@")
        if STABLE_SHIMS.match(symbol) or symbol in UNVERSIONED or version.startswith("@GLIBC"):
            continue
        if not version.lstrip("@").startswith(RUNTIMES):
            foreign.append(symbol)
    assert foreign == []


LOAD = """
import ctypes, os, sys
import torch
ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW)
import ppmoe_ops
from ppmoe_ops import _load
assert _load.load("cuda").loaded, _load.load("cuda").reason
for name in sys.argv[2:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ppmoe_ops::{name}", "CUDA"), name
print("loaded")
"""


def test_library_loads_on_this_torch(library: Path) -> None:
    text = "".join((kernels.CSRC / source).read_text() for source in kernels.CUDA_SOURCES)
    names = re.findall(r'm\.impl\("(\w+)"', text)
    assert names
    environment = {
        **os.environ,
        "PPMOE_OPS_LIBRARY_DIR": str(library.parent),
        "PYTHONPATH": os.pathsep.join([str(kernels.ROOT), *sys.path]),
    }
    environment.pop("PPMOE_OPS_BACKEND", None)
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(library), *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "loaded", run.stdout + run.stderr
