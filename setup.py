"""Builds the compiled parts by csrc/build.py; all metadata is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import build as kernels  # noqa: E402


class BuildKernels(build_ext):
    """Hands the build to csrc/build.py, into the source tree or into the wheel."""

    def run(self) -> None:
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


setup(ext_modules=[Extension("ppmoe_ops._host", [])], cmdclass={"build_ext": BuildKernels})
