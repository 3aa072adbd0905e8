"""The command `python -m ppmoe_ops.tune`, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ppmoe_ops import tune

STORED = """{"format": 1, "choices": {"into bfloat16 many": {
 "config": {"block_m": 128}, "ms": 0.5, "table_ms": 0.75,
 "dropped": [{"config": {"block_m": 64}, "why": "2 of 6 elements differ"}]}}}"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPMOE_OPS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("PPMOE_OPS_AUTOTUNE", raising=False)
    return tmp_path


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_shows_what_is_stored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--show"]) == 0
    assert "nothing is stored" in capsys.readouterr().out
    (folder / "tuned-X-3.6.0.json").write_text(STORED)
    assert tune.main(["--show"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "tuned-X-3.6.0.json",
        '  into bfloat16 many: {"block_m": 128}',
        "    0.5000 ms; the table's 0.7500 ms",
        '    dropped {"block_m": 64}: 2 of 6 elements differ',
    ]


@pytest.mark.parametrize(
    "arguments", [["--hidden", "0"], ["--dtype", "int8"], ["--top-k", "9", "--experts", "8"]]
)
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tune.main(arguments)
    assert caught.value.code == 2
