"""The gpu tier: the one rule by which all of it is skipped where there is no GPU."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU")
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(skip)
