"""`pixel_adaptive_fusion`: a gate and a linear layer over the joined branches, pixel by pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Autocast, Operator, Sample, register

_BACKWARD = "pixel_adaptive_fusion_backward"


def pixel_adaptive_fusion(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor, bp: Tensor
) -> Tensor:
    """Weigh every channel of every pixel by a gate of that pixel, then mix its channels.

    t = x * sigmoid(w2 @ relu(w1 @ x + b1) + b2), out = wp @ t + bp + t, for each pixel's C channels
    on their own.

    Args:
        x: [..., C] float32, bfloat16, float16 or float64, with one axis or more before C; any
            strides. Rows of channels at equal distances are read where they are.
        w1: [D, C] in the dtype of `x`; any D, any strides.
        b1: [D] in the dtype of `x`.
        w2: [C, D] in the dtype of `x`; any strides.
        b2: [C] in the dtype of `x`.
        wp: [C, C] in the dtype of `x`; any strides.
        bp: [C] in the dtype of `x`.

    Returns:
        The shape and dtype of `x`, contiguous. Sums are taken in float32 (float64 for float64);
        what goes from one product into the next may be rounded to the dtype of `x`.

    Raises:
        ValueError: a shape or dtype that is not as above.

    Gradient: to every argument.
    Saved for backward: no bytes of its own; keeps `x`, `w1`, `b1`, `w2`, `b2` and `wp` alive. The
    backward computes the gate once more.

    Source: PSLT (arXiv 2304.03481), the pixel-adaptive fusion module, as its authors' code has it.

    Example:
        >>> import torch, ppmoe_ops
        >>> x = torch.tensor([[2.0, 4.0]])
        >>> w1, b1 = torch.zeros(1, 2), torch.zeros(1)
        >>> w2, b2 = torch.zeros(2, 1), torch.zeros(2)
        >>> ppmoe_ops.pixel_adaptive_fusion(x, w1, b1, w2, b2, torch.eye(2), torch.ones(2)).tolist()
        [[3.0, 5.0]]
    """
    return PIXEL_ADAPTIVE_FUSION.overload(x, w1, b1, w2, b2, wp, bp)


def _check_parameter(
    op: str, name: str, tensor: Tensor, x: Tensor, axes: str, sizes: tuple[int, ...]
) -> None:
    check.dim(op, name, tensor, axes)
    check.dtype(op, name, tensor, (x.dtype,), "as x")
    for axis, letter in enumerate(axes.split(", ")):
        why = "as x" if letter == "C" else "as w1"
        check.size(op, name, letter, tensor.size(axis), sizes[axis], why)


def _check(op: str, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"{op}: x has {x.dim()} axes; expected 2 or more: [..., C]")
    check.dtype(op, "x", x, check.FLOATS)
    check.dim(op, "w1", w1, "D, C")
    channels, width = x.size(-1), w1.size(0)
    _check_parameter(op, "w1", w1, x, "D, C", (width, channels))
    _check_parameter(op, "b1", b1, x, "D", (width,))
    _check_parameter(op, "w2", w2, x, "C, D", (channels, width))
    _check_parameter(op, "b2", b2, x, "C", (channels,))
    _check_parameter(op, "wp", wp, x, "C, C", (channels, channels))


def _check_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor, bp: Tensor
) -> None:
    op = "pixel_adaptive_fusion"
    _check(op, x, w1, b1, w2, b2, wp)
    _check_parameter(op, "bp", bp, x, "C", (x.size(-1),))


def _check_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor
) -> None:
    _check(_BACKWARD, x, w1, b1, w2, b2, wp)
    check.dtype(_BACKWARD, "grad", grad, (x.dtype,), "as x")
    if grad.shape != x.shape:
        raise ValueError(
            f"{_BACKWARD}: grad has shape {list(grad.shape)}; expected {list(x.shape)} (as x)"
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _gate(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden values as the second product reads them, and the gate; both wide."""
    hidden = torch.relu(_wide(x) @ _wide(w1).T + _wide(b1)).to(x.dtype)
    return _wide(hidden), torch.sigmoid(_wide(hidden) @ _wide(w2).T + _wide(b2))


def _reference(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor, bp: Tensor
) -> Tensor:
    _check_forward(x, w1, b1, w2, b2, wp, bp)
    _, gate = _gate(x, w1, b1, w2, b2)
    t = _wide((_wide(x) * gate).to(x.dtype))
    out = (t @ _wide(wp).T + _wide(bp) + t).to(x.dtype)
    return out.contiguous()


def _fake(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor, bp: Tensor
) -> Tensor:
    _check_forward(x, w1, b1, w2, b2, wp, bp)
    return x.new_empty(x.shape)


def _reference_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor
) -> tuple[Tensor, ...]:
    _check_backward(grad, x, w1, b1, w2, b2, wp)
    dtype, shape = x.dtype, x.shape
    grad, x = (each.flatten(0, -2) for each in (grad, x))
    hidden, gate = _gate(x, w1, b1, w2, b2)
    grad, x = _wide(grad), _wide(x)
    # Rounded wherever a product reads it.
    t = _wide((x * gate).to(dtype))
    grad_t = grad @ _wide(wp) + grad
    grad_gate = _wide((grad_t * x * gate * (1 - gate)).to(dtype))
    # As torch's own: the gradient goes through a NaN, and not through 0.
    grad_hidden = _wide((grad_gate @ _wide(w2)).masked_fill(hidden <= 0, 0).to(dtype))
    grad_x = grad_t * gate + grad_hidden @ _wide(w1)
    parts = (
        grad_x.reshape(shape), grad_hidden.T @ x, grad_hidden.sum(0), grad_gate.T @ hidden,
        grad_gate.sum(0), grad.T @ t, grad.sum(0),
    )  # fmt: skip
    return tuple(each.to(dtype).contiguous() for each in parts)


def _fake_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor
) -> tuple[Tensor, ...]:
    _check_backward(grad, x, w1, b1, w2, b2, wp)
    channels, width = x.size(-1), w1.size(0)
    shapes = ((width, channels), (width,), (channels, width), (channels,), (channels, channels))
    return tuple(x.new_empty(shape) for shape in (x.shape, *shapes, (channels,)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = PIXEL_ADAPTIVE_FUSION_BACKWARD.overload(grad, *ctx.saved_tensors)
    return tuple(
        each if need else None for each, need in zip(grads, ctx.needs_input_grad, strict=True)
    )


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
    x_dim, *others = in_dims
    if x_dim is not None and all(each is None for each in others):
        x, *parameters = args
        return PIXEL_ADAPTIVE_FUSION.overload(x.movedim(x_dim, 0), *parameters), 0
    results = []
    for index in range(info.batch_size):
        each = (
            arg if at is None else arg.select(at, index)
            for arg, at in zip(args, in_dims, strict=True)
        )
        results.append(PIXEL_ADAPTIVE_FUSION.overload(*each))
    return torch.stack(results), 0


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    maps = (
        (tensor(2, 7, 24), 12),
        (tensor(1, 5, 3, 30), 16),
        (tensor(9, 8), 3),
        (tensor(2, 24, 4, 3).permute(0, 2, 3, 1), 12),
        (tensor(3, 4, 40)[..., 5:14], 40),
        (tensor(0, 7, 7, 6), 3),
        (tensor(2, 3, 5), 0),
        (tensor(4, 0), 2),
    )
    for x, width in maps:
        channels = x.size(-1)
        w1, w2, wp = tensor(width, channels), tensor(channels, width), tensor(channels, channels)
        b1, b2, bp = tensor(width), tensor(channels), tensor(channels)
        yield tuple(each.requires_grad_() for each in (x, w1, b1, w2, b2, wp, bp)), {}
    x, w1, w2, wp = tensor(6, 9), tensor(9, 4).T, tensor(4, 9).T, tensor(9, 9).T
    b1, b2, bp = tensor(8)[::2], tensor(1).expand(9), tensor(9)
    yield (x, w1, b1, w2, b2, wp.requires_grad_(), bp), {}


def _samples_backward(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for args, _ in _samples(device, dtype):
        plain = [each.detach() for each in args[:6]]
        yield (torch.randn_like(plain[0]), *plain), {}


def _pixels(x: Tensor) -> int:
    pixels = 1
    for size in x.shape[:-1]:
        pixels *= size
    return pixels


def _flops(x: Tensor, w1: Tensor, *_: Any, **__: Any) -> int:
    channels, width = x.size(-1), w1.size(0)
    return 2 * _pixels(x) * channels * (channels + 2 * width)


def _flops_backward(grad: Tensor, x: Tensor, w1: Tensor, *_: Any, **__: Any) -> int:
    # Two products for each of the forward's, and the gate's own two once more.
    return 2 * _flops(x, w1) + 4 * _pixels(x) * x.size(-1) * w1.size(0)


def _nbytes(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor, bp: Tensor
) -> int:
    parameters = sum(each.numel() for each in (w1, b1, w2, b2, wp, bp))
    return (2 * x.numel() + parameters) * x.element_size()


def _nbytes_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, wp: Tensor
) -> int:
    parameters = sum(each.numel() for each in (w1, b1, w2, b2, wp))
    return (3 * x.numel() + 2 * parameters + x.size(-1)) * x.element_size()


_PARAMETERS = "Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor wp"

PIXEL_ADAPTIVE_FUSION = register(
    Operator(
        name="pixel_adaptive_fusion",
        family="ladder_attention",
        schema=f"(Tensor x, {_PARAMETERS}, Tensor bp) -> Tensor",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        saved_bytes=lambda *_, **__: 0,
        samples=_samples,
        setup_context=_setup_context,
        backward=_backward,
        autocast=Autocast("region"),
        vmap=_vmap,
        sharding=lambda x, *_, **__: tuple(
            (f"{axis}", f"{axis}RRRRRR") for axis in range(x.ndim - 1)
        ),
        benchmark="bench_ladder_attention",
    )
)

PIXEL_ADAPTIVE_FUSION_BACKWARD = register(
    Operator(
        name=_BACKWARD,
        family="ladder_attention",
        schema=f"(Tensor grad, Tensor x, {_PARAMETERS}) -> (Tensor grad_x, Tensor grad_w1, "
        "Tensor grad_b1, Tensor grad_w2, Tensor grad_b2, Tensor grad_wp, Tensor grad_bp)",
        reference=_reference_backward,
        fake=_fake_backward,
        flops=_flops_backward,
        nbytes=_nbytes_backward,
        samples=_samples_backward,
        no_derivative="pixel_adaptive_fusion has no second derivative; allowed: first derivatives",
        sharding=lambda grad, x, *_, **__: tuple(
            (f"{axis}PPPPPP", f"{axis}{axis}RRRRR") for axis in range(x.ndim - 1)
        ),
        benchmark="bench_ladder_attention",
    )
)
