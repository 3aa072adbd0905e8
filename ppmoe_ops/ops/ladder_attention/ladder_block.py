"""`ladder_block`: the three branches of a ladder self-attention block and their fusion, at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Autocast, Operator, Sample, register
from ppmoe_ops.ops.ladder_attention.window_attention import pair
from ppmoe_ops.ops.ladder_attention.windows import (
    attend,
    attention_flops,
    check_wide,
    check_windows,
    wide_dtype,
)

BRANCH = (
    "ln1_w", "ln1_b", "w_in", "b_in", "bias_table", "w_out", "b_out", "ln2_w", "ln2_b",
    "f1_w", "f1_b", "dw_w", "dw_b", "dw_off", "f2_w", "f2_b",
)  # fmt: skip
FUSION = ("w1", "b1", "w2", "b2", "wp", "bp")
NAMES = tuple(f"branch {i} {name}" for i in range(3) for name in BRANCH) + tuple(
    f"fusion {name}" for name in FUSION
)
_WIDE = ("ln1_w", "ln1_b", "bias_table", "ln2_w", "ln2_b")
_EPS = 1e-5


def ladder_block(
    x: Tensor,
    params: Sequence[Tensor],
    num_heads: int,
    window: int | Sequence[int],
    shift: int | Sequence[int],
) -> Tensor:
    """Run a whole ladder self-attention block as it is at inference, batch norms folded.

    Branch i = 0, 1, 2 works on the channels [i*g, (i+1)*g) of `x`, g = C / 3, with the shift 0,
    +shift, -shift. With n = LN(x_i; ln1_w, ln1_b) and q, k[, v] = w_in n + b_in:

        z_i = x_i + w_out attention(q, k, v) + b_out [+ n where i > 0]
        a = gelu(f1_w LN(z_i; ln2_w, ln2_b) + f1_b)
        h[t] = dw_b + sum over taps d of dw_w[:, d] a[t + d] + dw_off[:, d], t + d inside the map
        y_i = z_i + f2_w gelu(h) + f2_b

    where v is a part of w_in's result in branch 0, and the raw y_{i-1} in the others. Attention is
    that of `window_attention`. The result is `pixel_adaptive_fusion` of y_0, y_1 and y_2 side by
    side. The eps of both layer norms is 1e-5.

    `dw_off` is the offset of the batch norm in front of the depth-wise convolution times the tap's
    weight before that norm's scale was folded into it: a border has the taps inside the map alone.

    Args:
        x: [B, H, W, C] float32, bfloat16, float16 or float64; any strides.
        params: 54 tensors, three times ln1_w [g], ln1_b [g], w_in [3g, g] (branch 0) or [2g, g],
            b_in [3g] or [2g], bias_table [(2*window[0]-1) * (2*window[1]-1), num_heads], w_out
            [g, g], b_out [g], ln2_w [g], ln2_b [g], f1_w [g, g], f1_b [g], dw_w [g, 3, 3], dw_b
            [g], dw_off [g, 3, 3], f2_w [g, g], f2_b [g], then the fusion's w1 [D, C], b1 [D], w2
            [C, D], b2 [C], wp [C, C], bp [C]. All in the dtype of `x`; ln1_w, ln1_b, bias_table,
            ln2_w and ln2_b may be float32 instead.
        num_heads: heads of a branch, a divisor of g.
        window: tokens, [rows, columns] or one number for both.
        shift: tokens, [rows, columns] or one number, that the windows of branch 1 are shifted by,
            and those of branch 2 the other way; smaller than the window, either sign.

    Returns:
        [B, H, W, C] in the dtype of `x`. Sums are taken in float32 (float64 for float64), as are
        norms, softmax and activations.

    Raises:
        ValueError: a shape, dtype or value that is not as above. A tensor of `params` is named by
            its place and by what it is: "params[17] (branch 1 ln1_b)".

    Gradient: none; a derivative raises. `ladder_attention`, `ladder_ffn` and
        `pixel_adaptive_fusion` are the differentiable parts.
    Saved for backward: nothing.

    Source: PSLT (arXiv 2304.03481), the ladder self-attention block, as its authors' code has it.

    Example:
        >>> import torch, ppmoe_ops
        >>> from ppmoe_ops.ops.ladder_attention.ladder_block import parameter_shapes
        >>> params = [torch.zeros(shape) for shape in parameter_shapes(24, 1, (7, 7), 12)]
        >>> out = ppmoe_ops.ladder_block(torch.ones(1, 14, 14, 24), params, 1, window=7, shift=3)
        >>> out.shape, out.unique()
        (torch.Size([1, 14, 14, 24]), tensor([0.5000]))
    """
    return LADDER_BLOCK.overload(x, params, num_heads, pair(window), pair(shift))


def parameter_shapes(
    channels: int, num_heads: int, window: Sequence[int], width: int
) -> list[list[int]]:
    """Shapes of `params` for C = `channels` and D = `width`."""
    g = channels // 3
    table = [(2 * window[0] - 1) * (2 * window[1] - 1), num_heads]
    shapes: list[list[int]] = []
    for parts in (3, 2, 2):
        attention = [[g], [g], [parts * g, g], [parts * g], table, [g, g], [g]]
        ffn = [[g], [g], [g, g], [g], [g, 3, 3], [g], [g, 3, 3], [g, g], [g]]
        shapes += attention + ffn
    c, d = channels, width
    return [*shapes, [d, c], [d], [c, d], [c], [c, c], [c]]


def _check(
    x: Tensor, params: Sequence[Tensor], num_heads: int, window: Sequence[int], shift: Sequence[int]
) -> None:
    op = "ladder_block"
    check.dim(op, "x", x, "B, H, W, C")
    check.dtype(op, "x", x, check.FLOATS)
    channels = x.size(3)
    if channels % 3 != 0:
        raise ValueError(f"{op}: x has C = {channels}; expected a multiple of 3 (three branches)")
    check_windows(op, channels // 3, num_heads, window, shift)
    if len(params) != len(NAMES):
        raise ValueError(
            f"{op}: params has {len(params)} tensors; expected {len(NAMES)} "
            "(three times 16 of a branch, 6 of the fusion)"
        )
    width = params[-6].size(0) if params[-6].dim() == 2 else 0
    shapes = parameter_shapes(channels, num_heads, window, width)
    for index, (tensor, name, shape) in enumerate(zip(params, NAMES, shapes, strict=True)):
        label = f"params[{index}] ({name})"
        if name.split()[-1] in _WIDE:
            check_wide(op, label, tensor, x)
        else:
            check.dtype(op, label, tensor, (x.dtype,), "as x")
        if list(tensor.shape) != shape:
            raise ValueError(f"{op}: {label} has shape {list(tensor.shape)}; expected {shape}")


def _branch(
    x: Tensor, v: Tensor | None, p: dict[str, Tensor], window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    shape, g = x.shape, x.size(3)
    n = F.layer_norm(x, (g,), p["ln1_w"], p["ln1_b"], _EPS)
    parts = F.linear(n, p["w_in"], p["b_in"]).split(g, -1)
    value = parts[2] if v is None else v
    table = p["bias_table"]
    o = attend(parts[0], parts[1], value, table, table.size(1), window, shift, None)
    z = x + F.linear(o, p["w_out"], p["b_out"])
    if v is not None:
        z = z + n
    a = F.gelu(F.linear(F.layer_norm(z, (g,), p["ln2_w"], p["ln2_b"], _EPS), p["f1_w"], p["f1_b"]))
    taps = torch.cat((a, torch.ones_like(a)), -1).permute(0, 3, 1, 2)
    weight = torch.cat((p["dw_w"], p["dw_off"])).unsqueeze(1)
    sums = F.conv2d(taps, weight, padding=1, groups=2 * g) if x.numel() else taps
    h = (sums[:, :g] + sums[:, g:]).permute(0, 2, 3, 1) + p["dw_b"]
    return (z + F.linear(F.gelu(h), p["f2_w"], p["f2_b"])).reshape(shape)


def _reference(
    x: Tensor, params: Sequence[Tensor], num_heads: int, window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    _check(x, params, num_heads, window, shift)
    wide = wide_dtype(x.dtype)
    p = dict(zip(NAMES, (each.to(wide) for each in params), strict=True))
    joined: list[Tensor] = []
    for i, part in enumerate(x.to(wide).chunk(3, -1)):
        sign = (0, 1, -1)[i]
        own = {name: p[f"branch {i} {name}"] for name in BRANCH}
        v = joined[-1] if joined else None
        joined.append(_branch(part, v, own, window, [sign * each for each in shift]))
    w1, b1, w2, b2, wp, bp = (p[f"fusion {name}"] for name in FUSION)
    y = torch.cat(joined, -1)
    t = y * torch.sigmoid(F.linear(torch.relu(F.linear(y, w1, b1)), w2, b2))
    return (F.linear(t, wp, bp) + t).to(x.dtype)


def _fake(
    x: Tensor, params: Sequence[Tensor], num_heads: int, window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    _check(x, params, num_heads, window, shift)
    return x.new_empty(x.shape)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    maps = (
        ((2, 14, 14, 48), 2, (7, 7), (3, 3), 24),
        ((1, 7, 7, 24), 1, (7, 7), (0, 0), 12),
        ((1, 5, 9, 72), 1, (2, 4), (-1, 3), 8),
        ((2, 3, 4, 48), 1, (7, 5), (2, 0), 3),
        ((0, 7, 7, 24), 1, (7, 7), (3, 3), 4),
        ((2, 0, 3, 24), 1, (7, 7), (3, 3), 4),
    )
    for index, (shape, heads, window, shift, width) in enumerate(maps):
        x = torch.randn(shape, device=device, dtype=dtype)
        params = []
        for name, size in zip(NAMES, parameter_shapes(shape[3], heads, window, width), strict=True):
            each = torch.randn(size, device=device) / math.sqrt(max(size[-1], 1))
            keep = name.split()[-1] in _WIDE and index % 2 == 0
            params.append(each.to(wide_dtype(dtype) if keep else dtype))
        if index == 2:
            x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        yield (x, params, heads, list(window), list(shift)), {}


def _flops(
    x: Tensor, params: Sequence[Tensor], num_heads: int, window: Sequence[int], shift: Sequence[int]
) -> int:
    batch, height, width, channels = x.shape
    g, gate = channels // 3, params[-6].size(0)
    linear = (3 + 2 + 2) * g * g + 3 * 3 * g * g
    fusion = channels * (channels + 2 * gate)
    products = 2 * batch * height * width * (linear + 9 * channels + fusion)
    return products + attention_flops(x, window)


def _nbytes(
    x: Tensor, params: Sequence[Tensor], num_heads: int, window: Sequence[int], shift: Sequence[int]
) -> int:
    return 2 * x.numel() * x.element_size() + sum(p.numel() * p.element_size() for p in params)


_KEEP = tuple(f"params[{i}]" for i, name in enumerate(NAMES) if name.split()[-1] in _WIDE)

LADDER_BLOCK = register(
    Operator(
        name="ladder_block",
        family="ladder_attention",
        schema="(Tensor x, Tensor[] params, SymInt num_heads, SymInt[] window, SymInt[] shift) "
        "-> Tensor",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        samples=_samples,
        no_derivative="it has no derivative; differentiable are ladder_attention, ladder_ffn and "
        "pixel_adaptive_fusion",
        autocast=Autocast("region", keep=_KEEP),
        benchmark="bench_ladder_attention",
    )
)
