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
    assert REGISTRATION in text
    return text.replace(REGISTRATION, f"STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, CPU, m)")


def build(folder: Path) -> Path:
    """Compile all CUDA sources into `folder` and return the library."""
    root = Path(torch.__file__).parent
    sources = [HEADERS / "shims.cpp"]
    includes = [f"-I{HEADERS}", f"-I{kernels.CSRC / 'include'}", f"-isystem{root / 'include'}"]
    for name in kernels.CUDA_SOURCES:
        path = kernels.CSRC / name
        sources.append(folder / name.replace("/", "-").replace(".cu", ".cpp"))
        sources[-1].write_text(translate(path.read_text()))
        includes.append(f"-I{path.parent}")
    library = folder / "_C_emulated.so"
    command = [kernels.find_cxx(), *FLAGS, *dict.fromkeys(includes), "-shared", "-o", library]
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
