"""Images: the digits, folders, the split, and what is drawn for a batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_image
from PIL import Image
from torch import Tensor

from ppmoe_models.image_data import (
    channel_statistics,
    load_digits,
    load_image_folder,
    random_affine,
    read_image,
    sample,
    split,
)


def plain(colour: tuple[int, ...], height: int = 6, width: int = 6) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(-1, 1, 1).expand(-1, height, width)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_digits() -> None:
    digits = load_digits()
    assert digits.images.dtype == torch.uint8
    assert digits.classes == tuple("0123456789")
    assert digits.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert int(digits.images.max()) == 255
    assert set(digits.images.unique().tolist()) == {round(255 * i / 16) for i in range(17)}
    # The first image is a zero: dark in its middle, bright around it.
    assert digits.labels[0] == 0
    assert digits.images[0, 0, 4, 3:5].sum() < digits.images[0, 0, 4, 1:3].sum()


def test_a_folder_of_images(tmp_path: Path) -> None:
    colours = {"b": (200, 10, 20), "a": (0, 100, 250), "c": (30, 30, 30)}
    for name, colour in colours.items():
        write_image(tmp_path / name / "one.png", plain(colour))
        write_image(tmp_path / name / "deeper" / "two.BMP", plain(colour, 9, 7))
    write_image(tmp_path / "a" / ".hidden.png", plain((1, 1, 1)))
    write_image(tmp_path / ".cache" / "one.png", plain((1, 1, 1)))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    data = load_image_folder(tmp_path, 4)
    assert data.classes == ("a", "b", "c")
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.source == f"6 images of {tmp_path.name}/"
    for image, label in zip(data.images, data.labels, strict=True):
        assert torch.equal(image, plain(colours["abc"[label]], 4, 4))
    grey = load_image_folder(tmp_path, 4, 1)
    assert grey.images.shape == (6, 1, 4, 4)
    assert grey.images[4].unique().tolist() == [30]


def test_expected_classes_give_the_labels(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_image(tmp_path / name / "one.png", plain((1, 2, 3)))
    data = load_image_folder(tmp_path, 4, classes=("b", "z", "a"))
    assert data.classes == ("b", "z", "a")
    assert data.labels.tolist() == [2, 0]
    with pytest.raises(ValueError, match="has classes b; expected some of a, c"):
        load_image_folder(tmp_path, 4, classes=("a", "c"))


def test_images_are_resized_and_cut_to_their_middle(tmp_path: Path) -> None:
    # Three squares side by side: the middle one is what a square cut leaves.
    wide = torch.cat([plain((each,), 8, 8) for each in (0, 200, 90)], 2)
    write_image(tmp_path / "wide.png", wide)
    write_image(tmp_path / "high.png", wide.transpose(1, 2))
    for name in ("wide.png", "high.png"):
        assert read_image(tmp_path / name, 8, 1).unique().tolist() == [200]
        half = read_image(tmp_path / name, 4, 1)[:, 1:3, 1:3]
        assert (half.int() - 200).abs().max() < 4
        assert read_image(tmp_path / name, 16, 1).shape == (1, 16, 16)
        # Resized to 8 at the shorter side, then cut to 4.
        assert read_image(tmp_path / name, 4, 1, short_side=8).unique().tolist() == [200]
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    write_image(tmp_path / "ramp.png", ramp)
    assert torch.equal(read_image(tmp_path / "ramp.png", 8, 1), ramp)
    assert torch.equal(read_image(tmp_path / "ramp.png", 4, 1, short_side=8), ramp[:, 2:6, 2:6])
    assert torch.equal(read_image(tmp_path / "ramp.png", 8, 3), ramp.expand(3, 8, 8))


def test_images_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).view(1, 8, 8)
    image = Image.frombytes("L", (8, 8), bytes(ramp.flatten().tolist()))
    turned = image.getexif()
    turned[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=turned)
    assert torch.equal(read_image(tmp_path / "a.png", 8, 1), ramp.flip(1, 2))


def make_nothing(path: Path) -> str:
    return "folder is '.*'; expected a folder"


def make_empty(path: Path) -> str:
    path.mkdir()
    return "has no sub-folders; expected one for each class"


def make_class_without_images(path: Path) -> str:
    write_image(path / "a" / "one.png", plain((1,)))
    (path / "b").mkdir()
    return r"b has no images; expected files that end with .bmp, .gif"


def make_broken_image(path: Path) -> str:
    (path / "a").mkdir(parents=True)
    (path / "a" / "one.png").write_bytes(b"no image")
    return r"one.png is no image that can be read \("


@pytest.mark.parametrize(
    "make", [make_nothing, make_empty, make_class_without_images, make_broken_image]
)
def test_bad_folders(tmp_path: Path, make: Any) -> None:
    message = make(tmp_path / "images")
    with pytest.raises(ValueError, match=message):
        load_image_folder(tmp_path / "images", 4)


def test_the_split_has_the_same_share_of_every_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 2)[torch.randperm(62)]
    train, held = split(labels, 0.25)
    assert labels[held].bincount().tolist() == [10, 5, 1]
    assert torch.equal(torch.cat((train, held)).sort().values, torch.arange(62))
    assert torch.equal(split(labels, 0.25)[1], held)
    assert not torch.equal(split(labels, 0.25, seed=1)[1], held)
    assert labels[split(labels, 0.99)[0]].bincount().tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="class 3 has 1 images; expected 2 or more"):
        split(torch.tensor([0, 0, 3]), 0.25)


def test_statistics_of_channels() -> None:
    images = torch.randint(0, 256, (700, 3, 2, 2), dtype=torch.uint8)
    places = torch.arange(0, 600, 2)
    mean, std = channel_statistics(images, places)
    pixels = images[places].double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean((0, 2, 3)))
    torch.testing.assert_close(
        torch.tensor(std).double(), pixels.var((0, 2, 3), correction=0).sqrt()
    )
    assert channel_statistics(torch.zeros_like(images), places)[1] == [0.001] * 3


def test_nothing_is_drawn_where_nothing_may_move() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    still = random_affine(2, generator())
    x = sample(images, 8, [0.0] * 3, [1.0] * 3, still)
    torch.testing.assert_close(x, images / 255)
    assert torch.equal(sample(images, 8, [0.0] * 3, [1.0] * 3), images / 255)
    # Other sizes are the same, drawn or not, but for the border, where outside is black.
    larger = sample(images, 20, [0.0] * 3, [1.0] * 3)
    drawn = sample(images, 20, [0.0] * 3, [1.0] * 3, still)
    torch.testing.assert_close(larger[..., 2:-2, 2:-2], drawn[..., 2:-2, 2:-2])


def test_normalisation_is_by_channel() -> None:
    images = plain((51, 102, 255), 2, 2)[None]
    x = sample(images, 2, [0.2, 0.2, 0.5], [1.0, 0.5, 0.25])
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([0.0, 0.4, 2.0]))


def test_images_move_by_the_share_that_is_drawn() -> None:
    images = torch.zeros(500, 1, 20, 20, dtype=torch.uint8)
    images[:, :, 10, 10] = 255
    x = sample(images, 20, [0.0], [1.0], random_affine(500, generator(), move=0.2))
    at = torch.arange(20.0)
    total = x.sum((1, 2, 3))
    torch.testing.assert_close(total, torch.ones(500), rtol=0, atol=1e-4)
    for axis in (2, 3):
        middle = (x.sum((1, axis)) * at).sum(-1) - 10
        assert -4.001 <= middle.min() < -3.8
        assert 3.8 < middle.max() <= 4.001


def test_images_turn_and_grow_by_what_is_drawn() -> None:
    affine = random_affine(2000, generator(), turn=30.0, zoom=0.2)
    x, y = affine[:, :, 0], affine[:, :, 1]
    scale = x.norm(dim=1)
    torch.testing.assert_close(scale, y.norm(dim=1))
    torch.testing.assert_close((x * y).sum(1), torch.zeros(2000), rtol=0, atol=1e-6)
    assert 0.8 <= scale.min() < 0.81
    assert 1.19 < scale.max() <= 1.2
    angle = torch.atan2(affine[:, 1, 0], affine[:, 0, 0]) * 180 / math.pi
    assert -30.001 <= angle.min() < -29
    assert 29 < angle.max() <= 30.001
    assert not affine[:, :, 2].any()


def test_half_of_the_images_are_mirrored() -> None:
    affine = random_affine(400, generator(), mirror=True)
    mirrored = affine[:, 0, 0] < 0
    assert 150 < mirrored.sum() < 250
    images = torch.randint(0, 256, (400, 1, 4, 4), dtype=torch.uint8)
    x = sample(images, 4, [0.0], [1.0], affine)
    expected = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images) / 255
    torch.testing.assert_close(x, expected)
