"""The Swin models of other libraries on `window_attention`: swapped in place, and back.

Covered, eager and under `torch.compile`, for classification, backbones and what else is made of
these layers:

| library | layers | maps that windows do not divide |
| --- | --- | --- |
| transformers 5 | `SwinLayer`, `Swinv2Layer` | padded first, as the library does: padding attends |
| torchvision | `ShiftedWindowAttention`, `ShiftedWindowAttentionV2` | the same |
| timm | `SwinTransformerBlock`, `SwinTransformerV2Block` | the same where nothing is shifted |

A swapped layer keeps its parameters, its buffers and their names; only its class is another one.
What the operator does not compute goes the library's own way, and the logger `ppmoe_models` says so
once for each reason: attention dropout in training; a call that asks for the attention weights or
gives arguments for the attention; hooks on modules that the operator stands in for; maps smaller
than the window of transformers' `SwinLayer`; and shifted blocks of timm on maps that windows do not
divide, as timm rolls before it pads, or of another size than its mask.

Two differences remain. The libraries add -100 to the scores that a window must not see, and let
some of it through where scores are 80 apart; the operator leaves it out. And dropout behind the
attention draws its numbers for a map, not for windows, so that it drops other elements.

Swin v2's cosine attention is the operator on normalised q and k, with the heads' scales multiplied
into q, and with the table that the model's network makes of the relative positions.

Not covered: models that only resemble these (Swin2SR, Donut, the Swin of MaskFormer, timm's
`swin_transformer_v2_cr`), and Pangu-Weather. Its windows have three dimensions; its bias has
absolute positions in two of them, and a table for each window there; and its third is periodic, so
that windows reach across the edge of the map.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import nn

from ppmoe_models.swin_layers import (
    Swapped,
    TimmSwin,
    TimmSwinV2,
    TorchvisionSwin,
    TorchvisionSwinV2,
    TransformersSwin,
    TransformersSwinV2,
    swapped_class,
)

# Named, as this package needs none of the libraries.
_LAYERS: dict[str, type[Swapped]] = {
    "transformers.models.swin.modeling_swin.SwinLayer": TransformersSwin,
    "transformers.models.swinv2.modeling_swinv2.Swinv2Layer": TransformersSwinV2,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": TorchvisionSwin,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": TorchvisionSwinV2,
    "timm.models.swin_transformer.SwinTransformerBlock": TimmSwin,
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": TimmSwinV2,
}


def _ours(kind: type) -> Any:
    return _LAYERS.get(f"{kind.__module__}.{kind.__qualname__}")


def _swappable(model: nn.Module) -> Iterator[nn.Module]:
    for layer in model.modules():
        kind = type(layer)
        ours = _ours(kind)
        if ours is None:
            continue
        for name in ours.needs:
            try:
                operator.attrgetter(name)(layer)
            except AttributeError:
                raise ValueError(
                    f"use_window_attention: {kind.__module__}.{kind.__qualname__} has no {name}; "
                    "expected a version of its library where it has (tested: transformers 5.17, "
                    "torchvision 0.29, timm 1.0.31)"
                ) from None
        yield layer


def use_window_attention(model: nn.Module) -> int:
    """Let the Swin layers of a model compute their attention by `ppmoe_ops.window_attention`.

    The model is changed in place, and no parameter is copied: optimizers, state dicts, `copy` and
    `pickle` see what they saw. A module that `torch.compile` has compiled already is compiled anew
    at its next call. See this module for the layers that are covered.

    Args:
        model: of transformers, torchvision or timm, or any module that holds such layers.

    Returns:
        How many layers of the model now use the operator, those of earlier calls included.

    Raises:
        ValueError: there is no such layer, or its library is of a version that is not covered.

    Example:
        >>> import torch
        >>> from transformers import SwinConfig, SwinModel
        >>> config = SwinConfig(image_size=56, embed_dim=16, depths=[2], num_heads=[2])
        >>> model = SwinModel(config)
        >>> use_window_attention(model)
        2
        >>> tuple(model(torch.zeros(1, 3, 56, 56)).last_hidden_state.shape)
        (1, 196, 16)
        >>> restore_attention(model)
        2
    """
    layers: list[Any] = list(_swappable(model))
    for layer in layers:
        own: Any = type(layer)
        layer.__class__ = swapped_class(_ours(own), own)
    count = sum(isinstance(layer, Swapped) for layer in model.modules())
    if not count:
        raise ValueError(
            f"use_window_attention: model is a {type(model).__name__} without a layer that is "
            f"known; expected one with layers of {', '.join(_LAYERS)}"
        )
    return count


def restore_attention(model: nn.Module) -> int:
    """Give the layers that `use_window_attention` changed their own attention again.

    Returns:
        How many layers that were.

    Example:
        >>> restore_attention(nn.Linear(2, 2))
        0
    """
    swapped: list[Any] = [each for each in model.modules() if isinstance(each, Swapped)]
    for layer in swapped:
        layer.__class__ = layer.own
    return len(swapped)
