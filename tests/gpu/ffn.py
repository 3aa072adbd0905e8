"""Shared by the tests of `expert_ffn` on a GPU: problems, a plain loop, how results are judged."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.ops.expert_slice.activations import GATED, activate, activate_backward
from ppmoe_ops.testing import assert_error_rule, cast_sample, poison_memory

CUDA = torch.device("cuda")
OPS = torch.ops.ppmoe_ops
ALL = (True,) * 6
BOTH = (True, True)
Args = tuple[Any, ...]


def call(name: str, *args: Any) -> Any:
    module, function = str(OPERATORS[name].triton).split(":")
    return getattr(importlib.import_module(module), function)(*args)


def problem(
    shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "swiglu",
    biases: tuple[bool, bool] = BOTH,
    ids: Tensor | None = None,
) -> Args:
    """Arguments of `expert_ffn`."""
    tokens, hidden, width, top_k, experts, first, local = shape
    inner = 2 * width if activation in GATED else width
    if ids is None:
        ids = torch.rand(tokens, experts, device=CUDA).argsort(-1)[:, :top_k]
    slots, offsets = OPS.expert_index(ids, first, local)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, device=CUDA) * max(sizes[-1], 1) ** -0.5).to(dtype)

    return (
        torch.randn(tokens, hidden, device=CUDA).to(dtype),
        slots,
        offsets,
        torch.randn(tokens, ids.size(1), device=CUDA, dtype=wide),
        tensor(local, inner, hidden),
        torch.randn(local, inner, device=CUDA).to(dtype) if biases[0] else None,
        tensor(local, hidden, width),
        torch.randn(local, hidden, device=CUDA).to(dtype) if biases[1] else None,
        activation,
    )


def groups(slots: Tensor, offsets: Tensor) -> list[tuple[slice, Tensor]]:
    bounds = [int(bound) for bound in offsets.tolist()]
    return [(slice(low, high), slots[low:high].long()) for low, high in pairwise(bounds)]


def plain_forward(
    x: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """A loop over the experts; each one's output is rounded, as the kernels store it."""
    rows = weights.size(0) * min(weights.size(1), w_out.size(0))
    out, pre = weights.new_zeros(x.shape), x.new_full((rows, w_in.size(1)), torch.nan)
    for expert, (at, group) in enumerate(groups(slots, offsets)):
        token = group // weights.size(1)
        hidden = x[token] @ w_in[expert].T
        if b_in is not None:
            hidden = hidden + b_in[expert]
        pre[at] = hidden
        row = activate(hidden, activation) @ w_out[expert].T
        if b_out is not None:
            row = row + b_out[expert]
        out.index_add_(0, token, row.to(out.dtype) * weights.reshape(-1)[group].unsqueeze(-1))
    return out.to(x.dtype), pre


def plain_backward(
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
) -> tuple[Tensor, ...]:
    wide, inner = weights.dtype, w_in.shape[:2]
    grad_x, grad_weights = weights.new_zeros(x.shape), weights.new_zeros(weights.shape)
    grad_w_in, grad_b_in = x.new_zeros(w_in.shape), x.new_zeros(inner)
    grad_w_out, grad_b_out = x.new_zeros(w_out.shape), x.new_zeros(w_out.shape[:2])
    for expert, (at, group) in enumerate(groups(slots, offsets)):
        token = group // weights.size(1)
        weight = weights.reshape(-1)[group].unsqueeze(-1)
        row, hidden = grad[token], pre[at]
        unweighted, activated = row @ w_out[expert], activate(hidden, activation)
        pre_grad = activate_backward((weight * unweighted).to(x.dtype), hidden, activation)
        dots = (unweighted.to(wide) * activated.to(wide)).sum(-1)
        if b_out is not None:
            dots = dots + (row.to(wide) * b_out[expert].to(wide)).sum(-1)
        grad_weights.view(-1)[group] = dots
        grad_x.index_add_(0, token, (pre_grad @ w_in[expert]).to(wide))
        grad_w_in[expert] = pre_grad.T @ x[token]
        grad_b_in[expert] = pre_grad.sum(0)
        grad_w_out[expert] = row.T @ (weight * activated).to(x.dtype)
        grad_b_out[expert] = (weight * row).to(x.dtype).sum(0)
    grads = (grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out)
    return grad_x.to(x.dtype), *grads


def check_forward(args: Args) -> Tensor:
    """Output and pre-activation by the error rule; returns the pre-activation."""
    with poison_memory():
        got, pre = call("expert_ffn_forward", *args, True)
        alone, nothing = call("expert_ffn_forward", *args, False)
    assert got.device.type == pre.device.type == CUDA.type
    assert nothing.shape == (0, args[4].size(1))
    plain, plain_pre = plain_forward(*args)
    exact, exact_pre = plain_forward(*cast_sample(args, torch.float64))
    assert_error_rule(got, plain, exact, 2, "result")
    assert_error_rule(alone, plain, exact, 2, "result without what is saved")
    assert_error_rule(pre, plain_pre, exact_pre, 2, "pre")
    # Rows of foreign slots are not touched.
    assert torch.equal(pre.isnan(), plain_pre.isnan())
    return plain_pre


def check_backward(
    args: Args, pre: Tensor, grad: Tensor | None = None, subsets: Sequence[Any] = (ALL,)
) -> None:
    """Every gradient that is needed by the error rule."""
    x, slots, offsets, weights, w_in, _, w_out, b_out, activation = args
    grad = torch.randn(x.shape, device=CUDA).to(x.dtype) if grad is None else grad
    given = (grad, x, slots, offsets, weights, w_in, w_out, b_out, pre, activation)
    plain, exact = plain_backward(*given), plain_backward(*cast_sample(given, torch.float64))
    names = ("x", "weights", "w_in", "b_in", "w_out", "b_out")
    for needs in subsets:
        with poison_memory():
            got = call("expert_ffn_backward", *given, *needs)
        for ours, theirs, truth, need, name in zip(got, plain, exact, needs, names, strict=True):
            if need:
                assert_error_rule(ours, theirs, truth, 3, f"gradient of {name}")
            else:
                assert ours.shape == (0,)


def check(args: Args, grad: Tensor | None = None) -> None:
    check_backward(args, check_forward(args), grad)


def replaced(args: Args, **changes: Tensor) -> Args:
    names = ("x", "slots", "offsets", "weights", "w_in", "b_in", "w_out", "b_out", "activation")
    return tuple({**dict(zip(names, args, strict=True)), **changes}.values())


def everything(args: Args) -> tuple[Tensor, ...]:
    """The output, the pre-activation and all gradients for a gradient of ones."""
    x, slots, offsets, weights, w_in, _, w_out, b_out, activation = args
    out, pre = call("expert_ffn_forward", *args, True)
    given = (torch.ones_like(x), x, slots, offsets, weights, w_in, w_out, b_out, pre, activation)
    return out, *call("expert_ffn_backward", *given, *ALL)
