"""Shifted windows on a map that is never rolled: where they are cut, and attention inside them.

Shared by the contracts of the family: geometry, checks, and the plain-PyTorch attention that their
references are built on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _checks as check


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of `dtype` are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def edges(length: int, window: int, shift: int) -> list[int]:
    """Where an axis is cut: its ends, and every x between them with x = shift mod window."""
    inner = range(shift % window, length, window)
    return sorted({0, length, *(x for x in inner if x > 0)})


def rectangles(
    height: int, width: int, window: Sequence[int], shift: Sequence[int]
) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of every window, row by row."""
    rows = edges(height, int(window[0]), int(shift[0]))
    columns = edges(width, int(window[1]), int(shift[1]))
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            yield slice(top, bottom), slice(left, right)


def bias_index(height: int, width: int, window: Sequence[int], device: torch.device) -> Tensor:
    """[N, N] rows of the bias table for a rectangle of height * width = N tokens."""
    row = torch.arange(height, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(height)
    rows = row[:, None] - row[None] + int(window[0]) - 1
    columns = column[:, None] - column[None] + int(window[1]) - 1
    return rows * (2 * int(window[1]) - 1) + columns


def _areas(
    q: Tensor, num_heads: int, window: Sequence[int], shift: Sequence[int]
) -> Iterator[tuple[tuple[slice, ...], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """For every window: where it is, a map's part of it as [B, heads, N, head_dim], and back."""
    batch, height, width, channels = q.shape
    for rows, columns in rectangles(height, width, window, shift):
        sides = rows.stop - rows.start, columns.stop - columns.start
        area = (slice(None), rows, columns)

        def heads(map_: Tensor, area: Any = area, tokens: int = sides[0] * sides[1]) -> Tensor:
            parts = map_[area].reshape(batch, tokens, num_heads, channels // num_heads)
            return parts.transpose(1, 2)

        def back(parts: Tensor, sides: tuple[int, int] = sides) -> Tensor:
            return parts.transpose(1, 2).reshape(batch, *sides, channels)

        yield area, heads, back


def _weights(
    q: Tensor,
    k: Tensor,
    bias_table: Tensor | None,
    area: tuple[slice, ...],
    window: Sequence[int],
    scale: float,
) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    if bias_table is not None:
        scores = scores + bias_table[_index(area, window, q.device)].permute(2, 0, 1)
    return torch.softmax(scores, -1)


def _index(area: tuple[slice, ...], window: Sequence[int], device: torch.device) -> Tensor:
    _, rows, columns = area
    return bias_index(rows.stop - rows.start, columns.stop - columns.start, window, device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None,
) -> Tensor:
    """The attention of `window_attention` in the dtype of its arguments, window by window."""
    factor = scale if scale is not None else (q.size(3) // num_heads) ** -0.5
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for area, heads, back in _areas(q, num_heads, window, shift):
        weights = _weights(heads(q), heads(k), bias_table, area, window, factor)
        out[area] = back(weights @ heads(v))
    return out


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attend` to q, k, v and the bias table (empty where there is none)."""
    factor = scale if scale is not None else (q.size(3) // num_heads) ** -0.5
    grads = [torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3)]
    grad_table = q.new_zeros((0,)) if bias_table is None else torch.zeros_like(bias_table)
    for area, heads, back in _areas(q, num_heads, window, shift):
        own, keys, values, given = heads(q), heads(k), heads(v), heads(grad)
        weights = _weights(own, keys, bias_table, area, window, factor)
        slope = given @ values.transpose(-1, -2)
        slope = weights * (slope - (weights * slope).sum(-1, keepdim=True))
        grads[0][area] = back(slope @ keys * factor)
        grads[1][area] = back(slope.transpose(-1, -2) @ own * factor)
        grads[2][area] = back(weights.transpose(-1, -2) @ given)
        if bias_table is not None:
            each = slope.sum(0).permute(1, 2, 0).flatten(0, 1)
            index = _index(area, window, q.device).flatten()
            grad_table.index_add_(0, index, each)
    return grads[0], grads[1], grads[2], grad_table


def check_maps(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q, k and v are maps of one shape and dtype."""
    check.dim(op, "q", q, "B, H, W, C")
    check.dtype(op, "q", q, check.FLOATS)
    for name, each in (("k", k), ("v", v)):
        check_like(op, name, each, q, "q")


def check_like(op: str, name: str, tensor: Tensor, first: Tensor, as_what: str) -> None:
    """Raise unless `tensor` is a map of the shape and dtype of `first`."""
    check.dim(op, name, tensor, "B, H, W, C")
    check.dtype(op, name, tensor, (first.dtype,), f"as {as_what}")
    for axis, letter in enumerate("BHWC"):
        check.size(op, name, letter, tensor.size(axis), first.size(axis), f"as {as_what}")


def check_windows(
    op: str, channels: int, num_heads: int, window: Sequence[int], shift: Sequence[int]
) -> None:
    """Raise unless heads divide the channels, windows exist and shifts are smaller than them."""
    if channels < 1:
        raise ValueError(f"{op}: C is {channels}; allowed: at least 1")
    if num_heads < 1 or channels % num_heads != 0:
        raise ValueError(f"{op}: num_heads is {num_heads}; allowed: divisors of C = {channels}")
    for name, pair in (("window", window), ("shift", shift)):
        if len(pair) != 2:
            raise ValueError(f"{op}: {name} has {len(pair)} numbers; expected 2: [rows, columns]")
    for side, axis in zip(window, ("rows", "columns"), strict=True):
        check.between(op, f"window ({axis})", side, 1, MOST_SIDE)
    for side, by, axis in zip(window, shift, ("rows", "columns"), strict=True):
        check.between(op, f"shift ({axis})", by, 1 - side, side - 1, "smaller than the window")


MOST_SIDE = 2**15 - 1
"""The longest side of a window: rows of its bias table are counted in 32 bits."""


def check_bias_table(
    op: str, bias_table: Tensor, first: Tensor, num_heads: int, window: Sequence[int]
) -> None:
    """Raise unless the table has a row for every offset within a window, a column for a head."""
    check.dim(op, "bias_table", bias_table, "R, heads")
    check_wide(op, "bias_table", bias_table, first)
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    why = "(2 * window rows - 1) * (2 * window columns - 1)"
    check.size(op, "bias_table", "R", bias_table.size(0), rows, why)
    check.size(op, "bias_table", "heads", bias_table.size(1), num_heads, "num_heads")


def check_wide(op: str, name: str, tensor: Tensor, first: Tensor) -> None:
    """Raise unless `tensor` is in the dtype of `first` or in what that is summed in."""
    allowed = dict.fromkeys((first.dtype, wide_dtype(first.dtype)))
    check.dtype(op, name, tensor, tuple(allowed), "that of the map, or what it is summed in")


def check_vector(
    op: str, name: str, tensor: Tensor, axis: str, size: int, why: str, first: Tensor, *, wide: bool
) -> None:
    """Raise unless `tensor` is [size] in the dtype of `first`, or with `wide` what that is
    summed in."""
    check.dim(op, name, tensor, axis)
    if wide:
        check_wide(op, name, tensor, first)
    else:
        check.dtype(op, name, tensor, (first.dtype,), "as x")
    check.size(op, name, axis, tensor.size(0), size, why)


def check_matrix(
    op: str, name: str, tensor: Tensor, axes: str, sizes: Sequence[int], why: str, first: Tensor
) -> None:
    """Raise unless `tensor` has these sizes and the dtype of `first`."""
    check.dim(op, name, tensor, axes)
    check.dtype(op, name, tensor, (first.dtype,), "as x")
    for axis, letter in enumerate(axes.split(", ")):
        check.size(op, name, letter, tensor.size(axis), sizes[axis], why)


def attention_flops(maps: Tensor, window: Sequence[int]) -> int:
    """Of the two products, as if every window were whole."""
    return 4 * maps.numel() * window[0] * window[1]
