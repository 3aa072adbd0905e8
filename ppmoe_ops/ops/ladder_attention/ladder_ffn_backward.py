"""`ladder_ffn_backward`: all eleven gradients of `ladder_ffn`, from its inputs and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Operator, Sample, register
from ppmoe_ops.ops.ladder_attention.ladder_ffn import (
    ARGUMENTS,
    Parameters,
    check_ffn,
    check_tensor,
    row_factor,
    samples,
    shifted,
    steps,
    wide_dtype,
)

_OP = "ladder_ffn_backward"


def _check(
    grad: Tensor, x: Tensor, parameters: Parameters, mean: Tensor, var: Tensor,
    row_scale: Tensor | None, training: bool,
) -> None:  # fmt: skip
    check_ffn(_OP, x, parameters, row_scale, training)
    check.dim(_OP, "grad", grad, "B, H, W, g")
    check.dtype(_OP, "grad", grad, (x.dtype,), "as x")
    for axis, letter in enumerate(("B", "H", "W", "g")):
        check.size(_OP, "grad", letter, grad.size(axis), x.size(axis), "as x")
    check_tensor(_OP, "mean", mean, "3, g", x, (wide_dtype(x),))
    check_tensor(_OP, "var", var, "3, g", x, (wide_dtype(x),))


def _pixel_sum(value: Tensor) -> Tensor:
    return value.flatten(0, 2).sum(0)


def _reference(
    grad: Tensor, x: Tensor, ln_w: Tensor, ln_b: Tensor, w1: Tensor, b1: Tensor, dw_w: Tensor,
    dw_b: Tensor, w2: Tensor, b2: Tensor, bn_w: Tensor, bn_b: Tensor, mean: Tensor, var: Tensor,
    row_scale: Tensor | None, training: bool, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters = Parameters(ln_w, ln_b, w1, b1, dw_w, dw_b, w2, b2, bn_w, bn_b)
    _check(grad, x, parameters, mean, var, row_scale, training)
    wide = wide_dtype(x)
    p = Parameters(*(each.to(wide) for each in parameters))
    s = steps(x, parameters, mean, var, eps)
    pixels = max(x.size(0) * x.size(1) * x.size(2), 1)
    grad_bn_w, grad_bn_b = torch.zeros_like(p.bn_w), torch.zeros_like(p.bn_b)

    def batch_norm(into: Tensor, normal: Tensor, index: int) -> Tensor:
        grad_bn_w[index] = _pixel_sum(into * normal)
        grad_bn_b[index] = _pixel_sum(into)
        if training:
            into = into - (grad_bn_b[index] + normal * grad_bn_w[index]) / pixels
        return into * (p.bn_w[index] * torch.rsqrt(var[index] + eps))

    def gelu(into: Tensor, h: Tensor) -> Tensor:
        slope: Tensor = torch.ops.aten.gelu_backward(into, h)
        return slope

    grad_h3 = batch_norm(grad.to(wide) * row_factor(x, row_scale), s.n3, 2)
    grad_b2 = _pixel_sum(grad_h3)
    grad_w2 = grad_h3.flatten(0, 2).T @ s.u2.flatten(0, 2)
    grad_h2 = gelu(batch_norm(grad_h3 @ p.w2, s.n2, 1), s.h2)
    if training:
        # The batch's mean takes these two shifts away again. NaN and infinity stay what they are.
        grad_b2, grad_bn_b[1] = grad_b2 - grad_b2, grad_bn_b[1] - grad_bn_b[1]
    padded_grad = F.pad(grad_h2, (0, 0, 1, 1, 1, 1))
    grad_u1 = torch.zeros_like(s.u1)
    grad_dw_w = torch.zeros_like(p.dw_w)
    for tap in range(9):
        row, column = tap // 3, tap % 3
        seen_by = shifted(padded_grad, 2 - row, 2 - column)
        grad_u1 = grad_u1 + seen_by * p.dw_w[:, row, column]
        grad_dw_w[:, row, column] = _pixel_sum(seen_by * s.u1)
    grad_h1 = gelu(batch_norm(grad_u1, s.n1, 0), s.h1)
    grad_ln_out = grad_h1 @ p.w1
    grad_n = grad_ln_out * p.ln_w
    along = (grad_n * s.ln_n).mean(-1, keepdim=True)
    through = (grad_n - grad_n.mean(-1, keepdim=True) - s.ln_n * along) * s.ln_inverse
    grads = Parameters(
        ln_w=_pixel_sum(grad_ln_out * s.ln_n),
        ln_b=_pixel_sum(grad_ln_out),
        w1=grad_h1.flatten(0, 2).T @ s.ln_out.flatten(0, 2),
        b1=_pixel_sum(grad_h1),
        dw_w=grad_dw_w,
        dw_b=_pixel_sum(grad_h2),
        w2=grad_w2,
        b2=grad_b2,
        bn_w=grad_bn_w,
        bn_b=grad_bn_b,
    )
    grad_x = (grad.to(wide) + through).to(x.dtype).contiguous()
    return grad_x, *(g.to(each.dtype) for g, each in zip(grads, parameters, strict=True))


def _fake(
    grad: Tensor, x: Tensor, ln_w: Tensor, ln_b: Tensor, w1: Tensor, b1: Tensor, dw_w: Tensor,
    dw_b: Tensor, w2: Tensor, b2: Tensor, bn_w: Tensor, bn_b: Tensor, mean: Tensor, var: Tensor,
    row_scale: Tensor | None, training: bool, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters = Parameters(ln_w, ln_b, w1, b1, dw_w, dw_b, w2, b2, bn_w, bn_b)
    _check(grad, x, parameters, mean, var, row_scale, training)
    return tuple(each.new_empty(each.shape) for each in (x, *parameters))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for args, _ in samples(device, dtype):
        plain = [each.detach() if isinstance(each, Tensor) else each for each in args]
        _, mean, var = torch.ops.ppmoe_ops.ladder_ffn.default(*plain)
        grad = torch.randn(plain[0].shape, device=device, dtype=dtype)
        eps = plain[15] if len(plain) > 15 else 1e-5
        yield (grad, *plain[:11], mean, var, plain[13], plain[14], eps), {}


def _flops(grad: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    # Two products for each one of the forward; what is computed again is not counted.
    return 4 * x.numel() * (2 * x.size(3) + 9)


def _nbytes(grad: Tensor, x: Tensor, *args: Any, **__: Any) -> int:
    """Three maps, the parameters in and their gradients out, statistics and row scales."""
    parameters = sum(each.nbytes for each in args[:10])
    rest = sum(each.nbytes for each in args[10:13] if each is not None)
    return 3 * x.numel() * x.element_size() + 2 * parameters + rest


_RETURNS = ", ".join(f"Tensor grad_{name}" for name in ("x", *Parameters._fields))

LADDER_FFN_BACKWARD = register(
    Operator(
        name=_OP,
        family="ladder_attention",
        schema=f"(Tensor grad, {ARGUMENTS}, Tensor mean, Tensor var, Tensor? row_scale, "
        f"bool training, float eps) -> ({_RETURNS})",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        samples=_samples,
        no_derivative="ladder_ffn has no second derivative; allowed: first derivatives",
        benchmark="bench_ladder_attention",
    )
)
