"""The settings of a training run: one dataclass, its command line, and the presets.

`option` and `add_options` make the command line of other settings too.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from ppmoe_models.language_model import LanguageModelConfig

# Model sizes, and the batch and learning rate that go with them.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "hidden": 32, "heads": 2, "width": 32, "experts": 4, "context": 32,
             "batch": 4, "lr": 0.003},
    "small": {"layers": 4, "hidden": 128, "heads": 4, "width": 128, "experts": 8, "context": 128,
              "batch": 16, "lr": 0.003},
    "medium": {"layers": 8, "hidden": 256, "heads": 8, "width": 256, "experts": 16,
               "context": 256, "batch": 16, "lr": 0.0015},
    "large": {"layers": 12, "hidden": 512, "heads": 8, "width": 512, "experts": 32,
              "context": 512, "batch": 16, "lr": 0.0008},
}  # fmt: skip
DTYPES = ("float32", "bfloat16")


def option(default: Any, text: str, kind: type = str, **others: Any) -> Any:
    """A field of settings: its default, its help, the type that its text is read as, `choices`."""
    return dataclasses.field(default=default, metadata={"help": text, "type": kind, **others})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What `python -m ppmoe_models.train_lm` can be told; None takes the preset's value.

    Example:
        >>> Settings(preset="tiny", experts=2).model().experts
        2
    """

    preset: str = option("small", "sizes of the model", choices=tuple(PRESETS))
    data: str | None = option(None, "a file or folder of text (the Python standard library)")
    out: str = option("runs/ppmoe_lm", "folder for pictures, numbers and the checkpoint")
    minutes: float = option(4.0, "time to train for, if steps are not given", float)
    steps: int | None = option(None, "steps to train for", int)
    seed: int = option(0, "of parameters, batches and the sample", int)
    compare_dense: bool = option(
        False, "also train the dense backbone of equal active parameters, step by step", bool
    )
    dtype: str = option("float32", "of the products; parameters are float32", choices=DTYPES)
    device: str = option("cpu", "where to train")
    experts: int | None = option(None, "experts a layer", int)
    top_k: int = option(2, "experts a token", int)
    shared_experts: int = option(0, "experts that every token passes", int)
    ranks: int = option(1, "tensor-parallel ranks to simulate", int)
    capacity_factor: float | None = option(None, "drop what goes beyond it (drop nothing)", float)
    jitter: float = option(0.0, "noise on the input of the routers", float)
    balance_weight: float = option(0.01, "of the load-balance loss", float)
    z_weight: float = option(0.001, "of the z-loss", float)
    context: int | None = option(None, "bytes of a sequence", int)
    batch: int | None = option(None, "sequences a step", int)
    lr: float | None = option(None, "highest learning rate", float)
    warmup: int = option(40, "steps until the learning rate is reached", int)
    weight_decay: float = option(0.1, "of matrices", float)
    clip: float = option(1.0, "largest norm of a step's gradient", float)
    validations: int = option(10, "times to measure the validation loss and save", int)
    windows: int = option(128, "sequences of a validation", int)
    sample: int = option(300, "bytes of sample text", int)
    prompt: str = option("def ", "what the sample continues")

    def __post_init__(self) -> None:
        lowest = {"minutes": 0.01, "steps": 1, "batch": 1, "context": 1, "warmup": 1,
                  "validations": 1, "windows": 1, "sample": 0}  # fmt: skip
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"train_lm: {name} is {value}; allowed: {least} or more")
        if not self.prompt:
            raise ValueError("train_lm: prompt is empty; expected a byte or more")

    def value(self, name: str) -> Any:
        """A setting, or the preset's value where it is None."""
        given = getattr(self, name)
        return PRESETS[self.preset].get(name) if given is None else given

    def model(self) -> LanguageModelConfig:
        """The sizes of the model with experts."""
        names = ("layers", "hidden", "heads", "width")
        return LanguageModelConfig(
            **{name: PRESETS[self.preset][name] for name in names},
            **{name: self.value(name) for name in ("experts", "context")},
            top_k=self.top_k,
            shared_experts=self.shared_experts,
            ranks=self.ranks,
            capacity_factor=self.capacity_factor,
            jitter=self.jitter,
            balance_weight=self.balance_weight,
            z_weight=self.z_weight,
        )


def add_options(made: argparse.ArgumentParser, settings: type) -> None:
    """An option for each field of a dataclass whose fields are made by `option`."""
    for field in dataclasses.fields(settings):
        name = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if field.metadata["type"] is bool:
            made.add_argument(name, action="store_true", help=text)
            continue
        if field.default is not None:
            text += f" ({field.default})"
        choices = field.metadata.get("choices")
        made.add_argument(name, type=field.metadata["type"], choices=choices, help=text)


def parser() -> argparse.ArgumentParser:
    """The command line: an option a setting, and `--resume`."""
    made = argparse.ArgumentParser(
        prog="python -m ppmoe_models.train_lm",
        description="Train a small language model with expert layers on text that is on every "
        "machine, and compare it with a bigram model.",
        argument_default=argparse.SUPPRESS,
    )
    add_options(made, Settings)
    made.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --out, with its settings; to train for longer, add "
        "--steps or --minutes (all of them, not those to add)",
    )
    return made


def given_settings(argv: Sequence[str] | None) -> tuple[dict[str, Any], bool]:
    """The settings that a command line names, and whether it asks to resume.

    Example:
        >>> given_settings(["--preset", "tiny", "--resume"])
        ({'preset': 'tiny'}, True)
    """
    given = vars(parser().parse_args(argv))
    resume = given.pop("resume", False)
    return given, resume
