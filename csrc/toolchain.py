"""The C++ compiler: which one, and the instruction sets that it can target."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from sources import X86_ISAS


class BuildError(RuntimeError):
    """A build that cannot go on: what was found, what was needed, and three ways out."""

    def __init__(self, found: str, needed: str, ways: tuple[str, str, str]) -> None:
        lines = "\n".join(f"  {number}. {way}" for number, way in enumerate(ways, 1))
        super().__init__(f"found: {found}\nneeded: {needed}\nways out:\n{lines}")


def tool_version(tool: str) -> str:
    """Name and version number of a compiler."""
    output = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    numbers = re.findall(r"\d+\.\d+(?:\.\d+)?", output.stdout)
    return f"{Path(tool).name} {numbers[-1] if 'nvcc' in tool else numbers[0]}" if numbers else tool


def find_cxx() -> str:
    """The C++ compiler: CXX if set, else c++."""
    cxx = os.environ.get("CXX", "c++")
    if shutil.which(cxx.split()[0]) is None:
        raise BuildError(
            f"no C++ compiler ({cxx})",
            "g++ 11 or later, or clang++ 14 or later",
            (
                "install one (Debian: apt install g++)",
                "set CXX to the compiler's path",
                "install a wheel, which needs no compiler",
            ),
        )
    return cxx


def supported_isas(cxx: str) -> dict[str, tuple[str, ...]]:
    """The instruction sets that the compiler can target, each with its whole list of flags."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"baseline": ()}
    flags: tuple[str, ...] = ()
    isas: dict[str, tuple[str, ...]] = {}
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text("#include <immintrin.h>\nint probe() { return 0; }\n")
        for name, more in X86_ISAS.items():
            flags += more
            command = [*cxx.split(), "-std=c++20", *flags, "-c", str(probe), "-o", os.devnull]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                isas[name] = (*flags, *(("-mprefer-vector-width=512",) if "512" in name else ()))
    if "baseline" not in isas:
        raise BuildError(
            f"{tool_version(cxx)}, which cannot compile C++20",
            "g++ 11 or later, or clang++ 14 or later",
            ("install one", "set CXX to its path", "install a wheel, which needs no compiler"),
        )
    return isas
