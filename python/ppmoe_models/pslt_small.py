"""A PSLT for small images, and a PSLT of the sizes that a state dict has."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ppmoe_models.pslt import PSLT
from ppmoe_models.pslt_blocks import LadderBlock, Stage
from ppmoe_models.pslt_convs import ConvBlock
from ppmoe_models.pslt_fused import FusedLadderBlock


class SmallPSLT(PSLT):
    """A PSLT whose ladder starts at stride 4: the stem, one convolution block, then the ladder.

    Images of 56 pixels give it the maps that a PSLT has of 224: 14x14 with shifted windows, then
    7x7 in one window.

    Args:
        dim, options: as `PSLT`'s. With `features_only` the maps are those at strides 4 and 8.

    Example:
        >>> import torch
        >>> from ppmoe_models import SmallPSLT
        >>> model = SmallPSLT(12, num_classes=10, in_chans=1, depths=(2, 1))
        >>> model(torch.randn(2, 1, 56, 56)).shape
        torch.Size([2, 10])
    """

    def __init__(self, dim: int = 12, **options: Any) -> None:
        super().__init__(dim, **options)
        self.conv_layers = nn.ModuleList([ConvBlock(dim, 8 * dim, 2)])
        self.reset_parameters()

    def _convolutions(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        return [self.conv_layers[0](x)]

    def fuse_for_inference(self, img_size: int = 56) -> SmallPSLT:
        """As `PSLT`'s, but for the convolutions, which stay as they are."""
        if self.fused:
            raise RuntimeError("SmallPSLT: fused for inference already")
        model = copy.deepcopy(self).eval().requires_grad_(False)
        model.fused = True
        for stage in model.layers:
            stage = cast(Stage, stage)
            ladders = [FusedLadderBlock(cast(LadderBlock, each)) for each in stage.blocks]
            stage.blocks = nn.ModuleList(ladders)
        return model.eval()


def pslt_of_state(state: Mapping[str, Tensor], **options: Any) -> PSLT:
    """A PSLT, or a small one, with the sizes of a classifier's state dict; nothing is loaded.

    Args:
        state: with the authors' names, and any other entries beside.
        options: of `PSLT`, but for sizes.

    Raises:
        ValueError: the state dict lacks what sizes are read from.

    Example:
        >>> from ppmoe_models import PSLT
        >>> other = pslt_of_state(PSLT(24, num_classes=5, depths=(2, 1)).state_dict())
        >>> other.dim, other.head.out_features, [len(each.blocks) for each in other.layers]
        (24, 5, [2, 1])
    """
    table = "layers.{}.blocks.0.blocks.0.attn.relative_position_bias_table"
    needed = ["patch_embed.proj.0.weight", "head.weight", *(table.format(i) for i in (0, 1))]
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(
            f"pslt_of_state: the checkpoint has no {', '.join(missing)}; expected that of a PSLT "
            "with its classifier"
        )
    stem, head, *tables = (state[name] for name in needed)
    kind = PSLT if _count(state, r"conv_layers\.(\d+)\.") > 1 else SmallPSLT
    return kind(
        2 * stem.size(0),
        in_chans=stem.size(1),
        num_classes=head.size(0),
        depths=[_count(state, rf"layers\.{i}\.blocks\.(\d+)\.") for i in (0, 1)],
        heads=[each.size(1) for each in tables],
        **options,
    )


def _count(state: Mapping[str, Tensor], numbered: str) -> int:
    """How many modules of a list a state dict has."""
    return len({found.group(1) for name in state if (found := re.match(numbered, name))})
