"""Builds the sdist and the wheel as pip would, and checks what is in them and that they work.

`make wheel` runs it. It builds in a copy of the tree, so that nothing that an earlier build left
behind can get in, and every pip it starts is held to the versions in requirements.txt: an isolated
build would otherwise download the newest torch, several gigabytes with CUDA.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Folder of the tree -> folder of the wheel.
PACKAGES = {
    "ppmoe_ops": "ppmoe_ops",
    "kernels": "ppmoe_ops/kernels",
    "bench": "ppmoe_ops/benchmarks",
    "python/ppmoe_models": "ppmoe_models",
}
RUNTIME_VERSIONS = ("GLIBC", "GLIBCXX", "CXXABI", "GCC")
WEAK = ("__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable")
RUNTIME_LIBRARIES = re.compile(r"(libstdc\+\+|libm|libgcc_s|libc|libdl|libpthread|librt)\.so\.\d+")
LOADER = re.compile(r"ld-linux[\w-]*\.so\.\d+")


class Checks:
    """Runs checks in turn and remembers which failed."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[str] = []

    def run(self, name: str, check: Callable[[], str | None]) -> None:
        """Run a check; an AssertionError is its failure."""
        started = time.monotonic()
        try:
            detail = check() or ""
        except AssertionError as error:
            self.failed.append(name)
            print(f"FAILED  {name}: {error}", flush=True)
        else:
            self.passed.append(name)
            seconds = time.monotonic() - started
            print(f"ok      {name} ({seconds:.0f} s)  {detail}".rstrip(), flush=True)


def run(
    command: Sequence[object], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with pinned pip; stdout and stderr come back together."""
    pinned = str(ROOT / "requirements.txt")
    settings = {**os.environ, "PIP_CONSTRAINT": pinned, "PIP_BUILD_CONSTRAINT": pinned}
    settings.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**settings, **environment},
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def succeed(command: Sequence[object], folder: Path, **environment: str) -> str:
    """Run a command that has to succeed; return what it printed."""
    done = run(command, folder, **environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}"
    return done.stdout


def tree_files() -> set[str]:
    """Files of the source tree that belong to it: tracked, or new and not ignored."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = run(listing, ROOT)
    if done.returncode == 0:
        return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}
    ignored = re.compile(r"(^|/)(\.venv|build|dist|reports|__pycache__|[^/]*\.egg-info)/|\.so$")
    every = (str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file())
    return {name for name in every if not ignored.search(name)}


def copy_tree(files: Iterable[str], to: Path) -> Path:
    """A copy of the tree without anything that a build left in it."""
    for name in files:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)
    return to


def check_sdist(archive: Path, files: set[str]) -> str:
    """The sdist holds the whole tree and what setuptools adds, nothing else."""
    with tarfile.open(archive) as tar:
        names = {name.name.partition("/")[2] for name in tar.getmembers() if name.isfile()}
    missing = sorted(files - names)
    assert not missing, f"not in the sdist: {', '.join(missing)}"
    added = re.compile(r"PKG-INFO|setup\.cfg|[\w./]+\.egg-info/.*")
    extra = sorted(name for name in names - files if not added.fullmatch(name))
    assert not extra, f"in the sdist but not in the tree: {', '.join(extra)}"
    return f"{len(names)} files"


def has_nvcc() -> bool:
    """Whether the build would find a CUDA compiler."""
    sys.path.insert(0, str(ROOT / "csrc"))
    return importlib.import_module("build").nvcc_path() is not None


def build_wheel(command: Sequence[object], folder: Path, cuda: str) -> str:
    """Build strictly, with the CUDA library wherever there is a compiler for it."""
    succeed(command, folder, PPMOE_OPS_WERROR="1", PPMOE_OPS_CUDA=cuda)
    return "with CUDA" if cuda == "1" else "without CUDA: no nvcc"


def check_contents(wheel: Path, files: set[str], cuda: bool) -> str:
    """The wheel holds every Python file of the packages, the libraries, and no other package."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    expected = {
        f"{inside}/{Path(name).relative_to(folder)}"
        for folder, inside in PACKAGES.items()
        for name in files
        if name.startswith(f"{folder}/") and name.endswith(".py")
    }
    libraries = ("_C_cpu.so", "_C_cuda.so") if cuda else ("_C_cpu.so",)
    expected |= {f"ppmoe_ops/{name}" for name in ("py.typed", "_build_info.json", *libraries)}
    assert not expected - names, f"not in the wheel: {', '.join(sorted(expected - names))}"
    rest = {name for name in names - expected if ".dist-info/" not in name}
    allowed = re.compile(r"ppmoe_ops/_host[\w.-]*\.so")
    extra = sorted(name for name in rest if not allowed.fullmatch(name))
    assert not extra, f"unexpected in the wheel: {', '.join(extra)}"
    assert any("_host" in name for name in rest), "not in the wheel: ppmoe_ops/_host"
    assert any(name.endswith("/licenses/LICENSE") for name in names), "no licence in the wheel"
    tag = wheel.stem.split("-", 2)[2]
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert tag.startswith(f"{python}-{python}-"), f"tag {tag}: not for this Python alone"
    return f"{len(names)} files, tag {tag}"


def check_metadata(wheel: Path) -> str:
    """The metadata ask for a range of torch, as the stable ABI allows, and name the licence."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    for line in (
        "Name: ppmoe_ops",
        "Requires-Python: >=3.11",
        "License-Expression: Apache-2.0",
        "Requires-Dist: torch>=2.11",
    ):
        assert line in metadata.splitlines(), f"no line '{line}' in the metadata"
    return "Requires-Dist: torch>=2.11"


def check_paths(unpacked: Path, private: Sequence[Path]) -> str:
    """No file of the wheel holds a path of the machine that built it."""
    needles = {str(path).encode() + b"/" for path in private} | {b"pip-build-env", b"pip-req-build"}
    count = 0
    for path in sorted(unpacked.rglob("*")):
        if path.is_file():
            count += 1
            data = path.read_bytes()
            found = sorted(needle.decode() for needle in needles if needle in data)
            assert not found, f"{path.relative_to(unpacked)} holds {', '.join(found)}"
    return f"{count} files"


def shim_functions() -> frozenset[str]:
    """Functions that torch's stable C headers declare."""
    import torch

    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    folders = (include / "stable" / "c", include / "inductor" / "aoti_torch")
    return frozenset(
        name
        for folder in folders
        for header in folder.rglob("*.h")
        for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", header.read_text())
    )


def check_symbols(library: Path) -> str:
    """The library takes nothing but stable shims, Python for `_host`, and the C/C++ runtime."""
    shims = frozenset() if library.name.startswith("_host") else shim_functions()
    used, strange = 0, []
    for line in succeed(["nm", "-D", "--undefined-only", library], ROOT).splitlines():
        name, _, version = line.split()[-1].partition("@")
        if version.strip("@").partition("_")[0] in RUNTIME_VERSIONS or name in WEAK:
            continue
        if name in shims or (library.name.startswith("_host") and re.match(r"_?Py", name)):
            used += 1
        else:
            strange.append(name)
    assert not strange, f"takes {', '.join(sorted(strange))}"
    dynamic = succeed(["readelf", "-d", library], ROOT)
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic), "has a search path of its own"
    linked = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    allowed = () if library.name.startswith("_host") else ("libtorch_cpu.so",)
    other = [
        name
        for name in linked
        if name not in allowed and not RUNTIME_LIBRARIES.fullmatch(name) and not LOADER.match(name)
    ]
    assert not other, f"is linked to {', '.join(other)}"
    return f"{used} symbols beside the runtime's; linked to {', '.join(linked)}"


def check_refusal(command: Sequence[object], folder: Path, found: str, **environment: str) -> str:
    """The command fails, and says what was found, what is needed and three ways out."""
    done = run(command, folder, **environment)
    assert done.returncode != 0, f"{' '.join(map(str, command))} did not fail"
    lines = [line.strip() for line in done.stdout.splitlines()]
    for start in ("found: ", "needed: ", "ways out:", "1. ", "2. ", "3. "):
        assert any(line.startswith(start) for line in lines), f"no '{start}' in\n{done.stdout}"
    said = next(line for line in lines if line.startswith("found: "))
    assert found in said, f"'{said}' does not tell of {found}"
    return said


def main() -> None:
    """Build, check, and print one line a check."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the sdist and the wheel"
    )
    out = parser.parse_args().out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    checks = Checks()
    with tempfile.TemporaryDirectory(prefix="ppmoe-wheel-") as folder:
        check_all(checks, out, Path(folder).resolve())
    print(f"wheel: {len(checks.passed)} passed, {len(checks.failed)} failed")
    sys.exit(bool(checks.failed))


def check_all(checks: Checks, out: Path, work: Path) -> None:
    """All checks; `work` is an empty folder."""
    files = tree_files()
    tree = copy_tree(files, work / "tree")
    python = sys.executable

    sdist_code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    checks.run("sdist builds", lambda: succeed([python, "-c", sdist_code], tree) and None)
    sdist = next(iter(out.glob("*.tar.gz")), None)
    if sdist is None:
        return
    checks.run("sdist contents", lambda: check_sdist(sdist, files))

    pip_wheel = [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out]
    cuda = "1" if has_nvcc() else "0"
    checks.run(
        "isolated wheel from the sdist",
        lambda: build_wheel([*pip_wheel, sdist], work, cuda),
    )
    wheel = next(iter(out.glob("*.whl")), None)
    if wheel is None:
        return
    checks.run("wheel contents", lambda: check_contents(wheel, files, cuda == "1"))
    checks.run("wheel metadata", lambda: check_metadata(wheel))
    unpacked = work / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    private = (ROOT, work, Path(sys.prefix), Path.home(), Path(tempfile.gettempdir()))
    checks.run("no paths of this machine", lambda: check_paths(unpacked, private))
    for library in sorted(unpacked.rglob("*.so")):
        checks.run(f"symbols of {library.name}", lambda library=library: check_symbols(library))

    venv = work / "venv"
    empty = venv / "bin" / "python"
    succeed([python, "-m", "venv", venv], work)
    setuptools = re.search(r"^setuptools==\S+", (ROOT / "requirements.txt").read_text(), re.M)
    assert setuptools is not None
    succeed([empty, "-m", "pip", "install", "-q", setuptools.group()], work)
    editable = [empty, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", tree]
    checks.run("refusal without torch", lambda: check_refusal(editable, work, "no torch"))
    again = [python, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", work, tree]
    nowhere = str(work / "nowhere")
    checks.run(
        "refusal without a compiler",
        lambda: check_refusal(again, work, "compiler", CXX=f"{nowhere}/c++"),
    )
    checks.run(
        "refusal without a CUDA toolkit",
        lambda: check_refusal(again, work, "nvcc", PPMOE_OPS_CUDA="1", CUDA_HOME=nowhere),
    )

    check_installed(checks, work, empty, wheel)


def check_installed(checks: Checks, work: Path, empty: Path, wheel: Path) -> None:
    """Install the wheel beside nothing but torch and use it outside the source tree."""
    install = [empty, "-m", "pip", "install", "-q", wheel]
    checks.run("installs into an empty environment", lambda: succeed(install, work) and None)
    outside = work / "outside"
    libraries = work / "no-libraries"
    outside.mkdir()
    libraries.mkdir()
    smoke = shutil.copy2(ROOT / "tests" / "wheel_smoke.py", outside)
    # torch warns that NumPy is not there; nothing here needs it.
    command = [empty, "-W", "ignore", smoke]

    def last_line(*words: object, **environment: str) -> str:
        return succeed([*command, *words], outside, **environment).strip().splitlines()[-1]

    checks.run("smoke test", lambda: last_line("cpp"))
    checks.run(
        "smoke test with its libraries hidden",
        lambda: last_line("reference", PPMOE_OPS_LIBRARY_DIR=str(libraries)),
    )
    info = [empty, "-W", "ignore", "-m", "ppmoe_ops.info"]
    checks.run("info", lambda: succeed(info, outside).splitlines()[0])


if __name__ == "__main__":
    main()
