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

from ppmoe_ops.kernels._launch import Config, Gpu, Launch, accumulator, column, gpu_of, upcasts
from ppmoe_ops.kernels._tune import MakeLaunch, Outputs, tuned
from ppmoe_ops.kernels.expert_slice.activations import pointwise, slope
from ppmoe_ops.kernels.expert_slice.configs import (
    ACTIVATION_GRADIENT,
    CANDIDATES,
    DOTS,
    FFN_WEIGHT_GRADIENT,
    OUT_OF,
    ffn_load,
)
from ppmoe_ops.kernels.expert_slice.expert_ffn import (
    out_of_experts_launch,
    persistent,
)
from ppmoe_ops.kernels.expert_slice.ffn_combine import combine_launch
from ppmoe_ops.kernels.expert_slice.ffn_sums import (
    bias_dots_launch,
    bias_sums_launch,
    weight_sums_launch,
)
from ppmoe_ops.kernels.expert_slice.ffn_tiles import (
    dense_rows,
    gathered_tile,
    listed,
    product,
    weight_argument,
    weight_tile,
)
from ppmoe_ops.kernels.expert_slice.ffn_weight_gradient import weight_gradient_launch
from ppmoe_ops.kernels.expert_slice.tiles import BAND, Plan, make_plan, prepare, tile_at
from ppmoe_ops.ops.expert_slice.activations import GATED
from ppmoe_ops.ops.expert_slice.expert_ffn import reserved_rows
from ppmoe_ops.ops.expert_slice.expert_ffn_backward import check_backward, empty_gradients


@triton.jit
def _finish(
    u,
    share,
    pre,
    pre_grad,
    weighted,
    row,
    end,
    at_n,
    width,
    stride_pre_r,
    stride_pre_n,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRE_GRAD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Stores pre_grad and weighted of a tile; returns <u, activation> of its rows."""
    n = at_n + tl.arange(0, BLOCK_N).to(tl.int64)
    half = tl.full((), 1, tl.int64) * width
    wide_row = row.to(tl.int64)[:, None]
    inside = (row < end)[:, None] & (n < width)[None, :]
    from_pre = pre + wide_row * stride_pre_r + n[None, :] * stride_pre_n
    gate = tl.load(from_pre, mask=inside, other=0.0).to(WIDE)
    value = pointwise(gate, ACTIVATION)
    dtype = weighted.dtype.element_ty
    halves = 2 if GATED else 1
    to = pre_grad + wide_row * (halves * half) + n[None, :]
    if GATED:
        up = tl.load(from_pre + half * stride_pre_n, mask=inside, other=0.0).to(WIDE)
        if PRE_GRAD:
            tl.store(to + half, (share[:, None] * u * value).to(dtype), mask=inside)
            gate_grad = share[:, None] * u * up * slope(gate, ACTIVATION)
            tl.store(to, gate_grad.to(dtype), mask=inside)
        value *= up
    elif PRE_GRAD:
        tl.store(to, (share[:, None] * u * slope(gate, ACTIVATION)).to(dtype), mask=inside)
    if WEIGHTED:
        at = weighted + wide_row * width + n[None, :]
        tl.store(at, (share[:, None] * value).to(dtype), mask=inside)
    return tl.sum(tl.where(inside, u * value, 0.0), axis=1)


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
        share = tl.load(scale + slot, mask=valid, other=0.0).to(WIDE)
        # Half the columns at a time: gate, up and gradient of all would not fit the registers.
        left, right = tl.split(tl.permute(tl.reshape(u, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        dot = _finish(
            left, share, pre, pre_grad, weighted, row, end, at_n, width, stride_pre_r,
            stride_pre_n, ACTIVATION, GATED, PRE_GRAD, WEIGHTED, WIDE, BLOCK_N // 2,
        )  # fmt: skip
        dot += _finish(
            right, share, pre, pre_grad, weighted, row, end, at_n + BLOCK_N // 2, width,
            stride_pre_r, stride_pre_n, ACTIVATION, GATED, PRE_GRAD, WEIGHTED, WIDE, BLOCK_N // 2,
        )  # fmt: skip
        if WANTS_DOTS:
            tl.store(dots + column.to(tl.int64) * rows + row, dot, mask=row < end)


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
    grad, x = dense_rows(grad), dense_rows(x)
    gpu, top_k, scale = gpu_of(device), weights.size(1), weights.contiguous()
    load = ffn_load(gpu, rows, w_out.size(0), grad, x, w_in, w_out)
    inner, out_of, outer = (
        column(table, x.element_size(), load)
        for table in (ACTIVATION_GRADIENT, OUT_OF, FFN_WEIGHT_GRADIENT)
    )
    plan = make_plan(slots, offsets, rows, inner)

    def run(name: str, config: Config, make: MakeLaunch, outputs: Outputs, *facts: object) -> None:
        facts = (x.dtype, load, f"{x.size(1)}x{w_out.size(2)}", *facts)
        tuned(name, config, make, outputs, CANDIDATES[name], *facts).run(device)

    pre_grad = x.new_empty(rows, w_in.size(1)) if need_x or need_w_in or need_b_in else None
    weighted = x.new_empty(rows, w_out.size(2)) if need_w_out else None
    dots = None
    if need_weights:
        parts = triton.cdiv(w_out.size(2), inner.block_n)
        dots = weights.new_empty(parts + (b_out is not None), rows)
    if pre_grad is not None or weighted is not None or dots is not None:

        def make_inner(config: Config) -> Launch:
            args = (plan, grad, scale, w_out, pre, pre_grad, weighted, dots, activation)
            return activation_gradient_launch(*args, config, gpu)

        by_tile = None if dots is None else dots[: triton.cdiv(w_out.size(2), inner.block_n)]
        wanted = (pre_grad is not None, weighted is not None, dots is not None)
        run("activation gradient", inner, make_inner, (pre_grad, weighted, by_tile), activation,
            "".join(str(int(each)) for each in wanted))  # fmt: skip
    if dots is not None:
        if b_out is not None:
            bias_dots_launch(plan, grad, b_out, dots[-1], top_k, DOTS).run(device)
        weight_sums_launch(plan, dots, grad_weights).run(device)
    if need_x:
        assert pre_grad is not None
        row_grad = x.new_empty(rows, x.size(1))
        turned = w_in.transpose(1, 2)
        into = (plan, pre_grad, turned, None, None, row_grad)
        run("out of", out_of, lambda c: out_of_experts_launch(*into, c, gpu), (row_grad,), "rows")
        combine_launch(plan, row_grad, grad_x, top_k).run(device)
    if need_w_in:
        assert pre_grad is not None
        left = (plan, pre_grad, x, grad_w_in, top_k, False)
        run(
            "weight gradient", outer, lambda c: weight_gradient_launch(*left, c), (grad_w_in,), "in"
        )
    if need_w_out:
        assert weighted is not None
        right = (plan, grad, weighted, grad_w_out, top_k, True)
        run(
            "weight gradient",
            outer,
            lambda c: weight_gradient_launch(*right, c),
            (grad_w_out,),
            "out",
        )
    if need_b_in:
        assert pre_grad is not None
        bias_sums_launch(plan, pre_grad, None, grad_b_in, top_k).run(device)
    if need_b_out:
        bias_sums_launch(plan, grad, scale, grad_b_out, top_k).run(device)
    return grads
