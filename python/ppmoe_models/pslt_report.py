"""What a PSLT training or evaluation leaves behind: a table, pictures, numbers in JSON."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppmoe_models.pslt import PSLT
from ppmoe_models.pslt_blocks import LadderBranch, smaller_table, window_and_shift
from ppmoe_models.pslt_trainer import PSLTTrainer
from ppmoe_models.train_report import smooth

COLOURS = ("tab:blue", "tab:orange")
MOST_NAMED = 20  # classes whose names and counts fit into a picture
SHOWN = 3  # images in the picture of the windows


def table(trainer: PSLTTrainer) -> str:
    """The accuracies on the images held out, side by side."""
    rows = [("model", "accuracy", "errors", "nats", "images/s", "parameters")]
    for learner in trainer.learners:
        _, nats, errors = learner.history.validation[-1]
        count = sum(each.numel() for each in learner.model.parameters())
        of = trainer.held.numel()
        rows.append((
            learner.name, f"{1 - errors / of:.2%}", f"{errors} of {of}", f"{nats:.4f}",
            f"{learner.history.images_per_second:,.0f}", f"{count:,}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join((name.ljust(widths[0]), *right)))
    return "\n".join(lines)


def scores(counts: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy and what it is made of, from [classes, classes] counts.

    Example:
        >>> import torch
        >>> told = scores(torch.tensor([[3, 1], [0, 0]]), ["cat", "dog"])
        >>> told["accuracy"], told["errors"], told["by_class"]
        (0.75, 1, {'cat': 0.75})
    """
    right, of = counts.diagonal(), counts.sum(1)
    return {
        "accuracy": int(right.sum()) / max(int(of.sum()), 1),
        "errors": int(of.sum() - right.sum()),
        "images": int(of.sum()),
        "by_class": {
            name: int(one) / int(all_of)
            for name, one, all_of in zip(classes, right, of, strict=True)
            if all_of
        },
        "confusion": counts.tolist(),
    }


def numbers(trainer: PSLTTrainer) -> dict[str, Any]:
    """The table as data, with the whole history."""
    result: dict[str, Any] = {
        "steps": trainer.step,
        "seconds": trainer.elapsed,
        "cpu_seconds": trainer.cpu_seconds,
        "threads": torch.get_num_threads(),
        "data": trainer.data.source,
        "classes": list(trainer.data.classes),
        "trained_on": trainer.train.numel(),
        "held_out": trainer.held.numel(),
        "models": {},
    }
    for learner in trainer.learners:
        history = learner.history
        result["models"][learner.name] = {
            **scores(trainer.confusion[learner.name], trainer.data.classes),
            "parameters": sum(each.numel() for each in learner.model.parameters()),
            "images_per_second": history.images_per_second,
            "train_nats": history.nats,
            "validation": history.validation,
        }
    return result


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its plots, [rows][columns]."""
    importlib.import_module("matplotlib").use("Agg")
    plots = importlib.import_module("matplotlib.pyplot")
    return plots.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False
    )


def _write(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    importlib.import_module("matplotlib.pyplot").close(figure)


def draw_curves(trainer: PSLTTrainer, path: Path) -> None:
    """The training loss, and the share of errors on the images held out."""
    figure, plots = _figure(2, 1, 8, 6)
    for learner, colour in zip(trainer.learners, COLOURS, strict=False):
        history = learner.history
        steps = range(1, len(history.nats) + 1)
        plots[0][0].plot(steps, smooth(history.nats), color=colour, label=learner.name)
        at = [step for step, *_ in history.validation]
        wrong = [100 * errors / trainer.held.numel() for *_, errors in history.validation]
        plots[1][0].plot(at, wrong, "o-", color=colour, label=learner.name)
    plots[0][0].set(ylabel="training loss, nats", title=f"PSLT on {trainer.data.source}")
    plots[1][0].set(xlabel="step", ylabel="errors, % of those held out", yscale="symlog")
    for row in plots:
        row[0].grid(alpha=0.3)
        row[0].legend()
    _write(figure, path)


def draw_confusion(counts: Tensor, classes: Sequence[str], title: str, path: Path) -> None:
    """Counts of [true, found] classes; colours leave the diagonal out, which is much larger."""
    side = 6.5 if len(classes) <= MOST_NAMED else 10
    figure, plots = _figure(1, 1, side, side)
    axes = plots[0][0]
    wrong = counts.clone().fill_diagonal_(0)
    # Counts stay readable on half of the colours.
    axes.imshow(wrong.tolist(), cmap="Reds", vmin=0, vmax=max(2 * int(wrong.max()), 1))
    axes.set(xlabel="found", ylabel="true", title=title)
    if len(classes) <= MOST_NAMED:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if len(max(classes)) > 2 else 0)
        axes.set_yticks(range(len(classes)), classes)
        for row, found in enumerate(counts.tolist()):
            for column, count in enumerate(found):
                if count:
                    axes.text(column, row, str(count), ha="center", va="center")
    _write(figure, path)


def edges(length: int, window: int, shift: int) -> list[int]:
    """Where an axis is cut into windows.

    Example:
        >>> edges(14, 7, 3), edges(14, 7, -3)
        ([0, 3, 10, 14], [0, 4, 11, 14])
    """
    return [0, *(x for x in range(1, length) if (x - shift) % window == 0), length]


def window_of(at: int, length: int, window: int, shift: int) -> tuple[int, int]:
    """First token and the one behind the last of the window that a token is in.

    Example:
        >>> window_of(7, 14, 7, 3)
        (3, 10)
    """
    cuts = edges(length, window, shift)
    return next(pair for pair in itertools.pairwise(cuts) if pair[1] > at)


@torch.no_grad()
def attention_from(branch: LadderBranch, x: Tensor, at: tuple[int, int]) -> Tensor:
    """[H, W]: what a token of a branch's input [H, W, g] gives its attention to, mean of heads.

    Padding, where windows do not fit, is left out.
    """
    height, width, channels = x.shape
    window, shift = window_and_shift(height, width, branch.shift)
    parts = branch.attn.into(branch.norm1(x)).split(channels, -1)
    q, k = (each.unflatten(-1, (branch.heads, -1)) for each in parts[:2])
    top, bottom = window_of(at[0], height, window, shift)
    left, right = window_of(at[1], width, window, shift)
    keys = k[top:bottom, left:right]
    rows = at[0] - torch.arange(top, bottom, device=x.device) + window - 1
    columns = at[1] - torch.arange(left, right, device=x.device) + window - 1
    bias = smaller_table(branch.attn.relative_position_bias_table, window)
    bias = bias[rows[:, None] * (2 * window - 1) + columns]
    found = (keys * q[at]).sum(-1) * keys.size(-1) ** -0.5 + bias
    weights = torch.zeros(height, width)
    weights[top:bottom, left:right] = found.flatten(0, 1).softmax(0).mean(1).view(found.shape[:2])
    return weights


def ladder_inputs(model: PSLT, x: Tensor) -> tuple[Any, Tensor]:
    """A copy of the last ladder block before merging, and its input [B, H, W, C] for images."""
    block: Any = model.layers[0].blocks[-1]  # type: ignore[index]
    taken: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    model.eval()
    with torch.no_grad():
        model(x)
    hook.remove()
    return copy.deepcopy(block).cpu(), taken[0].float().cpu()


def draw_windows(model: PSLT, x: Tensor, pictures: Tensor, path: Path) -> None:
    """Images beside what the middle token of each branch looks at, and the windows' edges.

    Args:
        model: not fused.
        x: [B, C, S, S] as the model gets them.
        pictures: [B, C, S, S] bytes, as they are shown.
        path: of the PNG file.
    """
    block, inputs = ladder_inputs(model, x)
    height, width = inputs.shape[1:3]
    at = (height // 2, width // 2)
    figure, plots = _figure(len(x), 4, 11, 2.9 * len(x))
    for row, picture, given in zip(plots, pictures, inputs, strict=True):
        shown = picture.permute(1, 2, 0).squeeze(-1).tolist()
        for axes in row:
            axes.imshow(shown, cmap="gray", extent=(0, width, height, 0), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        for axes, branch, part in zip(row[1:], block.blocks, given.chunk(3, -1), strict=True):
            window, shift = window_and_shift(height, width, branch.shift)
            weights = attention_from(branch, part, at)
            seen = torch.where(weights > 0, weights, torch.nan).tolist()
            axes.imshow(seen, cmap="inferno", alpha=0.8, extent=(0, width, height, 0), vmin=0)
            for cut in edges(height, window, shift):
                axes.axhline(cut, color="white", linewidth=1)
            for cut in edges(width, window, shift):
                axes.axvline(cut, color="white", linewidth=1)
            axes.plot(at[1] + 0.5, at[0] + 0.5, "+", color="cyan", markersize=12)
    plots[0][0].set_title("image")
    for axes, branch in zip(plots[0][1:], block.blocks, strict=True):
        axes.set_title(f"branch shifted by {window_and_shift(height, width, branch.shift)[1]}")
    figure.suptitle("Attention of the middle token (+) in its window, last block before merging")
    _write(figure, path)


def write_report(trainer: PSLTTrainer, out: Path) -> list[Path]:
    """Write the pictures and the numbers into a folder; their paths come back."""
    names = ("curves.png", "confusion.png", "windows.png", "numbers.json")
    paths = [out / name for name in names]
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(trainer, paths[0])
    learner, data = trainer.learners[0], trainer.data
    counts = trainer.confusion[learner.name]
    told = scores(counts, data.classes)
    title = f"{told['errors']} errors in {told['images']} images held out"
    draw_confusion(counts, data.classes, title, paths[1])
    labels = data.labels[trainer.held]
    some = [int((labels == label).nonzero()[0]) for label in labels.unique()[:SHOWN]]
    places = trainer.held[some]
    x = trainer.normalised(places).to(learner.device)
    draw_windows(learner.model, x, data.images[places], paths[2])
    paths[3].write_text(json.dumps(numbers(trainer), indent=1) + "\n")
    return paths
