"""`TunedModel`: a frozen backbone with a classifier on its features, which is linear probing.

LION and the other ways of tuning are made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppmoe_models.lion_backbone import (
    POOLINGS,
    has_class_token,
    image_channels,
    image_side,
    pooled,
    shapes_of,
    token_blocks,
)

PREFIX = "backbone."


class ParameterCounts(NamedTuple):
    """Scalars that are trained: all, and those that are not zero."""

    nominal: int
    nonzero: int


class TunedModel(nn.Module):
    """Linear probing: a frozen backbone, and a classifier that is trained.

    The backbone's parameters get no gradient, and it stays in evaluation mode under `train()`, so
    that its batch-norm statistics stay as they are.

    Args:
        backbone: takes images [B, C, H, W]; it is not copied, and its parameters are marked as not
            to be trained.
        num_classes: K.
        features: `features(backbone, images)` returns [B, d], [B, T, d] or [B, C, H, W]; None calls
            the backbone and takes `pooler_output` or `last_hidden_state` from what transformers
            returns.
        pooling: of tokens: "cls", "mean" or "auto", as in `ppmoe_models.lion_backbone.pooled`.
        feature_dim: d. None runs the backbone once, on black images of `image_size`.
        in_chans, image_size: of the images; None reads them from the backbone.
        whole_state: whether `state_dict` holds the backbone too. Else it holds what is trained, and
            `load_state_dict` leaves the backbone as it is.

    Attributes:
        head: the classifier, `nn.Linear(d, K)`.

    Shapes:
        [B, C, H, W] to [B, K].

    Raises:
        ValueError: sizes that are not allowed, or a backbone whose result is not known.

    Example:
        >>> import torch
        >>> from ppmoe_models.lion_small import SmallViT
        >>> model = TunedModel(SmallViT(32), num_classes=5)
        >>> list(model.state_dict()), model(torch.zeros(2, 1, 8, 8)).shape
        (['head.weight', 'head.bias'], torch.Size([2, 5]))
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        features: Callable[[nn.Module, Tensor], Any] | None = None,
        pooling: str = "auto",
        feature_dim: int | None = None,
        in_chans: int | None = None,
        image_size: int | None = None,
        whole_state: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"LION: num_classes is {num_classes}; allowed: 1 or more")
        if pooling not in POOLINGS:
            raise ValueError(f"LION: pooling is '{pooling}'; allowed: {', '.join(POOLINGS)}")
        self.backbone = backbone
        self.features, self.pooling, self.whole_state = features, pooling, whole_state
        self.in_chans = image_channels(backbone) if in_chans is None else in_chans
        self.image_size = image_side(backbone) if image_size is None else image_size
        self.class_token = has_class_token(backbone)
        self.mark_trained()
        if feature_dim is None:
            feature_dim = shapes_of(self.represent, backbone, self.example(), ())[0].size(1)
        self.feature_dim = feature_dim
        # First of what is drawn: with equal seeds all ways of tuning start with this classifier.
        example = next(backbone.parameters(), torch.empty(0))
        self.head = nn.Linear(feature_dim, num_classes, device=example.device, dtype=example.dtype)
        self.register_state_dict_post_hook(_without_backbone)  # type: ignore[no-untyped-call]
        self.train()
        self.register_load_state_dict_pre_hook(_own_backbone)  # type: ignore[no-untyped-call]

    def example(self) -> Tensor:
        """One black image."""
        like = next(self.backbone.parameters(), torch.empty(0))
        return like.new_zeros(1, self.in_chans, self.image_size, self.image_size)

    def mark_trained(self) -> None:
        """Say which of the backbone's parameters are trained: none."""
        self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> TunedModel:
        super().train(mode)
        self.backbone.eval()
        return self

    def represent(self, images: Tensor) -> Tensor:
        """[B, d]: the features that the backbone has of images."""
        own = self.features
        found = self.backbone(images) if own is None else own(self.backbone, images)
        return pooled(found, self.pooling, self.class_token)

    def prompted_features(self, images: Tensor) -> Tensor:
        """[B, d]: what the classifier gets."""
        return self.represent(images)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.prompted_features(images))
        return out

    def trained_parameters(self) -> list[nn.Parameter]:
        """All that an optimizer is to have."""
        return [each for each in self.parameters() if each.requires_grad]

    def prompt_parameters(self) -> list[nn.Parameter]:
        """Those of them that are not the classifier's."""
        own = set(self.head.parameters())
        return [each for each in self.trained_parameters() if each not in own]

    def parameter_counts(self) -> ParameterCounts:
        """How many scalars are trained, and how many of them are not zero."""
        trained = self.trained_parameters()
        nonzero = sum(int(torch.count_nonzero(each.detach())) for each in trained)
        return ParameterCounts(sum(each.numel() for each in trained), nonzero)

    def frozen_names(self) -> Iterator[str]:
        """Names of parameters and buffers that no training changes."""
        for name, parameter in self.backbone.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                yield PREFIX + name
        for name, _ in self.backbone.named_buffers(remove_duplicate=False):
            yield PREFIX + name


def blocks_or_found(
    backbone: nn.Module, blocks: list[nn.Module] | None, op: str
) -> list[nn.Module]:
    """Blocks that are given, or those that the backbone has."""
    return list(blocks) if blocks is not None else token_blocks(backbone, op)


def _without_backbone(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    if not module.whole_state:
        for name in module.frozen_names():
            state.pop(prefix + name, None)


def _own_backbone(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Where a state dict has nothing that is frozen, it is as it was."""
    frozen = {prefix + name for name in module.frozen_names()}
    if frozen.isdisjoint(state):
        own = module.backbone.state_dict(prefix=prefix + PREFIX)
        state.update({name: own[name] for name in own if name in frozen})
