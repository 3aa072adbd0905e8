"""The settings of `python -m ppmoe_models.train_lion`, and its command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from ppmoe_models.prompt_modes import MODES
from ppmoe_models.settings import add_options, option

# Highest learning rates, each the best of two to four (in steps of 2 or 2.5) on a third of the
# digits' training images, held out from the rest; no image of the reported accuracy was seen.
LEARNING_RATES = {
    "linear": 0.1, "full": 0.002, "bias": 0.05, "adapter": 0.05, "vpt_shallow": 0.05,
    "vpt_deep": 0.05, "lion": 0.05, "lion_image": 0.02,
}  # fmt: skip
SIZE_OF_FOLDERS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class LIONSettings:
    """What `python -m ppmoe_models.train_lion` can be told.

    Example:
        >>> LIONSettings(modes="linear, lion").chosen
        ('linear', 'lion')
    """

    data: str | None = option(None, "a folder with a sub-folder a class (scikit-learn's digits)")
    backbone: str | None = option(
        None, "a folder of a transformers model to tune on all classes (pre-train a small one)"
    )
    out: str = option("runs/lion", "folder for the table, the numbers, the picture, the model")
    modes: str = option(",".join(MODES), "ways of tuning, with commas between")
    seeds: int = option(5, "times that each is tuned, from other initial values", int)
    shots: int | None = option(None, "training images of each class (all)", int)
    long_tail: float | None = option(
        None, "times that the first class has more training images than the last", float
    )
    pretrain_classes: int | None = option(None, "classes to pre-train on (the first half)", int)
    pretrain_epochs: int = option(40, "times that the pre-training sees each of its images", int)
    epochs: int = option(
        20, "times that tuning sees each image; with fewer images as many steps", int
    )
    steps: int | None = option(None, "steps to tune for, instead of epochs", int)
    batch: int = option(64, "images a step", int)
    lr: float | None = option(None, "highest learning rate of every mode (each has its own)", float)
    weight_decay: float = option(0.0001, "of matrices, AdamW's", float)
    move: float = option(0.1, "share of a side that an image is moved by at most", float)
    turn: float = option(12.0, "degrees that an image is turned by at most", float)
    zoom: float = option(0.1, "share that an image is made larger or smaller by at most", float)
    held_out: float = option(0.25, "share of each class that is not trained on", float)
    size: int | None = option(None, "pixels a side (digits 8, folders 32, or the backbone's)", int)
    device: str = option("cpu", "where to train")
    tokens: int = option(20, "VPT's prompts", int)
    adapter_width: int = option(8, "of adapters", int)
    input_prompt: str = option(
        "pixels", "LION's first layer", choices=("pixels", "patches", "none")
    )
    input_width: int = option(8, "of its bottleneck", int)
    representation_prompt: str = option(
        "feature", "what the second layer of the mode lion is computed from",
        choices=("feature", "image", "none"),
    )  # fmt: skip
    representation_width: int = option(16, "of its bottleneck", int)
    keep: float = option(0.5, "share of LION's scored weights that pruning keeps; 1: no pruning",
                         float)  # fmt: skip
    decay: float = option(0.02, "of LION's weights that are not crucial", float)
    prune_at: float = option(0.75, "share of the steps after which small ones are cut", float)

    def __post_init__(self) -> None:
        counted = ("seeds", "shots", "epochs", "steps", "batch", "size", "tokens", "adapter_width",
                   "input_width", "representation_width", "long_tail",
                   "pretrain_epochs")  # fmt: skip
        for name in counted:
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"train_lion: {name} is {value}; allowed: 1 or more")
        for name in ("lr", "held_out", "keep", "prune_at"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"train_lion: {name} is {value}; allowed: above 0")
        for name in ("keep", "prune_at", "held_out"):
            if not getattr(self, name) <= 1:
                raise ValueError(f"train_lion: {name} is {getattr(self, name)}; allowed: up to 1")
        for name in ("decay", "weight_decay", "move", "turn", "zoom"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train_lion: {name} is {getattr(self, name)}; allowed: 0 or more")
        if self.shots is not None and self.long_tail is not None:
            raise ValueError("train_lion: shots and long_tail are given; expected one of them")
        strange = [mode for mode in self.chosen if mode not in MODES]
        if strange:
            raise ValueError(f"train_lion: modes has '{strange[0]}'; allowed: {', '.join(MODES)}")
        if len(set(self.chosen)) < len(self.chosen):
            raise ValueError(f"train_lion: modes is '{self.modes}'; allowed: each mode once")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The modes, one by one."""
        return tuple(part.strip() for part in self.modes.split(","))

    def rate(self, mode: str) -> float:
        """The highest learning rate of a mode."""
        return LEARNING_RATES[mode] if self.lr is None else self.lr

    def options(self, mode: str) -> dict[str, Any]:
        """What `prompt_modes.build` gets for a mode."""
        if mode.startswith("lion"):
            second = "image" if mode == "lion_image" else self.representation_prompt
            return {
                "input_prompt": None if self.input_prompt == "none" else self.input_prompt,
                "input_width": self.input_width,
                "representation_prompt": None if second == "none" else second,
                "representation_width": self.representation_width,
                "warn": False,
            }
        if mode == "adapter":
            return {"width": self.adapter_width}
        return {"tokens": self.tokens} if mode.startswith("vpt") else {}


def parser() -> argparse.ArgumentParser:
    """The command line: an option a setting."""
    made = argparse.ArgumentParser(
        prog="python -m ppmoe_models.train_lion",
        description="Pre-train a small backbone on half of the classes of some images "
        "(hand-written digits if none are given), freeze it, and tune LION and other ways of "
        "tuning on the other classes; print and save one table.",
        argument_default=argparse.SUPPRESS,
    )
    add_options(made, LIONSettings)
    return made


def given_settings(argv: Sequence[str] | None) -> dict[str, Any]:
    """The settings that a command line names.

    Example:
        >>> given_settings(["--modes", "linear,lion", "--shots", "4"])
        {'modes': 'linear,lion', 'shots': 4}
    """
    return vars(parser().parse_args(argv))
