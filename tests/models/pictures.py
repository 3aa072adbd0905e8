"""Folders of small images for tests, a sub-folder a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def write_image(path: Path, pixels: Tensor) -> None:
    """[C, H, W] bytes to a file, grey or in colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels, height, width = pixels.shape
    mode = "L" if channels == 1 else "RGB"
    raw = bytes(pixels.permute(1, 2, 0).flatten().tolist())
    Image.frombytes(mode, (width, height), raw).save(path)


def stripes(vertical: bool, width: int, side: int = 24) -> Tensor:
    """[3, side, side]: bright and dark stripes, with noise."""
    bright = (torch.arange(side) // width % 2).expand(side, side)
    bright = bright if vertical else bright.T
    noise = torch.randint(0, 56, (3, side, side))
    return (bright * 199 + noise).to(torch.uint8)


def stripes_folder(root: Path, count: int, names: Sequence[str] = ("across", "up")) -> Path:
    """`count` images of each class, which differ in the direction of their stripes alone."""
    for i in range(count):
        for name, vertical in zip(names, (False, True), strict=True):
            write_image(root / name / f"{i:03}.png", stripes(vertical, 2 + i % 3))
    return root
