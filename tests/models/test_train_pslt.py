"""`python -m ppmoe_models.train_pslt` from end to end, on a few small images."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib import image
from pictures import stripes_folder, write_image
from torch import Tensor

import ppmoe_ops
import ppmoe_ops.bench as door
from ppmoe_models import PSLT, SmallPSLT, load_pslt_checkpoint, pslt_report, train_pslt
from ppmoe_models.image_data import ImageData, load_digits, load_image_folder, sample, split
from ppmoe_models.pslt_settings import PRESETS, PSLTSettings
from ppmoe_models.pslt_small import pslt_of_state
from ppmoe_models.pslt_trainer import PSLTTrainer
from ppmoe_models.train_pslt import CHECKPOINT, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return stripes_folder(tmp_path_factory.mktemp("stripes"), 8)


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    quick = ["--steps=4", "--batch=4", "--validations=2", "--warmup=2", "--drop-path=0.2"]
    return [*quick, "--data", str(folder), "--out", str(out), *more]


def numbers_of(out: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((out / "numbers.json").read_text())
    return told


def assert_shows_something(path: Path) -> None:
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 250
    colours = {tuple(row) for row in pixels.reshape(-1, pixels.shape[-1])[::7].tolist()}
    assert len(colours) > 10, f"{path.name} shows nothing"


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a training with its comparison leaves."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(arguments(folder, out, "--compare-unshifted")) == 0
    return out


def test_what_is_told_is_so(folder: Path, run: Path) -> None:
    told = numbers_of(run)
    assert (told["trained_on"], told["held_out"], told["steps"]) == (12, 4, 4)
    assert set(told["models"]) == {"pslt", "unshifted"}
    kept = torch.load(run / CHECKPOINT, weights_only=True)
    model = SmallPSLT(12, num_classes=2, depths=PRESETS["small"]["depths"]).eval()
    model.load_state_dict(kept["model"])
    data = load_image_folder(folder, 56)
    held = split(data.labels, 0.25)[1]
    x = sample(data.images[held], 56, kept["mean"], kept["std"])
    assert kept["size"] == kept["stored"] == 56
    with torch.no_grad():
        logits = model(x)
    assert isinstance(logits, Tensor)
    labels = data.labels[held]
    ours = told["models"]["pslt"]
    assert [step for step, *_ in ours["validation"]] == [2, 4]
    assert ours["validation"][-1][1] == pytest.approx(F.cross_entropy(logits, labels).item())
    right = logits.argmax(-1) == labels
    assert ours["accuracy"] == right.float().mean().item()
    assert ours["errors"] == ours["validation"][-1][2] == int((~right).sum())
    assert sum(map(sum, ours["confusion"])) == 4
    assert [ours["confusion"][i][i] for i in (0, 1)] == [
        int((right & (labels == i)).sum()) for i in (0, 1)
    ]
    assert ours["parameters"] == sum(each.numel() for each in model.parameters())
    assert len(ours["train_nats"]) == 4
    assert told["models"]["unshifted"]["train_nats"] != ours["train_nats"]
    for name in ("curves.png", "confusion.png", "windows.png"):
        assert_shows_something(run / name)


def test_a_run_gives_the_same_bits_alone_and_compared(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "16 images of " in printed
    assert "12 to train on, 4 held out; 56x56, 3 channels" in printed
    assert "unshifted" not in printed
    one, other = (numbers_of(each)["models"]["pslt"] for each in (run, tmp_path))
    for each in (one, other):
        each.pop("images_per_second")
    assert one == other
    states = [torch.load(each / CHECKPOINT, weights_only=True) for each in (run, tmp_path)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


def test_shifts_are_all_that_the_comparison_lacks() -> None:
    settings = PSLTSettings(compare_unshifted=True, batch=2)
    trainer = PSLTTrainer(settings, few_digits())
    one, other = (learner.model for learner in trainer.learners)
    shifts = [
        [branch.shift for branch in model.layers[0].blocks[0].blocks] for model in (one, other)
    ]
    assert shifts == [[0, 3, -3], [0, 0, 0]]
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def few_digits(count: int = 40) -> ImageData:
    digits = load_digits()
    return digits._replace(images=digits.images[:count], labels=digits.labels[:count])


def test_the_ladder_sees_maps_that_are_shifted() -> None:
    trainer = PSLTTrainer(PSLTSettings(), load_digits())
    assert trainer.train.numel() + trainer.held.numel() == 1797
    assert trainer.steps == 20 * (1347 // 32)
    model = trainer.learners[0].model
    _, x = pslt_report.ladder_inputs(model, trainer.normalised(trainer.held[:2]))
    assert x.shape == (2, 14, 14, 96)


def test_it_learns(tmp_path: Path) -> None:
    torch.manual_seed(2)
    data = load_image_folder(stripes_folder(tmp_path, 24), 56)
    settings = PSLTSettings(steps=10, batch=12, validations=1, warmup=2, drop_path=0.0, turn=5.0)
    trainer = PSLTTrainer(settings, data)
    for module in trainer.learners[0].model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5  # ten steps are few for running statistics
    assert list(trainer.run()) == list(range(1, 11))
    history = trainer.learners[0].history
    assert history.nats[-1] < 0.5 * history.nats[0]
    assert history.validation[-1][2] == 0


def test_epochs_show_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = PSLTTrainer(PSLTSettings(epochs=2, batch=8, validations=1), few_digits(60))
    learner = trainer.learners[0]
    labels: list[int] = []
    monkeypatch.setattr(learner, "train", lambda _, given, __: labels.extend(given.tolist()))
    assert len(list(trainer.run())) == trainer.steps == 2 * (trainer.train.numel() // 8)
    count = torch.tensor(labels).bincount(minlength=10)
    # All but what is left over at the end of an epoch.
    most = 2 * trainer.data.labels[trainer.train].bincount(minlength=10)
    assert int((most - count).min()) >= 0
    assert int((most - count).sum()) == 2 * (trainer.train.numel() % 8)


def test_evaluation_of_a_checkpoint(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = split(load_image_folder(folder, 8).labels, 0.25)[1].tolist()
    for place in held:
        name = ("across", "up")[place // 8]
        target = tmp_path / "held" / name / f"{place}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / name / f"{place % 8:03}.png").read_bytes())
    given = ["--image-folder", str(tmp_path / "held"), "--checkpoint", str(run / CHECKPOINT)]
    assert main([*given, "--out", str(tmp_path / "out"), "--batch", "3"]) == 0
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    trained = numbers_of(run)["models"]["pslt"]
    for name in ("accuracy", "errors", "by_class", "confusion"):
        assert told[name] == trained[name], name
    assert f"4 images of held: {told['accuracy']:.2%}" in capsys.readouterr().out.replace("/", "")
    assert_shows_something(tmp_path / "out" / "confusion.png")

    # Some of the classes are enough, strange ones are not.
    (tmp_path / "held" / "across").rename(tmp_path / "across")
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "held" / "up").rename(tmp_path / "held" / "down")
    with pytest.raises(SystemExit, match="has classes down; expected some of across, up"):
        main([*given, "--out", str(tmp_path / "out")])


def test_evaluation_of_a_checkpoint_with_the_authors_names(tmp_path: Path) -> None:
    door.benchmarks()
    plain = sys.modules["importlib"].import_module("ppmoe_ops.benchmarks.plain_pslt")
    model = plain.PlainPSLT(dim=12, depths=(1, 1), num_classes=6).eval()
    torch.nn.init.normal_(model.head.weight, std=10.0)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    assert any("attn_mask" in name for name in state)
    state["module.norm.total_ops"] = torch.zeros(1)
    torch.save({"model": state, "args": Namespace(lr=0.1), "epoch": 3}, tmp_path / "theirs.pth")
    ramp = torch.linspace(0, 1, 280)
    for i in range(6):
        pixels = (ramp + i / 6).expand(3, 300, 280) * torch.tensor([1, 0.5, i / 6]).view(3, 1, 1)
        write_image(tmp_path / "images" / f"{i}" / "a.png", (pixels * 127).to(torch.uint8))
    evaluated = train_pslt.evaluate(
        tmp_path / "images", tmp_path / "theirs.pth", tmp_path / "out", batch=4
    )
    x = load_image_folder(tmp_path / "images", 224, short_side=256).images / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = model((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    found = logits.argmax(-1)
    expected = torch.zeros(6, 6, dtype=torch.long)
    for true, one in enumerate(found.tolist()):
        expected[true, one] += 1
    assert evaluated["confusion"] == expected.tolist()
    best = logits.topk(5).indices == torch.arange(6).view(6, 1)
    assert evaluated["among_best_5"] == pytest.approx(best.any(1).float().mean().item())


@pytest.mark.parametrize("kind", [PSLT, SmallPSLT])
def test_sizes_are_read_from_a_state_dict(kind: Any) -> None:
    model = kind(24, num_classes=7, in_chans=1, depths=(2, 1), heads=(2, 4))
    other = pslt_of_state({**model.state_dict(), "note": torch.zeros(1)})
    assert type(other) is kind
    load_pslt_checkpoint(other, model.state_dict())


def test_a_small_model_fused_gives_the_same() -> None:
    model = SmallPSLT(12, num_classes=3, in_chans=1, depths=(1, 1))
    x = torch.randn(4, 1, 56, 56)
    model(x)  # moves the running statistics
    model.eval()
    fused = model.fuse_for_inference()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="fused for inference already"):
        fused.fuse_for_inference()


@pytest.mark.parametrize("at", [(7, 7), (2, 12)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_attention_that_is_drawn_is_that_of_the_model(place: int, at: tuple[int, int]) -> None:
    model = SmallPSLT(12, depths=(1, 1))
    branch: Any = model.layers[0].blocks[0].blocks[place]  # type: ignore[index, union-attr]
    torch.nn.init.normal_(branch.attn.relative_position_bias_table)
    x = torch.randn(14, 14, 32)
    weights = pslt_report.attention_from(branch, x, at)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    parts = branch.attn.into(branch.norm1(x)[None]).split(32, -1)
    value = torch.randn(1, 14, 14, 8)
    with torch.no_grad():
        out = ppmoe_ops.window_attention(
            parts[0], parts[1], value.repeat(1, 1, 1, 4),
            branch.attn.relative_position_bias_table, 4, 7, branch.shift,
        )  # fmt: skip
    expected = out[0, at[0], at[1]].view(4, 8).mean(0)
    torch.testing.assert_close((weights[..., None] * value[0]).sum((0, 1)), expected)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("tqdm", "sklearn", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path)])
    assert str(stopped.value) == (
        "train_pslt: found no tqdm and no sklearn; needed for the images, the progress bar and "
        "the pictures. Way out: pip install ppmoe_ops[models]"
    )
    with pytest.raises(SystemExit, match="found no tqdm and no PIL; needed"):
        main(["--data", str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "folder is 'nowhere'; expected a folder"),
        (["--steps", "0"], "steps is 0; allowed: 1 or more"),
        (["--zoom", "1"], "zoom is 1.0; allowed: below 1"),
        (["--turn", "-1"], "turn is -1.0; allowed: 0 or more"),
        (["--held-out", "0"], "held_out is 0.0; allowed: above 0"),
        (["--checkpoint", "a.pt"], "--checkpoint alone; expected --image-folder and --checkpoint"),
        (["--image-folder", "a"], "--image-folder alone; expected"),
        (
            ["--image-folder", "a", "--checkpoint", "b", "--epochs", "3"],
            "an evaluation with --epochs; allowed: --image-folder, --checkpoint, --out, --batch",
        ),
        (["--image-folder", "a", "--checkpoint", "b"], "checkpoint is 'b'; expected a file"),
    ],
)
def test_bad_options_stop_in_one_line(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as stopped:
        main(options)
    assert "\n" not in str(stopped.value)


def test_folders_and_checkpoints_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    def stopped(checkpoint: Any, *more: str) -> str:
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        path = str(tmp_path / "checkpoint.pt")
        with pytest.raises(SystemExit) as found:
            main(["--image-folder", str(folder), "--checkpoint", path, "--out", str(tmp_path)])
        return str(found.value)

    assert "holds a list; expected a dict" in stopped([1])
    assert "the checkpoint has no patch_embed.proj.0.weight, head.weight" in stopped({"a": {}})
    state = SmallPSLT(12, num_classes=3, depths=(1, 1)).state_dict()
    assert "has 2 classes; expected 3, those of the checkpoint" in stopped({"model": state})
    del state["layers.0.downsample.norm.bias"]
    assert "missing: layers.0.downsample.norm.bias" in stopped(state)
    (tmp_path / "checkpoint.pt").write_bytes(b"something else")
    given = ["--image-folder", str(folder), "--checkpoint", str(tmp_path / "checkpoint.pt")]
    with pytest.raises(SystemExit, match=r"checkpoint.pt is no checkpoint \("):
        main(given)
    write_image(tmp_path / "one" / "only" / "a.png", torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(SystemExit, match="one has one class; expected 2 or more"):
        main(["--data", str(tmp_path / "one")])


def test_stopping_says_where(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PSLTTrainer, "validate", interrupted)
    with pytest.raises(SystemExit, match="stopped after step 2"):
        main(arguments(folder, tmp_path))


def test_bfloat16_trains_too(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path, "--dtype=bfloat16", "--steps=1", "--mirror")) == 0
    told = numbers_of(tmp_path)["models"]["pslt"]
    assert 0.5 < told["train_nats"][0] < 1.0


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--preset", "huge"])
    assert "invalid choice: 'huge'" in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole(preset: str) -> None:
    settings = PSLTSettings(preset=preset)
    with torch.device("meta"):
        model = settings.model(1000, 3)
    counts = {"tiny": 4298988, "base": 9257302, "large": 16099312}
    assert sum(each.numel() for each in model.parameters()) == counts.get(preset, 513_102)
