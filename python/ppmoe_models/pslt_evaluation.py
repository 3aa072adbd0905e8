"""Evaluates a PSLT checkpoint, of this package or of the authors, on a folder of images."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ppmoe_models.image_data import load_image_folder, sample
from ppmoe_models.pslt_checkpoint import _state_dict, load_pslt_checkpoint
from ppmoe_models.pslt_report import draw_confusion, scores
from ppmoe_models.pslt_small import pslt_of_state
from ppmoe_models.pslt_trainer import confusion_counts

# How the authors' checkpoints want their images; they name no classes.
OF_IMAGENET: dict[str, Any] = {
    "size": 224, "stored": 224, "short_side": 256, "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225], "classes": None,
}  # fmt: skip
BEST = 5


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a file of `torch.save` holds.

    Raises:
        ValueError: there is no such file, or it is none of these.
    """
    if not Path(path).is_file():
        raise ValueError(f"read_checkpoint: checkpoint is '{path}'; expected a file")
    try:
        # Training scripts store their arguments beside the model.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of anything raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"read_checkpoint: {path} is no checkpoint ({reason})") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"read_checkpoint: {path} holds a {type(found).__name__}; expected a dict")
    return dict(found)


def evaluate(
    folder: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    batch: int = 32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Classify a folder's images by a checkpoint's model, fused for inference.

    A checkpoint of `train_pslt` says what its images were like. For any other they are resized to
    256 pixels at the shorter side, cut to 224 and normalised as is usual for ImageNet, which is how
    the authors evaluate theirs.

    Args:
        folder: with a sub-folder a class: named as the checkpoint's classes, or, where it names
            none, as many as it has and in their order when sorted by name.
        checkpoint: a file with a state dict, or one with it as "model" or "state_dict".
        out: folder for `confusion.png` and `evaluation.json`.
        batch: images at once.
        device: where the model runs.

    Returns:
        What is in the JSON file: accuracy, share of images whose class is among the best five,
        errors, accuracies and confusion by class.

    Raises:
        ValueError: a checkpoint that is no PSLT's, or images that do not go with it.
    """
    found = read_checkpoint(checkpoint)
    state = _state_dict(found)
    model = pslt_of_state(state)
    load_pslt_checkpoint(model, state)
    own = {name: found[name] for name in OF_IMAGENET if name in found}
    images = {**OF_IMAGENET, **({"short_side": None, **own} if own else {})}
    channels = state["patch_embed.proj.0.weight"].size(1)
    data = load_image_folder(
        folder, images["stored"], channels,
        short_side=images["short_side"], classes=images["classes"],
    )  # fmt: skip
    classes = state["head.weight"].size(0)
    if len(data.classes) != classes:
        raise ValueError(
            f"evaluate: {folder} has {len(data.classes)} classes; expected {classes}, those of the "
            "checkpoint"
        )
    fused = model.to(device).fuse_for_inference(images["size"])
    likeliest = []
    bar = importlib.import_module("tqdm").tqdm(
        total=len(data.labels), unit=" images", dynamic_ncols=True
    )
    with bar, torch.no_grad():
        for places in torch.arange(len(data.labels)).split(batch):
            x = sample(data.images[places], images["size"], images["mean"], images["std"])
            logits = fused(x.to(device)).cpu()
            likeliest.append(logits.topk(min(BEST, classes)).indices)
            bar.update(len(places))
    best = torch.cat(likeliest)
    counts = confusion_counts(data.labels, best[:, 0], classes)
    among = (best == data.labels[:, None]).any(1).float().mean().item()
    told = {
        "checkpoint": Path(checkpoint).name,
        "data": data.source,
        "classes": list(data.classes),
        f"among_best_{BEST}": among,
        **scores(counts, data.classes),
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    title = f"{told['errors']} errors in {told['images']} images"
    draw_confusion(counts, data.classes, title, Path(out) / "confusion.png")
    (Path(out) / "evaluation.json").write_text(json.dumps(told, indent=1) + "\n")
    return told
