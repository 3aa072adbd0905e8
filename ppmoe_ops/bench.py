"""`python -m ppmoe_ops.bench`: time the operators, write a report, compare with a git revision.

The benchmarks themselves are the package `ppmoe_ops.benchmarks` (the folder `bench/`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import ppmoe_ops

PACKAGE = "ppmoe_ops.benchmarks"


def benchmarks() -> ModuleType:
    """The package `ppmoe_ops.benchmarks`, from the folder beside this package if need be.

    An install, editable or not, maps the folder `bench/` to that name. A source tree that is only
    on the path has no such mapping, so it is made here.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    if importlib.util.find_spec(PACKAGE) is not None:
        return importlib.import_module(PACKAGE)
    folder = Path(ppmoe_ops.__file__).resolve().parent.parent / "bench"
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
        raise ModuleNotFoundError(f"{PACKAGE}: not installed, and there is no {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    benchmarks()
    code: int = importlib.import_module(f"{PACKAGE}.command").main(arguments)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
