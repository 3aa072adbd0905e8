"""What the products of the expert layer load: tiles of gathered rows and of an expert's weights."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import Gpu, described

# How weights [L, N, K_in] are read: by the copy engine along K_in or along N, or by pointers.
ALONG_K, ALONG_N, POINTERS = 1, 2, 0


@triton.jit
def weight_tile(
    weight,
    expert,
    at_n,
    at_k,
    width_n,
    width_k,
    stride_e,
    stride_n,
    stride_k,
    WAY: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K, BLOCK_N] of one expert's weight from (at_n, at_k) on; zeros past its last k."""
    if WAY == 1:
        tile = weight.load([expert, at_n, at_k])
        return tl.trans(tl.reshape(tile, (BLOCK_N, BLOCK_K)))
    elif WAY == 2:
        tile = weight.load([expert, at_k, at_n])
        return tl.reshape(tile, (BLOCK_K, BLOCK_N))
    else:
        n = at_n + tl.arange(0, BLOCK_N).to(tl.int64)
        k = at_k + tl.arange(0, BLOCK_K).to(tl.int64)
        base = weight + expert.to(tl.int64) * stride_e
        at = base + k[:, None] * stride_k + n[None, :] * stride_n
        if EVEN:
            return tl.load(at)
        return tl.load(at, mask=(k < width_k)[:, None] & (n < width_n)[None, :], other=0.0)


@triton.jit
def gathered_tile(
    base, token, valid, at_k, width, stride_t, stride_k, EVEN: tl.constexpr, BLOCK_K: tl.constexpr
):
    """[rows, BLOCK_K] of the rows `token`; zeros where `valid` is not, and past the last k."""
    k = at_k + tl.arange(0, BLOCK_K).to(tl.int64)
    at = base + token[:, None] * stride_t + k[None, :] * stride_k
    if EVEN:
        return tl.load(at, mask=valid[:, None], other=0.0)
    return tl.load(at, mask=valid[:, None] & (k < width)[None, :], other=0.0)


@triton.jit
def product(a, b, total, UPCAST: tl.constexpr, WIDE: tl.constexpr):
    """total + a @ b, without a rounding to tf32."""
    if UPCAST:
        a, b = a.to(WIDE), b.to(WIDE)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=WIDE)


@triton.jit
def listed(slots, row, end, count, TOP_K: tl.constexpr):
    """Slot, its token and whether it is one, for rows of a tile that ends at `end`."""
    slot = tl.load(slots + row, mask=row < end, other=-1)
    valid = (slot >= 0) & (slot < count)
    slot = tl.where(valid, slot, 0)
    return slot, (slot // TOP_K).to(tl.int64), valid


def weight_argument(weight: Tensor, block_n: int, block_k: int, gpu: Gpu) -> tuple[Any, int]:
    """The argument `weight` of a kernel, and its WAY."""
    # Wider elements are multiplied out of registers, into which pointers load without a detour.
    if gpu.tma and weight.element_size() == 2:
        along_k = described(weight, 2, [1, block_n, block_k])
        if along_k is not None:
            return along_k, ALONG_K
        along_n = described(weight, 1, [1, block_k, block_n])
        if along_n is not None:
            return along_n, ALONG_N
    return weight, POINTERS


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where a row is not contiguous: an expanded gradient, say.

    One copy of T*H elements, against products that would load one element at a time.
    """
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
