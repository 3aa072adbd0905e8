"""Other ways of tuning a backbone: all of it, its biases, adapters, and VPT's prompt tokens.

None of them changes the backbone's modules; adapters and prompts are put in by hooks that live for
one forward call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppmoe_models.lion_backbone import Replace, replaced_inputs, replaced_outputs, shapes_of
from ppmoe_models.prompt_modes_base import TunedModel, blocks_or_found


class FullTuning(TunedModel):
    """All of the backbone is trained, in training mode; arguments as `TunedModel`'s.

    Example:
        >>> from ppmoe_models.lion_small import SmallViT
        >>> FullTuning(SmallViT(32, depth=1), num_classes=5).parameter_counts().nominal
        9509
    """

    def mark_trained(self) -> None:
        self.backbone.requires_grad_(True)

    def frozen_names(self) -> Iterator[str]:
        return iter(())

    def train(self, mode: bool = True) -> FullTuning:
        nn.Module.train(self, mode)
        return self


class BiasTuning(TunedModel):
    """The backbone's biases are trained: parameters named `bias`; arguments as `TunedModel`'s.

    Example:
        >>> from ppmoe_models.lion_small import SmallViT
        >>> BiasTuning(SmallViT(32, depth=1), num_classes=5).parameter_counts().nominal
        517
    """

    def mark_trained(self) -> None:
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] == "bias")


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))) along one axis, which starts as x; 2dr + r + d parameters."""

    def __init__(self, dim: int, width: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        along = x.movedim(self.axis, -1)
        out: Tensor = x + self.up(F.gelu(self.down(along))).movedim(-1, self.axis)
        return out


class AdapterTuning(TunedModel):
    """A bottleneck behind each block is trained. It starts as linear probing.

    Args:
        width: r.
        blocks: the backbone's, where it is not of a known library. Blocks return [B, T, d], or
            [B, C, H, W], of which C is taken; or a tuple with that first.
        others: as `TunedModel`'s.

    Example:
        >>> from ppmoe_models.lion_small import SmallViT
        >>> model = AdapterTuning(SmallViT(32, depth=2), num_classes=5, width=8)
        >>> model.parameter_counts().nominal == 2 * (2 * 32 * 8 + 8 + 32) + 5 * 33
        True
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        width: int = 8,
        blocks: list[nn.Module] | None = None,
        **others: Any,
    ) -> None:
        if width < 1:
            raise ValueError(f"AdapterTuning: width is {width}; allowed: 1 or more")
        super().__init__(backbone, num_classes, **others)
        self._blocks = tuple(blocks_or_found(backbone, blocks, "AdapterTuning"))
        _, _, after = shapes_of(self.represent, backbone, self.example(), self._blocks)
        made = [Bottleneck(x[1 if len(x) == 4 else -1], width, 1 if len(x) == 4 else -1)
                for x in after]  # fmt: skip
        self.adapters = nn.ModuleList(made).to(self.head.weight)

    def prompted_features(self, images: Tensor) -> Tensor:
        with replaced_outputs(list(zip(self._blocks, self.adapters, strict=True))):
            return self.represent(images)


class VPT(TunedModel):
    """Visual prompt tuning: tokens that are trained stand behind the class token.

    Shallow prompts enter the first block and pass through the others (p d parameters); deep ones
    are replaced before each block (p d for each). They leave before the features are pooled.

    Args:
        tokens: p.
        deep: which of the two.
        blocks: the backbone's, where it is not of a known library. Blocks get [B, T, d] with the
            class token first.
        others: as `TunedModel`'s.

    Raises:
        ValueError: the backbone has no class token, or values that are not allowed.

    Source: Visual Prompt Tuning (arXiv 2203.12119).

    Example:
        >>> from ppmoe_models.lion_small import SmallViT
        >>> VPT(SmallViT(32, depth=2), num_classes=5, tokens=3, deep=True).prompts.shape
        torch.Size([2, 3, 32])
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        tokens: int = 5,
        deep: bool = False,
        blocks: list[nn.Module] | None = None,
        **others: Any,
    ) -> None:
        if tokens < 1:
            raise ValueError(f"VPT: tokens is {tokens}; allowed: 1 or more")
        super().__init__(backbone, num_classes, **others)
        if not self.class_token:
            raise ValueError(
                f"VPT: backbone is a {type(backbone).__name__} without a class token; expected a "
                "vision transformer with one"
            )
        self._blocks = tuple(blocks_or_found(backbone, blocks, "VPT"))
        _, before, _ = shapes_of(self.represent, backbone, self.example(), self._blocks)
        dim = before[0][-1]
        like, layers = self.head.weight, len(self._blocks) if deep else 1
        self.prompts = nn.Parameter(like.new_empty(layers, tokens, dim))
        patches = (each for each in backbone.modules() if isinstance(each, nn.Conv2d))
        fan_in = next((each.weight[0].numel() for each in patches), dim)
        bound = math.sqrt(6 / (fan_in + dim))  # as the patch embedding, uniform after Xavier
        nn.init.uniform_(self.prompts, -bound, bound)

    def prompted_features(self, images: Tensor) -> Tensor:
        layers, tokens, _ = self.prompts.shape

        def enter(layer: int) -> Replace:
            def replace(x: Tensor) -> Tensor:
                prompts = self.prompts[layer].to(x.dtype).expand(x.size(0), -1, -1)
                behind = x[:, 1 + (tokens if layer else 0) :]
                return torch.cat((x[:, :1], prompts, behind), 1)

            return replace

        def leave(x: Tensor) -> Tensor:
            return torch.cat((x[:, :1], x[:, 1 + tokens :]), 1)

        entering = [(self._blocks[layer], enter(layer)) for layer in range(layers)]
        with replaced_inputs(entering), replaced_outputs([(self._blocks[-1], leave)]):
            return self.represent(images)
