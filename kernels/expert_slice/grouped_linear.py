"""`grouped_linear` and its backward in Triton: one launch over the tiles of all experts.

The host never reads `offsets`. A grid of ceil-bounded size is launched and every program finds its
tile by itself: rows are cut into groups (before the first expert, one per expert, after the last),
and the tiles of group g start at tile floor(first row of g / BLOCK_M) + g. That leaves room for
ceil(rows of g / BLOCK_M) tiles in every group, needs no prefix sum, and wastes at most one program
a group and column, which returns at once. Bad offsets are clamped to [0, R]: rows may then be left
unwritten, but no address outside the tensors is formed.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import Config, Launch, accumulator, choose, load_of, upcasts
from ppmoe_ops.kernels._tune import tuned
from ppmoe_ops.kernels.expert_slice.configs import (
    BIAS_GRADIENT,
    CANDIDATES,
    LINEAR,
    WEIGHT_GRADIENT,
)
from ppmoe_ops.ops.expert_slice.grouped_linear import check_backward, check_forward, read_bounds

BAND = 8  # row tiles that share a weight tile through the L2 cache
EXPERTS_AT_ONCE = 1024  # offsets that a program looks at in one step to find its tile


@triton.jit
def _bound(offsets, index, experts, count):
    """First row of the expert `index`; 0 for an index below 0, `count` for one above `experts`."""
    inside = (index >= 0) & (index <= experts)
    bound = tl.load(offsets + index, mask=inside, other=0)
    bound = tl.where(index > experts, count, bound)
    return tl.minimum(tl.maximum(bound, 0), count)


@triton.jit
def _find_tile(offsets, tile, experts, count, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of a tile (-1 and `experts` hold the rows of none), its first row, its row bounds."""
    starts = 0
    for first in range(0, experts + 2, BLOCK_L):
        group = first + tl.arange(0, BLOCK_L)
        begin = _bound(offsets, group - 1, experts, count)
        starts += tl.sum(((begin // BLOCK_M + group <= tile) & (group < experts + 2)).to(tl.int32))
    expert = starts - 2
    low = _bound(offsets, expert, experts, count)
    high = _bound(offsets, expert + 1, experts, count)
    row = low.to(tl.int64) + (tile - low // BLOCK_M - expert - 1).to(tl.int64) * BLOCK_M
    return expert, row, low, high


@triton.jit(do_not_specialize=["count", "experts"])
def _grouped_linear_kernel(
    rows,
    offsets,
    weight,
    bias,
    out,
    count,
    experts,
    width_out,
    width_in,
    stride_rows_m,
    stride_rows_k,
    stride_weight_e,
    stride_weight_n,
    stride_weight_k,
    stride_bias_e,
    stride_bias_n,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m, n] = sum_k rows[m, k] weight[e, n, k] + bias[e, n]; zero for rows of no expert.

    Fewest bytes: the experts' rows and the weights of experts with rows read, R*N elements written.
    """
    # Programs run down a band of row tiles before they go to the next column, so that the tiles of
    # one expert meet at the same weights.
    columns = tl.cdiv(width_out, BLOCK_N)
    tiles = tl.num_programs(0) // columns
    band = tl.program_id(0) // (BAND * columns)
    inside = tl.program_id(0) % (BAND * columns)
    height = tl.minimum(tiles - band * BAND, BAND)
    tile = band * BAND + inside % height
    column = inside // height

    expert, row, low, high = _find_tile(offsets, tile, experts, count, BLOCK_L, BLOCK_M)
    if (row < low) | (row >= high):
        return
    at_m = row + tl.arange(0, BLOCK_M)
    at_n = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    at_k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_n = at_n < width_out
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
    if (expert >= 0) & (expert < experts):
        # Rows past the expert's last are read (within the tensor) and never stored.
        safe_m = tl.minimum(at_m, count - 1)
        from_rows = rows + safe_m[:, None] * stride_rows_m + at_k[None, :] * stride_rows_k
        from_weight = weight + expert.to(tl.int64) * stride_weight_e
        from_weight += at_k[:, None] * stride_weight_k + at_n[None, :] * stride_weight_n
        step = tl.full((), BLOCK_K, tl.int64)
        for k in range(0, width_in, BLOCK_K):
            # A mask that is known to hold costs nothing; one that must be evaluated does.
            in_k = (at_k < width_in - k) | EVEN_K
            a = tl.load(from_rows, mask=in_k[None, :], other=0.0)
            b = tl.load(from_weight, mask=in_k[:, None] & (in_n | EVEN_N)[None, :], other=0.0)
            if UPCAST:
                a, b = a.to(WIDE), b.to(WIDE)
            total = tl.dot(a, b, total, input_precision="ieee", out_dtype=WIDE)
            from_rows += step * stride_rows_k
            from_weight += step * stride_weight_k
        if HAS_BIAS:
            from_bias = bias + expert.to(tl.int64) * stride_bias_e + at_n * stride_bias_n
            total += tl.load(from_bias, mask=in_n, other=0.0).to(WIDE)[None, :]
    to = out + at_m[:, None] * width_out + at_n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(at_m < high)[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["count", "experts"])
def _grouped_linear_weight_gradient_kernel(
    grad,
    rows,
    offsets,
    out,
    count,
    experts,
    width_out,
    width_in,
    stride_grad_m,
    stride_grad_n,
    stride_rows_m,
    stride_rows_k,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e, n, k] = sum over the rows m of expert e of grad[m, n] rows[m, k]; zero without rows.

    Fewest bytes: the experts' rows of grad and rows read, L*N*K_in elements written.
    """
    tiles_n = tl.cdiv(width_out, BLOCK_N)
    tiles_k = tl.cdiv(width_in, BLOCK_K)
    expert = tl.program_id(0) // (tiles_n * tiles_k)
    inside = tl.program_id(0) % (tiles_n * tiles_k)
    at_n = ((inside // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    at_k = ((inside % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    in_n = at_n < width_out
    in_k = at_k < width_in
    low = _bound(offsets, expert, experts, count)
    high = _bound(offsets, expert + 1, experts, count)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=WIDE)
    at_m = low.to(tl.int64) + tl.arange(0, BLOCK_M)
    from_grad = grad + at_m[:, None] * stride_grad_m + at_n[None, :] * stride_grad_n
    from_rows = rows + at_m[:, None] * stride_rows_m + at_k[None, :] * stride_rows_k
    step = tl.full((), BLOCK_M, tl.int64)
    for m in range(low, high, BLOCK_M):
        in_m = m + tl.arange(0, BLOCK_M) < high
        if EVEN_N:
            a = tl.load(from_grad, mask=in_m[:, None], other=0.0)
        else:
            a = tl.load(from_grad, mask=in_m[:, None] & in_n[None, :], other=0.0)
        if EVEN_K:
            b = tl.load(from_rows, mask=in_m[:, None], other=0.0)
        else:
            b = tl.load(from_rows, mask=in_m[:, None] & in_k[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(WIDE), b.to(WIDE)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee", out_dtype=WIDE)
        from_grad += step * stride_grad_m
        from_rows += step * stride_rows_m
    to = out + (expert.to(tl.int64) * width_out + at_n)[:, None] * width_in + at_k[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=in_n[:, None] & in_k[None, :])


@triton.jit(do_not_specialize=["count", "experts"])
def _grouped_linear_bias_gradient_kernel(
    grad,
    offsets,
    out,
    count,
    experts,
    width_out,
    stride_grad_m,
    stride_grad_n,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[e, n] = sum over the rows m of expert e of grad[m, n].

    Fewest bytes: the experts' rows of grad read, L*N elements written.
    """
    tiles_n = tl.cdiv(width_out, BLOCK_N)
    expert = tl.program_id(0) // tiles_n
    at_n = ((tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_n = at_n < width_out
    low = _bound(offsets, expert, experts, count)
    high = _bound(offsets, expert + 1, experts, count)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
    for m in range(low, high, BLOCK_M):
        at_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        from_grad = grad + at_m[:, None] * stride_grad_m + at_n[None, :] * stride_grad_n
        inside = (at_m < high)[:, None] & in_n[None, :]
        total += tl.load(from_grad, mask=inside, other=0.0).to(WIDE)
    to = out + expert.to(tl.int64) * width_out + at_n
    tl.store(to, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=in_n)


def linear_launch(
    rows: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: Config | None = None,
) -> Launch:
    """The call that fills `out` [R, N], which is contiguous; `config` replaces the table's."""
    count, width_out = out.shape
    experts, _, width_in = weight.shape
    config = config or choose(LINEAR, experts, rows, weight)
    tiles = count // config.block_m + experts + 2
    arguments = {
        "rows": rows,
        "offsets": offsets,
        "weight": weight,
        "bias": bias,
        "out": out,
        "count": count,
        "experts": experts,
        "width_out": width_out,
        "width_in": width_in,
        "stride_rows_m": rows.stride(0),
        "stride_rows_k": rows.stride(1),
        "stride_weight_e": weight.stride(0),
        "stride_weight_n": weight.stride(1),
        "stride_weight_k": weight.stride(2),
        "stride_bias_e": 0 if bias is None else bias.stride(0),
        "stride_bias_n": 0 if bias is None else bias.stride(1),
        "HAS_BIAS": bias is not None,
        "EVEN_N": width_out % config.block_n == 0,
        "EVEN_K": width_in % config.block_k == 0,
        "UPCAST": upcasts(rows.dtype),
        "WIDE": accumulator(rows.dtype),
        "BAND": BAND,
        "BLOCK_L": min(EXPERTS_AT_ONCE, triton.next_power_of_2(experts + 2)),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    programs = tiles * triton.cdiv(width_out, config.block_n) if out.numel() else 0
    return Launch(_grouped_linear_kernel, programs, arguments, config)


def weight_gradient_launch(
    grad: Tensor, rows: Tensor, offsets: Tensor, out: Tensor, config: Config | None = None
) -> Launch:
    """The call that fills `out` [L, N, K_in], which is contiguous."""
    experts, width_out, width_in = out.shape
    config = config or choose(WEIGHT_GRADIENT, experts, grad, rows)
    arguments = {
        "grad": grad,
        "rows": rows,
        "offsets": offsets,
        "out": out,
        "count": rows.size(0),
        "experts": experts,
        "width_out": width_out,
        "width_in": width_in,
        "stride_grad_m": grad.stride(0),
        "stride_grad_n": grad.stride(1),
        "stride_rows_m": rows.stride(0),
        "stride_rows_k": rows.stride(1),
        "EVEN_N": width_out % config.block_n == 0,
        "EVEN_K": width_in % config.block_k == 0,
        "UPCAST": upcasts(rows.dtype),
        "WIDE": accumulator(rows.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    tiles = triton.cdiv(width_out, config.block_n) * triton.cdiv(width_in, config.block_k)
    return Launch(_grouped_linear_weight_gradient_kernel, experts * tiles, arguments, config)


def bias_gradient_launch(grad: Tensor, offsets: Tensor, out: Tensor) -> Launch:
    """The call that fills `out` [L, N], which is contiguous."""
    experts, width_out = out.shape
    config = BIAS_GRADIENT
    arguments = {
        "grad": grad,
        "offsets": offsets,
        "out": out,
        "count": grad.size(0),
        "experts": experts,
        "width_out": width_out,
        "stride_grad_m": grad.stride(0),
        "stride_grad_n": grad.stride(1),
        "WIDE": accumulator(grad.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    programs = experts * triton.cdiv(width_out, config.block_n)
    return Launch(_grouped_linear_bias_gradient_kernel, programs, arguments, config)


def _prepare(op: str, rows: Tensor, offsets: Tensor, **others: Tensor | None) -> Tensor:
    for name, tensor in {"offsets": offsets, **others}.items():
        if tensor is not None and tensor.device != rows.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {rows.device}")
    if os.environ.get("PPMOE_OPS_CHECK") == "1":
        read_bounds(op, offsets, rows.size(0))
    return offsets.contiguous()


def _shape(weight: Tensor) -> str:
    return f"{weight.size(1)}x{weight.size(2)}"


def _run_linear(
    rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    config = choose(LINEAR, weight.size(0), rows, weight)
    # Which axis is contiguous decides how tiles of the weight are read.
    way = "rows" if weight.stride(2) == 1 else "columns"
    facts = (rows.dtype, load_of(weight.size(0), rows, weight), _shape(weight), way)
    args = (rows, offsets, weight, bias, out)
    tuned(
        "linear", config, lambda c: linear_launch(*args, c), (out,), CANDIDATES["linear"], *facts
    ).run(rows.device)


def grouped_linear(
    rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Launch `grouped_linear`; arguments and result as in `ppmoe_ops.grouped_linear`."""
    check_forward(rows, offsets, weight, bias)
    offsets = _prepare("grouped_linear", rows, offsets, weight=weight, bias=bias)
    out = rows.new_empty(rows.size(0), weight.size(1))
    _run_linear(rows, offsets, weight, bias, out)
    return out


def grouped_linear_backward(
    grad: Tensor,
    rows: Tensor,
    offsets: Tensor,
    weight: Tensor,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the gradients that are needed; the others come back with shape [0]."""
    check_backward(grad, rows, offsets, weight)
    offsets = _prepare("grouped_linear_backward", rows, offsets, weight=weight, grad=grad)
    grad_rows = rows.new_empty(rows.shape if need_rows else (0,))
    grad_weight = rows.new_empty(weight.shape if need_weight else (0,))
    grad_bias = rows.new_empty(weight.shape[:2] if need_bias else (0,))
    if need_rows:
        turned = weight.transpose(1, 2)
        _run_linear(grad, offsets, turned, None, grad_rows)
    if need_weight:
        config = choose(WEIGHT_GRADIENT, weight.size(0), grad, rows)
        args = (grad, rows, offsets, grad_weight)
        facts = (rows.dtype, load_of(weight.size(0), grad, rows), _shape(weight))
        tuned(
            "grouped weight gradient", config, lambda c: weight_gradient_launch(*args, c),
            (grad_weight,), CANDIDATES["weight gradient"], *facts,
        ).run(rows.device)  # fmt: skip
    if need_bias:
        bias_gradient_launch(grad, offsets, grad_bias).run(rows.device)
    return grad_rows, grad_weight, grad_bias
