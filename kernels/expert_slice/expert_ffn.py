"""`expert_ffn_forward` in Triton: rows are gathered by the first product, never stored.

Four or five launches: the plan (see `tiles.py`), the product into the experts with bias, gate and
activation in its epilogue, the product out of them with bias and routing weight in its own, and a
sum over each token's choices in the order of k. The products run a persistent grid over the plan's
tiles.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import (
    Config,
    Gpu,
    Launch,
    accumulator,
    column,
    described,
    gpu_of,
    upcasts,
)
from ppmoe_ops.kernels._tune import tuned
from ppmoe_ops.kernels.expert_slice.activations import pointwise
from ppmoe_ops.kernels.expert_slice.configs import (
    CANDIDATES,
    INTO,
    OUT_OF,
    ffn_load,
)
from ppmoe_ops.kernels.expert_slice.ffn_combine import combine_launch
from ppmoe_ops.kernels.expert_slice.ffn_tiles import (
    ALONG_N,
    POINTERS,
    dense_rows,
    gathered_tile,
    listed,
    product,
    weight_argument,
    weight_tile,
)
from ppmoe_ops.kernels.expert_slice.tiles import BAND, Plan, make_plan, prepare, tile_at
from ppmoe_ops.ops.expert_slice.activations import GATED
from ppmoe_ops.ops.expert_slice.expert_ffn import check_forward, reserved_rows


@triton.jit(do_not_specialize=["count", "capacity"])
def _into_experts_kernel(
    x,
    slots,
    tiles,
    weight,
    bias,
    pre,
    act,
    count,
    capacity,
    width_in,
    width,
    stride_x_t,
    stride_x_h,
    stride_weight_e,
    stride_weight_n,
    stride_weight_k,
    stride_bias_e,
    stride_bias_n,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SAVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    """act[r] = activation(w_in[e] x[token(r)] + b_in[e]); pre[r], its argument, where it is saved.

    Fewest bytes: the tokens that have a local slot and the weights of experts with rows read, act
    and pre written for local rows.
    """
    number = tl.load(tiles + 3 * capacity)
    columns = tl.cdiv(width, BLOCK_N)
    half = tl.full((), 1, tl.int64) * width
    for index in range(tl.program_id(0), number * columns, tl.num_programs(0)):
        expert, first, end, column = tile_at(tiles, index, columns, number, capacity, BAND)
        row = first + tl.arange(0, BLOCK_M)
        _, token, valid = listed(slots, row, end, count, TOP_K)
        at_n = column * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
        for k in range(0, width_in, BLOCK_K):
            a = gathered_tile(x, token, valid, k, width_in, stride_x_t, stride_x_h, EVEN_K, BLOCK_K)
            b = weight_tile(
                weight, expert, at_n, k, width, width_in, stride_weight_e, stride_weight_n,
                stride_weight_k, WAY, EVEN_N and EVEN_K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            total = product(a, b, total, UPCAST, WIDE)
            if GATED:
                # Past the gate's last column lies the other half, which is masked when stored.
                b = weight_tile(
                    weight, expert, at_n + width, k, 2 * width, width_in, stride_weight_e,
                    stride_weight_n, stride_weight_k, WAY, EVEN_N and EVEN_K, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                up = product(a, b, up, UPCAST, WIDE)
        n = at_n + tl.arange(0, BLOCK_N).to(tl.int64)
        in_n = n < width
        if HAS_BIAS:
            from_bias = bias + expert.to(tl.int64) * stride_bias_e
            total += tl.load(from_bias + n * stride_bias_n, mask=in_n, other=0.0).to(WIDE)[None, :]
            if GATED:
                from_bias += half * stride_bias_n
                up += tl.load(from_bias + n * stride_bias_n, mask=in_n, other=0.0).to(WIDE)[None, :]
        inside = (row < end)[:, None] & in_n[None, :]
        wide_row = row.to(tl.int64)[:, None]
        dtype = act.dtype.element_ty
        if SAVE:
            halves = 2 if GATED else 1
            to = pre + wide_row * (halves * width) + n[None, :]
            tl.store(to, total.to(dtype), mask=inside)
            if GATED:
                tl.store(to + half, up.to(dtype), mask=inside)
        value = pointwise(total, ACTIVATION)
        if GATED:
            value *= up
        tl.store(act + wide_row * width + n[None, :], value.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["count", "capacity"])
def _out_of_experts_kernel(
    rows,
    slots,
    tiles,
    weight,
    bias,
    scale,
    out,
    count,
    capacity,
    width_in,
    width,
    stride_weight_e,
    stride_weight_n,
    stride_weight_k,
    stride_bias_e,
    stride_bias_n,
    ROWS_DESCRIBED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WAY: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[r] = scale[slot(r)] * (weight[e] rows[r] + bias[e]) for the local rows r.

    Fewest bytes: local rows and the weights of experts with rows read, local rows of out written.
    """
    number = tl.load(tiles + 3 * capacity)
    columns = tl.cdiv(width, BLOCK_N)
    for index in tl.range(
        tl.program_id(0), number * columns, tl.num_programs(0), warp_specialize=SPECIALIZE
    ):
        expert, first, end, column = tile_at(tiles, index, columns, number, capacity, BAND)
        row = first + tl.arange(0, BLOCK_M)
        at_n = column * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
        for k in range(0, width_in, BLOCK_K):
            # Rows past the expert's last are another's, or untouched: they are never stored.
            if ROWS_DESCRIBED:
                a = rows.load([first, k])
            else:
                a = gathered_tile(
                    rows, row.to(tl.int64), row < end, k, width_in, width_in, 1, EVEN_K, BLOCK_K
                )
            b = weight_tile(
                weight, expert, at_n, k, width, width_in, stride_weight_e, stride_weight_n,
                stride_weight_k, WAY, EVEN_N and EVEN_K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            total = product(a, b, total, UPCAST, WIDE)
        n = at_n + tl.arange(0, BLOCK_N).to(tl.int64)
        in_n = n < width
        if HAS_BIAS:
            from_bias = bias + expert.to(tl.int64) * stride_bias_e + n * stride_bias_n
            total += tl.load(from_bias, mask=in_n, other=0.0).to(WIDE)[None, :]
        if HAS_SCALE:
            slot = tl.load(slots + row, mask=row < end, other=-1)
            valid = (slot >= 0) & (slot < count)
            total *= tl.load(scale + slot, mask=valid, other=0.0).to(WIDE)[:, None]
        to = out + row.to(tl.int64)[:, None] * width + n[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & in_n[None, :])


def persistent(plan: Plan, width: int, config: Config, gpu: Gpu) -> int:
    """A persistent grid: as many programs as fit at once, or as there can be tiles."""
    if config.block_m != plan.block_m:
        raise ValueError(f"BLOCK_M is {config.block_m}; allowed: the plan's, {plan.block_m}")
    several = 2 if config.num_warps <= 4 and config.block_m <= 64 else 1
    at_once = gpu.multiprocessors * (config.programs or several)
    return min(at_once, plan.capacity * triton.cdiv(width, config.block_n))


def into_experts_launch(
    plan: Plan,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    pre: Tensor | None,
    act: Tensor,
    top_k: int,
    activation: str,
    config: Config,
    gpu: Gpu,
) -> Launch:
    """The call that fills `act` [R, F] and, if it is given, `pre` [R, F or 2F]."""
    width = act.size(1)
    weight, way = weight_argument(w_in, config.block_n, config.block_k, gpu)
    # The second half begins where the copy engine may not begin a row.
    if activation in GATED and way == ALONG_N and width * w_in.element_size() % 16:
        weight, way = w_in, POINTERS
    arguments: dict[str, Any] = {
        "x": x,
        "slots": plan.slots,
        "tiles": plan.tiles,
        "weight": weight,
        "bias": b_in,
        "pre": pre,
        "act": act,
        "count": plan.slots.numel(),
        "capacity": plan.capacity,
        "width_in": x.size(1),
        "width": width,
        "stride_x_t": x.stride(0),
        "stride_x_h": x.stride(1),
        "stride_weight_e": w_in.stride(0),
        "stride_weight_n": w_in.stride(1),
        "stride_weight_k": w_in.stride(2),
        "stride_bias_e": 0 if b_in is None else b_in.stride(0),
        "stride_bias_n": 0 if b_in is None else b_in.stride(1),
        "TOP_K": top_k,
        "ACTIVATION": activation,
        "GATED": activation in GATED,
        "SAVE": pre is not None,
        "HAS_BIAS": b_in is not None,
        "WAY": way,
        "EVEN_N": width % config.block_n == 0,
        "EVEN_K": x.size(1) % config.block_k == 0,
        "UPCAST": upcasts(x.dtype),
        "WIDE": accumulator(x.dtype),
        "BAND": BAND,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    return Launch(_into_experts_kernel, persistent(plan, width, config, gpu), arguments, config)


def out_of_experts_launch(
    plan: Plan,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    config: Config,
    gpu: Gpu,
) -> Launch:
    """The call that fills the local rows of `out` [R, N] from `rows` [R, K_in], both contiguous."""
    width, width_in = out.size(1), rows.size(1)
    argument, way = weight_argument(weight, config.block_n, config.block_k, gpu)
    block = [config.block_m, config.block_k]
    described_rows = described(rows, 1, block) if gpu.tma and rows.element_size() == 2 else None
    arguments: dict[str, Any] = {
        "rows": rows if described_rows is None else described_rows,
        "slots": plan.slots,
        "tiles": plan.tiles,
        "weight": argument,
        "bias": bias,
        "scale": scale,
        "out": out,
        "count": plan.slots.numel(),
        "capacity": plan.capacity,
        "width_in": width_in,
        "width": width,
        "stride_weight_e": weight.stride(0),
        "stride_weight_n": weight.stride(1),
        "stride_weight_k": weight.stride(2),
        "stride_bias_e": 0 if bias is None else bias.stride(0),
        "stride_bias_n": 0 if bias is None else bias.stride(1),
        "ROWS_DESCRIBED": described_rows is not None,
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": scale is not None,
        "WAY": way,
        "EVEN_N": width % config.block_n == 0,
        "EVEN_K": width_in % config.block_k == 0,
        "UPCAST": upcasts(rows.dtype),
        "WIDE": accumulator(rows.dtype),
        "SPECIALIZE": config.specialize and described_rows is not None and way != POINTERS,
        "BAND": BAND,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    return Launch(_out_of_experts_kernel, persistent(plan, width, config, gpu), arguments, config)


def expert_ffn_forward(
    x: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Launch `expert_ffn_forward`; arguments and results as in its contract."""
    op = "expert_ffn"
    check_forward(x, slots, offsets, weights, w_in, b_in, w_out, b_out, activation)
    rows = reserved_rows(weights, w_out)
    slots, offsets = prepare(
        op, x, slots, offsets, rows, weights=weights, w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out
    )
    top_k, gpu, x = weights.size(1), gpu_of(x.device), dense_rows(x)
    pre = x.new_empty(rows if save else 0, w_in.size(1))
    out = x.new_empty(x.shape)
    if rows == 0:
        return out.zero_(), pre
    load = ffn_load(gpu, rows, w_out.size(0), x, w_in, w_out)
    into, out_of = (column(table, x.element_size(), load) for table in (INTO, OUT_OF))
    plan = make_plan(slots, offsets, rows, into)
    act = x.new_empty(rows, w_out.size(2))
    saved, shape = pre if save else None, f"{x.size(1)}x{w_out.size(2)}"
    if act.numel() or pre.numel():

        def make_into(config: Config) -> Launch:
            args = (plan, x, w_in, b_in, saved, act, top_k, activation, config, gpu)
            return into_experts_launch(*args)

        facts = (x.dtype, load, shape, activation, f"save={save}")
        tuned("into", into, make_into, (act, saved), CANDIDATES["into"], *facts).run(x.device)
    result = x.new_empty(rows, x.size(1))
    scale = weights.contiguous()

    def make_out(config: Config) -> Launch:
        return out_of_experts_launch(plan, act, w_out, b_out, scale, result, config, gpu)

    facts = (x.dtype, load, shape)
    tuned("out of", out_of, make_out, (result,), CANDIDATES["out of"], *facts).run(x.device)
    combine_launch(plan, result, out, top_k).run(x.device)
    return out, pre
