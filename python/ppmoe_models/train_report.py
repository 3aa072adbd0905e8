"""What a training leaves behind: a table, pictures of the losses and loads, numbers in JSON."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppmoe_models.text_data import bits
from ppmoe_models.trainer import Learner, Trainer

PACKAGES = ("tqdm", "matplotlib")
COLOURS = ("tab:blue", "tab:orange")


def require_packages(
    program: str = "train_lm",
    packages: Sequence[str] = PACKAGES,
    use: str = "the progress bar and the pictures",
) -> None:
    """Stop, in words, where packages that a program needs are missing.

    Raises:
        ImportError: naming all that are missing and how to get them.
    """
    missing = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ImportError(
            f"{program}: found no {' and no '.join(missing)}; needed for {use}. "
            "Way out: pip install ppmoe_ops[models]"
        )


def table(trainer: Trainer) -> str:
    """The validation losses side by side, and how fast they were reached.

    The bigram model was fitted to the training text; every line is of the same validation bytes.
    """
    head = ("model", "nats/byte", "bits/byte", "tokens/s", "parameters", "active")
    rows = [head, ("bigram", *_loss(trainer.bigram), "-", str(256 * 256), "-")]
    for learner in trainer.learners:
        model, history = learner.model, learner.history
        counts = (f"{model.num_parameters():,}", f"{model.num_active_parameters():,}")
        speed = f"{history.tokens_per_second:,.0f}"
        rows.append((learner.name, *_loss(history.validation[-1][1]), speed, *counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join((name.ljust(widths[0]), *right)))
    return "\n".join(lines)


def _loss(nats: float) -> tuple[str, str]:
    return f"{nats:.4f}", f"{bits(nats):.4f}"


def numbers(trainer: Trainer) -> dict[str, Any]:
    """The same as data, with the whole history."""
    result: dict[str, Any] = {
        "steps": trainer.step,
        "seconds": trainer.elapsed,
        "text": trainer.text.source,
        "train_bytes": trainer.text.train.numel(),
        "validated_bytes": trainer.windows[:, 1:].numel(),
        "bigram_nats": trainer.bigram,
        "models": {},
    }
    for learner in trainer.learners:
        history = learner.history
        nats = history.validation[-1][1]
        result["models"][learner.name] = {
            "validation_nats": nats,
            "validation_bits": bits(nats),
            "tokens_per_second": history.tokens_per_second,
            "parameters": learner.model.num_parameters(),
            "active_parameters": learner.model.num_active_parameters(),
            "dropped_share": history.dropped / max(history.slots, 1),
            "train_nats": history.nats,
            "balance": history.balance,
            "validation": history.validation,
            "loads": history.loads,
        }
    return result


def _figure(rows: int, height: float) -> tuple[Any, list[Any]]:
    importlib.import_module("matplotlib").use("Agg")
    plots = importlib.import_module("matplotlib.pyplot")
    figure, axes = plots.subplots(
        rows, 1, figsize=(8, height * rows), layout="constrained", squeeze=False
    )
    return figure, list(axes[:, 0])


def _write(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    importlib.import_module("matplotlib.pyplot").close(figure)


def smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """The running mean in which every older value counts `keep` of the next one.

    Example:
        >>> smooth([2.0, 4.0], keep=0.5)
        [2.0, 3.3333333333333335]
    """
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def draw_losses(trainer: Trainer, path: Path) -> None:
    """Training and validation losses in bits a byte, over the bigram model's."""
    figure, (axes,) = _figure(1, 5)
    axes.axhline(bits(trainer.bigram), color="grey", linestyle="--", label="bigram, validation")
    for learner, colour in zip(trainer.learners, COLOURS, strict=False):
        history = learner.history
        mean = [bits(nats) for nats in smooth(history.nats)]
        steps = range(1, len(mean) + 1)
        axes.plot(steps, mean, color=colour, alpha=0.4, label=f"{learner.name}, training (mean)")
        at, nats = zip(*history.validation, strict=True)
        validation = [bits(each) for each in nats]
        axes.plot(at, validation, "o-", color=colour, label=f"{learner.name}, validation")
    axes.set(xlabel="step", ylabel="bits per byte", title=f"Losses on {trainer.text.source}")
    axes.grid(alpha=0.3)
    axes.legend()
    _write(figure, path)


def draw_loads(learner: Learner, path: Path) -> None:
    """A map a layer: the load of each expert over the training; 1 is an even share."""
    loads = learner.history.loads
    layers = len(loads[0][1]) if loads else 0
    figure, plots = _figure(max(layers, 1), 2.6)
    for layer in range(layers):
        columns = [shares(of_layers[layer]) for _, of_layers in loads]
        rows = [list(row) for row in zip(*columns, strict=True)]
        axes = plots[layer]
        picture = axes.imshow(
            rows, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2
        )
        axes.set(ylabel="expert", title=f"Expert layer {layer}: load, 1 is an even share")
        axes.set_yticks(range(len(rows)))
        axes.set_xticks(range(len(loads)), [str(step) for step, _ in loads])
        figure.colorbar(picture, ax=axes, extend="max")
    plots[-1].set_xlabel("slots of the steps up to")
    _write(figure, path)


def shares(load: Sequence[int]) -> list[float]:
    """Loads in even shares.

    Example:
        >>> shares([3, 1])
        [1.5, 0.5]
    """
    total = max(sum(load), 1)
    return [len(load) * each / total for each in load]


def write_report(trainer: Trainer, out: Path) -> list[Path]:
    """Write the pictures and the numbers into a folder; their paths come back."""
    paths = [out / name for name in ("losses.png", "expert_load.png", "numbers.json")]
    draw_losses(trainer, paths[0])
    draw_loads(trainer.learners[0], paths[1])
    paths[2].write_text(json.dumps(numbers(trainer), indent=1) + "\n")
    return paths
