"""Plain-PyTorch compositions of ladder attention: what the operators are measured against.

Windows are made by roll and partition, masked pairs get -100, and biases are gathered from their
tables: before the call where no gradient is wanted (`bias` is then [windows or 1, heads, N, N] with
the mask in it), in the call otherwise. Partition writes queries, keys and values apart from each
other, once, which serves both forms of attention best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import ppmoe_ops

from .plain_pslt import relative_index, shift_mask

Form = Literal["manual", "sdpa"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """How square maps are cut into windows, and how what is in them attends."""

    side: int
    heads: int
    window: int
    shift: int
    form: Form = "manual"

    @property
    def masked(self) -> bool:
        return self.shift != 0

    def mask(self, like: Tensor) -> Tensor | None:
        """[windows, 1, N, N], or None where nothing is masked."""
        if not self.masked:
            return None
        mask = shift_mask(self.side, self.side, self.window, self.shift)
        return mask.unsqueeze(1).to(like)

    def bias(self, table: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows or 1, heads, N, N], gathered; the mask is added."""
        index = relative_index(self.window, self.window).to(table.device)
        bias = table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).unsqueeze(0)
        return (bias if mask is None else bias + mask).contiguous()

    def roll(self, maps: Tensor) -> Tensor:
        return maps.roll((-self.shift, -self.shift), (1, 2)) if self.shift else maps

    def unroll(self, maps: Tensor) -> Tensor:
        return maps.roll((self.shift, self.shift), (1, 2)) if self.shift else maps

    def cut(self, maps: Tensor, parts: int) -> Sequence[Tensor]:
        """Maps [B, H, W, parts * C], rolled: each part as [B, windows * heads, N, head dim]."""
        side, count = self.window, self.side // self.window
        x = maps.unflatten(3, (parts, self.heads, -1)).unflatten(2, (count, side))
        x = x.unflatten(1, (count, side)).permute(5, 0, 1, 3, 6, 2, 4, 7)
        return x.flatten(5, 6).flatten(2, 4).contiguous().unbind()

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of `cut`, for one part."""
        side, count = self.window, self.side // self.window
        x = windows.unflatten(2, (side, side)).unflatten(1, (count, count, self.heads))
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Attention of [B, windows * heads, N, head dim]."""
        if bias.size(0) > 1:
            bias = bias.flatten(0, 1).unsqueeze(0)
            return attend(q, k, v, bias, self.form)
        q, k, v = (each.unflatten(1, (-1, self.heads)).flatten(0, 1) for each in (q, k, v))
        out = attend(q, k, v, bias, self.form)
        windows = (self.side // self.window) ** 2
        return out.unflatten(0, (-1, windows)).flatten(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, form: Form) -> Tensor:
    """Attention of [rows, heads, N, head dim] with a bias [1, heads, N, N]."""
    if form == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores + bias, -1) @ v


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same by FlexAttention, which is for torch.compile; the bias is [heads, N, N]."""
    from torch.nn.attention.flex_attention import flex_attention

    def add(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query, key]

    out = flex_attention(q, k, v, score_mod=add)
    assert isinstance(out, Tensor)
    return out


def window_attention(qkv: Tensor, bias: Tensor, grid: Grid) -> Tensor:
    """Of one fused projection [B, H, W, 3C]."""
    q, k, v = grid.cut(grid.roll(qkv), 3)
    return grid.unroll(grid.join(grid.attend(q, k, v, bias)))


def window_attention_learnt(qkv: Tensor, table: Tensor, mask: Tensor | None, grid: Grid) -> Tensor:
    """The same with the bias gathered, so that the table gets a gradient."""
    return window_attention(qkv, grid.bias(table, mask), grid)


def branch(
    x: Tensor,
    v: Tensor | None,
    grid: Grid,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    bias: Tensor,
    w_out: Tensor,
    b_out: Tensor,
) -> Tensor:
    """`ladder_attention`; tokens are rolled before they are projected, as is usual."""
    n = grid.roll(F.layer_norm(x, x.shape[-1:], ln_w, ln_b))
    parts = grid.cut(F.linear(n, w_in, b_in), 3 if v is None else 2)
    value = parts[2] if v is None else grid.cut(grid.roll(v), 1)[0]
    out = F.linear(grid.join(grid.attend(parts[0], parts[1], value, bias)), w_out, b_out)
    return x + grid.unroll(out if v is None else out + n)


def branch_learnt(
    x: Tensor, v: Tensor | None, grid: Grid, mask: Tensor | None, *parameters: Tensor
) -> Tensor:
    """`branch` with a table and a mask in place of the bias."""
    given = list(parameters)
    given[4] = grid.bias(given[4], mask)
    return branch(x, v, grid, *given)


def fusion(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor,
           bp: Tensor) -> Tensor:  # fmt: skip
    """`pixel_adaptive_fusion`."""
    t = x * torch.sigmoid(F.linear(torch.relu(F.linear(x, w1, b1)), w2, b2))
    return F.linear(t, wp, bp) + t


def _norm(
    x: Tensor, index: int, norms: Sequence[Tensor | None], training: bool, seen: Sequence[Any]
) -> Tensor:
    for each in seen:
        each.append(x.detach())
    bn_w, bn_b, mean, var = (None if each is None else each[index] for each in norms)
    if training:
        mean = var = None
    return F.batch_norm(x, mean, var, bn_w, bn_b, training)


def _ffn(one: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, *rest: Any) -> Tensor:
    ln_w, ln_b, w1, b1, dw_w, dw_b, w2, b2, bn_w, bn_b, mean, var, training, *seen = rest
    norms = (bn_w, bn_b, mean, var)
    n = F.layer_norm(x, x.shape[-1:], ln_w, ln_b).permute(0, 3, 1, 2)
    a = _norm(F.gelu(one(n, w1, b1)), 0, norms, training, seen)
    a = F.conv2d(a, dw_w.unsqueeze(1), dw_b, padding=1, groups=dw_w.size(0))
    a = _norm(F.gelu(a), 1, norms, training, seen)
    a = _norm(one(a, w2, b2), 2, norms, training, seen)
    return x + a.permute(0, 2, 3, 1)


def ffn_statistics(x: Tensor, *rest: Any) -> list[Tensor]:
    """Means and variances of what the three batch norms of `ffn_linears` get."""
    seen: list[Tensor] = []
    ffn_linears(x, *rest, seen)
    pixels = [each.double().transpose(0, 1).flatten(1) for each in seen]
    return [torch.stack([each.mean(1) for each in pixels]),
            torch.stack([each.var(1, correction=0) for each in pixels])]  # fmt: skip


def ffn_convolutions(x: Tensor, *rest: Any) -> Tensor:
    """`ladder_ffn` with its linear layers as 1x1 convolutions."""
    return _ffn(lambda n, w, b: F.conv2d(n, w[:, :, None, None], b), x, *rest)


def ffn_linears(x: Tensor, *rest: Any) -> Tensor:
    """The same with linear layers on pixels, channels last."""
    return _ffn(lambda n, w, b: F.linear(n.permute(0, 2, 3, 1), w, b).permute(0, 3, 1, 2), x, *rest)


def _each(grids: Sequence[Grid], x: Tensor, step: Callable[..., Tensor]) -> Tensor:
    outs: list[Tensor] = []
    for index, (grid, part) in enumerate(zip(grids, x.chunk(3, -1), strict=True)):
        outs.append(step(index, part, outs[-1] if outs else None, grid))
    return torch.cat(outs, -1)


def core(x: Tensor, *rest: Any) -> Tensor:
    """Three branches without FFNs and the fusion; biases are in the place of tables."""
    *parameters, grids = rest

    def step(index: int, part: Tensor, v: Tensor | None, grid: Grid) -> Tensor:
        return branch(part, v, grid, *parameters[7 * index : 7 * index + 7])

    return fusion(_each(grids, x, step), *parameters[21:])


def core_learnt(x: Tensor, *rest: Any) -> Tensor:
    """The same on tables; the masks are given."""
    *parameters, masks, grids = rest
    for index, (grid, mask) in enumerate(zip(grids, masks, strict=True)):
        parameters[7 * index + 4] = grid.bias(parameters[7 * index + 4], mask)
    return core(x, *parameters, grids)


def core_fused(x: Tensor, *rest: Any) -> Tensor:
    """The operator's side of both, on tables."""
    *parameters, grids = rest

    def step(index: int, part: Tensor, v: Tensor | None, grid: Grid) -> Tensor:
        own = parameters[7 * index : 7 * index + 7]
        branch: Callable[..., Tensor] = ppmoe_ops.ladder_attention
        return branch(part, v, *own, None, grid.heads, grid.window, grid.shift)

    return ppmoe_ops.pixel_adaptive_fusion(_each(grids, x, step), *parameters[21:])


def block(x: Tensor, *rest: Any) -> Tensor:
    """`ladder_block`, batch norms folded; `borders` are what offsets add to each pixel."""
    *parameters, borders, grids = rest

    def step(index: int, part: Tensor, v: Tensor | None, grid: Grid) -> Tensor:
        own = parameters[16 * index : 16 * index + 16]
        z = branch(part, v, grid, *own[:7])
        ln_w, ln_b, f1_w, f1_b, dw_w, dw_b, _, f2_w, f2_b = own[7:]
        a = F.gelu(F.linear(F.layer_norm(z, z.shape[-1:], ln_w, ln_b), f1_w, f1_b))
        a = a.permute(0, 3, 1, 2)
        a = F.conv2d(a, dw_w.unsqueeze(1), dw_b, padding=1, groups=dw_w.size(0))
        return z + F.linear(F.gelu(a + borders[index]).permute(0, 2, 3, 1), f2_w, f2_b)

    return fusion(_each(grids, x, step), *parameters[48:])


def border(dw_off: Tensor, side: int) -> Tensor:
    """[1, g, H, W]: the offsets of the taps that are inside the map, added up once."""
    ones = dw_off.new_ones(1, dw_off.size(0), side, side)
    return F.conv2d(ones, dw_off.unsqueeze(1), padding=1, groups=dw_off.size(0))


def products(*pairs: Tensor) -> list[Tensor]:
    """Dense products alone: of rows and weights [outputs, inputs], pair by pair."""
    return [torch.mm(rows, weight.T) for rows, weight in zip(pairs[::2], pairs[1::2], strict=True)]


def products_step(*pairs: Tensor) -> list[Tensor]:
    """Those of a forward and a backward: each once more for the rows, and for the weight."""
    outs = products(*pairs)
    for out, rows, weight in zip(tuple(outs), pairs[::2], pairs[1::2], strict=True):
        outs += [torch.mm(out, weight), torch.mm(out.T, rows)]
    return outs


def products_backward(*triples: Tensor) -> list[Tensor]:
    """Those of a backward alone, from gradients of results, rows and weights."""
    found = []
    for grad, rows, weight in zip(triples[::3], triples[1::3], triples[2::3], strict=True):
        found += [torch.mm(grad, weight), torch.mm(grad.T, rows)]
    return found


def batched(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> list[Tensor]:
    """The two products of attention alone, on [rows, N, head dim]."""
    return [torch.bmm(q, k.transpose(1, 2)), torch.bmm(scores, v)]
