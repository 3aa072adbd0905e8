"""`python -m ppmoe_models.train_lm` from end to end, on a tiny preset."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib import image

from ppmoe_models import LanguageModel, train_report
from ppmoe_models import trainer as trainer_module
from ppmoe_models.settings import PRESETS, Settings
from ppmoe_models.text_data import even_windows, load_text
from ppmoe_models.train_lm import main
from ppmoe_models.trainer import load_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i}.txt").write_text("".join(f"{i} and {j} is {i + j}\n" for j in range(200)))
    return str(folder)


def arguments(data: str, out: Path, *more: str) -> list[str]:
    quick = ["--preset=tiny", "--steps=6", "--validations=3", "--windows=8", "--sample=20"]
    return [*quick, "--data", data, "--out", str(out), *more]


def test_end_to_end(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--compare-dense", "--capacity-factor=1.0", "--ranks=2", "--jitter=0.4"]
    assert main(arguments(data, out, *options, "--prompt=1 and")) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((out / "numbers.json").read_text())

    # The loss that is told is that of the parameters that are kept, on the windows it names.
    settings = Settings(**load_checkpoint(out / "checkpoint.pt")["settings"])
    windows = even_windows(load_text(data).validation, 8, 33)
    assert numbers["validated_bytes"] == 8 * 32
    for name, config in (("ppmoe", settings.model()), ("dense", settings.model().dense())):
        state = load_checkpoint(out / "checkpoint.pt")["learners"][name]
        model = LanguageModel(config).eval()  # jitter is for training alone
        model.load_state_dict(state["model"])
        told = numbers["models"][name]["validation_nats"]
        losses = []
        for batch in windows.split(4):  # capacity is counted a batch
            logits = model(batch[:, :-1]).logits
            losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
        assert torch.stack(losses).mean().item() == pytest.approx(told, rel=1e-5)
        assert f"{told:.4f}" in printed
        assert f"{told / math.log(2):.4f}" in printed
        assert numbers["models"][name]["tokens_per_second"] > 0
    assert f"{numbers['bigram_nats']:.4f}" in printed
    assert printed.count("\n1 and") == 2
    assert numbers["models"]["ppmoe"]["dropped_share"] > 0
    assert "of the slots dropped" in printed

    for name in ("losses.png", "expert_load.png"):
        pixels = image.imread(out / name)
        assert min(pixels.shape[:2]) > 250
        colours = {tuple(row) for row in pixels.reshape(-1, pixels.shape[-1])[::7].tolist()}
        assert len(colours) > 10, f"{name} shows nothing"


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments(data, tmp_path / "whole", "--jitter", "0.1")) == 0

    draw = trainer_module.random_windows
    calls = 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return draw(*args)

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "random_windows", interrupted)
        with pytest.raises(SystemExit, match=r"stopped after step 5\. --resume goes on"):
            main(arguments(data, tmp_path / "cut", "--jitter", "0.1"))
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] == 4
    assert main(["--resume", "--out", str(tmp_path / "cut")]) == 0

    numbers = []
    for folder in ("whole", "cut"):
        told = json.loads((tmp_path / folder / "numbers.json").read_text())["models"]["ppmoe"]
        told.pop("tokens_per_second")
        numbers.append(told)
    assert numbers[0] == numbers[1]
    states = [load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut")]
    parameters = [state["learners"]["ppmoe"]["model"] for state in states]
    for name, value in parameters[0].items():
        assert torch.equal(value, parameters[1][name]), name


def test_a_resumed_run_may_be_longer_but_not_another(data: str, tmp_path: Path) -> None:
    main(arguments(data, tmp_path))
    resume = ["--resume", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="--resume with seed = 5; expected 0, as the checkpoint"):
        main([*resume, "--seed", "5"])
    assert main([*resume, "--steps", "8", "--seed", "0"]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["steps"] == 8
    assert len(numbers["models"]["ppmoe"]["train_nats"]) == 8


def test_missing_packages_are_named_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in train_report.PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        main(["--data", str(tmp_path / "nowhere")])
    assert str(stopped.value) == (
        "train_lm: found no tqdm and no matplotlib; needed for the progress bar and the pictures. "
        "Way out: pip install ppmoe_ops[models]"
    )
    monkeypatch.delitem(sys.modules, "tqdm")
    with pytest.raises(ImportError, match="found no matplotlib; needed"):
        train_report.require_packages()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "data is 'nowhere'; expected a file or a folder"),
        (["--resume", "--out", "nowhere"], "--resume found no nowhere"),
        (["--steps", "0"], "steps is 0; allowed: 1 or more"),
        (["--prompt", ""], "prompt is empty"),
        (["--preset", "tiny", "--ranks", "3"], "ranks is 3; allowed: divisors of num_experts"),
        (["--preset", "tiny", "--top-k", "5"], "top_k is 5; allowed: 1 to 4"),
    ],
)
def test_bad_options_stop_in_one_line(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as stopped:
        main(options)
    assert "\n" not in str(stopped.value)


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--preset", "huge"])
    assert "invalid choice: 'huge'" in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole(preset: str) -> None:
    settings = Settings(preset=preset)
    assert settings.model().experts == PRESETS[preset]["experts"]
    assert all(settings.value(name) > 0 for name in ("batch", "lr", "context"))
    with torch.device("meta"):
        model = LanguageModel(settings.model())
    assert model.num_parameters() > 1.1 * model.num_active_parameters()


def test_reading_the_library_trains_too(tmp_path: Path) -> None:
    options = ["--preset", "tiny", "--steps", "2", "--windows", "4", "--sample", "0"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    # Python is far from uniform, and no pair says what comes next.
    assert 1.5 < numbers["bigram_nats"] < 4.0
