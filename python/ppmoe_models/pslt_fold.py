"""Batch norms at inference, as factors and offsets, folded into the layers beside them."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def scale_and_offset(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies with and adds at inference, in float64."""
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight.detach().double() / (var.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - mean.double() * scale


def fold_around(
    weight: Tensor,
    bias: Tensor | None,
    before: nn.BatchNorm2d | None,
    behind: nn.BatchNorm2d | None,
) -> tuple[Tensor, Tensor]:
    """Weight [O, I] and bias of a linear layer with the batch norms on its two sides in it."""
    folded = weight.detach().double()
    shift = folded.new_zeros(folded.size(0)) if bias is None else bias.detach().double()
    if before is not None:
        scale, offset = scale_and_offset(before)
        shift = shift + folded @ offset
        folded = folded * scale
    if behind is not None:
        scale, offset = scale_and_offset(behind)
        shift = shift * scale + offset
        folded = folded * scale.unsqueeze(1)
    return folded.to(weight.dtype), shift.to(weight.dtype)
