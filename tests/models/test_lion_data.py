"""Parts of image sets: classes, few shots, long tails."""

from __future__ import annotations

import pytest
import torch

from ppmoe_models.image_data import ImageData
from ppmoe_models.lion_data import few_shot, long_tailed, of_classes

LABELS = torch.tensor([0] * 40 + [1] * 30 + [2] * 50)[torch.randperm(120)]


def test_classes_are_counted_anew() -> None:
    images = torch.arange(120).view(-1, 1, 1, 1)
    data = of_classes(ImageData(images, LABELS, ("a", "b", "c"), "source"), [2, 0])
    assert data.classes == ("c", "a")
    assert data.labels.bincount().tolist() == [50, 40]
    assert torch.equal(LABELS[data.images.flatten()] == 2, data.labels == 0)
    with pytest.raises(ValueError, match="1 classes to tell apart; expected 2 or more"):
        of_classes(data, [1])


def test_few_shots() -> None:
    places = torch.arange(0, 120, 2)
    found = few_shot(LABELS, places, 5, seed=1)
    assert LABELS[found].bincount().tolist() == [5, 5, 5]
    assert set(found.tolist()) <= set(places.tolist())
    assert found.unique().numel() == 15
    assert torch.equal(found, few_shot(LABELS, places, 5, seed=1))
    assert not torch.equal(found, few_shot(LABELS, places, 5, seed=2))
    with pytest.raises(ValueError, match="shots is 31; allowed: up to 30"):
        few_shot(LABELS, torch.arange(120), 31)


def test_long_tails() -> None:
    found = long_tailed(LABELS, torch.arange(120), 9.0, seed=1)
    assert LABELS[found].bincount().tolist() == [30, 10, 3]
    assert found.unique().numel() == 43
    assert torch.equal(found, long_tailed(LABELS, torch.arange(120), 9.0, seed=1))
    assert LABELS[long_tailed(LABELS, torch.arange(120), 1000.0)].bincount().tolist() == [30, 1, 1]
    assert LABELS[long_tailed(LABELS, torch.arange(120), 1.0)].bincount().tolist() == [30, 30, 30]
