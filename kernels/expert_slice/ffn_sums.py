"""The small sums of `expert_ffn_backward`: gradients of routing weights and of biases."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import Config, Launch, accumulator
from ppmoe_ops.kernels.expert_slice.configs import BIAS_GRADIENT, WEIGHT_SUMS
from ppmoe_ops.kernels.expert_slice.ffn_tiles import gathered_tile, listed
from ppmoe_ops.kernels.expert_slice.tiles import Plan


@triton.jit(do_not_specialize=["count", "capacity"])
def _bias_dots_kernel(
    grad,
    slots,
    tiles,
    bias,
    dots,
    count,
    capacity,
    width,
    stride_grad_t,
    stride_grad_h,
    stride_bias_e,
    stride_bias_h,
    TOP_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dots[r] = <grad[token(r)], bias[e]> for local rows.

    Fewest bytes: gradients of the tokens that have a local slot, and biases, read.
    """
    tile = tl.program_id(0)
    if tile >= tl.load(tiles + 3 * capacity):
        return
    expert = tl.load(tiles + tile).to(tl.int64)
    first, end = tl.load(tiles + capacity + tile), tl.load(tiles + 2 * capacity + tile)
    row = first + tl.arange(0, BLOCK_M)
    _, token, valid = listed(slots, row, end, count, TOP_K)
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=WIDE)
    for k in range(0, width, BLOCK_K):
        part = gathered_tile(
            grad, token, valid, k, width, stride_grad_t, stride_grad_h, False, BLOCK_K
        )
        at = k + tl.arange(0, BLOCK_K).to(tl.int64)
        from_bias = bias + expert * stride_bias_e + at * stride_bias_h
        share = tl.load(from_bias, mask=at < width, other=0.0).to(WIDE)
        # A row that is not valid is not multiplied: the bias may not be finite.
        total += tl.where(valid[:, None], part.to(WIDE) * share[None, :], 0.0)
    tl.store(dots + row, tl.sum(total, axis=1), mask=row < end)


@triton.jit(do_not_specialize=["count", "rows", "parts"])
def _weight_sums_kernel(inverse, dots, out, count, rows, parts, BLOCK: tl.constexpr):
    """out[slot] = sum over the parts of dots[part, row of slot], zero for a slot without a row.

    Fewest bytes: one int32 per slot and the parts of local rows read, T*K elements written.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    row = tl.load(inverse + slot, mask=slot < count, other=-1)
    local = (row >= 0) & (row < rows)
    total = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
    from_dots = dots + row.to(tl.int64)
    for _ in range(0, parts):
        total += tl.load(from_dots, mask=local, other=0.0)
        from_dots += tl.full((), 1, tl.int64) * rows
    tl.store(out + slot, total, mask=slot < count)


@triton.jit(do_not_specialize=["count", "rows"])
def _bias_sums_kernel(
    values,
    scale,
    slots,
    offsets,
    out,
    count,
    rows,
    width,
    stride_values_m,
    stride_values_n,
    TOP_K: tl.constexpr,
    GATHERED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[e, n] = sum over the rows r of e of values[r, n], or of scale[slot] values[token(r), n].

    Fewest bytes: the experts' rows read, L*N elements written.
    """
    columns = tl.cdiv(width, BLOCK_N)
    expert = tl.program_id(0) // columns
    at_n = ((tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_n = at_n < width
    low = tl.minimum(tl.maximum(tl.load(offsets + expert), 0), rows)
    high = tl.minimum(tl.maximum(tl.load(offsets + expert + 1), 0), rows)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
    for m in range(low, high, BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        slot, token, valid = listed(slots, row, high, count, TOP_K)
        at_m = token if GATHERED else row.to(tl.int64)
        inside = valid[:, None] & in_n[None, :]
        at = values + at_m[:, None] * stride_values_m + at_n[None, :] * stride_values_n
        part = tl.load(at, mask=inside, other=0.0).to(WIDE)
        if GATHERED:
            part *= tl.load(scale + slot, mask=valid, other=0.0).to(WIDE)[:, None]
        total += part
    to = out + expert.to(tl.int64) * width + at_n
    tl.store(to, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=in_n)


def bias_dots_launch(
    plan: Plan, grad: Tensor, bias: Tensor, dots: Tensor, top_k: int, config: Config
) -> Launch:
    """The call that fills the local rows of `dots` [R]."""
    arguments = {
        "grad": grad,
        "slots": plan.slots,
        "tiles": plan.tiles,
        "bias": bias,
        "dots": dots,
        "count": plan.slots.numel(),
        "capacity": plan.capacity,
        "width": grad.size(1),
        "stride_grad_t": grad.stride(0),
        "stride_grad_h": grad.stride(1),
        "stride_bias_e": bias.stride(0),
        "stride_bias_h": bias.stride(1),
        "TOP_K": top_k,
        "WIDE": accumulator(grad.dtype),
        "BLOCK_M": plan.block_m,
        "BLOCK_K": config.block_k,
    }
    return Launch(_bias_dots_kernel, plan.capacity, arguments, config)


def weight_sums_launch(plan: Plan, dots: Tensor, out: Tensor) -> Launch:
    """The call that fills `out` [T, K] from `dots` [parts, R]."""
    arguments = {
        "inverse": plan.inverse,
        "dots": dots,
        "out": out,
        "count": out.numel(),
        "rows": plan.rows,
        "parts": dots.size(0),
        "BLOCK": WEIGHT_SUMS.block_m,
    }
    programs = triton.cdiv(out.numel(), WEIGHT_SUMS.block_m)
    return Launch(_weight_sums_kernel, programs, arguments, WEIGHT_SUMS)


def bias_sums_launch(
    plan: Plan, values: Tensor, scale: Tensor | None, out: Tensor, top_k: int
) -> Launch:
    """The call that fills `out` [L, N]; with `scale`, `values` [T, N] is gathered and weighted."""
    arguments = {
        "values": values,
        "scale": scale,
        "slots": plan.slots,
        "offsets": plan.offsets,
        "out": out,
        "count": plan.slots.numel(),
        "rows": plan.rows,
        "width": out.size(1),
        "stride_values_m": values.stride(0),
        "stride_values_n": values.stride(1),
        "TOP_K": top_k,
        "GATHERED": scale is not None,
        "WIDE": accumulator(values.dtype),
        "BLOCK_M": BIAS_GRADIENT.block_m,
        "BLOCK_N": BIAS_GRADIENT.block_n,
    }
    programs = out.size(0) * triton.cdiv(out.size(1), BIAS_GRADIENT.block_n)
    return Launch(_bias_sums_kernel, programs, arguments, BIAS_GRADIENT)
