"""Finds and loads the compiled kernel libraries, and remembers why one is missing."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent
DIRECTORY_VARIABLE = "PPMOE_OPS_LIBRARY_DIR"
LIBRARIES = {"cpp": "_C_cpu.so", "cuda": "_C_cuda.so"}


@dataclasses.dataclass(frozen=True)
class Status:
    """Whether a kernel library is in the process, and where from or why not."""

    loaded: bool
    path: Path
    reason: str


def library_directory() -> Path:
    """The folder the libraries are taken from: `PPMOE_OPS_LIBRARY_DIR`, else the package."""
    override = os.environ.get(DIRECTORY_VARIABLE)
    return Path(override) if override else PACKAGE


@cache
def load(backend: str) -> Status:
    """Load the library of `backend` ("cpp" or "cuda"), once a process."""
    path = library_directory() / LIBRARIES[backend]
    if not path.is_file():
        return Status(False, path, _why_not_built(backend, path))
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        built = build_info().get("torch", "unknown")
        return Status(
            False,
            path,
            f"{path.name} does not load: {error} "
            f"(built with torch {built}, running {torch.__version__})",
        )
    return Status(True, path, "loaded")


def _why_not_built(backend: str, path: Path) -> str:
    built = build_info().get("backends", {}).get(backend)
    if built and not built["built"]:
        return f"not built: {built['reason']}"
    return f"{path.name} is not in {path.parent}"


@cache
def build_info() -> dict[str, Any]:
    """What the build recorded about itself; empty where the package was never built."""
    path = library_directory() / "_build_info.json"
    if not path.is_file():
        return {}
    info: dict[str, Any] = json.loads(path.read_text())
    return info
