"""Attention layers as torchvision and timm have them, by roll, partition and mask.

They have the libraries' names for classes and attributes, so that `use_window_attention` takes them
for those; the libraries do not import beside every torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """[B, H, W, C] to [B, windows, N, C]."""
    x = x.unflatten(1, (-1, window[0])).unflatten(3, (-1, window[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def merge(x: Tensor, window: tuple[int, int], height: int, width: int) -> Tensor:
    """The inverse of `partition`."""
    x = x.unflatten(1, (height // window[0], width // window[1])).unflatten(3, window)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def mask(height: int, width: int, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """[windows, 1, N, N]: -100 between tokens of a rolled map that were not neighbours."""

    def part(length: int, side: int, step: int) -> Tensor:
        at = torch.arange(length)
        return (at >= length - side).int() + (at >= length - step).int() * (step > 0)

    parts = 3 * part(height, window[0], shift[0])[:, None] + part(width, window[1], shift[1])
    parts = partition(parts[None, :, :, None], window)[0]
    return torch.where(parts == parts.transpose(1, 2), 0.0, -100.0).unsqueeze(1)


def padded(x: Tensor, window: tuple[int, int]) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.size(2) % window[1], 0, -x.size(1) % window[0]))


class Attention(nn.Module):
    """What the attention of both libraries has in common; `v2` is that of Swin v2."""

    v2 = False
    separate = False  # whether the biases of q, k and v are parameters of their own

    def __init__(self, dim: int, window: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.window_size, self.num_heads = window, heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=not self.separate)
        self.proj = nn.Linear(dim, dim)
        if self.separate:
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
            self.register_buffer("k_bias", torch.zeros(dim), persistent=False)
            self.qkv_bias_separate = False
        if not self.v2:
            rows = (2 * window[0] - 1) * (2 * window[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
            return
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, heads, bias=False))
        apart = [8 * torch.arange(1 - side, side) / (side - 1) for side in window]
        apart = [each.sign() * torch.log2(each.abs() + 1) / 3 for each in apart]
        table = torch.stack(torch.meshgrid(*apart, indexing="ij"), -1)
        self.register_buffer("relative_coords_table", table.unsqueeze(0))

    def bias(self) -> Tensor:
        """[heads, N, N]."""
        height, width = self.window_size
        at = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        apart = at[:, None] - at + torch.tensor([height - 1, width - 1])
        index = apart[..., 0] * (2 * width - 1) + apart[..., 1]
        if self.v2:
            table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
            return 16 * table[index].permute(2, 0, 1).sigmoid()
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def parts(self, x: Tensor) -> Any:
        if self.separate:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            return F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.v2:  # k has no bias
            k = F.linear(x, self.qkv.weight.chunk(3)[1])
        return q, k, v

    def attend(self, windows: Tensor, masked: Tensor | None, dropout: float) -> Tensor:
        """[B, windows, N, C] to the same."""
        q, k, v = (
            each.unflatten(-1, (self.num_heads, -1)).transpose(2, 3) for each in self.parts(windows)
        )
        if self.v2:
            limit = self.logit_scale.clamp(max=math.log(100)).exp()
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * limit
        else:
            scores = q @ k.transpose(-1, -2) * self.scale
        scores = scores + self.bias() + (0.0 if masked is None else masked)
        weights = F.dropout(scores.softmax(-1), dropout, self.training)
        return self.proj((weights @ v).transpose(2, 3).flatten(3))


class TorchvisionAttention(Attention):
    """Pads, then rolls."""

    def __init__(
        self, dim: int, window: list[int], shift: list[int], heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__(dim, (window[0], window[1]), heads)
        self.window_size, self.shift_size = window, shift  # type: ignore[assignment]
        self.attention_dropout, self.dropout = dropout, 0.0

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window: Any = tuple(self.window_size)
        x = padded(x, window)
        high, wide = x.shape[1:3]
        sides = zip(self.shift_size, window, (high, wide), strict=True)
        down, right = (0 if one >= side else step for step, one, side in sides)
        x = partition(x.roll((-down, -right), (1, 2)), window)
        x = self.attend(x, mask(high, wide, window, (down, right)), self.attention_dropout)
        return merge(x, window, high, wide).roll((down, right), (1, 2))[:, :height, :width]


class TimmAttention(Attention):
    """`attn` of a block, on windows."""

    def __init__(self, dim: int, window: tuple[int, int], heads: int, dropout: float) -> None:
        super().__init__(dim, window, heads)
        self.attn_drop, self.proj_drop = nn.Dropout(dropout), nn.Dropout(0.0)
        self.softmax = nn.Softmax(-1)

    def forward(self, windows: Tensor, masked: Tensor | None = None) -> Tensor:
        return self.proj_drop(self.attend(windows, masked, self.attn_drop.p))


class TimmAttentionV2(TimmAttention):
    v2 = separate = True


class TimmBlock(nn.Module):
    """Rolls, then pads; the mask is for maps of `input_resolution` unless it is dynamic."""

    attention: type[TimmAttention] = TimmAttention

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        window_size: tuple[int, int],
        shift_size: tuple[int, int],
        attn_drop: float = 0.0,
        dynamic_mask: bool = True,
    ) -> None:
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.input_resolution, self.dynamic_mask = input_resolution, dynamic_mask
        self.attn = self.attention(dim, window_size, num_heads, attn_drop)

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        down, right = self.shift_size
        x = padded(x.roll((-down, -right), (1, 2)), self.window_size)
        sides = x.shape[1:3] if self.dynamic_mask else self.input_resolution
        masked = mask(*sides, self.window_size, self.shift_size) if down or right else None
        windows = self.attn(partition(x, self.window_size), masked)
        x = merge(windows, self.window_size, *x.shape[1:3])[:, :height, :width]
        return x.roll((down, right), (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self._attn(x)


def named(base: type, name: str, module: str, **more: Any) -> Any:
    return type(name, (base,), {"__module__": module, **more})


_TORCHVISION = "torchvision.models.swin_transformer"
STAND_INS: dict[str, Any] = {
    "torchvision": named(TorchvisionAttention, "ShiftedWindowAttention", _TORCHVISION),
    "torchvision_v2": named(
        TorchvisionAttention, "ShiftedWindowAttentionV2", _TORCHVISION, v2=True
    ),
    "timm": named(TimmBlock, "SwinTransformerBlock", "timm.models.swin_transformer"),
    "timm_v2": named(
        TimmBlock, "SwinTransformerV2Block", "timm.models.swin_transformer_v2",
        attention=TimmAttentionV2,
    ),
}  # fmt: skip
