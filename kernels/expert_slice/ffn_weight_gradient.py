"""Gradients of the expert layer's weights: products that gather on the axis that they sum over."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import Config, Launch, accumulator, upcasts
from ppmoe_ops.kernels.expert_slice.ffn_tiles import listed, product
from ppmoe_ops.kernels.expert_slice.tiles import Plan


@triton.jit(do_not_specialize=["count", "rows"])
def _weight_gradient_kernel(
    left,
    right,
    slots,
    offsets,
    out,
    count,
    rows,
    width_left,
    width_right,
    stride_left_m,
    stride_left_n,
    stride_right_m,
    stride_right_n,
    TOP_K: tl.constexpr,
    LEFT_GATHERED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e, p, q] = sum over the rows r of e of left[., p] right[., q], one side being gathered.

    The gathered side is read at token(r), the other at r; zero for an expert without rows.

    Fewest bytes: the rows of both sides read, L*P*Q elements written.
    """
    tiles_p = tl.cdiv(width_left, BLOCK_N)
    tiles_q = tl.cdiv(width_right, BLOCK_K)
    expert = tl.program_id(0) // (tiles_p * tiles_q)
    inside = tl.program_id(0) % (tiles_p * tiles_q)
    at_p = ((inside // tiles_q) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    at_q = ((inside % tiles_q) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    in_p, in_q = at_p < width_left, at_q < width_right
    low = tl.minimum(tl.maximum(tl.load(offsets + expert), 0), rows)
    high = tl.minimum(tl.maximum(tl.load(offsets + expert + 1), 0), rows)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=WIDE)
    for m in range(low, high, BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        _, token, valid = listed(slots, row, high, count, TOP_K)
        wide_row = row.to(tl.int64)
        at_left = token if LEFT_GATHERED else wide_row
        at_right = wide_row if LEFT_GATHERED else token
        # Rows of a bad slot, and those past the expert's last, count as zeros on both sides.
        from_left = left + at_left[:, None] * stride_left_m + at_p[None, :] * stride_left_n
        from_right = right + at_right[:, None] * stride_right_m + at_q[None, :] * stride_right_n
        if EVEN_N:
            a = tl.load(from_left, mask=valid[:, None], other=0.0)
        else:
            a = tl.load(from_left, mask=valid[:, None] & in_p[None, :], other=0.0)
        if EVEN_K:
            b = tl.load(from_right, mask=valid[:, None], other=0.0)
        else:
            b = tl.load(from_right, mask=valid[:, None] & in_q[None, :], other=0.0)
        total = product(tl.trans(a), b, total, UPCAST, WIDE)
    to = out + (expert.to(tl.int64) * width_left + at_p)[:, None] * width_right + at_q[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=in_p[:, None] & in_q[None, :])


def weight_gradient_launch(
    plan: Plan,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    top_k: int,
    left_gathered: bool,
    config: Config,
) -> Launch:
    """The call that fills `out` [L, P, Q], which is contiguous."""
    experts, width_left, width_right = out.shape
    arguments = {
        "left": left,
        "right": right,
        "slots": plan.slots,
        "offsets": plan.offsets,
        "out": out,
        "count": plan.slots.numel(),
        "rows": plan.rows,
        "width_left": width_left,
        "width_right": width_right,
        "stride_left_m": left.stride(0),
        "stride_left_n": left.stride(1),
        "stride_right_m": right.stride(0),
        "stride_right_n": right.stride(1),
        "TOP_K": top_k,
        "LEFT_GATHERED": left_gathered,
        "EVEN_N": width_left % config.block_n == 0,
        "EVEN_K": width_right % config.block_k == 0,
        "UPCAST": upcasts(left.dtype),
        "WIDE": accumulator(left.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    tiles = triton.cdiv(width_left, config.block_n) * triton.cdiv(width_right, config.block_k)
    return Launch(_weight_gradient_kernel, experts * tiles, arguments, config)
