"""Makes the environment that the Makefile works in: `python .ci/environment.py VENV FILE...`.

Without a GPU, every pinned version in the requirement files is installed. Where this Python has a
torch that sees a GPU, that torch and everything else that is installed beside it is kept, only what
is missing is installed, and nothing is downloaded when nothing is missing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MINIMUM = (3, 11)
# Never installed over a torch that sees a GPU: the two belong together.
KEPT = ("torch", "triton")
# Installed last and without what it asks for: a torch built for CUDA names a Triton of its own,
# which must not stop the installation of the tested one.
ALONE = ("triton",)
# A missing one of these stops the set-up; any other only loses the checks that need it.
NEEDED = ("numpy", "setuptools", "ninja", "pybind11", "pytest", "pytest-benchmark")


def stop(found: str, needed: str, ways: Sequence[str]) -> None:
    """End with what was found, what was needed, and the ways out."""
    lines = [f"  {number}. {way}" for number, way in enumerate(ways, 1)]
    message = [f"found: {found}", f"needed: {needed}", "ways out:", *lines]
    sys.exit("\n".join(["ppmoe_ops: the set-up stopped.", *message]))


def run(command: Sequence[object], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command; its output is captured unless `options` say otherwise."""
    settings: dict = {"check": False, "text": True, "stdout": subprocess.PIPE}
    settings |= {"stderr": subprocess.STDOUT, **options}
    return subprocess.run([str(word) for word in command], **settings)


def pins(files: Sequence[str]) -> dict[str, str]:
    """Name -> pinned requirement, of all requirement files."""
    found = {}
    for file in files:
        for line in Path(file).read_text().splitlines():
            requirement = line.partition("#")[0].strip()
            if requirement:
                found[requirement.partition("==")[0]] = requirement
    return found


def torch_beside(python: object) -> Path | None:
    """Where this Python's torch lies, if it sees a GPU."""
    probe = "import torch; print(torch.__file__ if torch.cuda.is_available() else '')"
    answer = run([python, "-c", probe], stderr=subprocess.DEVNULL).stdout.strip()
    return Path(answer).parents[1] if answer else None


def installed(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Name -> version of those distributions that `python` finds."""
    probe = """
import importlib.metadata, sys
for name in sys.argv[1:]:
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
"""
    lines = run([python, "-c", probe, *names]).stdout.splitlines()
    return dict(line.split() for line in lines)


def create(venv: Path, beside: Path | None) -> Path:
    """Make the environment, seeing what is installed in `beside`; return its Python."""
    python = venv / "bin" / "python"
    if python.exists():
        return python
    command = [sys.executable, "-m", "venv", venv]
    done = run(command if beside is None else [*command, "--system-site-packages"])
    if done.returncode != 0 and beside is not None:
        # pip of the Python beside serves where the module that would bring one is left out.
        done = run([*command, "--system-site-packages", "--without-pip", "--clear"])
    if done.returncode != 0:
        stop(
            f"`{sys.executable} -m venv` fails: {done.stdout.strip()}",
            "Python's venv module with pip",
            (
                "install it (Debian: apt install python3-venv)",
                "name another Python: make PYTHON=/path/to/python3",
                "pip install --no-build-isolation -e . into an environment of your own",
            ),
        )
    if beside is not None:
        # A Python that is itself in an environment does not pass its packages on by the flag, and
        # the ninja package looks for its program in this environment alone.
        site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        (Path(site.stdout.strip()) / "beside.pth").write_text(f"{beside}\n")
        program = Path(sys.executable).parent / "ninja"
        if program.exists():
            (venv / "bin" / "ninja").symlink_to(program)
    return python


def install(python: Path, wanted: dict[str, str]) -> str:
    """Install pinned requirements; return pip's words if that fails, else nothing."""
    together = [pin for name, pin in wanted.items() if name not in ALONE]
    alone = [pin for name, pin in wanted.items() if name in ALONE]
    for group, more in ((together, ()), (alone, ("--no-deps",))):
        if group:
            done = run([python, "-m", "pip", "install", "-qq", "--retries", "2", *more, *group])
            if done.returncode != 0:
                return done.stdout.strip()
    return ""


def main() -> None:
    """Make the environment named by the first argument from the files named by the others."""
    if sys.version_info < MINIMUM:
        stop(
            f"Python {sys.version.split()[0]}",
            "Python 3.11 or later",
            (
                "name another Python: make PYTHON=python3.12",
                "install one (Debian 12 and later have it)",
                "make the environment with a tool that brings a Python",
            ),
        )
    venv, files = Path(sys.argv[1]), sys.argv[2:]
    wanted = pins(files)
    beside = torch_beside(sys.executable)
    python = create(venv, beside)
    if beside is None:
        print(f"set-up: installing {len(wanted)} pinned packages into {venv}", flush=True)
        missing = wanted
    else:
        have = installed(python, [*wanted, *KEPT])
        versions = ", ".join(f"{name} {have[name]}" for name in KEPT if name in have)
        print(f"set-up: keeping {versions} (it sees a GPU) and what is beside it", flush=True)
        missing = {k: v for k, v in wanted.items() if k not in have and k not in KEPT}
    failure = install(python, missing)
    if not failure:
        return
    lost = [name for name in missing if name not in installed(python, list(missing))]
    stopping = [name for name in lost if beside is None or name in NEEDED]
    if stopping:
        stop(
            f"pip cannot install {', '.join(stopping)}:\n{failure}",
            "the versions in " + ", ".join(files),
            (
                "allow pip to reach a package index, or name one by PIP_INDEX_URL",
                "put the wheels into a folder and name it by PIP_FIND_LINKS",
                f"install them by hand into {venv}, then run make again",
            ),
        )
    reason = re.sub(r"\s+", " ", failure)[-200:]
    print(f"set-up: going on without {', '.join(lost)}; what needs them will say so ({reason})")


if __name__ == "__main__":
    main()
