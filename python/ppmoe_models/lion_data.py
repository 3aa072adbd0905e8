"""Parts of a set of labelled images: some classes, few images of each, or a long tail."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppmoe_models.image_data import ImageData


def of_classes(data: ImageData, classes: Sequence[int]) -> ImageData:
    """The images of some classes, with labels counted anew.

    Raises:
        ValueError: fewer than two.

    Example:
        >>> import torch
        >>> data = ImageData(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 1]), ("a", "b", "c"), "")
        >>> part = of_classes(data, [1, 2])
        >>> part.labels.tolist(), part.classes
        ([0, 1, 0], ('b', 'c'))
    """  # noqa: E501
    if len(classes) < 2:
        raise ValueError(f"train_lion: {len(classes)} classes to tell apart; expected 2 or more")
    new = torch.full((len(data.classes),), -1)
    new[list(classes)] = torch.arange(len(classes))
    labels = new[data.labels]
    names = tuple(data.classes[each] for each in classes)
    here = labels >= 0
    return ImageData(data.images[here], labels[here], names, data.source)


def _of_each_class(labels: Tensor, places: Tensor, counts: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for label, count in zip(labels[places].unique(sorted=True), counts, strict=True):
        own = places[labels[places] == label]
        kept.append(own[torch.randperm(own.numel(), generator=generator)[:count]])
    return torch.cat(kept).sort().values


def few_shot(labels: Tensor, places: Tensor, shots: int, seed: int = 0) -> Tensor:
    """`shots` places of each class, drawn from `places` in [N] `labels`.

    Raises:
        ValueError: a class has fewer.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 0, 0, 1, 1])
        >>> labels[few_shot(labels, torch.arange(5), 2)].tolist()
        [0, 0, 1, 1]
    """
    counts = labels[places].unique(return_counts=True)[1]
    if int(counts.min()) < shots:
        raise ValueError(
            f"train_lion: shots is {shots}; allowed: up to {int(counts.min())}, the training "
            "images of the smallest class"
        )
    return _of_each_class(labels, places, [shots] * counts.numel(), seed)


def long_tailed(labels: Tensor, places: Tensor, ratio: float, seed: int = 0) -> Tensor:
    """Places of which the last class has 1 / `ratio` as many as the first, in even steps between.

    With n images in the smallest class, class i of K keeps n ratio^(-i / (K - 1)), one at least.

    Example:
        >>> import torch
        >>> labels = torch.arange(3).repeat_interleave(16)
        >>> labels[long_tailed(labels, torch.arange(48), 16.0)].bincount().tolist()
        [16, 4, 1]
    """
    counts = labels[places].unique(return_counts=True)[1]
    last = max(counts.numel() - 1, 1)
    kept = [
        max(1, round(int(counts.min()) * ratio ** (-index / last)))
        for index in range(counts.numel())
    ]
    return _of_each_class(labels, places, kept, seed)
