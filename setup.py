"""Builds the compiled parts by csrc/build.py; all metadata is in pyproject.toml."""

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import build as kernels  # noqa: E402


def require(there: bool, found: str) -> None:
    """Stop where build isolation is off and the environment lacks what the build needs."""
    if there:
        return
    error = kernels.BuildError(
        f"{found} in the environment of {sys.executable}",
        "torch 2.11 or later, setuptools 77 or later, pybind11 and ninja",
        (
            'pip install "torch>=2.11" "setuptools>=77" pybind11 ninja, then again',
            "leave --no-build-isolation out: pip then brings what the build needs",
            "install a wheel, which needs no compiler",
        ),
    )
    raise SystemExit(f"ppmoe_ops: the build stopped.\n{error}")


class BuildKernels(build_ext):
    """Hands the build to csrc/build.py, into the source tree or into the wheel."""

    def run(self) -> None:
        for name in ("torch", "pybind11"):
            require(importlib.util.find_spec(name) is not None, f"no {name}")
        torch = version("torch")
        require(tuple(map(int, torch.split(".")[:2])) >= (2, 11), f"torch {torch}")
        in_place = self.inplace or self.editable_mode
        out = ROOT / "ppmoe_ops" if in_place else Path(self.build_lib) / "ppmoe_ops"
        try:
            kernels.build(out, ROOT / "build" / "objects")
        except kernels.BuildError as error:
            raise SystemExit(f"ppmoe_ops: the build stopped.\n{error}") from None

    def get_outputs(self) -> list[str]:
        """Nothing: setuptools would look for one shared object an Extension."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing to copy in an editable install: the libraries are built in place."""
        return {}


require(int(setuptools.__version__.partition(".")[0]) >= 77, f"setuptools {setuptools.__version__}")
setup(ext_modules=[Extension("ppmoe_ops._host", [])], cmdclass={"build_ext": BuildKernels})
