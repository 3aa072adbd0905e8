"""What a run of `train_lion` leaves behind: a table, numbers, and a picture of the solves."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppmoe_models.lion import LION
from ppmoe_models.lion_layers import ImplicitConv, ImplicitMLP
from ppmoe_models.lion_trainer import LIONTrainer, Tuned
from ppmoe_models.pslt_report import _figure, _write
from ppmoe_models.trainer import save_checkpoint

HEAD = ("mode", "trained", "not zero", "accuracy", "lowest", "highest", "seconds", "peak memory",
        "solver steps")  # fmt: skip
NOTES = (
    "Accuracy: mean and standard deviation over seeds, on images held out; lowest and highest of "
    "them. Trained: scalars that an optimizer has, the classifier's included. Seconds: of all "
    "training steps of one seed, the mean. Peak memory: of one training step, the most that "
    "torch's allocator held beyond what is there between steps. Solver steps: mean evaluations of "
    "f for an image, of the input prompt / the representation prompt. lion_image's second layer "
    "sees the image past the backbone: on small, easy images such as digits, which their pixels "
    "alone tell apart, that flatters it."
)
SHOWN = 64  # images whose residuals are drawn


def _accuracies(trainer: LIONTrainer, some: Sequence[Tuned]) -> list[float]:
    return [1 - each.errors / trainer.held.numel() for each in some]


def summary(trainer: LIONTrainer) -> dict[str, Any]:
    """What the table says, a dict for each mode."""
    told = {}
    for mode in trainer.settings.chosen:
        some = [each for each in trainer.results if each.mode == mode]
        if not some:
            continue
        accuracy = _accuracies(trainer, some)
        told[mode] = {
            "trained": some[0].counts.nominal,
            "not_zero": statistics.mean(each.counts.nonzero for each in some),
            "accuracy": statistics.mean(accuracy),
            "deviation": statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
            "lowest": min(accuracy),
            "highest": max(accuracy),
            "seconds": statistics.mean(each.seconds for each in some),
            "peak_bytes": next((each.peak_bytes for each in some if each.peak_bytes), None),
            "steps": {
                name: statistics.mean(each.steps[name] for each in some) for name in some[0].steps
            },
            "not_converged": sum(each.not_converged for each in some),
        }
    return told


def rows(trainer: LIONTrainer) -> list[tuple[str, ...]]:
    """The table's rows, its head first."""
    made: list[tuple[str, ...]] = [HEAD]
    for mode, told in summary(trainer).items():
        peak = told["peak_bytes"]
        made.append((
            mode, f"{told['trained']:,}", f"{told['not_zero']:,.0f}",
            f"{told['accuracy']:.2%} +- {100 * told['deviation']:.2f}",
            f"{told['lowest']:.2%}", f"{told['highest']:.2%}", f"{told['seconds']:.1f}",
            "-" if peak is None else f"{peak / 2**20:.1f} MiB",
            " / ".join(f"{each:.1f}" for each in told["steps"].values()) or "-",
        ))  # fmt: skip
    return made


def table(trainer: LIONTrainer) -> str:
    """The table as text."""
    made = rows(trainer)
    widths = [max(map(len, column)) for column in zip(*made, strict=True)]
    lines = []
    for name, *cells in made:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join((name.ljust(widths[0]), *right)))
    return "\n".join(lines)


def told_of_data(trainer: LIONTrainer) -> str:
    """What was trained on, in a sentence or two."""
    settings, before = trainer.settings, trainer.pretrained
    text = ""
    if before is not None:
        text = (
            f"Pre-trained on {before['images']:,} images of {', '.join(before['classes'])} "
            f"({before['accuracy']:.2%} of those held out). "
        )
    part = ""
    if settings.shots is not None:
        part = f" ({settings.shots} of each class)"
    if settings.long_tail is not None:
        part = f" (the last class {settings.long_tail:g} times fewer than the first)"
    return (
        f"{text}Tuned on {trainer.subset(0).numel():,} images of {', '.join(trainer.data.classes)}"
        f"{part}; {trainer.held.numel():,} held out; {settings.seeds} seeds."
    )


def markdown(trainer: LIONTrainer) -> str:
    """The table as a page."""
    head, *others = rows(trainer)
    lines = [f"# Ways of tuning on {trainer.data.source}", "", told_of_data(trainer), ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(each) + " |" for each in others]
    return "\n".join([*lines, "", NOTES, ""])


def numbers(trainer: LIONTrainer) -> dict[str, Any]:
    """The table as data, with every result."""
    return {
        "settings": dataclasses.asdict(trainer.settings),
        "data": trainer.data.source,
        "classes": list(trainer.data.classes),
        "trained_on": trainer.subset(0).numel(),
        "held_out": trainer.held.numel(),
        "threads": torch.get_num_threads(),
        "pretrained": trainer.pretrained,
        "modes": summary(trainer),
        "runs": [
            {**dataclasses.asdict(each), "counts": each.counts._asdict()}
            for each in trainer.results
        ],
    }


@torch.no_grad()
def residual_curve(layer: ImplicitConv | ImplicitMLP, u: Tensor) -> Tensor:
    """[max_iter, N]: the relative residual of each solve after 1, 2, ... evaluations.

    Each row is a solve of its own that stops there: what the solver would return.
    """
    kept = layer.rtol, layer.max_iter
    found = []
    try:
        layer.rtol = 0.0
        for count in range(1, kept[1] + 1):
            layer.max_iter = count
            found.append(layer(u)[1].relative)
    finally:
        layer.rtol, layer.max_iter = kept
    return torch.stack(found).cpu()


def draw_residuals(model: LION, images: Tensor, path: Path) -> None:
    """Residuals of the implicit layers over evaluations, on some images: median and worst."""
    inputs: dict[str, tuple[Any, Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda layer, given: inputs.update({name: (layer, given[0])})

    layers = {"input": model.input_prompt, "representation": model.representation_prompt}
    hooks = [each.register_forward_pre_hook(keep(name))
             for name, each in layers.items() if each is not None]  # fmt: skip
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    figure, plots = _figure(1, max(len(inputs), 1), 5 * max(len(inputs), 1), 4)
    for axes, (name, (layer, u)) in zip(plots[0], inputs.items(), strict=True):
        curve = residual_curve(layer, u)
        at = range(1, len(curve) + 1)
        axes.plot(at, curve.median(1).values.tolist(), "o-", label="median", markersize=3)
        axes.plot(at, curve.max(1).values.tolist(), "--", label="worst")
        axes.axhline(layer.rtol, color="grey", linewidth=1, label="stop")
        axes.set(yscale="log", xlabel="evaluations of f", ylabel="residual / size",
                 title=f"the {name} prompt, {layer.solver}")  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend()
    _write(figure, path)


def write_report(trainer: LIONTrainer, out: Path) -> list[Path]:
    """Write all of it into a folder; the paths come back."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "table.md", out / "numbers.json"]
    paths[0].write_text(markdown(trainer), encoding="utf-8")
    paths[1].write_text(json.dumps(numbers(trainer), indent=1) + "\n")
    if trainer.model is not None:
        paths += [out / "lion.pt", out / "residuals.png"]
        model = {"model": trainer.model.state_dict(), "classes": list(trainer.data.classes)}
        backbone = trainer.backbone.state_dict() if trainer.pretrained else None
        images = {"mean": trainer.mean, "std": trainer.std, "size": trainer.size}
        save_checkpoint({**model, "backbone": backbone, **images}, paths[2])
        some = trainer.normalised(trainer.data, trainer.held[:SHOWN])
        draw_residuals(trainer.model, some, paths[3])
    return paths
