"""`ladder_ffn`: the feed-forward half of a ladder branch, with its three batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Autocast, Operator, Sample, register


def ladder_ffn(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor,
    w1: Tensor,
    b1: Tensor,
    dw_w: Tensor,
    dw_b: Tensor,
    w2: Tensor,
    b2: Tensor,
    bn_w: Tensor,
    bn_b: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    row_scale: Tensor | None,
    training: bool,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the light feed-forward network of a branch over its map, and add it to the map.

    With LN the layer norm over channels and BN_0 to BN_2 the batch norms over pixels:
    a1 = gelu(w1 @ LN(x) + b1), a2 = gelu(conv3x3(BN_0(a1)) + dw_b), h3 = w2 @ BN_1(a2) + b2 and
    y = x + row_scale[b] * BN_2(h3). The convolution is depth-wise with stride 1; zeros surround the
    map *after* BN_0. gelu is the exact one.

    Args:
        x: [B, H, W, g] float32, bfloat16, float16 or float64; any strides.
        ln_w: [g], scale of the layer norm; the dtype of `x`, or float32 for a 16-bit `x`.
        ln_b: [g], its shift; as `ln_w`.
        w1: [g, g] in the dtype of `x`, [outputs, inputs]; any strides.
        b1: [g] in the dtype of `x`.
        dw_w: [g, 3, 3] in the dtype of `x`.
        dw_b: [g] in the dtype of `x`.
        w2: [g, g], as `w1`.
        b2: [g] in the dtype of `x`.
        bn_w: [3, g], scales of the batch norms, one row a norm; as `ln_w`.
        bn_b: [3, g], their shifts; as `ln_w`.
        running_mean: [3, g], as `ln_w`; what is normalised with where `training` is False. With
            True it is not read and may be None.
        running_var: [3, g], as `running_mean`.
        row_scale: [B] in a dtype that `ln_w` may have, a factor for every map of the batch
            (stochastic depth), or None for ones.
        training: normalise with the mean and variance of this batch.
        eps: added to variances, by the layer norm too.

    Returns:
        y: [B, H, W, g] in the dtype of `x`. Sums are kept in float32 (float64 for float64);
            what lies between two products or sums may be rounded to the dtype of `x`.
        mean: [3, g] float32 (float64 for float64): what was normalised with, the batch's own with
            `training`. Not differentiable.
        var: [3, g], likewise; over all B * H * W pixels, without Bessel's correction. Running
            statistics take var * n / (n - 1) for n pixels, as torch's do; the caller updates them.

    Raises:
        ValueError: a shape or dtype that is not as above; fewer than two pixels with `training`;
            no running statistics without; a gradient asked for `running_mean`, `running_var` or
            `row_scale`.

    Gradient: to `x` and all ten parameters, `ln_w` to `bn_b`, in both modes; with `training`,
    through the statistics too, so that those of `b2` and `bn_b[1]` are zero.
    Saved for backward: no bytes of its own; keeps all inputs but the running statistics alive, and
    the results `mean` and `var`. The rest is computed again.

    Source: PSLT (arXiv 2304.03481), its light FFN; the order GELU, then batch norm is that of the
    released model.

    Example:
        >>> import torch, ppmoe_ops
        >>> x = torch.randn(2, 5, 5, 8)
        >>> one, zero, eye = torch.ones(8), torch.zeros(8), torch.eye(8)
        >>> tap = torch.zeros(8, 3, 3)
        >>> scale, shift = torch.ones(3, 8), torch.zeros(3, 8)
        >>> parameters = (one, zero, eye, zero, tap, zero, eye, zero, scale, shift)
        >>> y, mean, var = ppmoe_ops.ladder_ffn(x, *parameters, None, None, None, True)
        >>> bool((y - x).abs().max() < 1e-6)  # a convolution without taps leaves nothing to add
        True
        >>> mean.shape, var[1].tolist() == [0.0] * 8
        (torch.Size([3, 8]), True)
    """
    return LADDER_FFN.overload(
        x, ln_w, ln_b, w1, b1, dw_w, dw_b, w2, b2, bn_w, bn_b, running_mean, running_var,
        row_scale, training, eps,
    )  # fmt: skip


class Parameters(NamedTuple):
    ln_w: Tensor
    ln_b: Tensor
    w1: Tensor
    b1: Tensor
    dw_w: Tensor
    dw_b: Tensor
    w2: Tensor
    b2: Tensor
    bn_w: Tensor
    bn_b: Tensor


_AXES = ("g", "g", "g, g", "g", "g, 3, 3", "g", "g, g", "g", "3, g", "3, g")
_NORMS = ("ln_w", "ln_b", "bn_w", "bn_b")


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def norm_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """What norms, statistics and row scales may be for this x."""
    wide = wide_dtype(x)
    return (wide,) if x.dtype == wide else (x.dtype, wide)


def check_tensor(
    op: str, name: str, tensor: Tensor, axes: str, x: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    """A tensor whose axes are called g, as the channels of x, or by their size."""
    check.dim(op, name, tensor, axes)
    check.dtype(op, name, tensor, dtypes, "for this x")
    for axis, letter in enumerate(axes.split(", ")):
        wanted, why = (x.size(3), "as x") if letter == "g" else (int(letter), f"[{axes}]")
        check.size(op, name, f"axis {axis}", tensor.size(axis), wanted, why)


def check_ffn(
    op: str, x: Tensor, parameters: Parameters, row_scale: Tensor | None, training: bool
) -> None:
    check.dim(op, "x", x, "B, H, W, g")
    check.dtype(op, "x", x, check.FLOATS)
    for name, tensor, axes in zip(Parameters._fields, parameters, _AXES, strict=True):
        dtypes = norm_dtypes(x) if name in _NORMS else (x.dtype,)
        check_tensor(op, name, tensor, axes, x, dtypes)
    if row_scale is not None:
        check.dim(op, "row_scale", row_scale, "B")
        check.dtype(op, "row_scale", row_scale, norm_dtypes(x), "for this x")
        check.size(op, "row_scale", "B", row_scale.size(0), x.size(0), "as x")
    pixels = x.size(0) * x.size(1) * x.size(2)
    if training and pixels < 2:
        raise ValueError(f"{op}: x has B * H * W = {pixels}; allowed in training: 2 or more")


def _check_forward(
    x: Tensor, parameters: Parameters, running_mean: Tensor | None, running_var: Tensor | None,
    row_scale: Tensor | None, training: bool,
) -> None:  # fmt: skip
    op = "ladder_ffn"
    check_ffn(op, x, parameters, row_scale, training)
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor is not None:
            check_tensor(op, name, tensor, "3, g", x, norm_dtypes(x))
        elif not training:
            raise ValueError(f"{op}: {name} is None; allowed only with training")


def shifted(padded: Tensor, row: int, column: int) -> Tensor:
    """What a tap of the convolution sees: x as padded by one pixel, moved."""
    height, width = padded.size(1) - 2, padded.size(2) - 2
    return padded[:, row : row + height, column : column + width]


class Steps(NamedTuple):
    """The stages of the network, wide. h are before an activation, n normalised without scale."""

    ln_inverse: Tensor
    ln_n: Tensor
    ln_out: Tensor
    h1: Tensor
    n1: Tensor
    u1: Tensor
    h2: Tensor
    n2: Tensor
    u2: Tensor
    n3: Tensor
    mean: Tensor
    var: Tensor


def steps(
    x: Tensor, parameters: Parameters, mean: Tensor | None, var: Tensor | None, eps: float
) -> Steps:
    """All stages up to the last batch norm; without mean and var, by the batch's own."""
    wide = wide_dtype(x)
    p = Parameters(*(each.to(wide) for each in parameters))
    means, variances = [], []

    def batch_norm(value: Tensor, index: int) -> tuple[Tensor, Tensor]:
        pixels = value.flatten(0, 2)
        m = pixels.mean(0) if mean is None else mean[index].to(wide)
        v = pixels.var(0, correction=0) if var is None else var[index].to(wide)
        means.append(m)
        variances.append(v)
        normal = (value - m) * torch.rsqrt(v + eps)
        return normal, normal * p.bn_w[index] + p.bn_b[index]

    x = x.to(wide)
    centred = x - x.mean(-1, keepdim=True)
    ln_inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    ln_n = centred * ln_inverse
    ln_out = ln_n * p.ln_w + p.ln_b
    h1 = ln_out @ p.w1.T + p.b1
    n1, u1 = batch_norm(F.gelu(h1), 0)
    padded = F.pad(u1, (0, 0, 1, 1, 1, 1))
    h2 = p.dw_b.expand_as(u1)
    for tap in range(9):
        h2 = h2 + shifted(padded, tap // 3, tap % 3) * p.dw_w[:, tap // 3, tap % 3]
    n2, u2 = batch_norm(F.gelu(h2), 1)
    n3, _ = batch_norm(u2 @ p.w2.T + p.b2, 2)
    return Steps(
        ln_inverse, ln_n, ln_out, h1, n1, u1, h2, n2, u2, n3,
        torch.stack(means), torch.stack(variances),
    )  # fmt: skip


def row_factor(x: Tensor, row_scale: Tensor | None) -> Tensor | float:
    return 1.0 if row_scale is None else row_scale.to(wide_dtype(x)).view(-1, 1, 1, 1)


def _reference(
    x: Tensor, ln_w: Tensor, ln_b: Tensor, w1: Tensor, b1: Tensor, dw_w: Tensor, dw_b: Tensor,
    w2: Tensor, b2: Tensor, bn_w: Tensor, bn_b: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, row_scale: Tensor | None, training: bool, eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = Parameters(ln_w, ln_b, w1, b1, dw_w, dw_b, w2, b2, bn_w, bn_b)
    _check_forward(x, p, running_mean, running_var, row_scale, training)
    given = (None, None) if training else (running_mean, running_var)
    s = steps(x, p, *given, eps)
    wide = wide_dtype(x)
    out = s.n3 * bn_w[2].to(wide) + bn_b[2].to(wide)
    y = x.to(wide) + row_factor(x, row_scale) * out
    return y.to(x.dtype).contiguous(), s.mean, s.var


def _fake(
    x: Tensor, ln_w: Tensor, ln_b: Tensor, w1: Tensor, b1: Tensor, dw_w: Tensor, dw_b: Tensor,
    w2: Tensor, b2: Tensor, bn_w: Tensor, bn_b: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, row_scale: Tensor | None, training: bool, eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = Parameters(ln_w, ln_b, w1, b1, dw_w, dw_b, w2, b2, bn_w, bn_b)
    _check_forward(x, p, running_mean, running_var, row_scale, training)
    statistics = (3, x.size(3))
    return (
        x.new_empty(x.shape),
        x.new_empty(statistics, dtype=wide_dtype(x)),
        x.new_empty(statistics, dtype=wide_dtype(x)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    for index, name in ((11, "running_mean"), (12, "running_var"), (13, "row_scale")):
        if ctx.needs_input_grad[index]:
            raise ValueError(f"ladder_ffn: {name} requires a gradient; allowed: one that does not")
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(*inputs[:11], mean, var, inputs[13])
    ctx.training = inputs[14]
    # The dispatcher drops an argument that equals its default.
    ctx.eps = inputs[15] if len(inputs) > 15 else 1e-5


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.ppmoe_ops.ladder_ffn_backward.default(
        grad, *ctx.saved_tensors, ctx.training, ctx.eps
    )
    needs = ctx.needs_input_grad
    needed = (each if need else None for each, need in zip(grads, needs, strict=False))
    return (*needed, *[None] * (len(needs) - 11))


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """B, H, W, g; training by turns, row scales and float32 norms now and then."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for index, sizes in enumerate(
        ((2, 5, 4, 8), (1, 7, 7, 24), (2, 1, 3, 10), (3, 4, 1, 16), (0, 4, 4, 8), (2, 0, 3, 8))
    ):
        batch, *_, g = sizes
        training = index in (0, 3)

        def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        norm = wide if index % 2 else dtype
        parameters = Parameters(
            1 + 0.1 * tensor(g, dtype=norm), tensor(g, dtype=norm), tensor(g, g) * g**-0.5,
            tensor(g), tensor(g, 3, 3) / 3, tensor(g), tensor(g, g) * g**-0.5, tensor(g),
            1 + 0.1 * tensor(3, g, dtype=norm), tensor(3, g, dtype=norm),
        )  # fmt: skip
        leaves = [each.detach().requires_grad_() for each in (tensor(*sizes), *parameters)]
        running = (tensor(3, g, dtype=norm), 0.5 + tensor(3, g, dtype=norm).square())
        given = (None, None) if index == 0 else running
        scale = torch.rand(batch, device=device, dtype=norm) if index % 3 == 0 else None
        yield (*leaves, *given, scale, training, *([1e-3] if index == 1 else [])), {}


def _flops(x: Tensor, *_: Any, **__: Any) -> int:
    # Products alone: two linear layers and nine taps.
    return 2 * x.numel() * (2 * x.size(3) + 9)


def _nbytes(x: Tensor, *args: Any, **__: Any) -> int:
    """The map in and out, the parameters, the statistics."""
    statistics = 2 * 3 * x.size(3) * (8 if x.dtype == torch.float64 else 4)
    given = args[10:13] if not args[13] else (None, None, args[12])
    read = sum(each.nbytes for each in (*args[:10], *given) if each is not None)
    return 2 * x.numel() * x.element_size() + read + statistics


ARGUMENTS = (
    "Tensor x, Tensor ln_w, Tensor ln_b, Tensor w1, Tensor b1, Tensor dw_w, Tensor dw_b, "
    "Tensor w2, Tensor b2, Tensor bn_w, Tensor bn_b"
)

LADDER_FFN = register(
    Operator(
        name="ladder_ffn",
        family="ladder_attention",
        schema=f"({ARGUMENTS}, Tensor? running_mean, Tensor? running_var, Tensor? row_scale, "
        "bool training, float eps=1e-5) -> (Tensor y, Tensor mean, Tensor var)",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        saved_bytes=lambda *_, **__: 0,
        samples=samples,
        setup_context=_setup_context,
        backward=_backward,
        autocast=Autocast("region", keep=(*_NORMS, "running_mean", "running_var", "row_scale")),
        benchmark="bench_ladder_attention",
    )
)
