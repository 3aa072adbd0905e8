"""`expert_ffn_backward`: all six gradients of `expert_ffn`, from the saved pre-activation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Operator, Sample, register
from ppmoe_ops.ops.expert_slice.activations import activate, activate_backward
from ppmoe_ops.ops.expert_slice.expert_ffn import (
    EXPERT_FFN_FORWARD,
    check_ffn,
    read_groups,
    reserved_rows,
    samples,
    wide_dtype,
)

_OP = "expert_ffn_backward"


def check_backward(
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
) -> None:
    check_ffn(_OP, x, slots, offsets, weights, w_in, w_out, b_out, activation)
    check.dim(_OP, "grad", grad, "T, H")
    check.dtype(_OP, "grad", grad, (x.dtype,), "as x")
    check.size(_OP, "grad", "T", grad.size(0), x.size(0), "as x")
    check.size(_OP, "grad", "H", grad.size(1), x.size(1), "as x")
    check.dim(_OP, "pre", pre, "R, F")
    check.dtype(_OP, "pre", pre, (x.dtype,), "as x")
    check.size(_OP, "pre", "R", pre.size(0), reserved_rows(weights, w_out), "T * min(K, L)")
    check.size(_OP, "pre", "F", pre.size(1), w_in.size(1), "as w_in")


def empty_gradients(
    x: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    shapes = (x.shape, weights.shape, w_in.shape, w_in.shape[:2], w_out.shape, w_out.shape[:2])
    dtypes = (x.dtype, weights.dtype, *[x.dtype] * 4)
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


def _reference(
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
    check_backward(grad, x, slots, offsets, weights, w_in, w_out, b_out, pre, activation)
    groups = read_groups(_OP, slots, offsets, reserved_rows(weights, w_out))
    wide = wide_dtype(x)
    grads = tuple(each.zero_() for each in empty_gradients(x, weights, w_in, w_out, needs))
    grad_x, grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out = grads
    total = x.new_zeros(x.shape, dtype=wide)
    first = int(offsets[0])
    for expert, group in enumerate(groups):
        last = first + group.numel()
        token = group // max(weights.size(1), 1)
        weight = weights.reshape(-1)[group].unsqueeze(-1)
        row_grad, hidden = grad[token].to(wide), pre[first:last].to(wide)
        unweighted = row_grad @ w_out[expert].to(wide)
        activated = activate(hidden, activation)
        # Rounded as the products below read them.
        pre_grad = activate_backward(weight * unweighted, hidden, activation).to(x.dtype).to(wide)
        if needs[0]:
            total.index_add_(0, token, pre_grad @ w_in[expert].to(wide))
        if needs[1]:
            dots = (unweighted * activated).sum(-1)
            if b_out is not None:
                dots = dots + row_grad @ b_out[expert].to(wide)
            grad_weights.view(-1)[group] = dots
        if needs[2]:
            grad_w_in[expert] = (pre_grad.T @ x[token].to(wide)).to(x.dtype)
        if needs[3]:
            grad_b_in[expert] = pre_grad.sum(0).to(x.dtype)
        if needs[4]:
            weighted = (weight * activated).to(x.dtype).to(wide)
            grad_w_out[expert] = (row_grad.T @ weighted).to(x.dtype)
        if needs[5]:
            grad_b_out[expert] = (weight * row_grad).sum(0).to(x.dtype)
        first = last
    if needs[0]:
        grad_x.copy_(total)
    return grads


def _fake(
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
    check_backward(grad, x, slots, offsets, weights, w_in, w_out, b_out, pre, activation)
    return empty_gradients(x, weights, w_in, w_out, needs)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for index, (args, _) in enumerate(samples(device, dtype)):
        plain = [each.detach() if isinstance(each, Tensor) else each for each in args]
        x, slots, offsets, weights, w_in, _, w_out, b_out, activation = plain
        _, pre = EXPERT_FFN_FORWARD.overload(*plain, True)
        grad = torch.randn(x.shape, device=device, dtype=dtype)
        every = (True, True, True, True, True, True)
        some = (index % 3 == 0, index % 3 == 1, True, False, index % 2 == 0, True)
        needs = some if index >= 4 else every
        yield (grad, x, slots, offsets, weights, w_in, w_out, b_out, pre, activation, *needs), {}


def _flops(grad: Tensor, x: Tensor, slots: Tensor, offsets: Tensor, weights: Tensor, w_in: Tensor,
           w_out: Tensor, b_out: Tensor | None, pre: Tensor, activation: str,
           need_x: bool, need_weights: bool, need_w_in: bool, need_b_in: bool, need_w_out: bool,
           need_b_out: bool) -> int:  # fmt: skip
    one = 2 * reserved_rows(weights, w_out) * x.size(1)
    inner = need_x or need_weights or need_w_in or need_b_in
    into = (int(need_x) + int(need_w_in)) * w_in.size(1)
    return one * (into + (int(inner) + int(need_w_out)) * w_out.size(2))


def _nbytes(grad: Tensor, x: Tensor, slots: Tensor, offsets: Tensor, weights: Tensor, w_in: Tensor,
            w_out: Tensor, b_out: Tensor | None, pre: Tensor, activation: str,
            need_x: bool, need_weights: bool, need_w_in: bool, *needs: bool) -> int:  # fmt: skip
    listed = slots[int(offsets[0]) : int(offsets[-1])]
    tokens = int(torch.unique(listed // max(weights.size(1), 1)).numel())
    hit = int((offsets[1:] > offsets[:-1]).sum())
    per_expert = w_in.size(1) * x.size(1), w_out.size(2) * x.size(1)
    moved = tokens * x.size(1) + listed.numel() * pre.size(1) + hit * per_expert[1]
    if need_x:
        moved += x.numel() + hit * per_expert[0]
    if need_w_in:
        moved += tokens * x.size(1) + w_in.numel()
    if needs[1]:
        moved += w_out.numel()
    return moved * x.element_size() + 12 * listed.numel()


EXPERT_FFN_BACKWARD = register(
    Operator(
        name=_OP,
        family="expert_slice",
        schema="(Tensor grad, Tensor x, Tensor slots, Tensor offsets, Tensor weights, "
        "Tensor w_in, Tensor w_out, Tensor? b_out, Tensor pre, str activation, bool need_x, "
        "bool need_weights, bool need_w_in, bool need_b_in, bool need_w_out, bool need_b_out) -> "
        "(Tensor grad_x, Tensor grad_weights, Tensor grad_w_in, Tensor grad_b_in, "
        "Tensor grad_w_out, Tensor grad_b_out)",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        samples=_samples,
        no_derivative="expert_ffn has no second derivative; allowed: first derivatives",
        triton="ppmoe_ops.kernels.expert_slice.expert_ffn_backward:expert_ffn_backward",
        benchmark="bench_expert_slice",
    )
)
