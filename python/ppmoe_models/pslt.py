"""PSLT, the light-weight vision transformer of ladder self-attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ppmoe_models.pslt_blocks import BranchAttention, LadderBlock, Stage
from ppmoe_models.pslt_checkpoint import drop_entries_without_use
from ppmoe_models.pslt_convs import ConvBlock, Stem
from ppmoe_models.pslt_fused import FusedLadderBlock
from ppmoe_models.pslt_fused_convs import STRIDES, FusedConvolutions


class PSLT(nn.Module):
    """Convolution blocks, then ladder self-attention blocks at strides 16 and 32.

    Any image size works. Windows have 7x7 tokens, and where a map has fewer rows or columns, that
    many; maps of at most 7 rows or columns are not shifted. Running statistics of the batch norms
    are updated as torch does it; in the ladder all three norms of an FFN must be in one mode.

    Args:
        dim: channels of the stem, a multiple of 12; stages have 2, 4, 8 and 16 times as many.
        num_classes: outputs of the classifier.
        in_chans: channels of an image.
        drop_path_rate: stochastic depth's rate at the last ladder block; it grows linearly from 0
            at the first, and is that of all residuals of a block, each drawn for itself.
        features_only: no classifier; the result is a list of maps.
        padding: what happens where windows do not fit into a map. "authors": as in the released
            detection code, the normalised map and the value are padded with zeros, right and below,
            and the zeros take part in the attention. "ragged": nothing is padded, and windows at
            the border are smaller.
        shifts: without them the windows of all three branches lie alike.
        depths: ladder blocks at strides 16 and 32.
        heads: of each branch there.

    Shapes:
        [B, in_chans, H, W] images to [B, num_classes], or with `features_only` to maps [B, C, h, w]
        at strides 4, 8, 16 and 32 with C = 2, 4, 8 and 16 times `dim` (sides are rounded up), in
        channels-last memory. Odd sides of the map at stride 16 get a row or column of zeros before
        they are merged.

    Source: PSLT (arXiv 2304.03481). The architecture, its initial values and the names of
        parameters are those of the authors' released code.

    Example:
        >>> import torch
        >>> from ppmoe_models import PSLT
        >>> model = PSLT(12, num_classes=10, depths=(2, 1))
        >>> model(torch.randn(2, 3, 112, 112)).shape
        torch.Size([2, 10])
        >>> backbone = PSLT(12, depths=(2, 1), features_only=True).eval().fuse_for_inference()
        >>> [list(each.shape[1:]) for each in backbone(torch.randn(1, 3, 100, 75))]
        [[24, 25, 19], [48, 13, 10], [96, 7, 5], [192, 4, 3]]
    """

    def __init__(
        self,
        dim: int = 36,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.2,
        features_only: bool = False,
        padding: str = "authors",
        shifts: bool = True,
        depths: Sequence[int] = (10, 3),
        heads: Sequence[int] = (4, 8),
    ) -> None:
        super().__init__()
        if dim < 1 or dim % 12 != 0:
            raise ValueError(f"PSLT: dim is {dim}; allowed: multiples of 12")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(
                f"PSLT: drop_path_rate is {drop_path_rate}; allowed: at least 0 and below 1"
            )
        for name, pair in (("depths", depths), ("heads", heads)):
            if len(pair) != 2 or min(pair) < 1:
                raise ValueError(f"PSLT: {name} is {list(pair)}; allowed: two numbers above 0")
        self.dim, self.features_only, self.fused = dim, features_only, False
        self.patch_embed: nn.Module = Stem(in_chans, dim)
        self.conv_layers = nn.ModuleList(
            ConvBlock(before * dim, after * dim, stride)
            for before, after, stride in zip(
                (1, 2, 2, 2, 4, 4, 4), (2, 2, 2, 4, 4, 4, 8), STRIDES, strict=True
            )
        )
        last = max(sum(depths) - 1, 1)
        drops = [drop_path_rate * index / last for index in range(sum(depths))]
        shared: dict[str, Any] = {"shifts": shifts, "padding": padding}
        self.layers = nn.ModuleList([
            Stage(8 * dim, heads[0], drops[: depths[0]], merging=True, **shared),
            Stage(16 * dim, heads[1], drops[depths[0] :], merging=False, **shared),
        ])  # fmt: skip
        self.norm = None if features_only else nn.LayerNorm(16 * dim)
        self.head = None if features_only else nn.Linear(16 * dim, num_classes)
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]

    def reset_parameters(self) -> None:
        """Draw weights again: linear layers and bias tables with deviation 0.02, no biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, BranchAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        maps = self.features(x)
        if self.norm is None or self.head is None:
            return maps
        last = maps[-1].permute(0, 2, 3, 1).flatten(1, 2)
        out: Tensor = self.head(self.norm(last).mean(1))
        return out

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps [B, C, h, w] at strides 4, 8, 16 and 32; the third as it is before merging."""
        if self.fused and torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("PSLT: fused for inference, and asked for a gradient to x")
        *maps, x = self._convolutions(x)
        x = x.permute(0, 2, 3, 1)
        for stage in self.layers:
            stage = cast(Stage, stage)
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def _convolutions(self, x: Tensor) -> list[Tensor]:
        """Maps at strides 4 and 8, and the one that the ladder starts with."""
        if isinstance(self.patch_embed, FusedConvolutions):
            maps: list[Tensor] = self.patch_embed(x)
            return maps
        # Convolutions, GELU and batch norm are all faster so, and the ladder needs it.
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        maps = []
        for index, block in enumerate(self.conv_layers):
            x = block(x)
            if index in (2, 5, 6):
                maps.append(x)
        return maps

    def fuse_for_inference(self, img_size: int = 224) -> PSLT:
        """A copy for inference alone: batch norms folded, a ladder block one operator.

        Results are the same but for rounding, borders of the maps included. The copy shares
        nothing with this model, gives no gradients, cannot be trained and loads no state dict.

        Args:
            img_size: rows of the images it is made for; others work too.

        Raises:
            RuntimeError: this model is fused already.

        Example:
            >>> import torch
            >>> from ppmoe_models import PSLT
            >>> model = PSLT(12, depths=(1, 1)).eval()
            >>> image = torch.randn(1, 3, 64, 64)
            >>> fused = model.fuse_for_inference(img_size=64)
            >>> bool(torch.allclose(model(image), fused(image), atol=1e-4))
            True
        """
        if self.fused:
            raise RuntimeError("PSLT: fused for inference already")
        model = copy.deepcopy(self).eval().requires_grad_(False)
        model.fused = True
        blocks = [cast(ConvBlock, each) for each in model.conv_layers]
        model.patch_embed = FusedConvolutions(cast(Stem, model.patch_embed), blocks, img_size)
        model.conv_layers = nn.ModuleList()
        for stage in model.layers:
            ladders = cast(Stage, stage).blocks
            for index, ladder in enumerate(ladders):
                ladders[index] = FusedLadderBlock(cast(LadderBlock, ladder))
        return model.eval()

    def train(self, mode: bool = True) -> PSLT:
        """As any module's; a fused model has no training mode and raises RuntimeError."""
        if mode and self.fused:
            raise RuntimeError("PSLT: fused for inference; train the model it was made from")
        super().train(mode)
        return self


def _before_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    model = cast(PSLT, module)
    if model.fused:
        raise RuntimeError("PSLT: fused for inference; load the state dict first, then fuse")
    drop_entries_without_use(state, prefix, without_head=model.features_only)


def pslt_tiny(**options: Any) -> PSLT:
    """PSLT-Tiny: 4,298,988 parameters and 0.90 G multiply-adds at 224x224; options as `PSLT`'s.

    Example:
        >>> from ppmoe_models import pslt_tiny
        >>> sum(each.numel() for each in pslt_tiny().parameters())
        4298988
    """
    return PSLT(24, **options)


def pslt(**options: Any) -> PSLT:
    """PSLT: 9,257,302 parameters and 1.97 G multiply-adds at 224x224; options as `PSLT`'s.

    Example:
        >>> from ppmoe_models.pslt import pslt
        >>> sum(each.numel() for each in pslt().parameters())
        9257302
    """
    return PSLT(36, **options)


def pslt_large(**options: Any) -> PSLT:
    """PSLT-Large: 16,099,312 parameters, 3.46 G multiply-adds at 224x224; options as `PSLT`'s.

    Example:
        >>> from ppmoe_models import pslt_large
        >>> sum(each.numel() for each in pslt_large().parameters())
        16099312
    """
    return PSLT(48, **options)
