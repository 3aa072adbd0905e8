"""`slice_rows`, `merge_rows` and their backwards in Triton: gathers, nothing is added atomically.

All but `slice_rows` first build the inverse of `slots` (which row holds flat slot t*K+k), so that
every output row has one owner and one order of additions. A slot that is not valid acts as -1 and
never reaches an address; one that is listed twice belongs to its last row.

Strides and widths are passed in units of UNIT elements, up to 16 bytes: Triton sees the factor in
the address and loads that much at once where the addresses allow it.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import Config, Launch, accumulator, check_devices
from ppmoe_ops.kernels.expert_slice.configs import (
    INVERT,
    INVERT_ALONE,
    MERGE,
    MERGE_BACKWARD,
    SLICE,
)
from ppmoe_ops.ops.expert_slice.rows import (
    check_merge,
    check_merge_backward,
    check_slice,
    check_slice_backward,
    check_slot_values,
)

ALONE = 8192  # up to here one program inverts the slots, in one launch
TALLEST = 64  # most rows of a tile, however narrow


@triton.jit(do_not_specialize=["count"])
def _slice_rows_kernel(
    x,
    slots,
    out,
    count,
    top_k,
    hidden,
    stride_m,
    stride_n,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[r] = x[slots[r] // K], zero for a slot that is not valid.

    Fewest bytes: the distinct rows listed read, T*K rows written, T*K int32 read.
    """
    width = hidden * UNIT
    columns = tl.cdiv(width, BLOCK_N)
    at_m = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at_n = (tl.program_id(0) % columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = at_n < width
    slot = tl.load(slots + at_m, mask=at_m < count, other=-1)
    valid = (slot >= 0) & (slot < count)
    token = (tl.where(valid, slot, 0) // top_k).to(tl.int64)
    of = x + token[:, None] * stride_m * UNIT + at_n[None, :] * stride_n
    value = tl.load(of, mask=valid[:, None] & in_n[None, :], other=0.0)
    to = out + at_m[:, None] * width + at_n[None, :]
    tl.store(to, value, mask=(at_m < count)[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["count"])
def _invert_slots_kernel(slots, inverse, count, ALONE: tl.constexpr, BLOCK: tl.constexpr):
    """inverse[slots[r]] = r; the larger r where a slot comes twice, which no order of writes shows.

    The inverse is full of -1 before, unless this is the only program: it fills it itself.
    Fewest bytes: T*K int32 read and written.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    end = first + BLOCK
    if ALONE:
        end = end * 0 + count
        for at in range(0, count, BLOCK):
            to = at + tl.arange(0, BLOCK).to(tl.int64)
            tl.store(inverse + to, -1, mask=to < count)
        tl.debug_barrier()
    for at in range(first, end, BLOCK):
        row = at + tl.arange(0, BLOCK)
        slot = tl.load(slots + row, mask=row < count, other=-1)
        valid = (slot >= 0) & (slot < count)
        to = inverse + tl.where(valid, slot, 0).to(tl.int64)
        tl.atomic_max(to, row.to(tl.int32), mask=valid, sem="relaxed")


@triton.jit
def _gather(of_n, inverse, weights, slot, in_m, in_n, stride_m, UNIT: tl.constexpr):
    """The row of every flat slot, zero if it has none, and its weight."""
    row = tl.load(inverse + slot, mask=in_m, other=-1)
    here = row >= 0
    of = of_n[None, :] + tl.where(here, row, 0).to(tl.int64)[:, None] * stride_m * UNIT
    value = tl.load(of, mask=here[:, None] & in_n[None, :], other=0.0)
    if weights is None:
        return value, here.to(tl.float32)
    else:
        return value, tl.load(weights + slot, mask=here, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def _merge_rows_kernel(
    rows,
    inverse,
    weights,
    out,
    tokens,
    top_k,
    hidden,
    stride_m,
    stride_n,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[t] = sum over k of weights[t, k] rows[inverse[t*K+k]], in the order of k.

    Also the backward of slice_rows, without weights. Fewest bytes: the listed rows read, T rows
    written, T*K int32 and T*K weights read.
    """
    width = hidden * UNIT
    columns = tl.cdiv(width, BLOCK_N)
    at_m = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at_n = (tl.program_id(0) % columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = at_m < tokens, at_n < width
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
    of_n, slot = rows + at_n * stride_n, at_m * top_k
    # Four rows are on their way before the first is added.
    for k in range(0, top_k, 4):
        in_b, in_c, in_d = k + 1 < top_k, k + 2 < top_k, k + 3 < top_k
        a, p = _gather(of_n, inverse, weights, slot + k, in_m, in_n, stride_m, UNIT)
        b, q = _gather(of_n, inverse, weights, slot + k + 1, in_m & in_b, in_n, stride_m, UNIT)
        c, r = _gather(of_n, inverse, weights, slot + k + 2, in_m & in_c, in_n, stride_m, UNIT)
        d, s = _gather(of_n, inverse, weights, slot + k + 3, in_m & in_d, in_n, stride_m, UNIT)
        total += p.to(WIDE)[:, None] * a.to(WIDE)
        total += q.to(WIDE)[:, None] * b.to(WIDE)
        total += r.to(WIDE)[:, None] * c.to(WIDE)
        total += s.to(WIDE)[:, None] * d.to(WIDE)
    to = out + at_m[:, None] * width + at_n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["count"])
def _merge_rows_backward_kernel(
    grad,
    rows,
    slots,
    inverse,
    weights,
    grad_rows,
    grad_weights,
    count,
    top_k,
    hidden,
    stride_grad_m,
    stride_grad_n,
    stride_rows_m,
    stride_rows_n,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_rows[inverse[s]] = weights[s] grad[s // K]; grad_weights[s] their scalar product.

    A program has some flat slots, in order, so that the slots of a token share grad[t] through the
    cache. It also fills grad_rows[s] where no flat slot owns that row (the tail). Fewest bytes: T
    rows of grad and the listed rows read, T*K rows written, T*K weights read and written.
    """
    width = hidden * UNIT
    slot = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = slot < count
    row = tl.load(inverse + slot, mask=in_m, other=-1)
    here = row >= 0
    weight = tl.load(weights + slot, mask=here, other=0.0)
    of_grad = grad + (slot // top_k)[:, None] * stride_grad_m * UNIT
    at_row = tl.where(here, row, 0).to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
    for n in range(0, width, BLOCK_N):
        at_n = (n + tl.arange(0, BLOCK_N).to(tl.int64))[None, :]
        inside = here[:, None] & (at_n < width)
        g = tl.load(of_grad + at_n * stride_grad_n, mask=inside, other=0.0).to(WIDE)
        of_rows = rows + at_row * stride_rows_m * UNIT + at_n * stride_rows_n
        total += g * tl.load(of_rows, mask=inside, other=0.0).to(WIDE)
        scaled = weight[:, None] * g
        tl.store(
            grad_rows + at_row * width + at_n, scaled.to(grad_rows.dtype.element_ty), mask=inside
        )
    tl.store(grad_weights + slot, tl.sum(total, axis=1), mask=in_m)

    # The row of the same number, if it is nobody's: its own slot is not valid, or has a later row.
    own = tl.load(slots + slot, mask=in_m, other=-1)
    valid = (own >= 0) & (own < count)
    own = tl.where(valid, own, 0)
    owned = valid & (tl.load(inverse + own.to(tl.int64), mask=valid, other=-1) == slot)
    if tl.max((in_m & ~owned).to(tl.int32), axis=0) > 0:
        weight = tl.load(weights + own.to(tl.int64), mask=valid, other=0.0)
        of_grad = grad + (own // top_k).to(tl.int64)[:, None] * stride_grad_m * UNIT
        for n in range(0, width, BLOCK_N):
            at_n = (n + tl.arange(0, BLOCK_N).to(tl.int64))[None, :]
            unowned = (in_m & ~owned)[:, None] & (at_n < width)
            g = tl.load(of_grad + at_n * stride_grad_n, mask=unowned & valid[:, None], other=0.0)
            scaled = tl.where(valid[:, None], weight[:, None] * g.to(WIDE), 0.0)
            to = grad_rows + slot[:, None] * width + at_n
            tl.store(to, scaled.to(grad_rows.dtype.element_ty), mask=unowned)


def _tile(config: Config, rows: int, hidden: int) -> tuple[int, int]:
    """Rows and columns of a tile: of rows narrower than the configuration's, there are more."""
    wide = min(triton.next_power_of_2(hidden), config.block_n)
    tall = min(config.block_m * (config.block_n // wide), TALLEST)
    return min(tall, triton.next_power_of_2(rows)), wide


def _unit(hidden: int, *matrices: Tensor) -> int:
    """Elements, at most 16 bytes of them, that the width and the row strides are multiples of."""
    unit = 16 // matrices[0].element_size()
    strides = [hidden, *(each.stride(0) for each in matrices)]
    while any(stride % unit for stride in strides):
        unit //= 2
    return unit


def slice_launch(x: Tensor, slots: Tensor, top_k: int, out: Tensor) -> Launch:
    """The call that fills `out` [T*K, H], which is contiguous and not empty."""
    count, hidden = out.shape
    config, unit = SLICE[x.element_size()], _unit(hidden, x)
    tall, wide = _tile(config, count, hidden)
    if unit == 1:  # each element in flight takes a register
        tall = max(tall // 2, 1)
    arguments = {
        "x": x,
        "slots": slots,
        "out": out,
        "count": count,
        "top_k": top_k,
        "hidden": hidden // unit,
        "stride_m": x.stride(0) // unit,
        "stride_n": x.stride(1),
        "UNIT": unit,
        "BLOCK_M": tall,
        "BLOCK_N": wide,
    }
    programs = triton.cdiv(count, tall) * triton.cdiv(hidden, wide)
    return Launch(_slice_rows_kernel, programs, arguments, config)


def invert_launch(slots: Tensor, inverse: Tensor) -> Launch:
    """The call that fills `inverse`, which is full of -1 before if it is longer than ALONE."""
    count = slots.numel()
    alone = count <= ALONE
    config = INVERT_ALONE if alone else INVERT
    arguments = {
        "slots": slots,
        "inverse": inverse,
        "count": count,
        "ALONE": alone,
        "BLOCK": config.block_m,
    }
    programs = 1 if alone else triton.cdiv(count, config.block_m)
    return Launch(_invert_slots_kernel, programs, arguments, config)


def merge_launch(
    rows: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int, out: Tensor
) -> Launch:
    """The call that fills `out` [T, H], which is contiguous and not empty."""
    tokens, hidden = out.shape
    config, unit = MERGE[rows.element_size()], _unit(hidden, rows)
    tall, wide = _tile(config, tokens, hidden)
    arguments = {
        "rows": rows,
        "inverse": inverse,
        "weights": weights,
        "out": out,
        "tokens": tokens,
        "top_k": top_k,
        "hidden": hidden // unit,
        "stride_m": rows.stride(0) // unit,
        "stride_n": rows.stride(1),
        "WIDE": accumulator(rows.dtype),
        "UNIT": unit,
        "BLOCK_M": tall,
        "BLOCK_N": wide,
    }
    programs = triton.cdiv(tokens, tall) * triton.cdiv(hidden, wide)
    return Launch(_merge_rows_kernel, programs, arguments, config)


def merge_backward_launch(
    grad: Tensor,
    rows: Tensor,
    slots: Tensor,
    inverse: Tensor,
    weights: Tensor,
    grad_rows: Tensor,
    grad_weights: Tensor,
) -> Launch:
    """The call that fills `grad_rows` and `grad_weights`, contiguous; there are slots."""
    count, hidden = grad_rows.shape
    config, unit = MERGE_BACKWARD[rows.element_size()], _unit(hidden, grad, rows)
    tall, wide = _tile(config, count, max(hidden, 1))
    arguments = {
        "grad": grad,
        "rows": rows,
        "slots": slots,
        "inverse": inverse,
        "weights": weights,
        "grad_rows": grad_rows,
        "grad_weights": grad_weights,
        "count": count,
        "top_k": weights.size(1),
        "hidden": hidden // unit,
        "stride_grad_m": grad.stride(0) // unit,
        "stride_grad_n": grad.stride(1),
        "stride_rows_m": rows.stride(0) // unit,
        "stride_rows_n": rows.stride(1),
        "WIDE": accumulator(rows.dtype),
        "UNIT": unit,
        "BLOCK_M": tall,
        "BLOCK_N": wide,
    }
    programs = triton.cdiv(count, tall)
    return Launch(_merge_rows_backward_kernel, programs, arguments, config)


def _prepare(op: str, like: Tensor, slots: Tensor, **others: Tensor) -> Tensor:
    """Contiguous slots, after the checks that the contract's own do not make."""
    check_devices(op, like, slots=slots, **others)
    if os.environ.get("PPMOE_OPS_CHECK") == "1":
        check_slot_values(op, slots)
    return slots.contiguous()


def _inverse(slots: Tensor) -> Tensor:
    inverse = torch.empty_like(slots)
    if slots.numel() > ALONE:
        inverse.fill_(-1)
    invert_launch(slots, inverse).run(slots.device)
    return inverse


def slice_rows(x: Tensor, slots: Tensor, top_k: int) -> Tensor:
    """Launch `slice_rows`; arguments and result as in `ppmoe_ops.slice_rows`."""
    check_slice(x, slots, top_k)
    slots = _prepare("slice_rows", x, slots)
    out = x.new_empty(slots.size(0), x.size(1))
    if out.numel():
        slice_launch(x, slots, top_k, out).run(x.device)
    return out


def slice_rows_backward(grad: Tensor, slots: Tensor, top_k: int) -> Tensor:
    """Launch the sum over each token's rows of `grad`."""
    check_slice_backward(grad, slots, top_k)
    slots = _prepare("slice_rows_backward", grad, slots)
    out = grad.new_empty(slots.size(0) // top_k, grad.size(1))
    if out.numel():
        merge_launch(grad, _inverse(slots), None, top_k, out).run(grad.device)
    return out


def merge_rows(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Launch `merge_rows`; arguments and result as in `ppmoe_ops.merge_rows`."""
    check_merge("merge_rows", rows, slots, weights)
    slots = _prepare("merge_rows", rows, slots, weights=weights)
    out = rows.new_empty(weights.size(0), rows.size(1))
    if slots.numel() == 0:
        return out.zero_()
    if out.numel():
        inverse = _inverse(slots)
        merge_launch(rows, inverse, weights.contiguous(), weights.size(1), out).run(rows.device)
    return out


def merge_rows_backward(
    grad: Tensor, rows: Tensor, slots: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the gradients of `merge_rows` to its rows and weights."""
    check_merge_backward(grad, rows, slots, weights)
    slots = _prepare("merge_rows_backward", rows, slots, weights=weights, grad=grad)
    grad_rows, grad_weights = rows.new_empty(rows.shape), weights.new_empty(weights.shape)
    if slots.numel():
        weights = weights.contiguous()
        arguments = (grad, rows, slots, _inverse(slots), weights, grad_rows, grad_weights)
        merge_backward_launch(*arguments).run(rows.device)
    return grad_rows, grad_weights
