"""`route` and its backward in Triton: a program holds whole rows of some tokens in registers.

The K best of a row are found in K rounds: the largest key, then the lowest id that has it. Keys are
integers with the order of the scores, so that both are integer reductions, which are one
instruction over a warp from sm_80 on; a sort would shuffle every element many times for the few
that are wanted. Ids that have been chosen get a key below that of -inf, so ids are always valid and
distinct.

Any number of experts is one tile, padded to a power of two (with groups: a power of two of groups
and of experts in a group), and wide rows get more warps. Beyond 16384 experts registers may spill.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import Config, Launch, accumulator, check_devices
from ppmoe_ops.kernels.expert_slice.configs import MOST_WARPS, ROUTER
from ppmoe_ops.ops.expert_slice.route import (
    SIGMOID_SUM_FLOOR,
    check_backward,
    check_backward_ids,
    check_forward,
)

FEW = 2048  # up to so many tokens, more and smaller programs


@triton.jit
def exponential(x):
    """exp of x <= 0 to 2 ulp at any size: exp2 alone multiplies the rounding error of x by x."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x < -110.0, -110.0, x)
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        rest = (x - n * 0.693359375) + n * 2.12194440e-4
        # In two steps, so that a subnormal result is rounded once.
        return tl.exp2(rest * 1.4426950408889634) * tl.exp2(n + 64.0) * 5.421010862427522e-20


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), zero where that exp overflows: keys tie there as the reference's do."""
    small = exponential(-tl.abs(x))
    lowest = -709.782712893384 if x.dtype == tl.float64 else -88.72283905206835
    return tl.where(x < lowest, 0.0, tl.where(x < 0, small, 1.0) / (1.0 + small))


@triton.jit
def _ordered(x):
    """An integer with the order of x, NaN as -inf and -0 as +0; never the smallest one."""
    x = tl.where(x == x, x, float("-inf"))
    x = tl.where(x == 0, 0.0, x)
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _take_best(keys, ids, LOWEST: tl.constexpr):
    """In every row the lowest id of the largest key, and the keys without it."""
    best = tl.max(keys, axis=1)
    taken = tl.min(tl.where(keys == best[:, None], ids, 0x7FFFFFFF), axis=1)
    return taken, tl.where(ids == taken[:, None], LOWEST, keys)


@triton.jit
def _limit_groups(
    key,
    PAIRS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """`key`, -inf outside the groups with the largest sums of their two best (PAIRS) keys."""
    key = tl.reshape(key, (BLOCK_T, BLOCK_G, BLOCK_S))
    at_g, at_s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)[None, None, :]
    total = tl.max(key, axis=2)
    if PAIRS:
        first = tl.min(tl.where(key == total[:, :, None], at_s, BLOCK_S), axis=2)
        total += tl.max(tl.where(at_s == first[:, :, None], float("-inf"), key), axis=2)
    order = tl.where((at_g < GROUPS)[None, :], _ordered(total), LOWEST)
    for _ in range(TOP_GROUPS):
        _, order = _take_best(order, at_g[None, :], LOWEST)
    key = tl.where((order == LOWEST)[:, :, None], key, float("-inf"))
    return tl.reshape(key, (BLOCK_T, BLOCK_G * BLOCK_S))


@triton.jit(do_not_specialize=["tokens"])
def _route_kernel(
    logits,
    bias,
    weights,
    chosen,
    tokens,
    experts,
    scale,
    stride_t,
    stride_e,
    stride_bias,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
    FLOOR: tl.constexpr,
    WIDE: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Ids and weights of the K best experts of every token.

    Fewest bytes: T*E logits read, T*K weights and int32 written.
    """
    at_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    at_e, at_k = tl.arange(0, BLOCK_G * BLOCK_S), tl.arange(0, BLOCK_K)
    ids, real = at_e, at_e < experts
    if GROUPS > 1:
        size = experts // GROUPS
        ids = at_e // BLOCK_S * size + at_e % BLOCK_S
        real = (at_e % BLOCK_S < size) & (at_e // BLOCK_S < GROUPS)
    in_t = at_t < tokens
    row = logits + at_t[:, None] * stride_t
    of = row + ids.to(tl.int64)[None, :] * stride_e
    x = tl.load(of, mask=in_t[:, None] & real[None, :], other=float("-inf")).to(WIDE)
    top = tl.max(tl.where(x == x, x, float("-inf")), axis=1)

    key, total = x, top
    if SOFTMAX:
        if not RENORMALIZE or bias is not None or GROUPS > 1:
            score = exponential(x - top[:, None])
            total = tl.sum(score, axis=1)
            if bias is not None or GROUPS > 1:
                key = score / total[:, None]
    else:
        key = _sigmoid(x)
    if bias is not None:
        of_bias = bias + ids.to(tl.int64) * stride_bias
        key += tl.load(of_bias, mask=real, other=0.0).to(WIDE)[None, :]
    if GROUPS > 1:
        key = tl.where(real[None, :] & (key == key), key, float("-inf"))
        key = _limit_groups(key, PAIRS, GROUPS, TOP_GROUPS, LOWEST, BLOCK_T, BLOCK_G, BLOCK_S)
    order = tl.where(real[None, :], _ordered(key), LOWEST)

    best = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    for k in range(TOP_K):
        taken, order = _take_best(order, ids[None, :], LOWEST)
        best = tl.where((at_k == k)[None, :], taken[:, None], best)

    # The chosen logits once more, from the cache.
    inside = in_t[:, None] & (at_k < TOP_K)[None, :]
    of = row + best.to(tl.int64) * stride_e
    value = tl.load(of, mask=inside, other=float("-inf")).to(WIDE)
    if SOFTMAX and RENORMALIZE:
        # Equal to dividing by the sum, and right where the selected scores underflow.
        share = exponential(value - tl.max(value, axis=1)[:, None])
        share = share / tl.sum(share, axis=1)[:, None]
        poisoned = tl.max((x != x).to(tl.int32), axis=1) > 0
        poisoned = poisoned | (top == float("inf")) | (top == float("-inf"))
        share = tl.where(poisoned[:, None], float("nan"), share)
    elif SOFTMAX:
        share = exponential(value - top[:, None]) / total[:, None]
    else:
        share = _sigmoid(value)
        if RENORMALIZE:
            share = share / (tl.sum(share, axis=1) + FLOOR)[:, None]
    to = at_t[:, None] * TOP_K + at_k[None, :]
    tl.store(weights + to, share * scale, mask=inside)
    tl.store(chosen + to, best, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _route_backward_kernel(
    grad,
    weights,
    chosen,
    logits,
    out,
    tokens,
    experts,
    scale,
    stride_grad_t,
    stride_grad_k,
    stride_logits_t,
    stride_logits_e,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    FLOOR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the weights to the logits; an id that is not valid counts as not chosen.

    Fewest bytes: T*K weights, gradients and int32 read (T*E logits for softmax without
    renormalising), T*E elements written.
    """
    at_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    at_e, at_k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    in_t, in_e = at_t < tokens, at_e < experts
    inside = in_t[:, None] & (at_k < TOP_K)[None, :]
    of = at_t[:, None] * TOP_K + at_k[None, :]
    ids = tl.load(chosen + of, mask=inside, other=-1)
    inside = inside & (ids >= 0) & (ids < experts)
    of_grad = grad + at_t[:, None] * stride_grad_t + at_k[None, :].to(tl.int64) * stride_grad_k
    part = tl.load(of_grad, mask=inside, other=0.0).to(WIDE) * scale
    base, factor = tl.zeros((BLOCK_T,), dtype=WIDE), tl.full((BLOCK_T, BLOCK_E), 1.0, dtype=WIDE)
    if SOFTMAX and RENORMALIZE:
        share = tl.load(weights + of, mask=inside, other=0.0).to(WIDE) / scale
        share = tl.where(inside & (scale != 0), share, 0.0)
        part = share * (part - tl.sum(part * share, axis=1)[:, None])
    else:
        row = logits + at_t[:, None] * stride_logits_t
        of_value = row + tl.where(inside, ids, 0).to(tl.int64) * stride_logits_e
        value = tl.load(of_value, mask=inside, other=float("-inf")).to(WIDE)
        if SOFTMAX:
            of_row = row + at_e.to(tl.int64)[None, :] * stride_logits_e
            x = tl.load(of_row, mask=in_t[:, None] & in_e[None, :], other=float("-inf")).to(WIDE)
            top = tl.max(tl.where(x == x, x, float("-inf")), axis=1)
            factor = exponential(x - top[:, None])
            total = tl.sum(factor, axis=1)
            factor = factor / total[:, None]
            share = exponential(value - top[:, None]) / total[:, None]
            base = tl.sum(tl.where(inside, part * share, 0.0), axis=1)
        else:
            score = _sigmoid(value)
            if RENORMALIZE:
                total = tl.sum(score, axis=1) + FLOOR
                mean = tl.sum(part * score, axis=1) / total
                part = (part - mean[:, None]) / total[:, None]
            part = part * score * _sigmoid(-value)

    spread = tl.zeros((BLOCK_T, BLOCK_E), dtype=WIDE)
    for k in range(TOP_K):
        here = (at_k == k)[None, :]
        expert = tl.sum(tl.where(here, ids, 0), axis=1)
        value_k = tl.sum(tl.where(here, part, 0.0), axis=1)
        spread = tl.where(at_e[None, :] == expert[:, None], value_k[:, None], spread)
    if SOFTMAX and not RENORMALIZE:
        spread = factor * (spread - base[:, None])
    to = out + (at_t[:, None] * experts + at_e[None, :])
    tl.store(to, spread.to(out.dtype.element_ty), mask=in_t[:, None] & in_e[None, :])


def whole_rows(config: Config, tokens: int, width: int) -> Config:
    """`config` for rows of `width` elements, a power of two; BLOCK_M is the tokens."""
    rows = max(1, min(config.block_k // width, config.block_m, triton.next_power_of_2(tokens)))
    warps = config.num_warps * max(1, width // config.block_k)
    return dataclasses.replace(config, block_m=rows, num_warps=min(warps, MOST_WARPS))


def route_launch(
    logits: Tensor,
    selection_bias: Tensor | None,
    options: dict[str, Any],
    weights: Tensor,
    chosen: Tensor,
) -> Launch:
    """The call that fills `weights` and `chosen` [T, K], contiguous; `options` as in `route`."""
    tokens, experts = logits.shape
    groups = options["groups"]
    high = triton.next_power_of_2(groups)
    wide = triton.next_power_of_2(experts // groups)
    config = whole_rows(ROUTER["few" if tokens <= FEW else "many"], tokens, high * wide)
    arguments = {
        "logits": logits,
        "bias": selection_bias,
        "weights": weights,
        "chosen": chosen,
        "tokens": tokens,
        "experts": experts,
        "scale": options["scale"],
        "stride_t": logits.stride(0),
        "stride_e": logits.stride(1),
        "stride_bias": 0 if selection_bias is None else selection_bias.stride(0),
        "SOFTMAX": options["score"] == "softmax",
        "RENORMALIZE": options["renormalize"],
        "TOP_K": weights.size(1),
        "GROUPS": groups,
        "TOP_GROUPS": options["top_groups"],
        "PAIRS": experts > groups,
        "FLOOR": SIGMOID_SUM_FLOOR,
        "WIDE": accumulator(logits.dtype),
        "LOWEST": -(2**63) if logits.dtype == torch.float64 else -(2**31),
        "BLOCK_T": config.block_m,
        "BLOCK_G": high,
        "BLOCK_S": wide,
        "BLOCK_K": triton.next_power_of_2(weights.size(1)),
    }
    return Launch(_route_kernel, triton.cdiv(tokens, config.block_m), arguments, config)


def route_backward_launch(
    grad: Tensor,
    weights: Tensor,
    chosen: Tensor,
    logits: Tensor | None,
    options: dict[str, Any],
    out: Tensor,
) -> Launch:
    """The call that fills `out` [T, E], contiguous like weights and chosen, and not empty."""
    tokens, experts = out.shape
    wide = triton.next_power_of_2(experts)
    config = whole_rows(ROUTER["few" if tokens <= FEW else "many"], tokens, wide)
    arguments = {
        "grad": grad,
        "weights": weights,
        "chosen": chosen,
        "logits": logits,
        "out": out,
        "tokens": tokens,
        "experts": experts,
        "scale": options["scale"],
        "stride_grad_t": grad.stride(0),
        "stride_grad_k": grad.stride(1),
        "stride_logits_t": 0 if logits is None else logits.stride(0),
        "stride_logits_e": 0 if logits is None else logits.stride(1),
        "SOFTMAX": options["score"] == "softmax",
        "RENORMALIZE": options["renormalize"],
        "TOP_K": weights.size(1),
        "FLOOR": SIGMOID_SUM_FLOOR,
        "WIDE": accumulator(out.dtype),
        "BLOCK_T": config.block_m,
        "BLOCK_E": wide,
        "BLOCK_K": triton.next_power_of_2(max(weights.size(1), 1)),
    }
    return Launch(_route_backward_kernel, triton.cdiv(tokens, config.block_m), arguments, config)


def route(
    logits: Tensor,
    top_k: int,
    score: str = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Launch `route`; arguments and results as in `ppmoe_ops.route`."""
    check_forward(logits, top_k, score, selection_bias, groups, top_groups)
    check_devices("route", logits, selection_bias=selection_bias)
    double = logits.dtype == torch.float64
    shape = (logits.size(0), top_k)
    weights = logits.new_empty(shape, dtype=torch.float64 if double else torch.float32)
    chosen = logits.new_empty(shape, dtype=torch.int32)
    # Numbers reach kernels as float32.
    options = {"score": score, "renormalize": renormalize, "groups": groups}
    options |= {"top_groups": top_groups, "scale": 1.0 if double else scale}
    if logits.size(0):
        route_launch(logits, selection_bias, options, weights, chosen).run(logits.device)
    return weights.mul_(scale) if double else weights, chosen


def route_backward(
    grad_weights: Tensor,
    weights: Tensor,
    experts: Tensor,
    logits: Tensor | None,
    num_experts: int,
    dtype: torch.dtype,
    score: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """Launch the gradient of `route` to its logits."""
    check_backward(grad_weights, weights, experts, logits, num_experts, dtype, score, renormalize)
    check_devices("route_backward", grad_weights, weights=weights, experts=experts, logits=logits)
    if os.environ.get("PPMOE_OPS_CHECK") == "1":
        check_backward_ids(experts, num_experts)
    if dtype == torch.float64:
        grad_weights = grad_weights * scale
        weights = weights / scale if scale != 0 else torch.zeros_like(weights)
        scale = 1.0
    out = weights.new_empty((weights.size(0), num_experts), dtype=dtype)
    options = {"score": score, "renormalize": renormalize, "scale": scale}
    if weights.size(0):
        given = (grad_weights, weights.contiguous(), experts.contiguous(), logits)
        route_backward_launch(*given, options, out).run(out.device)
    return out
