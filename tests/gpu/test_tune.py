"""The tuner on a GPU: what it stores, that a capture never times, that stored choices compute."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from ppmoe_ops import tune

pytest.importorskip("triton")

from ppmoe_ops.kernels import _choices, _tune
from ppmoe_ops.kernels.expert_slice.grouped_linear import grouped_linear

GIVEN = argparse.Namespace(
    hidden=256, width=128, experts=4, top_k=2, dtype="bfloat16", activation="swiglu"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(_choices.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(_choices.VARIABLE, "1")
    _choices.known.cache_clear()
    return tmp_path


def test_every_product_gets_a_choice_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.run_products(GIVEN, 700)
    (path,) = folder.glob("tuned-*.json")
    stored = path.read_bytes()
    kinds = {key.split()[0] for key in _choices.read(path)}
    assert kinds == {
        "into", "out_of", "activation_gradient", "weight_gradient", "linear",
        "grouped_weight_gradient",
    }  # fmt: skip
    for key, record in _choices.read(path).items():
        assert 0 < record["ms"] <= record["table_ms"], key
        # A candidate may not fit a smaller GPU; none may compute something else.
        assert not any("differ" in each["why"] for each in record["dropped"]), key

    def refuse(*_: object) -> float:
        raise AssertionError("timed again")

    monkeypatch.setattr(_tune, "milliseconds", refuse)
    tune.run_products(GIVEN, 700)
    assert path.read_bytes() == stored


def test_a_capture_takes_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(512, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2, 256, 128, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0, 200, 512], device="cuda", dtype=torch.int32)
    monkeypatch.setenv(_choices.VARIABLE, "0")
    expected = grouped_linear(rows, offsets, weight)
    monkeypatch.setenv(_choices.VARIABLE, "1")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_linear(rows, offsets, weight)
    graph.replay()
    assert torch.equal(out, expected)
    assert not list(folder.iterdir())
    torch.testing.assert_close(grouped_linear(rows, offsets, weight), expected)
    assert list(folder.glob("tuned-*.json"))
