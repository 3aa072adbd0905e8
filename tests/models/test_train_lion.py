"""`python -m ppmoe_models.train_lion` from end to end, on a few small images."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lion_backbones import cnn, vit
from matplotlib import image
from pictures import stripes_folder
from torch import nn

from ppmoe_models import LION
from ppmoe_models.image_data import ImageData, load_digits
from ppmoe_models.lion_layers import ImplicitMLP
from ppmoe_models.lion_memory import peak_bytes
from ppmoe_models.lion_report import residual_curve, summary, table
from ppmoe_models.lion_settings import LIONSettings
from ppmoe_models.lion_small import SmallViT
from ppmoe_models.lion_trainer import LIONTrainer
from ppmoe_models.prompt_modes import MODES, build
from ppmoe_models.train_lion import main

QUICK: dict[str, Any] = {"pretrain_epochs": 1, "steps": 4, "batch": 8, "seeds": 1}


def few_digits(count: int = 20) -> ImageData:
    """The first images of each digit."""
    digits = load_digits()
    places = torch.cat([(digits.labels == each).nonzero()[:count, 0] for each in range(10)])
    return digits._replace(images=digits.images[places], labels=digits.labels[places])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LIONTrainer, Path]:
    """A trainer that has done all ways of tuning from two seeds, and where main wrote the same."""
    out = tmp_path_factory.mktemp("lion") / "out"
    patch = pytest.MonkeyPatch()
    patch.setattr("ppmoe_models.train_lion.load_digits", few_digits)
    try:
        quick = ["--pretrain-epochs=2", "--steps=5", "--batch=8", "--seeds=2", "--out", str(out)]
        assert main(quick) == 0
    finally:
        patch.undo()
    trainer = LIONTrainer(
        LIONSettings(pretrain_epochs=2, steps=5, batch=8, seeds=2, out=str(out)), few_digits()
    )
    return trainer, out


def numbers_of(out: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((out / "numbers.json").read_text())
    return told


def test_what_is_told_is_so(run: tuple[LIONTrainer, Path]) -> None:
    trainer, out = run
    told = numbers_of(out)
    assert told["classes"] == ["5", "6", "7", "8", "9"]
    assert told["pretrained"]["classes"] == ["0", "1", "2", "3", "4"]
    assert (told["trained_on"], told["held_out"]) == (75, 25)
    assert list(told["modes"]) == list(MODES)
    assert [(each["mode"], each["seed"]) for each in told["runs"]] == [
        (mode, seed) for mode in MODES for seed in range(2)
    ]
    for mode, each in told["modes"].items():
        options = trainer.settings.options(mode)
        model = build(mode, copy.deepcopy(trainer.backbone), 5, **options)
        assert each["trained"] == model.parameter_counts().nominal, mode
        assert each["not_zero"] <= each["trained"], mode
        errors = [one["errors"] for one in told["runs"] if one["mode"] == mode]
        assert each["accuracy"] == pytest.approx(1 - sum(errors) / 50), mode
        assert each["peak_bytes"] > 100_000, mode
        assert each["seconds"] > 0
    assert set(told["modes"]["lion"]["steps"]) == {"input", "representation"}
    for steps in told["modes"]["lion"]["steps"].values():
        assert 1 <= steps <= 30
    assert told["modes"]["lion"]["not_converged"] == 0
    assert told["modes"]["full"]["peak_bytes"] > told["modes"]["linear"]["peak_bytes"]
    # All but LION's scored weights of the implicit layers, half of which are cut.
    lion = told["modes"]["lion"]
    scored = 8 * 2 + 9 * 64 + 8 + 3 * 16 * 48
    assert lion["trained"] - lion["not_zero"] == pytest.approx(scored / 2, abs=3)

    page = (out / "table.md").read_text(encoding="utf-8")
    assert all(f"| {mode} |" in page for mode in MODES)
    assert "2 seeds" in page
    pixels = image.imread(out / "residuals.png")
    assert min(pixels.shape[:2]) > 250
    assert pixels.std() > 0.05


def test_the_model_that_is_kept_is_the_one_measured(run: tuple[LIONTrainer, Path]) -> None:
    trainer, out = run
    kept = torch.load(out / "lion.pt", weights_only=True)
    backbone = SmallViT(48, depth=3)
    backbone.load_state_dict(kept["backbone"])
    model = LION(backbone, 5, warn=False)
    model.load_state_dict(kept["model"])
    assert not any(name.startswith("backbone.") for name in kept["model"])
    with torch.no_grad():
        found = model.eval()(trainer.normalised(trainer.data, trainer.held)).argmax(-1)
    errors = int((found != trainer.data.labels[trainer.held]).sum())
    first = next(each for each in numbers_of(out)["runs"] if each["mode"] == "lion")
    assert errors == first["errors"]


@pytest.mark.parametrize("mode", ["linear", "lion"])
def test_the_same_settings_give_the_same_bits(mode: str, run: tuple[LIONTrainer, Path]) -> None:
    trainer, out = run
    again = trainer.tune(mode, 1)
    first = next(
        each for each in numbers_of(out)["runs"] if (each["mode"], each["seed"]) == (mode, 1)
    )
    assert (again.nats, again.errors) == (first["nats"], first["errors"])


def test_the_backbone_is_left_alone(run: tuple[LIONTrainer, Path]) -> None:
    trainer, _ = run
    before = copy.deepcopy(trainer.backbone.state_dict())
    for mode in ("full", "lion"):
        trainer.tune(mode, 0)
    for name, value in trainer.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(each.requires_grad for each in trainer.backbone.parameters())


def test_it_learns() -> None:
    settings = LIONSettings(
        pretrain_epochs=8, steps=100, batch=16, seeds=1, modes="linear,lion", move=0.0, turn=0.0,
        zoom=0.0,
    )  # fmt: skip
    trainer = LIONTrainer(settings, few_digits(24))
    results = {each.mode: each for each in trainer.run()}
    for each in results.values():
        assert sum(each.nats[-5:]) < 0.8 * sum(each.nats[:5])
    assert results["lion"].errors < 0.6 * trainer.held.numel()
    lines = table(trainer).splitlines()
    assert [line.split()[0] for line in lines] == ["mode", "linear", "lion"]
    assert summary(trainer)["lion"]["deviation"] == 0.0


@pytest.mark.parametrize(
    ("options", "counts"),
    [({"shots": 3}, [3] * 5), ({"long_tail": 5.0}, [15, 10, 7, 4, 3]), ({}, [15] * 5)],
)
def test_subsets_are_tuned_on(options: dict[str, Any], counts: list[int]) -> None:
    settings = LIONSettings(**QUICK, modes="linear", **options)
    trainer = LIONTrainer(settings, few_digits())
    places = trainer.subset(0)
    assert trainer.data.labels[places].bincount().tolist() == counts
    assert not set(places.tolist()) & set(trainer.held.tolist())
    if options:
        assert not torch.equal(places, trainer.subset(1))
    seen: set[int] = set()
    taken = trainer.normalised

    def noted(data: Any, picked: Any, draws: Any = None) -> Any:
        if draws is not None:
            seen.update(picked.tolist())
        return taken(data, picked, draws)

    trainer.normalised = noted  # type: ignore[method-assign]
    trainer.settings = dataclasses.replace(settings, steps=None, epochs=2)
    result = trainer.tune("linear", 0)
    assert len(result.nats) == 2 * (75 // 8)
    assert seen <= set(places.tolist())
    assert len(result.by_class) == 5


def test_a_folder_and_a_transformers_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stripes_folder(tmp_path / "stripes", 8)
    vit().save_pretrained(tmp_path / "vit")  # type: ignore[operator]
    assert main([
        "--data", str(folder), "--backbone", str(tmp_path / "vit"), "--out", str(tmp_path / "out"),
        "--steps=3", "--batch=4", "--seeds=1", "--modes=lion,vpt_deep", "--input-prompt=patches",
        "--keep=1",
    ]) == 0  # fmt: skip
    told = numbers_of(tmp_path / "out")
    assert told["classes"] == ["across", "up"]
    assert told["pretrained"] is None
    assert (told["trained_on"], told["held_out"]) == (12, 4)
    assert told["modes"]["lion"]["not_zero"] == told["modes"]["lion"]["trained"]
    assert "Pre-trained" not in capsys.readouterr().out
    assert torch.load(tmp_path / "out" / "lion.pt", weights_only=True)["backbone"] is None


def test_a_folder_without_a_backbone(tmp_path: Path) -> None:
    folder = stripes_folder(tmp_path / "stripes", 6)
    stripes_folder(tmp_path / "stripes", 6, ("wide", "zig"))
    arguments = ["--data", str(folder), "--out", str(tmp_path / "out"), "--steps=2", "--batch=4"]
    arguments += ["--seeds=1", "--modes=linear", "--pretrain-epochs=1"]
    assert main(arguments) == 0
    told = numbers_of(tmp_path / "out")
    assert (told["pretrained"]["classes"], told["classes"]) == (["across", "up"], ["wide", "zig"])
    assert not (tmp_path / "out" / "residuals.png").exists(), "there is no LION to draw"
    with pytest.raises(SystemExit, match="1 classes to tell apart; expected 2 or more"):
        main([*arguments, "--pretrain-classes=3"])


def test_residual_curves_are_those_of_the_solver() -> None:
    layer, u = ImplicitMLP(12, 12, 4), torch.randn(5, 12)
    curve = residual_curve(layer, u)
    assert curve.shape == (30, 5)
    assert (layer.rtol, layer.max_iter) == (1e-4, 30)
    assert (curve[1:] <= curve[:-1] * 1.001).all(), "the best of all so far"
    _, solve = layer(u)
    for row, steps in enumerate(solve.steps.tolist()):
        assert curve[steps - 1, row] <= 1e-4 * 1.01
        assert steps == 1 or curve[steps - 2, row] > 1e-4 * 0.99


def test_peaks_of_memory() -> None:
    def run() -> torch.Tensor:
        one = torch.empty(1000)
        two = torch.empty(500) + 1
        del one
        return torch.empty(200) + two[:200]

    assert 0 <= peak_bytes(run, torch.device("cpu")) - 4 * 2000 < 100
    layer = nn.Linear(64, 64)
    found = peak_bytes(lambda: layer(torch.zeros(256, 64)).sum().backward(), torch.device("cpu"))
    assert found >= 4 * (2 * 256 * 64 + 64 * 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "folder is 'nowhere'; expected a folder"),
        (["--backbone", "nowhere"], "backbone is 'nowhere'; expected a folder of a transformers"),
        (["--steps", "0"], "steps is 0; allowed: 1 or more"),
        (["--keep", "0"], "keep is 0.0; allowed: above 0"),
        (["--prune-at", "2"], "prune_at is 2.0; allowed: up to 1"),
        (["--decay", "-1"], "decay is -1.0; allowed: 0 or more"),
        (["--lr", "nan"], "lr is nan; allowed: above 0"),
        (["--modes", "linear,vpt"], "modes has 'vpt'; allowed: linear, full, bias, adapter"),
        (["--modes", "lion,lion"], "modes is 'lion,lion'; allowed: each mode once"),
        (["--modes", ""], "modes has ''; allowed"),
        (["--shots", "2", "--long-tail", "10"], "shots and long_tail are given; expected one"),
        (["--long-tail", "0.5"], "long_tail is 0.5; allowed: 1 or more"),
        (["--shots", "1000", "--pretrain-epochs=1"], "shots is 1000; allowed: up to 13"),
        (["--pretrain-classes", "9"], "1 classes to tell apart; expected 2 or more"),
        (["--size", "7"], "size is 7; allowed: even"),
        (["--input-width", "65", "--pretrain-epochs=1"], "input_width is 65; allowed: 1 to 64"),
    ],
)
def test_bad_options_stop_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message) as stopped:
        main([*options, "--out", str(tmp_path), "--modes=lion", *options])
    assert "\n" not in str(stopped.value)


def test_modes_that_do_not_go_with_a_backbone() -> None:
    trainer = LIONTrainer(
        LIONSettings(**QUICK, size=12, modes="vpt_deep"), few_digits(), cnn().eval()
    )
    assert trainer.channels == 3
    with pytest.raises(ValueError, match="without a class token"):
        list(trainer.run())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("tqdm", "sklearn", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path)])
    assert "train_lion: found no tqdm and no sklearn; needed for the images" in str(stopped.value)
    with pytest.raises(SystemExit, match="found no tqdm and no transformers; needed"):
        main(["--backbone", "x", "--data", str(tmp_path)])


def test_stopping_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LIONTrainer, "tune", interrupted)
    monkeypatch.setattr("ppmoe_models.train_lion.load_digits", few_digits)
    with pytest.raises(SystemExit, match="stopped after 0 models"):
        main(["--pretrain-epochs=1", "--out", str(tmp_path)])
