"""The interpret tier: Triton kernels on CPU tensors, in a process of its own.

Triton decides when a kernel is defined whether it is interpreted, so TRITON_INTERPRET=1 must be in
the environment from the start; without it this folder is skipped.
"""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 and a process of its own")
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(skip)
