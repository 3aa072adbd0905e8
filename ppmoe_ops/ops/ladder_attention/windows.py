"""Shifted windows on a map that is never rolled: where they are cut, and attention inside them.

Shared by the contracts of the family: geometry, checks, and the plain-PyTorch attention that their
references are built on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

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
    batch, height, width, channels = q.shape
    head_dim = channels // num_heads
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.empty_like(q, memory_format=torch.contiguous_format)

    def heads(part: Tensor) -> Tensor:  # [B, heads, N, head_dim]
        tokens = part.size(1) * part.size(2)
        return part.reshape(batch, tokens, num_heads, head_dim).transpose(1, 2)

    for rows, columns in rectangles(height, width, window, shift):
        area = (slice(None), rows, columns)
        scores = heads(q[area]) @ heads(k[area]).transpose(-1, -2) * scale
        if bias_table is not None:
            sides = rows.stop - rows.start, columns.stop - columns.start
            index = bias_index(*sides, window, q.device)
            scores = scores + bias_table[index].permute(2, 0, 1)
        part = torch.softmax(scores, -1) @ heads(v[area])
        out[area] = part.transpose(1, 2).reshape(q[area].shape)
    return out


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
    if num_heads < 1 or channels % num_heads != 0:
        raise ValueError(f"{op}: num_heads is {num_heads}; allowed: divisors of C = {channels}")
    for name, pair in (("window", window), ("shift", shift)):
        if len(pair) != 2:
            raise ValueError(
                f"{op}: {name} has {len(pair)} numbers; expected 2: [rows, columns]"
            )
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
