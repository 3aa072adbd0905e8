"""`ladder_attention`: the attention sub-layer of one ladder branch, norm to residual."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Autocast, Operator, Sample, register
from ppmoe_ops.ops.ladder_attention.window_attention import pair
from ppmoe_ops.ops.ladder_attention.windows import (
    attend,
    attention_flops,
    check_bias_table,
    check_like,
    check_matrix,
    check_vector,
    check_windows,
    wide_dtype,
)

_OP = "ladder_attention"


def ladder_attention(
    x: Tensor,
    v: Tensor | None,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    bias_table: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    row_scale: Tensor | None,
    num_heads: int,
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    eps: float = 1e-5,
) -> Tensor:
    """Run norm, projections, shifted-window attention and residual of one ladder branch.

    With n = LN(x), the first branch (`v` is None) has [q, k, v] = w_in n + b_in and
    z = x + s (w_out a + b_out). A later branch has [q, k] = w_in n + b_in, takes the output of the
    branch before it for v as it is, and adds the normalised input once more:
    z = x + s (w_out a + b_out + n). Here a is `window_attention` at scale head_dim ** -0.5.

    Args:
        x: [B, H, W, g] map, float32, bfloat16, float16 or float64; any strides.
        v: [B, H, W, g] in the dtype of `x`, or None.
        ln_w: [g] weights of the norm, in the dtype of `x` or in float32.
        ln_b: [g] biases of the norm, likewise.
        w_in: [3g, g] where `v` is None, else [2g, g]; outputs are q first, then k, then v.
        b_in: [3g] or [2g].
        bias_table: [(2*window rows - 1) * (2*window columns - 1), heads], as `window_attention`
            takes it.
        w_out: [g, g].
        b_out: [g].
        row_scale: [B], factors s of the images' residuals (stochastic depth), in the dtype of `x`
            or in float32, or None for ones.
        num_heads: a divisor of g.
        window: tokens, [rows, columns] or one number for both.
        shift: tokens, [rows, columns] or one number; smaller than the window, either sign.
        eps: of the norm.

    Returns:
        z [B, H, W, g] contiguous, in the dtype of `x`.

    Raises:
        ValueError: a shape, dtype, window, shift or number of heads that is not as above, or a
            `row_scale` that requires a gradient.

    Gradient: to all but `row_scale`.
    Saved for backward: no bytes of its own; keeps the arguments alive. The norm, the projections
        and the attention are computed again.

    Source: PSLT (arXiv 2304.03481), ladder self-attention; details as in the authors' code.

    Example:
        >>> import torch, ppmoe_ops
        >>> x, one, zero = torch.randn(2, 14, 14, 8), torch.ones(8), torch.zeros(8)
        >>> w_in, w_out, table = torch.randn(24, 8), torch.randn(8, 8), torch.zeros(169, 1)
        >>> first = ppmoe_ops.ladder_attention(
        ...     x, None, one, zero, w_in, torch.zeros(24), table, w_out, zero, None, 1, window=7)
        >>> second = ppmoe_ops.ladder_attention(
        ...     x, first, one, zero, w_in[:16], torch.zeros(16), table, w_out, zero, None, 1,
        ...     window=7, shift=3)
        >>> second.shape
        torch.Size([2, 14, 14, 8])
    """
    return LADDER_ATTENTION.overload(
        x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, b_out, row_scale,
        num_heads, pair(window), pair(shift), eps,
    )  # fmt: skip


def check_branch(
    op: str,
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
) -> None:
    check.dim(op, "x", x, "B, H, W, g")
    check.dtype(op, "x", x, check.FLOATS)
    width = x.size(3)
    if v is not None:
        check_like(op, "v", v, x, "x")
    for name, each in (("ln_w", ln_w), ("ln_b", ln_b)):
        check_vector(op, name, each, "g", width, "as x", x, wide=True)
    outputs, why = (3 * width, "3g without v") if v is None else (2 * width, "2g with v")
    check_matrix(op, "w_in", w_in, "O, g", (outputs, width), f"{why}; g as x", x)
    check_vector(op, "b_in", b_in, "O", outputs, why, x, wide=False)
    check_windows(op, width, num_heads, window, shift)
    check_bias_table(op, bias_table, x, num_heads, window)
    check_matrix(op, "w_out", w_out, "O, g", (width, width), "g of x", x)
    if row_scale is not None:
        check_vector(op, "row_scale", row_scale, "B", x.size(0), "as x", x, wide=True)


def plain(
    x: Tensor,
    v: Tensor | None,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    bias_table: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    row_scale: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    eps: float,
) -> Tensor:
    """The formulas of the docstring, in the dtype of the arguments."""
    n = F.layer_norm(x, x.shape[-1:], ln_w, ln_b, eps)
    parts = F.linear(n, w_in, b_in).split(x.size(3), -1)
    value = parts[2] if v is None else v
    a = attend(parts[0], parts[1], value, bias_table, num_heads, window, shift, None)
    out = F.linear(a, w_out, b_out)
    if v is not None:
        out = out + n
    return x + (out if row_scale is None else row_scale.view(-1, 1, 1, 1) * out)


def _reference(
    x: Tensor,
    v: Tensor | None,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    bias_table: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    row_scale: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    eps: float = 1e-5,
) -> Tensor:
    check_branch(
        _OP, x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, row_scale, num_heads, window, shift
    )
    check_vector(_OP, "b_out", b_out, "g", x.size(3), "as x", x, wide=False)
    tensors = (x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, b_out, row_scale)
    wide = (None if each is None else each.to(wide_dtype(x.dtype)) for each in tensors)
    out = plain(*wide, num_heads, window, shift, eps)  # type: ignore[arg-type, call-arg]
    return out.to(x.dtype).contiguous()


def _fake(
    x: Tensor,
    v: Tensor | None,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    bias_table: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    row_scale: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    eps: float = 1e-5,
) -> Tensor:
    check_branch(
        _OP, x, v, ln_w, ln_b, w_in, b_in, bias_table, w_out, row_scale, num_heads, window, shift
    )
    check_vector(_OP, "b_out", b_out, "g", x.size(3), "as x", x, wide=False)
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _b_out, row_scale = inputs[:10]
    if row_scale is not None and row_scale.requires_grad:
        raise ValueError(f"{_OP}: row_scale requires a gradient; allowed: one that does not")
    ctx.save_for_backward(*tensors, row_scale)
    # The dispatcher drops an argument that equals its default.
    ctx.rest = (*inputs[10:], 1e-5)[:4]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from ppmoe_ops.ops.ladder_attention.ladder_attention_backward import LADDER_ATTENTION_BACKWARD

    needs = ctx.needs_input_grad[:9]
    asked = any(needs[:2]), any(needs[2:])
    grads = LADDER_ATTENTION_BACKWARD.overload(grad, *ctx.saved_tensors, *ctx.rest, *asked)
    found = (each if need else None for each, need in zip(grads, needs, strict=True))
    return (*found, *(None,) * (len(ctx.needs_input_grad) - 9))


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, kept: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(kept).requires_grad_()

    wide = wide_dtype(dtype)
    cases = (
        ((2, 14, 14, 24), 1, (7, 7), (0, 0), False, False),
        ((2, 14, 14, 24), 3, (7, 7), (3, 3), True, True),
        ((1, 14, 9, 32), 2, (7, 7), (-3, -3), True, False),
        ((3, 5, 4, 16), 2, (3, 2), (1, -1), False, True),
        ((0, 7, 7, 8), 1, (7, 7), (0, 0), True, False),
    )
    for index, (shape, heads, window, shift, later, scaled) in enumerate(cases):
        batch, width = shape[0], shape[3]
        outputs = (2 if later else 3) * width
        kept = wide if index % 2 == 1 else dtype
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        x = tensor(*shape[:3], 2 * width).detach()[..., :width].requires_grad_()
        row_scale = torch.tensor([0.0, 1.25, 1.0], device=device)[:batch].to(kept)
        yield (
            x, tensor(*shape) if later else None, tensor(width, kept=kept),
            tensor(width, kept=kept), tensor(outputs, width, scale=width**-0.5), tensor(outputs),
            tensor(rows, heads, kept=kept), tensor(width, width, scale=width**-0.5), tensor(width),
            row_scale if scaled else None, heads, window, shift,
        ), {"eps": 1e-3} if index == 3 else {}  # fmt: skip


def _flops(x: Tensor, v: Tensor | None, ln_w: Tensor, ln_b: Tensor, w_in: Tensor, b_in: Tensor,
           bias_table: Tensor, w_out: Tensor, b_out: Tensor, row_scale: Tensor | None,
           num_heads: int, window: Sequence[int], shift: Sequence[int],
           eps: float = 1e-5) -> int:  # fmt: skip
    products = 2 * x.numel() * (w_in.size(0) + w_out.size(0))
    return products + attention_flops(x, window)


def _nbytes(x: Tensor, v: Tensor | None, ln_w: Tensor, ln_b: Tensor, w_in: Tensor, b_in: Tensor,
            bias_table: Tensor, w_out: Tensor, b_out: Tensor, row_scale: Tensor | None,
            num_heads: int, window: Sequence[int], shift: Sequence[int],
            eps: float = 1e-5) -> int:  # fmt: skip
    moved = (2 if v is None else 3) * x.numel() + w_in.numel() + w_out.numel()
    return moved * x.element_size() + bias_table.numel() * bias_table.element_size()


LADDER_ATTENTION = register(
    Operator(
        name=_OP,
        family="ladder_attention",
        schema="(Tensor x, Tensor? v, Tensor ln_w, Tensor ln_b, Tensor w_in, Tensor b_in, "
        "Tensor bias_table, Tensor w_out, Tensor b_out, Tensor? row_scale, SymInt num_heads, "
        "SymInt[] window, SymInt[] shift, float eps=1e-5) -> Tensor",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        saved_bytes=lambda *_, **__: 0,
        samples=samples,
        setup_context=_setup_context,
        backward=_backward,
        autocast=Autocast("region", keep=("ln_w", "ln_b", "bias_table", "row_scale")),
        # Images are independent.
        sharding=lambda x, v, *rest, **__: (
            (
                "0",
                "0" + ("-" if v is None else "0") + "RRRRRRR" + ("-" if rest[7] is None else "0"),
            ),
        ),
        benchmark="bench_ladder_attention",
    )
)
