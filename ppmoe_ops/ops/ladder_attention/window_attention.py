"""`window_attention`: multi-head attention inside the windows of a shifted grid of a map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops._library import Autocast, Operator, Sample, register
from ppmoe_ops.ops.ladder_attention.windows import (
    attend,
    attend_backward,
    attention_flops,
    check_bias_table,
    check_like,
    check_maps,
    check_windows,
    wide_dtype,
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    scale: float | None = None,
) -> Tensor:
    """Attend inside the windows of a shifted grid, without roll, partition, mask or padding.

    An axis of length n is cut at its ends and at every x in (0, n) with x = shift mod window, so
    windows at the border may be smaller. This equals attention on the map rolled by -shift with
    the pairs masked that were not neighbours before; those pairs are not computed here.
    Head h owns channels h*C/heads to (h+1)*C/heads. Products, softmax and their sums are in float32
    (float64 for float64).

    Args:
        q: [B, H, W, C] map of queries, float32, bfloat16, float16 or float64; any strides, so that
            slices of one fused projection are taken as they are.
        k: [B, H, W, C] map of keys, in the dtype of `q`; any strides.
        v: [B, H, W, C] map of values, in the dtype of `q`; any strides.
        bias_table: [(2*window rows - 1) * (2*window columns - 1), heads], added to the scores, in
            the dtype of `q` or in float32, or None. Row (r - r' + window rows - 1) *
            (2*window columns - 1) + (c - c' + window columns - 1) is for the query at (r, c) and
            the key at (r', c').
        num_heads: a divisor of C. All head dimensions work; multiples of 8 are the fast ones.
        window: tokens, [rows, columns] or one number for both.
        shift: tokens, [rows, columns] or one number; smaller than the window, either sign. Positive
            is the direction of Swin: the map rolled up and left.
        scale: factor of q k^T; None is (C / heads) ** -0.5.

    Returns:
        [B, H, W, C] contiguous, in the dtype of `q`.

    Raises:
        ValueError: a shape, dtype, window, shift or number of heads that is not as above.

    Gradient: to `q`, `k`, `v` and `bias_table`. Softmax weights are computed again; no sum depends
        on the number of threads, that of the bias table included.
    Saved for backward: no bytes of its own; keeps `q`, `k`, `v` and `bias_table` alive.

    Source: Swin Transformer (arXiv 2103.14030) section 3.2; PSLT (arXiv 2304.03481), whose branches
        shift in both directions.

    Example:
        >>> import torch, ppmoe_ops
        >>> x = torch.arange(4.0).reshape(1, 1, 4, 1)
        >>> zero = torch.zeros_like(x)
        >>> ppmoe_ops.window_attention(zero, zero, x, None, 1, window=2).flatten().tolist()
        [0.5, 0.5, 2.5, 2.5]
        >>> ppmoe_ops.window_attention(zero, zero, x, None, 1, window=2, shift=1).flatten().tolist()
        [0.0, 1.5, 1.5, 3.0]
    """
    return WINDOW_ATTENTION.overload(
        q, k, v, bias_table, num_heads, pair(window), pair(shift), scale
    )


def pair(sides: int | Sequence[int]) -> Sequence[int]:
    """Rows and columns, where one number stands for both."""
    return sides if isinstance(sides, Sequence) else (sides, sides)


def check_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
) -> None:
    check_maps(op, q, k, v)
    check_windows(op, q.size(3), num_heads, window, shift)
    if bias_table is not None:
        check_bias_table(op, bias_table, q, num_heads, window)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    check_attention("window_attention", q, k, v, bias_table, num_heads, window, shift)
    wide = wide_dtype(q.dtype)
    table = None if bias_table is None else bias_table.to(wide)
    out = attend(q.to(wide), k.to(wide), v.to(wide), table, num_heads, window, shift, scale)
    return out.to(q.dtype)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    check_attention("window_attention", q, k, v, bias_table, num_heads, window, shift)
    return q.new_empty(q.shape)


_BACKWARD = "window_attention_backward"


def _check_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None,
                    num_heads: int, window: Sequence[int],
                    shift: Sequence[int]) -> None:  # fmt: skip
    check_attention(_BACKWARD, q, k, v, bias_table, num_heads, window, shift)
    check_like(_BACKWARD, "grad", grad, q, "q")


def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad, q, k, v, bias_table, num_heads, window, shift)
    wide = wide_dtype(q.dtype)
    table = None if bias_table is None else bias_table.to(wide)
    grad, *maps = (each.to(wide) for each in (grad, q, k, v))
    *found, grad_table = attend_backward(
        grad, maps[0], maps[1], maps[2], table, num_heads, window, shift, scale
    )
    grad_q, grad_k, grad_v = (each.to(q.dtype) for each in found)
    if bias_table is None or not need_bias:
        return grad_q, grad_k, grad_v, _no_bias(q, bias_table)
    return grad_q, grad_k, grad_v, grad_table.to(bias_table.dtype)


def _no_bias(q: Tensor, bias_table: Tensor | None) -> Tensor:
    return (q if bias_table is None else bias_table).new_empty((0,))


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad, q, k, v, bias_table, num_heads, window, shift)
    maps = (q.new_empty(q.shape) for _ in range(3))
    if bias_table is None or not need_bias:
        return *maps, _no_bias(q, bias_table)  # type: ignore[return-value]
    return *maps, bias_table.new_empty(bias_table.shape)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, bias_table, *rest = inputs
    ctx.save_for_backward(q, k, v, bias_table)
    # The dispatcher drops an argument that equals its default.
    ctx.rest = (*rest, None)[:4]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    grads = WINDOW_ATTENTION_BACKWARD.overload(grad, *ctx.saved_tensors, *ctx.rest, needs[3])
    found = (each if need else None for each, need in zip(grads, needs, strict=True))
    return (*found, *(None,) * (len(ctx.needs_input_grad) - 4))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def maps(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def table(window: Sequence[int], heads: int, wide: bool = False) -> Tensor:
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        kept = wide_dtype(dtype) if wide else dtype
        return torch.randn(rows, heads, device=device).to(kept).requires_grad_()

    cases = (
        ((2, 14, 14, 48), 2, (7, 7), (3, 3)),
        ((1, 14, 14, 48), 2, (7, 7), (-3, -3)),
        ((3, 5, 9, 16), 1, (3, 4), (-1, 2)),
        ((1, 3, 2, 24), 3, (7, 5), (0, 4)),
        ((0, 4, 4, 8), 1, (2, 2), (1, 0)),
        ((1, 6, 6, 64), 1, (1, 6), (0, 0)),
    )
    for index, (shape, heads, window, shift) in enumerate(cases):
        q, k, v = (maps(*shape).requires_grad_() for _ in range(3))
        bias = table(window, heads, wide=index % 2 == 1) if index != 2 else None
        scale = (None, 1.0, 0.3)[index % 3]
        yield (q, k, v, bias, heads, window, shift), {} if scale is None else {"scale": scale}
    fused = maps(2, 8, 7, 3 * 32).requires_grad_()
    yield (*fused.chunk(3, -1), table((4, 4), 4), 4, (4, 4), (2, 1)), {}


def _samples_backward(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for index, (args, options) in enumerate(_samples(device, dtype)):
        q, k, v, bias, *rest = (
            each.detach() if isinstance(each, Tensor) else each for each in args
        )
        grad = torch.randn(q.shape, device=device, dtype=dtype)
        scale = options.get("scale")
        yield (grad, q, k, v, bias, *rest, scale, index % 2 == 0), {}


def _flops(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None, num_heads: int,
           window: Sequence[int], shift: Sequence[int],
           scale: float | None = None) -> int:  # fmt: skip
    return attention_flops(q, window)


def _flops_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None,
                    num_heads: int, window: Sequence[int], shift: Sequence[int],
                    scale: float | None, need_bias: bool) -> int:  # fmt: skip
    # Scores again, and four products that the derivative takes.
    return attention_flops(q, window) * 5 // 2


def _nbytes(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None, num_heads: int,
            window: Sequence[int], shift: Sequence[int],
            scale: float | None = None) -> int:  # fmt: skip
    table = 0 if bias_table is None else bias_table.numel() * bias_table.element_size()
    return 4 * q.numel() * q.element_size() + table


def _nbytes_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None,
                     num_heads: int, window: Sequence[int], shift: Sequence[int],
                     scale: float | None, need_bias: bool) -> int:  # fmt: skip
    table = 0 if bias_table is None else bias_table.numel() * bias_table.element_size()
    return 7 * q.numel() * q.element_size() + (1 + int(need_bias)) * table


WINDOW_ATTENTION = register(
    Operator(
        name="window_attention",
        family="ladder_attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor? bias_table, SymInt num_heads, "
        "SymInt[] window, SymInt[] shift, float? scale=None) -> Tensor",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        saved_bytes=lambda *_, **__: 0,
        samples=_samples,
        setup_context=_setup_context,
        backward=_backward,
        autocast=Autocast("region", keep=("bias_table",)),
        # Images are independent.
        sharding=lambda q, k, v, bias_table, *_, **__: (
            (("0", "000R" if bias_table is not None else "000-"),)
        ),
        benchmark="bench_ladder_attention",
    )
)

WINDOW_ATTENTION_BACKWARD = register(
    Operator(
        name=_BACKWARD,
        family="ladder_attention",
        schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias_table, SymInt num_heads, "
        "SymInt[] window, SymInt[] shift, float? scale, bool need_bias) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
        reference=_reference_backward,
        fake=_fake_backward,
        flops=_flops_backward,
        nbytes=_nbytes_backward,
        samples=_samples_backward,
        no_derivative="window_attention has no second derivative; allowed: first derivatives",
        benchmark="bench_ladder_attention",
    )
)
