"""csrc/build.py: what it decides, what it says when it cannot, and what the built library needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ppmoe_ops import _host, _load, _version

build: Any = import_module("build")  # csrc/build.py
sources: Any = import_module("sources")
toolchain: Any = import_module("toolchain")
ROOT = Path(__file__).resolve().parents[1]
LIBRARY = _load.library_directory() / _load.LIBRARIES["cpp"]
VARIABLES = ("PPMOE_OPS_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX", "CUDA_HOME", "CUDA_PATH",
             "PPMOE_OPS_WERROR")  # fmt: skip


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvcc_path", lambda: None)


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvcc_path", lambda: Path("/toolkit/bin/nvcc"))
    monkeypatch.setattr(build, "tool_version", lambda tool: f"{Path(tool).name} 13.0")


def ways_out(error: BaseException) -> list[str]:
    """The three ways out, after checking that what was found and needed come first."""
    lines = str(error).splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["found", "needed", "ways out"]
    assert len(lines) == 6
    assert all(lines[2 + n].startswith(f"  {n}. ") for n in (1, 2, 3))
    return [line[5:] for line in lines[3:]]


def test_build_error_says_what_was_found_needed_and_three_ways_out() -> None:
    error = build.BuildError("a", "b", ("c", "d", "e"))
    assert str(error) == "found: a\nneeded: b\nways out:\n  1. c\n  2. d\n  3. e"
    assert ways_out(error) == ["c", "d", "e"]


def test_auto_builds_no_cuda_without_nvcc(no_nvcc: None) -> None:
    assert build.decide_cuda() == build.Backend(False, "no nvcc")


def test_auto_follows_the_torch_that_is_there(nvcc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    decision = build.decide_cuda()
    assert not decision.built
    assert re.search(r"torch .* is a CPU build \(PPMOE_OPS_CUDA=1 forces\)", decision.reason)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert build.decide_cuda() == build.Backend(True, f"nvcc 13.0, {' '.join(build.CUDA_ARCHS)}")


def test_one_builds_cuda_for_a_cpu_torch_too(nvcc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("PPMOE_OPS_CUDA", "1")
    assert build.decide_cuda().built


def test_one_without_nvcc_stops(no_nvcc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPMOE_OPS_CUDA", "1")
    with pytest.raises(build.BuildError, match="found: PPMOE_OPS_CUDA=1, but no nvcc") as error:
        build.decide_cuda()
    assert "set PPMOE_OPS_CUDA=0: Triton kernels need no toolkit" in ways_out(error.value)


def test_zero_builds_no_cuda(nvcc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPMOE_OPS_CUDA", "0")
    assert build.decide_cuda() == build.Backend(False, "PPMOE_OPS_CUDA=0")


@pytest.mark.parametrize("wish", ["yes", "2", "AUTO", "on"])
def test_any_other_value_stops(wish: str, nvcc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPMOE_OPS_CUDA", wish)
    with pytest.raises(build.BuildError, match=f"found: PPMOE_OPS_CUDA={wish}\nneeded: auto, 0 or"):
        build.decide_cuda()


def test_nvcc_of_cuda_home_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.nvcc_path() is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert build.nvcc_path() == tmp_path / "bin" / "nvcc"


@pytest.mark.parametrize(
    ("listed", "archs"),
    [
        ("8.0", ("8.0",)),
        ("8.0;9.0a", ("8.0", "9.0a")),
        (" 8.0 9.0+PTX ", ("8.0", "9.0+PTX")),
        ("8.0; 9.0a", ("8.0", "9.0a")),
        ("  ", None),
        (None, None),
    ],
)
def test_arch_list(listed: str | None, archs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if listed is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert build.cuda_archs() == (archs or build.CUDA_ARCHS)


def test_gencode_flags() -> None:
    assert build.gencode_flags(("8.0", "9.0a", "10.0+PTX")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.parametrize(
    ("memory", "cores", "jobs"),
    [(16e9, 4, 4), (2.5e9, 8, 2), (0.3e9, 8, 1), (-1e9, 2, 1), (float("inf"), 3, 3), (1e9, 1, 1)],
)
def test_jobs_fit_memory_and_cores(
    memory: float, cores: int, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "available_memory", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert build.job_count() == jobs


@pytest.mark.parametrize(("asked", "jobs"), [("3", 3), ("64", 64), ("0", 1), ("-2", 1)])
def test_max_jobs_overrides(asked: str, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", asked)
    monkeypatch.setattr(build, "available_memory", lambda: 0.0)
    assert build.job_count() == jobs


def test_available_memory_is_that_of_the_machine_or_less() -> None:
    memory = build.available_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory <= total


def test_no_compiler_stops_with_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(no-such-compiler") as error:
        toolchain.find_cxx()
    assert "set CXX to the compiler's path" in ways_out(error.value)


def test_a_compiler_that_is_too_old_stops(tmp_path: Path) -> None:
    old = tmp_path / "old-c++"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'old 4.8.5' && exit 0\nexit 1\n")
    old.chmod(0o755)
    if os.uname().machine != "x86_64":
        assert toolchain.supported_isas(str(old)) == {"baseline": ()}
        return
    with pytest.raises(build.BuildError, match=r"found: old-c\+\+ 4.8.5, which cannot") as error:
        toolchain.supported_isas(str(old))
    ways_out(error.value)


def test_no_ninja_stops_with_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match="found: no ninja") as error:
        build.ninja_command()
    assert ways_out(error.value)[0] == "pip install ninja"


def test_instruction_sets_contain_earlier_ones() -> None:
    isas = toolchain.supported_isas(toolchain.find_cxx())
    names = list(isas)
    assert names[0] == "baseline"
    for less, more in pairwise(names):
        widths = {"-mprefer-vector-width=512"}
        assert set(isas[less]) - widths <= set(isas[more])


@pytest.fixture
def plan() -> Any:
    isas = {"baseline": (), "avx2": ("-mavx2",)}
    return build.Plan("c++", isas, build.Backend(False, "test"), 1)


def test_ninja_file_has_every_source_for_every_instruction_set(plan: Any, tmp_path: Path) -> None:
    lines = list(build.ninja_file(plan, tmp_path))
    objects = [line.split(":")[0].removeprefix("build ") for line in lines if ": cxx " in line]
    wanted = [f"cpu/{source.replace('/', '-')}.o" for source in sources.CPU_OPS]
    wanted += [
        f"cpu/{source.replace('/', '-')}.{isa}.o"
        for isa in plan.isas
        for source in sources.CPU_KERNELS
    ]
    wanted += [f"host/{source.replace('/', '-')}.o" for source in sources.HOST_SOURCES]
    assert sorted(objects) == sorted(wanted)
    (link,) = [line for line in lines if line.startswith(f"build {tmp_path / '_C_cpu.so'}: link ")]
    assert sorted(link.split(": link ")[1].split()) == sorted(o for o in wanted if o[:3] == "cpu")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert any(line.startswith(f"build {tmp_path}/_host{suffix}: link ") for line in lines)
    assert not any("nvcc" in line for line in lines)


def test_every_source_file_is_on_the_list() -> None:
    csrc = ROOT / "csrc"
    found = {str(p.relative_to(csrc)) for p in csrc.rglob("*") if p.suffix in (".cpp", ".cu")}
    listed = {*sources.CPU_OPS, *sources.CPU_KERNELS, *sources.HOST_SOURCES, *sources.CUDA_SOURCES}
    assert found == listed


def test_flags_of_a_kernel_are_those_of_its_instruction_set(plan: Any, tmp_path: Path) -> None:
    lines = list(build.ninja_file(plan, tmp_path))
    for isa in plan.isas:
        at = next(n for n, line in enumerate(lines) if line.startswith("build cpu/cpu-capa"))
        assert "-mavx2" not in lines[at + 1]
        name = f"build cpu/cpu-expert_slice-rows.cpp.{isa}.o"
        at = next(n for n, line in enumerate(lines) if line.startswith(name))
        assert f"-DPPMOE_ISA={isa}" in lines[at + 1]
        assert ("-mavx2" in lines[at + 1]) == (isa == "avx2")
        # Kernel sources see no torch header.
        assert "torch" not in lines[at + 1].replace(str(ROOT), "")


def test_sanitizer_plan_replaces_optimisation(plan: Any, tmp_path: Path) -> None:
    sanitized = build.dataclasses.replace(plan, sanitize="address,undefined")
    text = "\n".join(build.ninja_file(sanitized, tmp_path))
    assert "-fsanitize=address,undefined" in text
    assert "-O3" not in text
    assert "-O2" not in text


def test_werror_is_asked_for(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-Werror" not in "\n".join(build.ninja_file(plan, tmp_path))
    monkeypatch.setenv("PPMOE_OPS_WERROR", "1")
    assert "-Werror" in "\n".join(build.ninja_file(plan, tmp_path))


def test_cuda_plan_has_every_cuda_source(plan: Any, nvcc: None, tmp_path: Path) -> None:
    with_cuda = build.dataclasses.replace(plan, cuda=build.Backend(True, "test"))
    lines = list(build.ninja_file(with_cuda, tmp_path))
    compiled = [line for line in lines if ": nvcc " in line]
    assert len(compiled) == len(sources.CUDA_SOURCES)
    assert all(any(line.endswith(source) for line in compiled) for source in sources.CUDA_SOURCES)
    assert any(line.startswith(f"build {tmp_path}/_C_cuda.so: nvlink ") for line in lines)


def test_paths_with_spaces_are_escaped(plan: Any, tmp_path: Path) -> None:
    out = tmp_path / "a folder"
    assert any(r"/a$ folder/_C_cpu.so: link" in line for line in build.ninja_file(plan, out))


def test_only_one_instruction_set_can_be_planned(no_nvcc: None) -> None:
    isas = list(toolchain.supported_isas(toolchain.find_cxx()))
    planned = build.make_plan(only_isa=isas[-1]).isas
    assert list(planned) == list(dict.fromkeys(("baseline", isas[-1])))
    assert build.make_plan(sanitize="address").cuda == build.Backend(False, "sanitizer build")


def test_summary_has_five_lines(plan: Any, tmp_path: Path) -> None:
    lines = build.summary(plan, tmp_path, 61.4)
    assert len(lines) == 5
    assert lines[0].startswith(f"ppmoe_ops {_version.__version__}: torch {torch.__version__}, ")
    assert lines[0].endswith(", 61 s with 1 jobs")
    assert lines[2] == "  cuda  not built: test"


def test_a_compiler_error_stops_with_ways_out(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ninja_command", lambda: ["false"])
    with pytest.raises(build.BuildError, match=r"found: a compiler error \(above\)") as error:
        build.build(tmp_path / "out", tmp_path / "work", plan)
    assert "if memory ran out, set MAX_JOBS=1" in ways_out(error.value)
    assert not (tmp_path / "out" / "_build_info.json").exists()


def test_version_is_read_without_importing() -> None:
    assert build.package_version() == _version.__version__


def test_build_record_is_that_of_this_library() -> None:
    record = json.loads((LIBRARY.parent / "_build_info.json").read_text())
    assert record["version"] == _version.__version__
    assert record["backends"]["cpp"]["built"]
    assert record["isas"][0] == "baseline"
    assert len(record["summary"]) == 5


# What the C and C++ runtimes may be asked for besides libtorch's shims.
RUNTIME = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
LINKER = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
SHIM = re.compile(r"^(aoti_)?torch_\w+$")


def undefined_symbols(library: Path) -> list[str]:
    tool = shutil.which("nm")
    assert tool is not None, "nm of binutils, which every compiler comes with, is not on PATH"
    command = [tool, "--dynamic", "--undefined-only", "--with-symbol-versions", str(library)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in output.splitlines() if line.strip()]


def test_library_needs_stable_shims_and_the_runtimes_alone() -> None:
    symbols = undefined_symbols(LIBRARY)
    assert any(SHIM.match(name) for name in symbols)
    assert [
        name for name in symbols if not (SHIM.match(name) or RUNTIME.match(name) or name in LINKER)
    ] == []


def test_library_exports_nothing_of_torch_and_nothing_unnamed() -> None:
    command = ["nm", "--dynamic", "--defined-only", "--demangle", str(LIBRARY)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(c10|at)::", output)


@pytest.mark.parametrize("library", [LIBRARY, Path(_host.__file__)], ids=lambda path: path.name)
def test_no_path_of_the_building_machine_is_inside(library: Path) -> None:
    content = library.read_bytes()
    for path in (ROOT, Path(torch.__file__).parent, Path(sysconfig.get_paths()["include"])):
        assert str(path).encode() not in content, path
