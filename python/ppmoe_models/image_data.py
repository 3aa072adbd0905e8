"""Images to train on: digits that come with scikit-learn, or a folder with a sub-folder a class.

Images are kept as bytes at one size; `sample` makes batches of another size from them, moved and
turned at random if asked.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff",
                      ".webp"))  # fmt: skip


class ImageData(NamedTuple):
    """Labelled images.

    Attributes:
        images: [N, C, S, S] uint8; C is 1 (grey) or 3 (red, green, blue).
        labels: [N] int64, places in `classes`.
        classes: names, in order.
        source: where the images are from, in words.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str


def load_digits() -> ImageData:
    """The 1797 hand-written digits of scikit-learn, 8x8, grey.

    Example:
        >>> digits = load_digits()
        >>> list(digits.images.shape), len(digits.classes)
        ([1797, 1, 8, 8], 10)
    """
    found: Any = importlib.import_module("sklearn.datasets").load_digits()
    images = (torch.from_numpy(found.images) * (255 / 16)).round().to(torch.uint8)
    classes = tuple(str(name) for name in found.target_names)
    labels = torch.from_numpy(found.target).long()
    return ImageData(images.unsqueeze(1), labels, classes, "the digits of scikit-learn")


def load_image_folder(
    folder: str | Path,
    size: int,
    channels: int = 3,
    *,
    short_side: int | None = None,
    classes: Sequence[str] | None = None,
) -> ImageData:
    """Read a folder with a sub-folder for each class, and images somewhere in it.

    Images are turned as their camera says, resized (bicubic) and cut to their square centre. All of
    them stay in memory. Hidden files and folders are passed over.

    Args:
        folder: its sub-folders, in order of their names, are the classes.
        size: S, pixels a side.
        channels: 1 for grey, 3 for colours, whatever the files have.
        short_side: pixels that an image's shorter side is resized to before it is cut; None is
            `size`, which cuts nothing off that side.
        classes: the classes to expect, in the order of their labels; sub-folders must be some of
            these. None: those that are found.

    Raises:
        ValueError: no such folder, no images in a class, classes that are not expected, or a file
            that is no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"load_image_folder: folder is '{folder}'; expected a folder")
    found = sorted(each.name for each in root.iterdir() if each.is_dir() and _shown(each))
    if not found:
        raise ValueError(
            f"load_image_folder: {root} has no sub-folders; expected one for each class"
        )
    names = tuple(found if classes is None else classes)
    strange = [name for name in found if name not in names]
    if strange:
        raise ValueError(
            f"load_image_folder: {root} has classes {', '.join(strange)}; expected some of "
            f"{', '.join(names)}"
        )
    images, labels = [], []
    for name in found:
        paths = [path for path in sorted((root / name).rglob("*")) if _is_image(path, root)]
        if not paths:
            raise ValueError(
                f"load_image_folder: {root / name} has no images; expected files that end with "
                f"{', '.join(sorted(SUFFIXES))}"
            )
        images += [read_image(path, size, channels, short_side) for path in paths]
        labels += [names.index(name)] * len(paths)
    source = f"{len(images)} images of {root.name}/"
    return ImageData(torch.stack(images), torch.tensor(labels), names, source)


def _shown(path: Path) -> bool:
    return not path.name.startswith(".")


def _is_image(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix.lower() in SUFFIXES and path.is_file() and not hidden


def read_image(path: Path, size: int, channels: int, short_side: int | None = None) -> Tensor:
    """[channels, size, size] uint8: one file, as `load_image_folder` reads it.

    Raises:
        ValueError: it is no image.
    """
    library: Any = importlib.import_module("PIL.Image")
    operations: Any = importlib.import_module("PIL.ImageOps")
    short_side = max(short_side or size, size)
    try:
        with library.open(path) as file:
            image = operations.exif_transpose(file).convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"read_image: {path} is no image that can be read ({error})") from None
    width, height = image.size
    scale = short_side / min(width, height)
    width, height = (max(round(side * scale), short_side) for side in (width, height))
    image = image.resize((width, height), library.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, channels).permute(2, 0, 1).contiguous()


def split(labels: Tensor, held_out: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two lists of places in [N] `labels`: to train on, and held out; the same share of each class.

    Raises:
        ValueError: a class is too small to be in both.

    Example:
        >>> import torch
        >>> train, held = split(torch.tensor([0, 0, 0, 0, 1, 1]), 0.25)
        >>> len(train), len(held)
        (4, 2)
    """
    generator = torch.Generator().manual_seed(seed)
    train, held = [], []
    for label in labels.unique(sorted=True):
        places = (labels == label).nonzero().flatten()
        if places.numel() < 2:
            raise ValueError(
                f"split: class {int(label)} has {places.numel()} images; expected 2 or more"
            )
        places = places[torch.randperm(places.numel(), generator=generator)]
        count = min(max(1, round(places.numel() * held_out)), places.numel() - 1)
        held.append(places[:count])
        train.append(places[count:])
    return torch.cat(train).sort().values, torch.cat(held).sort().values


def channel_statistics(images: Tensor, places: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, where bytes are 0 to 1.

    Args:
        images: [N, C, S, S] uint8.
        places: those of N that count.

    Example:
        >>> import torch
        >>> pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
        >>> channel_statistics(pixels, torch.tensor([0, 1]))
        ([0.5], [0.5])
    """
    total = square = torch.zeros(images.size(1), dtype=torch.float64)
    for some in places.split(256):
        x = images[some].double() / 255
        total, square = total + x.sum((0, 2, 3)), square + (x * x).sum((0, 2, 3))
    count = places.numel() * images[0, 0].numel()
    mean = total / count
    deviation = (square / count - mean**2).clamp(min=1e-6).sqrt()
    return mean.tolist(), deviation.tolist()


def random_affine(
    count: int,
    generator: torch.Generator,
    *,
    move: float = 0.0,
    turn: float = 0.0,
    zoom: float = 0.0,
    mirror: bool = False,
) -> Tensor:
    """[count, 2, 3] maps from places in the new image to places in the old, for `sample`.

    Args:
        move: up to this share of a side, along both.
        turn: up to so many degrees, either way.
        zoom: up to this share larger or smaller.
        mirror: left and right of every second image.

    Example:
        >>> import torch
        >>> random_affine(1, torch.Generator().manual_seed(0)).tolist()
        [[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    draws = torch.rand(count, 5, generator=generator) * 2 - 1
    angle = draws[:, 0] * math.radians(turn)
    scale = 1 + draws[:, 1] * zoom
    across = torch.where(draws[:, 4] < 0, -1.0, 1.0) if mirror else torch.ones(count)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    offset = draws[:, 2:4] * (2 * move)  # sides go from -1 to 1
    rows = (
        torch.stack((cosine * across, -sine, offset[:, 0]), -1),
        torch.stack((sine * across, cosine, offset[:, 1]), -1),
    )
    return torch.stack(rows, 1) + 0.0  # no negative zeros


def sample(
    images: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    affine: Tensor | None = None,
) -> Tensor:
    """[B, C, size, size] float32 from [B, C, S, S] bytes, normalised, bilinear between pixels.

    Args:
        images: uint8, on any device.
        size: pixels a side of the result.
        mean, std: of each channel, where bytes are 0 to 1.
        affine: [B, 2, 3] of `random_affine`, or None. What lies outside of an image is black.

    Example:
        >>> import torch
        >>> pixels = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)
        >>> sample(pixels, 2, [0.0], [0.2]).flatten().tolist()
        [0.0, 5.0, 1.0, 2.0]
    """
    x = images.float() / 255
    if affine is not None:
        grid = F.affine_grid(affine.to(x.device), [x.size(0), 1, size, size], align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    elif x.size(-1) != size:
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
    middle, spread = (x.new_tensor(each).view(1, -1, 1, 1) for each in (mean, std))
    return (x - middle) / spread
