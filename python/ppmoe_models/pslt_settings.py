"""The settings of `python -m ppmoe_models.train_pslt`, and its command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from ppmoe_models.pslt import PSLT
from ppmoe_models.pslt_small import SmallPSLT
from ppmoe_models.settings import DTYPES, add_options, option

# Sizes of the model, and those of the images: `stored` is what is kept, `size` what the model gets.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"dim": 12, "depths": (2, 1), "size": 56, "stored": 56},
    "tiny": {"dim": 24, "depths": (10, 3), "size": 224, "stored": 224},
    "base": {"dim": 36, "depths": (10, 3), "size": 224, "stored": 224},
    "large": {"dim": 48, "depths": (10, 3), "size": 224, "stored": 224},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PSLTSettings:
    """What `python -m ppmoe_models.train_pslt` can be told for a training.

    Example:
        >>> PSLTSettings(preset="small").sizes["size"]
        56
    """

    preset: str = option("small", "sizes of the model and its images", choices=tuple(PRESETS))
    data: str | None = option(None, "a folder with a sub-folder a class (scikit-learn's digits)")
    out: str = option("runs/pslt", "folder for pictures, numbers and the checkpoint")
    epochs: int = option(20, "times that every image is seen", int)
    steps: int | None = option(None, "steps to train for, instead of epochs", int)
    held_out: float = option(0.25, "share of each class that is not trained on", float)
    seed: int = option(0, "of parameters, batches and what is drawn for images", int)
    compare_unshifted: bool = option(
        False, "also train the same model without shifted windows, on the same batches", bool
    )
    dtype: str = option("float32", "of the products; parameters are float32", choices=DTYPES)
    device: str = option("cpu", "where to train")
    batch: int = option(32, "images a step", int)
    lr: float = option(0.002, "highest learning rate", float)
    warmup: int = option(40, "steps until the learning rate is reached", int)
    weight_decay: float = option(0.05, "of matrices", float)
    clip: float = option(1.0, "largest norm of a step's gradient", float)
    label_smoothing: float = option(0.1, "probability that is spread over all classes", float)
    drop_path: float = option(0.05, "stochastic depth at the last block", float)
    move: float = option(0.1, "share of a side that an image is moved by at most", float)
    turn: float = option(12.0, "degrees that an image is turned by at most", float)
    zoom: float = option(0.1, "share that an image is made larger or smaller by at most", float)
    mirror: bool = option(False, "show half of the images mirrored", bool)
    validations: int = option(8, "times to measure the accuracy and save", int)

    def __post_init__(self) -> None:
        counted = ("epochs", "steps", "batch", "warmup", "validations")
        measured = ("label_smoothing", "drop_path", "move", "turn", "zoom")
        for least, names in ((1, counted), (0, measured)):
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= least:
                    raise ValueError(f"train_pslt: {name} is {value}; allowed: {least} or more")
        for name in ("held_out", "label_smoothing", "drop_path", "zoom"):
            if not getattr(self, name) < 1:
                raise ValueError(f"train_pslt: {name} is {getattr(self, name)}; allowed: below 1")
        if not self.held_out > 0:
            raise ValueError(f"train_pslt: held_out is {self.held_out}; allowed: above 0")

    @property
    def sizes(self) -> dict[str, Any]:
        """Of the preset: dim, depths, size, stored."""
        return PRESETS[self.preset]

    def model(self, num_classes: int, in_chans: int, *, shifts: bool = True) -> PSLT:
        """The model of the preset, for so many classes and channels of an image."""
        kind = SmallPSLT if self.preset == "small" else PSLT
        return kind(
            self.sizes["dim"], depths=self.sizes["depths"], num_classes=num_classes,
            in_chans=in_chans, drop_path_rate=self.drop_path, shifts=shifts,
        )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line: an option a setting, and what asks for an evaluation instead."""
    made = argparse.ArgumentParser(
        prog="python -m ppmoe_models.train_pslt",
        description="Train a small PSLT on images, hand-written digits if none are given, and "
        "measure it on those held out; or evaluate a checkpoint.",
        argument_default=argparse.SUPPRESS,
    )
    add_options(made, PSLTSettings)
    evaluation = made.add_argument_group(
        "evaluation", "both: nothing is trained; --out, --batch and --device are heeded"
    )
    evaluation.add_argument("--image-folder", help="a folder with a sub-folder a class")
    evaluation.add_argument(
        "--checkpoint", help="a file of this program, or a PSLT with its authors' names"
    )
    return made


OF_EVALUATION = ("image_folder", "checkpoint")
HEEDED = (*OF_EVALUATION, "out", "batch", "device")


def given_settings(argv: Sequence[str] | None) -> dict[str, Any]:
    """The settings that a command line names; for an evaluation those that it needs.

    Raises:
        ValueError: half an evaluation is asked for, or one with settings of a training.

    Example:
        >>> given_settings(["--batch", "8"])
        {'batch': 8}
    """
    given = vars(parser().parse_args(argv))
    named = [name for name in OF_EVALUATION if name in given]
    if len(named) == 1:
        raise ValueError(
            f"train_pslt: --{named[0].replace('_', '-')} alone; expected --image-folder and "
            "--checkpoint together"
        )
    unheeded = [name for name in given if named and name not in HEEDED]
    if unheeded:
        raise ValueError(
            f"train_pslt: an evaluation with --{unheeded[0].replace('_', '-')}; allowed: "
            + ", ".join("--" + name.replace("_", "-") for name in HEEDED)
        )
    return given
