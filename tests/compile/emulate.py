"""Builds the CUDA sources for a CPU, against the headers in `emulation/`, without changing them.

The result registers the operators as `torch.ops.ppmoe_emulated.*` for CPU tensors: the same
kernels, launch shapes and argument checks that a GPU gets, one fiber per CUDA thread. Only the
launch syntax and the registration line are rewritten.
"""

from __future__ import annotations

import re
import subprocess
from importlib import import_module
from pathlib import Path

import torch

from ppmoe_ops._library import OPERATORS

kernels = import_module("build")  # csrc/build.py

NAMESPACE = "ppmoe_emulated"
HEADERS = Path(__file__).parent / "emulation"
LAUNCH = re.compile(r"(\b\w+(?:<[^<>;()]*>)?)\s*<<<([^;]*?)>>>\(")
DYNAMIC_SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
REGISTRATION = "STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CUDA, m)"
FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-w",
    f"-DTORCH_TARGET_VERSION={kernels.STABLE_ABI_TARGET}",
    "-Daoti_torch_device_type_cuda=aoti_torch_device_type_cpu",
    "-Daoti_torch_create_device_guard=emulated_create_device_guard",
    "-Daoti_torch_delete_device_guard=emulated_delete_device_guard",
)


def translate(source: str) -> str:
    """CUDA C++ to C++: launches become function calls, the CUDA key becomes the CPU's."""
    text, launches = LAUNCH.subn(r"emulation::launch(\1, \2)(", source)
    assert launches == source.count("<<<"), "a launch was not recognised"
    text = DYNAMIC_SHARED.sub(r"\1* \2 = emulation::dynamic_shared<\1>();", text)
    assert "extern __shared__" not in text, "a declaration of shared memory was not recognised"
    return text.replace(REGISTRATION, f"STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, CPU, m)")


def build(folder: Path) -> Path:
    """Compile all CUDA sources into `folder` and return the library."""
    root = Path(torch.__file__).parent
    sources = [HEADERS / "shims.cpp"]
    includes = [f"-I{HEADERS}", f"-I{kernels.CSRC / 'include'}", f"-isystem{root / 'include'}"]
    for path in sorted((kernels.CSRC / "cuda").rglob("*.cu*")):
        # Headers stand beside the sources here too, and are found there first.
        target = folder / path.relative_to(kernels.CSRC)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".cu":
            target = target.with_suffix(".cpp")
            sources.append(target)
        target.write_text(translate(path.read_text()))
    library = folder / "_C_emulated.so"
    command = [kernels.find_cxx(), *FLAGS, *includes, "-shared", "-o", library]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-Wl,-z,defs"]
    subprocess.run([*command, *sources, *link], check=True)
    return library


def load(library: Path) -> torch.library.Library:
    """Define the operators under their emulated names and load `library`; keep the result alive."""
    definitions = torch.library.Library(NAMESPACE, "DEF")
    text = "".join((kernels.CSRC / name).read_text() for name in kernels.CUDA_SOURCES)
    for name in re.findall(r'm\.impl\("(\w+)"', text):
        definitions.define(name + OPERATORS[name].schema)
    torch.ops.load_library(str(library))
    return definitions
