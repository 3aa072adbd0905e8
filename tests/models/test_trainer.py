"""The training loop: exact resuming, equal batches, and a budget of minutes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppmoe_models import LanguageModel
from ppmoe_models import trainer as trainer_module
from ppmoe_models.settings import Settings
from ppmoe_models.text_data import TextData, load_text, random_windows
from ppmoe_models.trainer import Trainer, learning_rate, load_checkpoint, save_checkpoint

QUICK: dict[str, Any] = {"preset": "tiny", "steps": 7, "validations": 3, "windows": 8, "warmup": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(1000)))
    return load_text(str(path))


def tensors(value: Any, name: str = "") -> dict[str, Any]:
    """All leaves of a nested state, but times."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        leaves: dict[str, Any] = {}
        for key, each in items:
            if key not in ("seconds", "elapsed"):
                leaves |= tensors(each, f"{name}.{key}")
        return leaves
    return {name: value}


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = (
            torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
        )
        assert same, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"jitter": 0.2, "compare_dense": True, "capacity_factor": 1.0, "ranks": 2},
        {"dtype": "bfloat16", "shared_experts": 1},
    ],
)
def test_resumed_training_equals_the_uninterrupted_one(
    tmp_path: Path, text: TextData, options: dict[str, Any]
) -> None:
    settings = Settings(**{**QUICK, **options})
    whole = Trainer(settings, text)
    assert list(whole.run()) == [step / 7 for step in range(1, 8)]

    cut = Trainer(settings, text)
    for _ in cut.run():
        if cut.step == 4:
            save_checkpoint(cut.state(), tmp_path / "checkpoint.pt")
            break
    torch.rand(3)  # whatever else draws numbers in between
    resumed = Trainer(settings, text)
    resumed.restore(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert len(list(resumed.run())) == 3
    assert_same_state(whole.state(), resumed.state())
    assert len(resumed.learners[0].history.nats) == 7
    assert resumed.learners[0].history.tokens == whole.learners[0].history.tokens


def test_both_models_see_the_same_batches(text: TextData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {"ppmoe": [], "dense": []}
    train = trainer_module.Learner.train

    def spy(self: trainer_module.Learner, windows: Tensor, rate: float) -> None:
        seen[self.name].append(windows.clone())
        train(self, windows, rate)

    monkeypatch.setattr(trainer_module.Learner, "train", spy)
    list(Trainer(Settings(**QUICK, compare_dense=True), text).run())
    assert torch.equal(torch.stack(seen["ppmoe"]), torch.stack(seen["dense"]))
    assert not torch.equal(seen["ppmoe"][0], seen["ppmoe"][1])


def test_the_comparison_does_not_change_the_model(text: TextData) -> None:
    alone = Trainer(Settings(**QUICK), text)
    compared = Trainer(Settings(**QUICK, compare_dense=True), text)
    list(alone.run())
    list(compared.run())
    assert_same_state(alone.learners[0].state(), compared.learners[0].state())


def test_history_counts_every_slot(text: TextData) -> None:
    trainer = Trainer(Settings(**QUICK, capacity_factor=0.5), text)
    list(trainer.run())
    history = trainer.learners[0].history
    # 4 sequences of 32 bytes, 2 choices, 1 layer with experts.
    assert history.slots == 7 * 4 * 32 * 2
    assert sum(sum(loads[0]) for _, loads in history.loads) == history.slots
    assert history.slots / 2 <= history.dropped < history.slots
    assert [step for step, _ in history.validation] == [0, 3, 5, 7]
    assert history.tokens == 7 * 4 * 32
    assert all(balance >= 0.9 for balance in history.balance)


def test_training_beats_the_bigram_model_where_pairs_say_little(tmp_path: Path) -> None:
    path = tmp_path / "rhyme.txt"
    lines = ("one, two, three, four,\n", "four, three, two, one;\n", "two, four, one, three:\n")
    draw = torch.randint(3, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("".join(lines[i] for i in draw))
    settings = Settings(preset="tiny", steps=150, windows=16, lr=0.01, warmup=10)
    trainer = Trainer(settings, load_text(str(path)))
    list(trainer.run())
    assert trainer.learners[0].history.validation[-1][1] < 0.5 * trainer.bigram


@pytest.mark.parametrize("slower", [1.0, 1.2])
def test_minutes_are_kept_on_machines_of_any_speed(
    text: TextData, monkeypatch: pytest.MonkeyPatch, slower: float
) -> None:
    now, wait = 0.0, 0.01

    def look() -> float:  # a clock that each look sets forward, by more and more
        nonlocal now, wait
        wait *= slower
        now += wait
        return now

    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=look))
    settings = Settings(**{**QUICK, "steps": None, "minutes": 0.05, "validations": 4})
    trainer = Trainer(settings, text)
    progress = list(trainer.run())
    history = trainer.learners[0].history
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    assert history.validation[-1][0] == trainer.step
    assert 0.94 * 60 * 0.05 < trainer.elapsed < 60 * 0.05 * slower**4
    if slower == 1:
        assert len(history.validation) == 5
        assert trainer.step > 50


def test_minutes_go_on_where_they_stopped(text: TextData) -> None:
    settings = Settings(**{**QUICK, "steps": None, "minutes": 10.0})
    trainer = Trainer(settings, text)
    next(iter(trainer.run()))
    state = trainer.state()
    state["elapsed"] = 7 * 60.0
    other = Trainer(settings, text)
    other.restore(state)
    next(iter(other.run()))
    assert other.step == 2
    assert 7 / 9.5 < other.progress < 8 / 9.5


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, step / 200, 15) for step in range(200)]
    assert rates[0] == pytest.approx(1 / 15)
    assert max(rates) == rates[14] == pytest.approx(1, abs=0.02)
    assert rates[14:] == sorted(rates[14:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.001)
    # Few steps, or slow ones: the rise ends with the first tenth.
    assert learning_rate(0, 0.05, 40) == pytest.approx(0.5, abs=0.01)
    assert learning_rate(1, 0.1, 40) > 0.95


def test_validation_is_without_jitter(text: TextData) -> None:
    trainer = Trainer(Settings(**QUICK, jitter=0.9), text)
    learner = trainer.learners[0]
    list(trainer.run())
    learner.validate(7, trainer.windows)
    assert learner.history.validation[-1] == learner.history.validation[-2]


def test_steps_are_of_adamw_on_clipped_gradients(text: TextData) -> None:
    settings = Settings(**{**QUICK, "steps": 3}, clip=0.05, balance_weight=0.5, weight_decay=0.3)
    trainer = Trainer(settings, text)
    list(trainer.run())

    torch.manual_seed(settings.seed)
    model = LanguageModel(settings.model())
    named = dict(model.named_parameters())
    decays = [each for key, each in named.items() if "norm" not in key and "embedding" not in key]
    others = [each for key, each in named.items() if "norm" in key or "embedding" in key]
    groups = [{"params": decays, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(3):
        windows = random_windows(text.train, 4, 33, generator)
        out = model(windows[:, :-1])
        nats = F.cross_entropy(out.logits.transpose(1, 2), windows[:, 1:])
        grads = torch.autograd.grad(nats + out.router_loss, list(named.values()))
        norm = sum(grad.square().sum() for grad in grads) ** 0.5
        assert norm > 0.05
        for parameter, grad in zip(named.values(), grads, strict=True):
            parameter.grad = grad * 0.05 / norm
        for group in optimizer.param_groups:
            group["lr"] = 0.003 * learning_rate(step, step / 3, 2)
        optimizer.step()
    trained = dict(trainer.learners[0].model.named_parameters())
    for key, value in named.items():
        torch.testing.assert_close(trained[key], value, atol=2e-5, rtol=1e-4, msg=key)


def test_only_matrices_decay(text: TextData) -> None:
    learner = Trainer(Settings(**QUICK), text).learners[0]
    decay, free = (group["params"] for group in learner.optimizer.param_groups)
    names = {id(each): name for name, each in learner.model.named_parameters()}
    assert {names[id(each)].split(".")[-1] for each in free} == {"weight"}
    assert all("norm" in names[id(each)] or "embedding" in names[id(each)] for each in free)
    assert len(decay) + len(free) == len(names)
    assert "blocks.1.ffn.w_in" in {names[id(each)] for each in decay}


def test_other_text_cannot_be_resumed_with(text: TextData) -> None:
    trainer = Trainer(Settings(**QUICK), text)
    state = trainer.state()
    other = Trainer(Settings(**QUICK), text._replace(fingerprint="1:0-1:0"))
    with pytest.raises(ValueError, match="the text is 1:0-1:0; expected that of the checkpoint"):
        other.restore(state)


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "checkpoint.pt"
    save_checkpoint({"step": 1}, path)

    def fail(state: Any, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint({"step": 2}, path)
    assert load_checkpoint(path) == {"step": 1}
    with pytest.raises(ValueError, match=r"found no .*none\.pt"):
        load_checkpoint(tmp_path / "none.pt")
