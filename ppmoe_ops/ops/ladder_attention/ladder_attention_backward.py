"""`ladder_attention_backward`: all nine gradients of `ladder_attention`, from its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ppmoe_ops._library import Operator, Sample, register
from ppmoe_ops.ops.ladder_attention.ladder_attention import check_branch
from ppmoe_ops.ops.ladder_attention.ladder_attention import samples as forward_samples
from ppmoe_ops.ops.ladder_attention.windows import (
    attend,
    attend_backward,
    attention_flops,
    check_like,
    wide_dtype,
)

_OP = "ladder_attention_backward"


def _empty(
    x: Tensor,
    v: Tensor | None,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    bias_table: Tensor,
    w_out: Tensor,
    need_maps: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else (0,))

    grad_v = x.new_empty((0,)) if v is None else like(v, need_maps)
    parameters = (ln_w, ln_b, w_in, b_in, bias_table, w_out)
    grads = (like(each, need_parameters) for each in parameters)
    grad_b_out = x.new_empty((x.size(3),) if need_parameters else (0,))
    return like(x, need_maps), grad_v, *grads, grad_b_out


def _reference(
    grad: Tensor,
    x: Tensor,
    v: Tensor | None,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    bias_table: Tensor,
    w_out: Tensor,
    row_scale: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    eps: float,
    need_maps: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    check_branch(
        _OP, x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, row_scale, num_heads, window, shift
    )
    check_like(_OP, "grad", grad, x, "x")
    wide = wide_dtype(x.dtype)
    own_x, norm_w, norm_b, weight, bias, table, out_weight, given = (
        each.to(wide) for each in (x, ln_w, ln_b, w_in, b_in, bias_table, w_out, grad)
    )
    width = x.size(3)
    centred = own_x - own_x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    standard = centred * inverse
    n = standard * norm_w + norm_b
    parts = F.linear(n, weight, bias).split(width, -1)
    q, k, value = parts[0], parts[1], parts[2] if v is None else v.to(wide)

    scaled = given if row_scale is None else given * row_scale.to(wide).view(-1, 1, 1, 1)
    *slopes, grad_table = attend_backward(
        scaled @ out_weight, q, k, value, table, num_heads, window, shift, None
    )
    attended = attend(q, k, value, table, num_heads, window, shift, None)
    into = torch.cat(slopes if v is None else slopes[:2], -1)
    grad_n = into @ weight if v is None else into @ weight + scaled
    slope = grad_n * norm_w
    level, tilt = slope.mean(-1, keepdim=True), (slope * standard).mean(-1, keepdim=True)
    found = (
        given + (slope - level - standard * tilt) * inverse,
        slopes[2],
        (grad_n * standard).sum((0, 1, 2)),
        grad_n.sum((0, 1, 2)),
        into.flatten(0, 2).T @ n.flatten(0, 2),
        into.sum((0, 1, 2)),
        grad_table,
        scaled.flatten(0, 2).T @ attended.flatten(0, 2),
        scaled.sum((0, 1, 2)),
    )
    results = _empty(x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, need_maps, need_parameters)
    for result, each in zip(results, found, strict=True):
        if result.shape == each.shape:
            result.copy_(each)
    return results


def _fake(
    grad: Tensor,
    x: Tensor,
    v: Tensor | None,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    bias_table: Tensor,
    w_out: Tensor,
    row_scale: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    eps: float,
    need_maps: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    check_branch(
        _OP, x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, row_scale, num_heads, window, shift
    )
    check_like(_OP, "grad", grad, x, "x")
    return _empty(x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, need_maps, need_parameters)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    needs = ((True, True), (True, False), (False, True))
    for index, (args, options) in enumerate(forward_samples(device, dtype)):
        plain_args = [
            each.detach() if isinstance(each, Tensor) else each
            for position, each in enumerate(args)
            if position != 8
        ]
        grad = torch.randn(args[0].shape, device=device, dtype=dtype)
        eps = options.get("eps", 1e-5)
        yield (grad, *plain_args, eps, *needs[index % 3]), {}


def _flops(grad: Tensor, x: Tensor, v: Tensor | None, ln_w: Tensor, ln_b: Tensor, w_in: Tensor,
           b_in: Tensor, bias_table: Tensor, w_out: Tensor, row_scale: Tensor | None,
           num_heads: int, window: Sequence[int], shift: Sequence[int], eps: float,
           need_maps: bool, need_parameters: bool) -> int:  # fmt: skip
    into, out = 2 * x.numel() * w_in.size(0), 2 * x.numel() * w_out.size(0)
    # w_in once more, the gradients of what both products take, and those of the weights.
    products = 2 * into + out + int(need_parameters) * (into + out)
    return products + 3 * attention_flops(x, window)


def _nbytes(grad: Tensor, x: Tensor, v: Tensor | None, ln_w: Tensor, ln_b: Tensor, w_in: Tensor,
            b_in: Tensor, bias_table: Tensor, w_out: Tensor, row_scale: Tensor | None,
            num_heads: int, window: Sequence[int], shift: Sequence[int], eps: float,
            need_maps: bool, need_parameters: bool) -> int:  # fmt: skip
    maps = (2 if v is None else 3) + int(need_maps) * (1 if v is None else 2)
    weights = (1 + int(need_parameters)) * (w_in.numel() + w_out.numel())
    return (maps * x.numel() + weights) * x.element_size()


LADDER_ATTENTION_BACKWARD = register(
    Operator(
        name=_OP,
        family="ladder_attention",
        schema="(Tensor grad, Tensor x, Tensor? v, Tensor ln_w, Tensor ln_b, Tensor w_in, "
        "Tensor b_in, Tensor bias_table, Tensor w_out, Tensor? row_scale, SymInt num_heads, "
        "SymInt[] window, SymInt[] shift, float eps, bool need_maps, bool need_parameters) -> "
        "(Tensor grad_x, Tensor grad_v, Tensor grad_ln_w, Tensor grad_ln_b, Tensor grad_w_in, "
        "Tensor grad_b_in, Tensor grad_bias_table, Tensor grad_w_out, Tensor grad_b_out)",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        samples=_samples,
        no_derivative="ladder_attention has no second derivative; allowed: first derivatives",
        benchmark="bench_ladder_attention",
    )
)
