"""Tune a frozen backbone with LION and otherwise: `python -m ppmoe_models.train_lion --help`."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppmoe_models.image_data import load_digits, load_image_folder
from ppmoe_models.lion_backbone import image_channels, image_side
from ppmoe_models.lion_report import NOTES, table, told_of_data, write_report
from ppmoe_models.lion_settings import SIZE_OF_FOLDERS, LIONSettings, given_settings
from ppmoe_models.lion_trainer import LIONTrainer, load_backbone
from ppmoe_models.train_report import PACKAGES, require_packages

PROGRAM = "train_lion"
NEEDED_FOR = "the images, the progress bar and the pictures"


def make_trainer(given: dict[str, Any]) -> LIONTrainer:
    """A trainer for the digits, or for the images in the folder that is given.

    Raises:
        ImportError: a package is missing that the images, the backbone or the report need.
        ValueError: a setting that is not allowed, or a folder that cannot be trained on.
    """
    settings = LIONSettings(**given)
    of_data = "PIL" if settings.data else "sklearn"
    of_backbone = () if settings.backbone is None else ("transformers",)
    require_packages(PROGRAM, (*PACKAGES, of_data, *of_backbone), NEEDED_FOR)
    backbone = None if settings.backbone is None else load_backbone(settings.backbone)
    if settings.data is None:
        return LIONTrainer(settings, load_digits(), backbone)
    own = SIZE_OF_FOLDERS if backbone is None else image_side(backbone)
    channels = 3 if backbone is None else image_channels(backbone)
    data = load_image_folder(settings.data, settings.size or own, channels)
    return LIONTrainer(settings, data, backbone)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status comes back."""
    started = time.perf_counter()
    try:
        trainer = make_trainer(given_settings(argv))
    except (ImportError, ValueError) as error:
        raise SystemExit(str(error)) from None
    settings = trainer.settings
    print(f"{trainer.data.source}: {told_of_data(trainer)}")
    bar = importlib.import_module("tqdm").tqdm(
        total=len(settings.chosen) * settings.seeds, unit=" models", dynamic_ncols=True
    )
    try:
        with bar:
            for done in trainer.run():
                accuracy = f"{1 - done.errors / trainer.held.numel():.2%}"
                bar.set_postfix({done.mode: accuracy}, refresh=False)
                bar.update()
    except KeyboardInterrupt:
        raise SystemExit(f"\ntrain_lion: stopped after {len(trainer.results)} models") from None
    except ValueError as error:  # a way of tuning that the backbone does not go with
        raise SystemExit(str(error)) from None
    paths = write_report(trainer, Path(settings.out))
    print(table(trainer), NOTES, sep="\n")
    print(f"{time.perf_counter() - started:.0f} s; written:", *paths, sep="\n  ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
