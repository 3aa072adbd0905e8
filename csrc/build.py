"""How the compiled parts are built, from the sources and flags that `sources.py` lists.

`setup.py` calls `build`. By hand, `python csrc/build.py --out DIR` builds the libraries into a
folder that `PPMOE_OPS_LIBRARY_DIR` can then name; `--sanitize` and `--isa` make special builds.

Environment: PPMOE_OPS_CUDA (auto, 0, 1), TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CUDA_HOME, and
PPMOE_OPS_WERROR=1 to treat compiler warnings as errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sources import (
    CPU_KERNELS,
    CPU_OPS,
    CUDA_ARCHS,
    CUDA_FLAGS,
    CUDA_SOURCES,
    CXX_FLAGS,
    HOST_SOURCES,
    KERNEL_FLAGS,
    OPS_FLAGS,
    SANITIZE_FLAGS,
    STABLE_ABI_TARGET,
)
from toolchain import BuildError, find_cxx, supported_isas, tool_version

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent

MEMORY_PER_JOB = 1.0e9  # bytes; nvcc and a stable header need 0.45e9


@dataclasses.dataclass(frozen=True)
class Backend:
    """Whether a library is built, and why or why not."""

    built: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the ninja file is made from."""

    cxx: str
    isas: dict[str, tuple[str, ...]]
    cuda: Backend
    jobs: int
    sanitize: str = ""


def package_version() -> str:
    """The version in ppmoe_ops/_version.py, read without importing the package."""
    text = (ROOT / "ppmoe_ops" / "_version.py").read_text()
    match = re.search(r'__version__ = "([^"]+)"', text)
    assert match is not None
    return match.group(1)


def nvcc_path() -> Path | None:
    """The CUDA compiler: of CUDA_HOME if that is set, else on PATH, else in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        candidate = Path(home) / "bin" / "nvcc"
        return candidate if candidate.is_file() else None
    usual = Path("/usr/local/cuda/bin/nvcc")
    if usual.is_file():
        return usual
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def decide_cuda() -> Backend:
    """Apply PPMOE_OPS_CUDA: `auto` builds where nvcc and a CUDA torch are."""
    import torch

    wish = os.environ.get("PPMOE_OPS_CUDA", "auto")
    nvcc = nvcc_path()
    if wish not in ("auto", "0", "1"):
        raise BuildError(
            f"PPMOE_OPS_CUDA={wish}",
            "auto, 0 or 1",
            ("unset it", "set it to 1 to build for CUDA", "set it to 0 for the CPU alone"),
        )
    if wish == "0":
        return Backend(False, "PPMOE_OPS_CUDA=0")
    if nvcc is None:
        if wish == "1":
            raise BuildError(
                "PPMOE_OPS_CUDA=1, but no nvcc (looked in CUDA_HOME, PATH, /usr/local/cuda)",
                "a CUDA toolkit, version 12 or later",
                (
                    "set CUDA_HOME to the toolkit's folder",
                    "install a toolkit (a 'devel' container image has one)",
                    "set PPMOE_OPS_CUDA=0: Triton kernels need no toolkit",
                ),
            )
        return Backend(False, "no nvcc")
    if wish == "auto" and torch.version.cuda is None:
        return Backend(False, f"torch {torch.__version__} is a CPU build (PPMOE_OPS_CUDA=1 forces)")
    return Backend(True, f"{tool_version(str(nvcc))}, {' '.join(cuda_archs())}")


def cuda_archs() -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST if set, else the architectures that the kernels were written for."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    return tuple(re.split(r"[;\s]+", listed.strip())) if listed.strip() else CUDA_ARCHS


def gencode_flags(archs: Sequence[str]) -> list[str]:
    """`-gencode` flags of architectures written as in TORCH_CUDA_ARCH_LIST (`9.0a`, `10.0+PTX`)."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def available_memory() -> float:
    """Bytes that new processes may use: the smaller of the machine's and the container's."""
    limits = [float("inf")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if match:
            limits.append(float(match.group(1)) * 1024)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        if Path(limit).is_file() and Path(limit).read_text().strip() != "max":
            limits.append(float(Path(limit).read_text()) - float(Path(used).read_text()))
    return min(limits)


def job_count() -> int:
    """Parallel compilers: MAX_JOBS if set, else as many as cores and memory allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    by_memory = available_memory() / MEMORY_PER_JOB
    return max(1, min(cores or 1, int(min(by_memory, 1024))))


def make_plan(sanitize: str = "", only_isa: str | None = None) -> Plan:
    """Look at the machine and decide what to build."""
    cxx = find_cxx()
    isas = supported_isas(cxx)
    if only_isa is not None:
        isas = {name: flags for name, flags in isas.items() if name in ("baseline", only_isa)}
    cuda = Backend(False, "sanitizer build") if sanitize else decide_cuda()
    return Plan(cxx, isas, cuda, job_count(), sanitize)


def _escape(text: object) -> str:
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _includes(system: str = "-isystem") -> list[str]:
    """Include folders; torch's by the flag `system`, so that its warnings are not ours."""
    import torch

    include = Path(torch.__file__).parent / "include"
    ours = [f"-I{CSRC}/include", f"-I{CSRC}"]
    return [*ours, f"{system}{include}", f"{system}{include}/torch/csrc/api/include"]


def _private_paths() -> list[str]:
    """Flags that keep paths of the machine that builds out of messages and debug information."""
    import pybind11
    import torch

    public = {
        ROOT: "",
        Path(torch.__file__).parent: "torch/",
        Path(pybind11.__file__).parent: "pybind11/",
        Path(sysconfig.get_paths()["include"]): "python/",
    }
    return [f"-ffile-prefix-map={path}/={name}" for path, name in public.items()]


def ninja_file(plan: Plan, out: Path) -> Iterator[str]:
    """Lines of the ninja file that builds `plan` into the folder `out`."""
    import pybind11
    import torch

    torch_root = Path(torch.__file__).parent
    werror = os.environ.get("PPMOE_OPS_WERROR") == "1"
    common = [
        *CXX_FLAGS,
        *_private_paths(),
        *(["-Werror"] if werror else []),
        *([f"-fsanitize={plan.sanitize}", *SANITIZE_FLAGS] if plan.sanitize else []),
        *(f"-DPPMOE_HAS_{name.upper()}=1" for name in plan.isas),
    ]
    link = [f"-fsanitize={plan.sanitize}"] if plan.sanitize else ["-Wl,-z,defs"]
    yield f"cxx = {plan.cxx}"
    yield f"common = {' '.join(map(_escape, common))}"
    yield "rule cxx"
    yield "  command = $cxx -MMD -MF $out.d $common $flags -c $in -o $out"
    yield "  depfile = $out.d"
    yield "  deps = gcc"
    yield "  description = $in $isa"
    # A process that has the old library open keeps it: the new one gets its name when it is whole.
    yield "rule link"
    yield f"  command = $cxx -shared {' '.join(link)} $in -o $out.part $libs && mv $out.part $out"
    yield "  description = $out"

    objects: dict[str, list[str]] = {"cpu": [], "host": [], "cuda": []}

    def compile_one(kind: str, source: str, flags: Sequence[str], isa: str = "") -> Iterator[str]:
        name = f"{kind}/{source.replace('/', '-')}{'.' + isa if isa else ''}.o"
        objects[kind].append(name)
        yield f"build {name}: cxx {_escape(CSRC / source)}"
        yield f"  flags = {' '.join(map(_escape, flags))}"
        yield f"  isa = {isa and f'({isa})'}"

    optimise = (lambda flags: [f for f in flags if f[:2] != "-O"]) if plan.sanitize else list
    for source in CPU_OPS:
        yield from compile_one("cpu", source, [*optimise(OPS_FLAGS), *_includes()])
    for isa, isa_flags in plan.isas.items():
        for source in CPU_KERNELS:
            flags = [
                *optimise(KERNEL_FLAGS),
                *isa_flags,
                f"-DPPMOE_ISA={isa}",
                f"-I{CSRC}/include",
                f"-I{CSRC}",
            ]
            yield from compile_one("cpu", source, flags, isa)
    host_flags = [
        *optimise(OPS_FLAGS),
        f"-I{CSRC}/include",
        f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_paths()['include']}",
    ]
    for source in HOST_SOURCES:
        yield from compile_one("host", source, host_flags)

    libtorch = f"-L{torch_root}/lib -ltorch_cpu"
    yield f"build {_escape(out / '_C_cpu.so')}: link {' '.join(objects['cpu'])}"
    yield f"  libs = {libtorch}"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    yield f"build {_escape(out / f'_host{suffix}')}: link {' '.join(objects['host'])}"
    # The interpreter provides Python's own symbols.
    yield "  libs = -Wl,--unresolved-symbols=ignore-all"

    if plan.cuda.built:
        yield from _ninja_cuda(plan, out, libtorch, werror)


def _ninja_cuda(plan: Plan, out: Path, libtorch: str, werror: bool) -> Iterator[str]:
    flags = [
        *CUDA_FLAGS,
        *gencode_flags(cuda_archs()),
        *(["-Werror=all-warnings"] if werror else []),
        *(f"-Xcompiler={flag}" for flag in _private_paths()),
        *_includes("-isystem="),
    ]
    yield f"nvcc = {_escape(nvcc_path())} -ccbin {plan.cxx}"
    yield "rule nvcc"
    yield f"  command = $nvcc -MD -MF $out.d {' '.join(map(_escape, flags))} -c $in -o $out"
    yield "  depfile = $out.d"
    yield "  deps = gcc"
    yield "  description = $in"
    yield "rule nvlink"
    command = "$nvcc -shared --no-device-link -cudart=static $in -o $out.part $libs"
    yield f"  command = {command} && mv $out.part $out"
    yield "  description = $out"
    names = []
    for source in CUDA_SOURCES:
        names.append(f"cuda/{source.replace('/', '-')}.o")
        yield f"build {names[-1]}: nvcc {_escape(CSRC / source)}"
    yield f"build {_escape(out / '_C_cuda.so')}: nvlink {' '.join(names)}"
    yield f"  libs = {libtorch}"


def ninja_command() -> list[str]:
    """ninja of the environment that builds, else the one on PATH."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise BuildError(
            "no ninja",
            "ninja 1.10 or later",
            ("pip install ninja", "install it by the system's packages", "install a wheel"),
        )
    return [found]


def summary(plan: Plan, out: Path, seconds: float) -> list[str]:
    """The five lines that are printed after a build and kept in the package."""
    import pybind11
    import torch

    cuda = f"built: {plan.cuda.reason}" if plan.cuda.built else f"not built: {plan.cuda.reason}"
    return [
        f"ppmoe_ops {package_version()}: torch {torch.__version__}, "
        f"python {platform.python_version()}, {seconds:.0f} s with {plan.jobs} jobs",
        f"  cpu   built: {tool_version(plan.cxx.split()[0])}, {' '.join(plan.isas)}"
        + (f", sanitizers {plan.sanitize}" if plan.sanitize else ""),
        f"  cuda  {cuda}",
        f"  host  built: pybind11 {pybind11.__version__}",
        f"  into  {out.name}/",
    ]


def build(out: Path, work: Path, plan: Plan | None = None) -> dict[str, Any]:
    """Build everything into `out` (objects in `work`); return and store the build record."""
    import torch

    plan = plan or make_plan()
    out, work = out.resolve(), work.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text("\n".join(ninja_file(plan, out)) + "\n")
    started = time.monotonic()
    command = [*ninja_command(), "-C", str(work), "-j", str(plan.jobs)]
    if subprocess.run(command, check=False).returncode != 0:
        raise BuildError(
            "a compiler error (above)",
            "all sources to compile",
            (
                "if memory ran out, set MAX_JOBS=1",
                "if it is a .cu file, set PPMOE_OPS_CUDA=0",
                "report it with the summary of `python -m ppmoe_ops.info`",
            ),
        )
    lines = summary(plan, out, time.monotonic() - started)
    record = {
        "version": package_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": tool_version(plan.cxx.split()[0]),
        "isas": list(plan.isas),
        "sanitize": plan.sanitize,
        "stable_abi": STABLE_ABI_TARGET,
        "backends": {
            "cpp": dataclasses.asdict(Backend(True, ", ".join(plan.isas))),
            "cuda": dataclasses.asdict(plan.cuda),
        },
        "summary": lines,
    }
    (out / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n")
    print("\n".join(lines), flush=True)
    return record


def main() -> None:
    """Build into a folder of its own, for sanitizers, one instruction set, or by hand."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the libraries")
    parser.add_argument("--sanitize", default="", help="for -fsanitize=, e.g. address,undefined")
    parser.add_argument("--isa", help="build this instruction set and the baseline alone")
    options = parser.parse_args()
    try:
        plan = make_plan(options.sanitize, options.isa)
        build(options.out, options.out / "objects", plan)
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
