"""Train a small PSLT on images, or evaluate one: `python -m ppmoe_models.train_pslt --help`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppmoe_models.image_data import load_digits, load_image_folder
from ppmoe_models.pslt_evaluation import BEST, evaluate
from ppmoe_models.pslt_report import table, write_report
from ppmoe_models.pslt_settings import OF_EVALUATION, PSLTSettings, given_settings
from ppmoe_models.pslt_trainer import PSLTTrainer
from ppmoe_models.train_report import PACKAGES, require_packages
from ppmoe_models.trainer import save_checkpoint

PROGRAM = "train_pslt"
NEEDED_FOR = "the images, the progress bar and the pictures"
CHECKPOINT = "pslt.pt"
BAR = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"


def make_trainer(given: dict[str, Any]) -> PSLTTrainer:
    """A trainer for the digits, or for the images in the folder that is given.

    Raises:
        ImportError: a package is missing that the images or the report need.
        ValueError: a setting that is not allowed, or a folder that cannot be trained on.
    """
    settings = PSLTSettings(**given)
    require_packages(PROGRAM, (*PACKAGES, "PIL" if settings.data else "sklearn"), NEEDED_FOR)
    if settings.data is None:
        return PSLTTrainer(settings, load_digits())
    data = load_image_folder(settings.data, settings.sizes["stored"])
    if len(data.classes) < 2:
        raise ValueError(f"train_pslt: {settings.data} has one class; expected 2 or more")
    return PSLTTrainer(settings, data)


def train(trainer: PSLTTrainer) -> None:
    """Run all steps with a progress bar; the checkpoint is written after each validation."""
    path = Path(trainer.settings.out) / CHECKPOINT
    bar = importlib.import_module("tqdm").tqdm(
        total=trainer.steps, dynamic_ncols=True, bar_format=BAR
    )
    with bar:
        for step in trainer.run(lambda: save_checkpoint(trainer.checkpoint(), path)):
            shown: dict[str, Any] = {"step": f"{step}/{trainer.steps}"}
            for learner in trainer.learners:
                history = learner.history
                shown[learner.name] = f"{history.nats[-1]:.3f}"
                if history.validation:
                    errors = history.validation[-1][2]
                    shown[learner.name] += f" held out {1 - errors / trainer.held.numel():.2%}"
            bar.set_postfix(shown, refresh=False)
            bar.update(step - bar.n)


def run_training(trainer: PSLTTrainer) -> None:
    """Train to the end, and write and print what came of it."""
    settings = trainer.settings
    size, channels = settings.sizes["size"], trainer.data.images.size(1)
    print(
        f"images: {trainer.data.source}, {len(trainer.data.classes)} classes; "
        f"{trainer.train.numel():,} to train on, {trainer.held.numel():,} held out; "
        f"{size}x{size}, {channels} channels"
    )
    try:
        train(trainer)
    except KeyboardInterrupt:
        raise SystemExit(f"\ntrain_pslt: stopped after step {trainer.step}") from None
    paths = [Path(settings.out) / CHECKPOINT, *write_report(trainer, Path(settings.out))]
    print(table(trainer))
    spent = f"{trainer.elapsed:.0f} s ({trainer.cpu_seconds:.0f} s of all cores)"
    print(f"{trainer.step} steps in {spent}; written:", *paths, sep="\n  ")


def run_evaluation(given: dict[str, Any]) -> None:
    """Evaluate a checkpoint, and print how good it is.

    Raises:
        ImportError: a package is missing that the images or the pictures need.
        ValueError: a setting, checkpoint or folder that is not allowed.
    """
    require_packages(PROGRAM, (*PACKAGES, "PIL"), NEEDED_FOR)
    files = {name: given[name] for name in OF_EVALUATION}
    settings = PSLTSettings(**{name: given[name] for name in given if name not in files})
    out = Path(settings.out)
    told = evaluate(
        files["image_folder"], files["checkpoint"], out, batch=settings.batch,
        device=settings.device,
    )  # fmt: skip
    among = f"; {told[f'among_best_{BEST}']:.2%} among the best {BEST}"
    print(
        f"{told['data']}: {told['accuracy']:.2%}, {told['errors']} errors in {told['images']}"
        + (among if len(told["classes"]) > BEST else "")
    )
    print("written:", out / "evaluation.json", out / "confusion.png", sep="\n  ")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status comes back."""
    try:
        given = given_settings(argv)
        if "checkpoint" in given:
            run_evaluation(given)
            return 0
        trainer = make_trainer(given)
    except (ImportError, ValueError) as error:
        raise SystemExit(str(error)) from None
    run_training(trainer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
