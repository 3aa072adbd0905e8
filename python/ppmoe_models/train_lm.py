"""Train a small language model with expert layers: `python -m ppmoe_models.train_lm --help`."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppmoe_models.settings import Settings, given_settings
from ppmoe_models.text_data import bits, load_text
from ppmoe_models.train_report import require_packages, table, write_report
from ppmoe_models.trainer import Learner, Trainer, load_checkpoint, save_checkpoint

CHECKPOINT = "checkpoint.pt"
# What a resumed run may be told anew; the rest is as the checkpoint has it.
MAY_CHANGE = ("out", "steps", "minutes", "sample", "prompt", "device")


def make_trainer(given: dict[str, Any], resume: bool) -> Trainer:
    """A trainer from the settings that were given, new or from the checkpoint in `out`.

    Raises:
        ValueError: a setting that is not allowed, or not that of the checkpoint.
    """
    if not resume:
        settings = Settings(**given)
        return Trainer(settings, load_text(settings.data))
    state = load_checkpoint(Path(given.get("out", Settings().out)) / CHECKPOINT)
    for name, value in given.items():
        if name not in MAY_CHANGE and value != state["settings"][name]:
            raise ValueError(
                f"train_lm: --resume with {name} = {value}; expected {state['settings'][name]}, "
                "as the checkpoint has it"
            )
    changed = {name: value for name, value in given.items() if name in MAY_CHANGE}
    if "minutes" in given and "steps" not in given:
        changed["steps"] = None
    settings = Settings(**{**state["settings"], **changed})
    trainer = Trainer(settings, load_text(settings.data))
    trainer.restore(state)
    return trainer


def train(trainer: Trainer) -> None:
    """Run all steps with a progress bar; the checkpoint is written after each validation."""
    path = Path(trainer.settings.out) / CHECKPOINT
    bar = importlib.import_module("tqdm").tqdm(
        total=1.0,
        initial=trainer.progress,
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}",
    )
    with bar:
        for progress in trainer.run(lambda: save_checkpoint(trainer.state(), path)):
            shown: dict[str, Any] = {"step": trainer.step}
            for learner in trainer.learners:
                history = learner.history
                shown[learner.name] = (
                    f"{history.nats[-1]:.3f} val {history.validation[-1][1]:.3f} "
                    f"{history.tokens_per_second:,.0f} tok/s"
                )
            bar.set_postfix(shown, refresh=False)
            bar.update(progress - bar.n)


def sample_text(learner: Learner, prompt: str, length: int, seed: int) -> str:
    """What the model makes of a prompt, `length` more bytes."""
    ids = torch.tensor([list(prompt.encode())], device=learner.device)
    generator = torch.Generator(learner.device).manual_seed(seed)
    made = learner.model.generate(ids, length, temperature=0.8, generator=generator)
    return bytes(made[0].tolist()).decode(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status comes back."""
    given, resume = given_settings(argv)
    try:
        require_packages()
        trainer = make_trainer(given, resume)
    except (ImportError, ValueError) as error:
        raise SystemExit(str(error)) from None
    settings, text = trainer.settings, trainer.text
    print(
        f"text: {text.source}, {text.train.numel():,} bytes to train on, "
        f"{trainer.windows[:, 1:].numel():,} of {text.validation.numel():,} to validate with\n"
        f"bigram: {trainer.bigram:.4f} nats, {bits(trainer.bigram):.4f} bits a byte"
    )
    for learner in trainer.learners:
        config = dataclasses.asdict(learner.model.config)
        print(f"{learner.name}: {', '.join(f'{key} {value}' for key, value in config.items())}")
    try:
        train(trainer)
    except KeyboardInterrupt:
        raise SystemExit(
            f"\ntrain_lm: stopped after step {trainer.step}. --resume goes on from the last "
            f"checkpoint in {settings.out}, if there is one"
        ) from None
    paths = write_report(trainer, Path(settings.out))
    print(table(trainer))
    for learner in trainer.learners:
        history = learner.history
        if history.slots:
            print(f"{learner.name}: {history.dropped / history.slots:.2%} of the slots dropped")
        if settings.sample:
            text_made = sample_text(learner, settings.prompt, settings.sample, settings.seed)
            print(f"--- sample of {learner.name}\n{text_made}")
    print("---")
    print(f"{trainer.step} steps in {trainer.elapsed:.0f} s; written:", *paths, sep="\n  ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
