"""Bounds and predictions: counted as the contracts count, and called what they are."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import ppmoe_ops.bench as door
from ppmoe_ops._library import OPERATORS

door.benchmarks()
cases, command, inputs, model, page, roofline = (
    importlib.import_module(f"{door.PACKAGE}.{name}")
    for name in (
        "device_cases",
        "command",
        "inputs",
        "roofline_model",
        "roofline_page",
        "roofline",
    )
)
SMALL = inputs.Model("small", 24, 16, 8, 2)
FAMILY = sorted(name for name in inputs.BUILDERS if OPERATORS[name].family == "expert_slice")


@pytest.fixture(scope="module")
def predictions() -> list[Any]:
    return [roofline.predict(case) for case in cases.cases()]


@pytest.mark.parametrize("height", [1, 2, 4, 16])
@pytest.mark.parametrize(("tokens", "odds"), [(5, 0.3), (9, 0.05), (12, 0.9), (7, 1.0), (4, 0.0)])
def test_expected_tiles_are_those_of_every_outcome(tokens: int, odds: float, height: int) -> None:
    outcomes = range(tokens + 1)
    chances = [math.comb(tokens, m) * odds**m * (1 - odds) ** (tokens - m) for m in outcomes]
    expected = sum(p * math.ceil(m / height) for p, m in zip(chances, outcomes, strict=True))
    rows, tiles = model.tiles_of_random_rows(tokens, odds, height)
    assert rows == pytest.approx(tokens * odds)
    assert tiles == pytest.approx(expected)


def test_expected_tiles_are_those_of_drawn_ids() -> None:
    work = inputs.Workload(SMALL, 4000, routing="uniform")
    counts = torch.bincount(inputs.expert_ids(work).flatten().long(), minlength=8)
    drawn = float((counts / 32).ceil().sum()) / 8
    assert model.tiles_of_random_rows(4000, 0.25, 32)[1] == pytest.approx(drawn, rel=0.02)


def test_shares_of_tiles_and_waves() -> None:
    assert model.useful_rows(128, 1.0, 128) == 1.0
    assert model.useful_rows(64, 1.0, 128) == 0.5
    assert model.useful_columns(768, 256) == 1.0
    assert model.useful_columns(300, 256) == pytest.approx(300 / 512)
    assert model.useful_waves(132, 132) == 1.0
    assert model.useful_waves(133, 132) == pytest.approx(133 / 264)
    assert model.useful_waves(0, 132) == 1.0


def test_programs_on_a_multiprocessor() -> None:
    big, narrow = model.Tiling(128, 256, 64, 8, 3), model.Tiling(64, 128, 64, 4, 4)
    assert big.resident(model.H200) == 1
    assert narrow.resident(model.H200) == 2
    assert model.Tiling(16, 16, 16, 32, 1).resident(model.H200) == 2


def test_nothing_is_predicted_below_its_bound(predictions: list[Any]) -> None:
    for each in predictions:
        assert each.bound()[0] <= each.by_launch() * (1 + 1e-9), each.case.key
        assert each.by_launch() < each.seconds(), each.case.key
        assert 0 < each.useful <= 1
        assert 0 < each.waves <= 1


def test_better_assumptions_never_predict_more_time() -> None:
    step = roofline.predict(cases.cases(cases.LAYER)[0]).steps[4]
    now = step.predicted(model.H200)
    for name, value in (("launch", 0.0), ("fill", 0.0)):
        better = dataclasses.replace(model.ASSUMED, **{name: value})
        assert step.predicted(model.H200, better) < now
    slow = dataclasses.replace(step, efficiency=step.efficiency / 2)
    assert slow.predicted(model.H200) > 1.5 * now


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", FAMILY)
def test_costs_without_values_are_those_with(name: str, ranks: int) -> None:
    work = inputs.Workload(SMALL, 40, torch.bfloat16, "uniform", local_experts=8 // ranks)
    op = OPERATORS[name]
    real, shapes = inputs.build(name, work), inputs.build(name, work, "meta")
    assert op.nbytes(*shapes) == op.nbytes(*real)
    assert op.flops(*shapes) == op.flops(*real)


@pytest.mark.parametrize("ranks", [1, 8])
def test_bytes_of_the_layers_launches(ranks: int) -> None:
    """The sums that the module's docstring states, small index arrays aside."""
    size, tokens = 2, 512
    work = cases.share(inputs.QWEN3_30B, tokens, ranks)
    hidden, width, local = 2048, 768, work.local
    found = {
        name: roofline.predict(cases.DeviceCase(name, work, ranks))
        for name in ("expert_ffn_forward", "expert_ffn_backward")
    }
    forward, backward = found.values()
    rows = forward.flops / (6 * hidden * width)
    assert rows == int(inputs.build("expert_ffn", work, "meta")[2][-1])
    weights = 3 * local * hidden * width
    kept = 2 * rows * width
    moved = weights + 3 * rows * hidden + 2 * rows * width + tokens * hidden + kept
    assert forward.moved == pytest.approx(size * moved, rel=0.01)
    moved = 5 * rows * hidden + 10 * rows * width + 2 * weights + tokens * hidden
    assert backward.moved == pytest.approx(size * moved, rel=0.01)
    assert backward.flops == 2 * forward.flops
    assert forward.read == size * weights


def test_tiles_cover_every_local_row() -> None:
    case = cases.cases(cases.LAYER)[0]
    for step in roofline.predict(case).steps:
        if step.tiling is not None and "gradient" not in step.name:
            work = 2 * step.tiling.rows * step.tiling.columns * step.tiles
            width = 2048 if "up" in step.name else 768
            assert step.flops / step.useful == pytest.approx(work * width, rel=1e-6)


def test_the_page_is_written_by_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["roofline", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / page.NAME}\n"
    text = (tmp_path / page.NAME).read_text()
    stored = (page.RESULTS / page.NAME).read_text()
    assert text == stored, "stale: run `python -m ppmoe_ops.bench roofline`"


def test_unmeasured_rows_say_so_and_stored_ones_are_shown(tmp_path: Path) -> None:
    assert page.stored(tmp_path) is None
    assert page.this_cpu(tmp_path) is None
    plain = page.render(tmp_path)
    count = len(cases.cases())
    held = sum(bool(case.target) for case in cases.cases())
    assert plain.count(f"{page.NOT_RUN} |") == count + held
    assert "No row was run on a GPU yet" in plain

    first, second, third = cases.cases()[:3]
    rows = [
        {"key": first.key, "seconds": {"median": 4e-3}},
        {"key": second.key, "seconds": {"median": 1.0}, "tuned": True},
        {"key": third.key, "seconds": {"median": 1.0}, "peer": "Liger"},
        {"key": second.key, "seconds": None},
    ]
    run = {"kind": "device", "device": "cuda", "facts": {"GPU": "some GPU"}, "rows": rows}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "rehearsal.json").write_text(json.dumps({**run, "device": "cpu"}))
    (tmp_path / "report.json").write_text("{}")
    found = page.stored(tmp_path)
    assert found == page.Measured("some GPU", {first.key: 4e-3})
    text = page.render(tmp_path)
    assert "Measured on some GPU." in text
    assert text.count(f"{page.NOT_RUN} |") == count + held - 2
    assert "| 618 TFLOP/s (aim) |" in text
    assert "| 4,000 us |" in text


def test_the_stored_cpu_report_gives_the_ceilings() -> None:
    data = json.loads((page.RESULTS / page.CPU_REPORT).read_text())
    cpu = page.this_cpu()
    assert cpu.flops == data["ceilings"]["gemm"]["bfloat16"]
    assert cpu.bandwidth == data["ceilings"]["copies"][-1]["bytes_per_second"]
    assert cpu.bound(cpu.flops, 0) == (1.0, "products")
    assert cpu.bound(0, 2 * cpu.bandwidth) == (2.0, "bytes")


def test_roofline_takes_no_operators(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["roofline", "route"])
    assert "growth and roofline none" in capsys.readouterr().err


def test_without_triton_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(roofline, "_module", missing)
    with pytest.raises(SystemExit):
        command.main(["roofline", "--out", str(tmp_path)])
    assert "cannot be read without Triton" in capsys.readouterr().err
    assert not (tmp_path / page.NAME).exists()
