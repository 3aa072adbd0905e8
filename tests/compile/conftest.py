"""Helpers of this folder for any import mode, and the CUDA sources built for the CPU, once."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parents[1] / "csrc", HERE.parent / "expert_slice"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import emulate

    return emulate.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def ops(emulated_library: Path) -> Iterator[Any]:
    """`torch.ops.ppmoe_emulated`: the CUDA operators for CPU tensors."""
    import emulate
    import torch

    definitions = emulate.load(emulated_library)
    yield torch.ops.ppmoe_emulated
    del definitions
