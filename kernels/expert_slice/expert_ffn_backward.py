"""`expert_ffn_backward` in Triton: all gradients from the pre-activation, without expert outputs.

Launches, of which only those that are needed are made: the plan; gathered output gradients times
w_out with the activation's derivative in the epilogue, which also gives the routing weights' dots
<activation, its gradient> by column tile; gradients of the rows and their sum over a token's
choices; the weights' gradients, which gather on the axis that they sum over; sums for the biases.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import Config, Gpu, Launch, accumulator, gpu_of, upcasts
from ppmoe_ops.kernels.expert_slice.activations import pointwise, slope
from ppmoe_ops.kernels.expert_slice.configs import (
    ACTIVATION_GRADIENT,
    DOTS,
    OUT_OF,
    WEIGHT_GRADIENT,
    ffn_load,
)
from ppmoe_ops.kernels.expert_slice.expert_ffn import (
    combine_launch,
    out_of_experts_launch,
    persistent,
)
from ppmoe_ops.kernels.expert_slice.ffn_sums import (
    bias_dots_launch,
    bias_sums_launch,
    weight_sums_launch,
)
from ppmoe_ops.kernels.expert_slice.ffn_tiles import (
    gathered_tile,
    listed,
    product,
    weight_argument,
    weight_tile,
)
from ppmoe_ops.kernels.expert_slice.tiles import BAND, Plan, make_plan, prepare, tile_at
from ppmoe_ops.ops.expert_slice.activations import GATED
from ppmoe_ops.ops.expert_slice.expert_ffn import reserved_rows
from ppmoe_ops.ops.expert_slice.expert_ffn_backward import check_backward, empty_gradients


@triton.jit(do_not_specialize=["count", "capacity", "rows"])
def _activation_gradient_kernel(
    grad,
    slots,
    tiles,
    scale,
    weight,
    pre,
    pre_grad,
    weighted,
    dots,
    count,
    capacity,
    rows,
    width_in,
    width,
    stride_grad_t,
    stride_grad_h,
    stride_pre_r,
    stride_pre_n,
    stride_weight_e,
    stride_weight_n,
    stride_weight_k,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRE_GRAD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WANTS_DOTS: tl.constexpr,
    WAY: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """With u = w_out[e]^T grad[token(r)], a = activation(pre[r]) and s the routing weight of r:

    pre_grad[r] = s * u * a'(pre[r]), weighted[r] = s * a, dots[column tile, r] = <u, a> over it.

    Fewest bytes: gradients of the tokens that have a local slot, weights of experts with rows and
    local rows of pre read; local rows of pre_grad and weighted written.
    """
    number = tl.load(tiles + 3 * capacity)
    columns = tl.cdiv(width, BLOCK_N)
    for index in range(tl.program_id(0), number * columns, tl.num_programs(0)):
        expert, first, end, column = tile_at(tiles, index, columns, number, capacity, BAND)
        row = first + tl.arange(0, BLOCK_M)
        slot, token, valid = listed(slots, row, end, count, TOP_K)
        at_n = column * BLOCK_N
        u = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
        if PRODUCT:
            for k in range(0, width_in, BLOCK_K):
                a = gathered_tile(
                    grad, token, valid, k, width_in, stride_grad_t, stride_grad_h, EVEN_K, BLOCK_K
                )
                b = weight_tile(
                    weight, expert, at_n, k, width, width_in, stride_weight_e, stride_weight_n,
                    stride_weight_k, WAY, EVEN_N and EVEN_K, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                u = product(a, b, u, UPCAST, WIDE)
        n = at_n + tl.arange(0, BLOCK_N).to(tl.int64)
        wide_row = row.to(tl.int64)
        inside = (row < end)[:, None] & (n < width)[None, :]
        share = tl.load(scale + slot, mask=valid, other=0.0).to(WIDE)[:, None]
        from_pre = pre + wide_row[:, None] * stride_pre_r + n[None, :] * stride_pre_n
        gate = tl.load(from_pre, mask=inside, other=0.0).to(WIDE)
        value = pointwise(gate, ACTIVATION)
        dtype = weighted.dtype.element_ty
        halves = 2 if GATED else 1
        to = pre_grad + wide_row[:, None] * (halves * width) + n[None, :]
        if GATED:
            up = tl.load(from_pre + width * stride_pre_n, mask=inside, other=0.0).to(WIDE)
            if PRE_GRAD:
                tl.store(to + width, (share * u * value).to(dtype), mask=inside)
                gate_grad = share * u * up * slope(gate, ACTIVATION)
                tl.store(to, gate_grad.to(dtype), mask=inside)
            value *= up
        elif PRE_GRAD:
            tl.store(to, (share * u * slope(gate, ACTIVATION)).to(dtype), mask=inside)
        if WEIGHTED:
            at = weighted + wide_row[:, None] * width + n[None, :]
            tl.store(at, (share * value).to(dtype), mask=inside)
        if WANTS_DOTS:
            dot = tl.sum(tl.where(inside, u * value, 0.0), axis=1)
            tl.store(dots + column.to(tl.int64) * rows + row, dot, mask=row < end)


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


def activation_gradient_launch(
    plan: Plan,
    grad: Tensor,
    scale: Tensor,
    w_out: Tensor,
    pre: Tensor,
    pre_grad: Tensor | None,
    weighted: Tensor | None,
    dots: Tensor | None,
    activation: str,
    config: Config,
    gpu: Gpu,
) -> Launch:
    """The call that fills those of `pre_grad`, `weighted` and `dots` [tiles, R] that are given."""
    width, turned = w_out.size(2), w_out.transpose(1, 2)
    weight, way = weight_argument(turned, config.block_n, config.block_k, gpu)
    given: dict[str, Any] = {"PRE_GRAD": pre_grad, "WEIGHTED": weighted, "WANTS_DOTS": dots}
    arguments: dict[str, Any] = {
        "grad": grad,
        "slots": plan.slots,
        "tiles": plan.tiles,
        "scale": scale,
        "weight": weight,
        "pre": pre,
        # What is not asked for is never written; its type is still looked at.
        "pre_grad": pre if pre_grad is None else pre_grad,
        "weighted": pre if weighted is None else weighted,
        "dots": dots,
        "count": plan.slots.numel(),
        "capacity": plan.capacity,
        "rows": plan.rows,
        "width_in": grad.size(1),
        "width": width,
        "stride_grad_t": grad.stride(0),
        "stride_grad_h": grad.stride(1),
        "stride_pre_r": pre.stride(0),
        "stride_pre_n": pre.stride(1),
        "stride_weight_e": turned.stride(0),
        "stride_weight_n": turned.stride(1),
        "stride_weight_k": turned.stride(2),
        "TOP_K": scale.size(1),
        "ACTIVATION": activation,
        "GATED": activation in GATED,
        "PRODUCT": pre_grad is not None or dots is not None,
        **{name: tensor is not None for name, tensor in given.items()},
        "WAY": way,
        "EVEN_N": width % config.block_n == 0,
        "EVEN_K": grad.size(1) % config.block_k == 0,
        "UPCAST": upcasts(grad.dtype),
        "WIDE": accumulator(grad.dtype),
        "BAND": BAND,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    programs = persistent(plan, width, config, gpu)
    return Launch(_activation_gradient_kernel, programs, arguments, config)


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


def expert_ffn_backward(
    grad: Tensor,
    x: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    pre: Tensor,
    activation: str,
    *needs: bool,
) -> tuple[Tensor, ...]:
    """Launch the gradients that are needed; the others come back with shape [0]."""
    op = "expert_ffn_backward"
    check_backward(grad, x, slots, offsets, weights, w_in, w_out, b_out, pre, activation)
    rows, device = reserved_rows(weights, w_out), x.device
    others = {"weights": weights, "w_in": w_in, "w_out": w_out, "b_out": b_out, "pre": pre}
    slots, offsets = prepare(op, x, slots, offsets, rows, grad=grad, **others)
    grads = empty_gradients(x, weights, w_in, w_out, needs)
    if rows == 0:
        return tuple(each.zero_() for each in grads)
    need_x, need_weights, need_w_in, need_b_in, need_w_out, need_b_out = needs
    grad_x, grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out = grads
    gpu, top_k, scale = gpu_of(device), weights.size(1), weights.contiguous()
    load = ffn_load(rows, w_out.size(0), grad, x, w_in, w_out)
    inner, out_of, outer = (
        table[x.element_size()][load] for table in (ACTIVATION_GRADIENT, OUT_OF, WEIGHT_GRADIENT)
    )
    plan = make_plan(slots, offsets, rows, inner)

    pre_grad = x.new_empty(rows, w_in.size(1)) if need_x or need_w_in or need_b_in else None
    weighted = x.new_empty(rows, w_out.size(2)) if need_w_out else None
    dots = None
    if need_weights:
        parts = triton.cdiv(w_out.size(2), inner.block_n)
        dots = weights.new_empty(parts + (b_out is not None), rows)
    if pre_grad is not None or weighted is not None or dots is not None:
        args = (plan, grad, scale, w_out, pre, pre_grad, weighted, dots, activation, inner, gpu)
        activation_gradient_launch(*args).run(device)
    if dots is not None:
        if b_out is not None:
            bias_dots_launch(plan, grad, b_out, dots[-1], top_k, DOTS).run(device)
        weight_sums_launch(plan, dots, grad_weights).run(device)
    if need_x:
        assert pre_grad is not None
        row_grad = x.new_empty(rows, x.size(1))
        turned = w_in.transpose(1, 2)
        out_of_experts_launch(plan, pre_grad, turned, None, None, row_grad, out_of, gpu).run(device)
        combine_launch(plan, row_grad, grad_x, top_k).run(device)
    if need_w_in:
        assert pre_grad is not None
        weight_gradient_launch(plan, pre_grad, x, grad_w_in, top_k, False, outer).run(device)
    if need_w_out:
        assert weighted is not None
        weight_gradient_launch(plan, grad, weighted, grad_w_out, top_k, True, outer).run(device)
    if need_b_in:
        assert pre_grad is not None
        bias_sums_launch(plan, pre_grad, None, grad_b_in, top_k).run(device)
    if need_b_out:
        bias_sums_launch(plan, grad, scale, grad_b_out, top_k).run(device)
    return grads
