"""`router_losses` and its backward in Triton.

The forward is two launches: programs over whole rows write the log-sum-exp of their tokens and
their own sums (softmax mass and ids by expert, squares), and one program adds those up in a fixed
order. Nothing is added atomically, so that the results have the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import Launch, accumulator, check_devices
from ppmoe_ops.kernels.expert_slice.configs import LOSSES, LOSSES_FINISH, LOSSES_PROGRAMS
from ppmoe_ops.kernels.expert_slice.route import exponential, whole_rows
from ppmoe_ops.ops.expert_slice.router_losses import check_backward, check_forward

BINS = 128, 1024  # of one histogram: the fewest that pay, and the most
IDS_AT_ONCE = 1024


@triton.jit(do_not_specialize=["tokens", "chunk"])
def _router_losses_rows_kernel(
    logits,
    ids,
    lse,
    mass,
    counts,
    squares,
    tokens,
    chunk,
    experts,
    top_k,
    stride_t,
    stride_e,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BINS: tl.constexpr,
):
    """lse[t], and the sums over `chunk` tokens: mass[p, e], counts[p, e], squares[p].

    Fewest bytes: T*E logits and T*K ids read, T log-sum-exps written.
    """
    part = tl.program_id(0).to(tl.int64)
    begin, end = part * chunk, tl.minimum((part + 1) * chunk, tokens)
    at_e = tl.arange(0, BLOCK_E)
    in_e = at_e < experts
    total_mass = tl.zeros((BLOCK_T, BLOCK_E), dtype=WIDE)
    total_squares = tl.zeros((BLOCK_T,), dtype=WIDE)
    for first in range(begin, end, BLOCK_T):
        at_t = first + tl.arange(0, BLOCK_T)
        in_t = at_t < end
        of = logits + at_t[:, None] * stride_t + at_e[None, :].to(tl.int64) * stride_e
        x = tl.load(of, mask=in_t[:, None] & in_e[None, :], other=float("-inf")).to(WIDE)
        top = tl.max(tl.where(x == x, x, float("-inf")), axis=1)
        score = exponential(x - top[:, None])
        total = tl.sum(score, axis=1)
        row = top + tl.log(total)
        # An infinite largest logit is the log-sum-exp itself, unless there is a NaN beside it.
        infinite = (top == float("inf")) | (top == float("-inf"))
        has_nan = tl.max((x != x).to(tl.int32), axis=1) > 0
        row = tl.where(infinite & ~has_nan, top, row)
        tl.store(lse + at_t, row, mask=in_t)
        total_squares += tl.where(in_t, row * row, 0.0)
        total_mass += tl.where(in_t[:, None], score / total[:, None], 0.0)
    tl.store(mass + (part * experts + at_e), tl.sum(total_mass, axis=0), mask=in_e)
    tl.store(squares + part, tl.sum(total_squares, axis=0))

    at_b = tl.arange(0, BINS)
    for low in range(0, experts, BINS):
        hits = tl.zeros((BINS,), dtype=tl.int32)
        for first in range(begin * top_k, end * top_k, BLOCK_I):
            at_i = first + tl.arange(0, BLOCK_I)
            expert = tl.load(ids + at_i, mask=at_i < end * top_k, other=-1).to(tl.int64)
            valid = (expert >= low) & (expert < low + BINS)
            place = tl.where(valid, expert - low, 0).to(tl.int32)
            hits += tl.histogram(place, BINS, mask=valid)
        tl.store(counts + (part * experts + low + at_b), hits, mask=low + at_b < experts)


@triton.jit(do_not_specialize=["parts", "tokens"])
def _router_losses_finish_kernel(
    mass,
    counts,
    squares,
    balance,
    z,
    shares,
    parts,
    tokens,
    experts,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add the sums of `parts` programs up, in one program. Fewest bytes: E shares written."""
    at_r, at_e = tl.arange(0, ROWS).to(tl.int64)[:, None], tl.arange(0, BLOCK_E)[None, :]
    hits = tl.zeros((ROWS, BLOCK_E), dtype=tl.int32)
    for low in range(0, experts, BLOCK_E):
        for row in range(0, parts, ROWS):
            inside = (row + at_r < parts) & (low + at_e < experts)
            hits += tl.load(counts + ((row + at_r) * experts + low + at_e), mask=inside, other=0)
    valid = tl.maximum(tl.sum(tl.sum(hits, axis=1), axis=0), 1).to(WIDE)

    total = tl.zeros((BLOCK_E,), dtype=WIDE)
    for low in range(0, experts, BLOCK_E):
        hits = tl.zeros((ROWS, BLOCK_E), dtype=tl.int32)
        sums = tl.zeros((ROWS, BLOCK_E), dtype=WIDE)
        for row in range(0, parts, ROWS):
            inside = (row + at_r < parts) & (low + at_e < experts)
            of = (row + at_r) * experts + low + at_e
            hits += tl.load(counts + of, mask=inside, other=0)
            sums += tl.load(mass + of, mask=inside, other=0.0)
        share = tl.sum(hits, axis=0).to(WIDE) / valid
        at = (low + tl.arange(0, BLOCK_E)).to(tl.int64)
        tl.store(shares + at, share, mask=at < experts)
        total += share * tl.sum(sums, axis=0)
    tl.store(balance, tl.sum(total, axis=0) * experts / tokens)

    at = tl.arange(0, ROWS * BLOCK_E).to(tl.int64)
    total = tl.zeros((ROWS * BLOCK_E,), dtype=WIDE)
    for row in range(0, parts, ROWS * BLOCK_E):
        total += tl.load(squares + (row + at), mask=row + at < parts, other=0.0)
    tl.store(z, tl.sum(total, axis=0) / tokens)


@triton.jit(do_not_specialize=["tokens"])
def _router_losses_backward_kernel(
    grad_balance,
    grad_z,
    logits,
    shares,
    lse,
    out,
    tokens,
    experts,
    stride_t,
    stride_e,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The gradients of both losses to the logits.

    Fewest bytes: T*E logits, T log-sum-exps and E shares read, T*E elements written.
    """
    at_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    at_e = tl.arange(0, BLOCK_E)
    in_t, in_e = at_t < tokens, at_e < experts
    inside = in_t[:, None] & in_e[None, :]
    of = logits + at_t[:, None] * stride_t + at_e[None, :].to(tl.int64) * stride_e
    x = tl.load(of, mask=inside, other=float("-inf")).to(WIDE)
    row = tl.load(lse + at_t, mask=in_t, other=0.0)
    share = tl.load(shares + at_e.to(tl.int64), mask=in_e, other=0.0)
    by_balance = tl.load(grad_balance) * experts
    by_z = tl.load(grad_z) * 2

    probability = exponential(x - row[:, None])
    mean = tl.sum(tl.where(in_e[None, :], probability * share[None, :], 0.0), axis=1)
    grad = probability * (share[None, :] - mean[:, None]) * by_balance
    grad += probability * row[:, None] * by_z
    to = out + (at_t[:, None] * experts + at_e[None, :])
    tl.store(to, (grad / tokens).to(out.dtype.element_ty), mask=inside)


def forward_launches(
    logits: Tensor, ids: Tensor, balance: Tensor, z: Tensor, shares: Tensor, lse: Tensor
) -> list[Launch]:
    """The calls that fill the last four; `ids` are contiguous, and there are tokens."""
    tokens, experts = logits.shape
    wide = triton.next_power_of_2(experts)
    config = whole_rows(LOSSES, tokens, wide)
    chunk = triton.cdiv(tokens, LOSSES_PROGRAMS)
    chunk = triton.cdiv(chunk, config.block_m) * config.block_m
    parts = triton.cdiv(tokens, chunk)
    sums = {
        "mass": lse.new_empty((parts, experts)),
        "counts": lse.new_empty((parts, experts), dtype=torch.int32),
        "squares": lse.new_empty((parts,)),
        "tokens": tokens,
        "experts": experts,
        "WIDE": accumulator(logits.dtype),
    }
    rows = {
        **sums,
        "logits": logits,
        "ids": ids,
        "lse": lse,
        "chunk": chunk,
        "top_k": ids.size(1),
        "stride_t": logits.stride(0),
        "stride_e": logits.stride(1),
        "BLOCK_T": config.block_m,
        "BLOCK_E": wide,
        "BLOCK_I": min(IDS_AT_ONCE, triton.next_power_of_2(max(chunk * ids.size(1), 1))),
        "BINS": min(max(wide, BINS[0]), BINS[1]),
    }
    columns = min(wide, LOSSES_FINISH.block_n)
    finish = {
        **sums,
        "balance": balance,
        "z": z,
        "shares": shares,
        "parts": parts,
        "ROWS": min(LOSSES_FINISH.block_k // columns, triton.next_power_of_2(parts)),
        "BLOCK_E": columns,
    }
    return [
        Launch(_router_losses_rows_kernel, parts, rows, config),
        Launch(_router_losses_finish_kernel, 1, finish, LOSSES_FINISH),
    ]


def backward_launch(
    grad_balance: Tensor, grad_z: Tensor, logits: Tensor, shares: Tensor, lse: Tensor, out: Tensor
) -> Launch:
    """The call that fills `out` [T, E], contiguous like shares and lse, and not empty."""
    tokens, experts = logits.shape
    wide = triton.next_power_of_2(experts)
    config = whole_rows(LOSSES, tokens, wide)
    arguments = {
        "grad_balance": grad_balance,
        "grad_z": grad_z,
        "logits": logits,
        "shares": shares,
        "lse": lse,
        "out": out,
        "tokens": tokens,
        "experts": experts,
        "stride_t": logits.stride(0),
        "stride_e": logits.stride(1),
        "WIDE": accumulator(logits.dtype),
        "BLOCK_T": config.block_m,
        "BLOCK_E": wide,
    }
    programs = triton.cdiv(tokens, config.block_m)
    return Launch(_router_losses_backward_kernel, programs, arguments, config)


def router_losses_forward(logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `router_losses`; also returns what its backward takes: shares and log-sum-exps."""
    check_forward("router_losses", logits, experts)
    check_devices("router_losses", logits, experts=experts)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    balance, z = logits.new_empty((), dtype=wide), logits.new_empty((), dtype=wide)
    shares = logits.new_empty((logits.size(1),), dtype=wide)
    lse = logits.new_empty((logits.size(0),), dtype=wide)
    if logits.size(0) == 0:
        return balance.zero_(), z.zero_(), shares.zero_(), lse
    for launch in forward_launches(logits, experts.contiguous(), balance, z, shares, lse):
        launch.run(logits.device)
    return balance, z, shares, lse


def router_losses_backward(
    grad_balance: Tensor, grad_z: Tensor, logits: Tensor, shares: Tensor, lse: Tensor
) -> Tensor:
    """Launch the gradients of both losses to the logits."""
    check_backward(grad_balance, grad_z, logits, shares, lse)
    given = {"grad_balance": grad_balance, "grad_z": grad_z, "shares": shares, "lse": lse}
    check_devices("router_losses_backward", logits, **given)
    out = logits.new_empty(logits.shape)
    if logits.size(0):
        given = (grad_balance, grad_z, logits, shares.contiguous(), lse.contiguous())
        backward_launch(*given, out).run(logits.device)
    return out
