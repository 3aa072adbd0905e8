"""Inputs for the ladder-attention tests, and the operators once more as plain compositions.

The compositions share nothing with the package's references, are differentiable by autograd alone,
and run in any dtype: in float64 they give the exact results of the error rule. Window attention is
there three times: padded to whole windows, over the whole map with pairs masked, and as the authors
write it, by roll, partition, mask, roll back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ppmoe_ops._library import OPERATORS

Args = dict[str, Any]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What the authors add to the score of a pair that must not see each other.
MASKED = -100.0


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, and of sums, beside data of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch of maps and how it is cut; `width` is that of the map, in tokens."""

    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    window: tuple[int, int] = (7, 7)
    shift: tuple[int, int] = (0, 0)

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def map(self) -> tuple[int, int, int, int]:
        return self.batch, self.height, self.width, self.channels


def groups(length: int, window: int, shift: int) -> Tensor:
    """The number of the rectangle that each position of an axis belongs to."""
    numbers = torch.div(torch.arange(length) - shift, window, rounding_mode="floor")
    return numbers - numbers[:1]


def edges(length: int, window: int, shift: int) -> list[int]:
    """Where rectangles begin on an axis, and its end."""
    return [0, *(x for x in range(1, length) if (x - shift) % window == 0), length]


def relative_index(rows: Tensor, columns: Tensor, window: Sequence[int]) -> Tensor:
    """Rows of the bias table for all pairs of tokens, 0 where they are too far apart."""
    down, across = (each[:, None] - each[None, :] for each in (rows, columns))
    index = (down + window[0] - 1) * (2 * window[1] - 1) + across + window[1] - 1
    far = (down.abs() >= window[0]) | (across.abs() >= window[1])
    return index.masked_fill(far, 0)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """The map in a larger one that whole windows cover, keys outside of the map masked."""
    _, height, width, channels = q.shape
    (tall, broad), head_dim = window, channels // num_heads
    top, left = -shift[0] % tall, -shift[1] % broad
    rest = (0, 0, left, -(left + width) % broad, top, -(top + height) % tall)

    def windows(each: Tensor) -> Tensor:  # [B, windows, tokens, channels]
        each = F.pad(each, rest)
        each = each.unflatten(2, (-1, broad)).unflatten(1, (-1, tall))
        return each.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def heads(each: Tensor) -> Tensor:
        return windows(each).unflatten(-1, (num_heads, head_dim)).transpose(2, 3)

    inside = windows(torch.ones(1, height, width, 1)).squeeze(-1) > 0
    scores = heads(q) @ heads(k).transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if bias_table is not None:
        at = torch.arange(tall * broad)
        index = relative_index(at // broad, at % broad, window)
        scores = scores + bias_table[index].permute(2, 0, 1)
    outside = ~inside[:, :, None, None, :]
    weights = scores.masked_fill(outside, -torch.inf).softmax(-1).to(v.dtype)
    out = (weights @ heads(v)).transpose(2, 3).flatten(3)
    out = out.unflatten(2, (tall, broad)).unflatten(1, (-1, (left + width + rest[3]) // broad))
    out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out[:, top : top + height, left : left + width]


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """Every token with every token of its map, and pairs of different rectangles masked."""
    batch, height, width, channels = q.shape
    tokens, head_dim = height * width, channels // num_heads
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    down, across = (
        groups(n, w, s)[at]
        for n, w, s, at in zip((height, width), window, shift, (rows, columns), strict=True)
    )
    apart = (down[:, None] != down[None]) | (across[:, None] != across[None])

    def heads(each: Tensor) -> Tensor:
        return each.reshape(batch, tokens, num_heads, head_dim).transpose(1, 2)

    scores = heads(q) @ heads(k).transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if bias_table is not None:
        scores = scores + bias_table[relative_index(rows, columns, window)].permute(2, 0, 1)
    weights = scores.masked_fill(apart, -torch.inf).softmax(-1).to(v.dtype)
    return (weights @ heads(v)).transpose(1, 2).reshape(batch, height, width, channels)


def rolled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """The authors' form, for maps that the window divides."""
    batch, height, width, channels = q.shape
    (tall, broad), head_dim = window, channels // num_heads
    back = (int(shift[0]), int(shift[1]))

    def flags(length: int, by: int) -> Tensor:
        at = torch.arange(length)
        return (at >= length - by) if by > 0 else (at < -by)

    def partition(each: Tensor) -> Tensor:
        each = each.reshape(-1, height // tall, tall, width // broad, broad, each.size(-1))
        return each.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(0, 2)

    def windows(each: Tensor) -> Tensor:
        rolled = torch.roll(each, (-back[0], -back[1]), (1, 2))
        return partition(rolled).unflatten(-1, (num_heads, head_dim)).transpose(1, 2)

    label = flags(height, back[0])[:, None] * 2 + flags(width, back[1])[None, :] * 1
    label = partition(label[None, :, :, None]).squeeze(-1)
    mask = (label[:, :, None] != label[:, None, :]) * MASKED
    at = torch.arange(tall * broad)
    index = relative_index(at // broad, at % broad, window)
    scores = windows(q) * (head_dim**-0.5 if scale is None else scale)
    scores = scores @ windows(k).transpose(-1, -2)
    if bias_table is not None:
        scores = scores + bias_table[index].permute(2, 0, 1)
    scores = scores + mask.repeat(batch, 1, 1).unsqueeze(1).to(scores.dtype)
    out = (scores.softmax(-1).to(v.dtype) @ windows(v)).transpose(1, 2).flatten(2)
    out = out.unflatten(0, (batch, height // tall, width // broad))
    out = out.unflatten(3, (tall, broad)).transpose(2, 3).reshape(q.shape)
    return torch.roll(out, back, (1, 2))


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """torch's own; in float32 where the parameters are of float32 beside narrower data."""
    kept = weight.dtype if weight.dtype == bias.dtype else wide(x.dtype)
    return F.layer_norm(x.to(kept), x.shape[-1:], weight, bias, eps).to(x.dtype)


def per_image(row_scale: Tensor | None, branch: Tensor) -> Tensor:
    if row_scale is None:
        return branch
    return branch * row_scale.to(branch.dtype).reshape(-1, 1, 1, 1)


def plain_branch(
    x: Tensor,
    v: Tensor | None,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    bias_table: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    row_scale: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    eps: float = 1e-5,
) -> Tensor:
    normed = plain_norm(x, ln_w, ln_b, eps)
    parts = F.linear(normed, w_in, b_in).split(x.size(-1), -1)
    value = parts[2] if v is None else v
    mixed = plain_attention(parts[0], parts[1], value, bias_table, num_heads, window, shift)
    out = F.linear(mixed, w_out, b_out)
    return x + per_image(row_scale, out if v is None else out + normed)


def plain_ffn(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor,
    w1: Tensor,
    b1: Tensor,
    dw_w: Tensor,
    dw_b: Tensor,
    w2: Tensor,
    b2: Tensor,
    bn_w: Tensor,
    bn_b: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    row_scale: Tensor | None,
    training: bool,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolutions and batch norms of torch on a channels-first map."""
    means, variances = [], []

    def closed(row: Tensor, like: Tensor) -> Tensor:
        return row.to(like.dtype).contiguous()  # torch's batch norm misreads one with strides

    def batch_norm(each: Tensor, at: int) -> Tensor:
        values = each.to(wide(each.dtype))
        if training:
            mean, variance = values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)
            running: tuple[Tensor | None, Tensor | None] = (None, None)
        else:
            assert running_mean is not None
            assert running_var is not None
            mean, variance = (closed(t[at], values) for t in (running_mean, running_var))
            running = (mean, variance)
        means.append(mean.detach())
        variances.append(variance.detach())
        weight, bias = closed(bn_w[at], values), closed(bn_b[at], values)
        return F.batch_norm(values, *running, weight, bias, training, 0.1, eps).to(each.dtype)

    maps = plain_norm(x, ln_w, ln_b, eps).permute(0, 3, 1, 2)
    maps = batch_norm(F.gelu(F.conv2d(maps, w1[:, :, None, None], b1)), 0)
    deep = F.conv2d(maps, dw_w[:, None], dw_b, padding=1, groups=x.size(-1))
    maps = batch_norm(F.gelu(deep), 1)
    maps = batch_norm(F.conv2d(maps, w2[:, :, None, None], b2), 2)
    out = x + per_image(row_scale, maps.permute(0, 2, 3, 1))
    return out, torch.stack(means), torch.stack(variances)


def plain_fusion(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor, bp: Tensor
) -> Tensor:
    gate = torch.sigmoid(F.linear(torch.relu(F.linear(x, w1, b1)), w2, b2))
    taken = x * gate
    return F.linear(taken, wp, bp) + taken


def folded_ffn(z: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The second half of a branch, batch norms folded: nine of a branch's sixteen parameters."""
    ln_w, ln_b, f1_w, f1_b, dw_w, dw_b, dw_off, f2_w, f2_b = params
    maps = F.linear(plain_norm(z, ln_w, ln_b), f1_w, f1_b)
    maps = F.gelu(maps).permute(0, 3, 1, 2)
    deep = F.conv2d(maps, dw_w[:, None], dw_b, padding=1, groups=z.size(-1))
    inside = torch.ones_like(maps[:1])
    deep = deep + F.conv2d(inside, dw_off[:, None], padding=1, groups=z.size(-1))
    return z + F.linear(F.gelu(deep).permute(0, 2, 3, 1), f2_w, f2_b)


def plain_block(
    x: Tensor,
    params: Sequence[Tensor],
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
) -> Tensor:
    value, outputs = None, []
    for at, (part, sign) in enumerate(zip(x.chunk(3, -1), (0, 1, -1), strict=True)):
        mine = list(params[16 * at : 16 * at + 16])
        moved = [sign * each for each in shift]
        z = plain_branch(part, value, *mine[:7], None, num_heads, window, moved)
        value = folded_ffn(z, mine[7:])
        outputs.append(value)
    return plain_fusion(torch.cat(outputs, -1), *params[48:])


PLAIN: dict[str, Callable[..., Any]] = {
    "window_attention": plain_attention,
    "ladder_attention": plain_branch,
    "ladder_ffn": plain_ffn,
    "pixel_adaptive_fusion": plain_fusion,
    "ladder_block": plain_block,
}


def run(name: str, args: Args) -> Any:
    """The operator, as it is dispatched."""
    return OPERATORS[name].overload(*args.values())
