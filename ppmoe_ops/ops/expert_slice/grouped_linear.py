"""`grouped_linear`: one linear layer per expert over that expert's rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Autocast, Operator, Sample, register


def grouped_linear(
    rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiply every expert's rows by that expert's weight.

    out[o_e : o_{e+1}] = rows[o_e : o_{e+1}] @ weight[e].T + bias[e], with o = `offsets`; rows of no
    expert are zero. Products are accumulated in float32 (float64 for float64).

    Args:
        rows: [R, K_in] float32, bfloat16, float16 or float64.
        offsets: [L+1] int32, not decreasing, in [0, R].
        weight: [L, N, K_in] in the dtype of `rows`; any strides.
        bias: [L, N] in the dtype of `rows`, or None.

    Returns:
        [R, N] in the dtype of `rows`.

    Raises:
        ValueError: a shape or dtype that is not as above; on the CPU, offsets that decrease.
        IndexError: on the CPU, an offset outside [0, R].

    Gradient: to `rows`, `weight` and `bias`.
    Saved for backward: no bytes of its own; keeps `rows`, `offsets` and `weight` alive.

    Source: PPMoE (arXiv 2304.11414) section 3.3.2, the serial expert products in one call.

    Example:
        >>> import torch, ppmoe_ops
        >>> rows = torch.ones(3, 2)
        >>> weight = torch.tensor([[[1.0, 1.0]], [[2.0, 3.0]]])
        >>> offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
        >>> ppmoe_ops.grouped_linear(rows, offsets, weight).tolist()
        [[2.0], [5.0], [0.0]]
    """
    return GROUPED_LINEAR.overload(rows, offsets, weight, bias)


def check_groups(op: str, rows: Tensor, offsets: Tensor, weight: Tensor) -> None:
    check.dim(op, "rows", rows, "R, K_in")
    check.dtype(op, "rows", rows, check.FLOATS)
    check.between(op, "R", rows.size(0), 0, 2**31 - 1, "offsets are int32")
    check.dim(op, "weight", weight, "L, N, K_in")
    check.dtype(op, "weight", weight, (rows.dtype,), "as rows")
    check.size(op, "weight", "K_in", weight.size(2), rows.size(1), "as rows")
    check.dim(op, "offsets", offsets, "L+1")
    check.dtype(op, "offsets", offsets, (torch.int32,))
    check.size(op, "offsets", "L+1", offsets.size(0), weight.size(0) + 1, "L of weight plus 1")


def check_forward(rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "grouped_linear"
    check_groups(op, rows, offsets, weight)
    if bias is not None:
        check.dim(op, "bias", bias, "L, N")
        check.dtype(op, "bias", bias, (rows.dtype,), "as rows")
        check.size(op, "bias", "L", bias.size(0), weight.size(0), "as weight")
        check.size(op, "bias", "N", bias.size(1), weight.size(1), "as weight")


def read_bounds(op: str, offsets: Tensor, rows: int) -> list[int]:
    bounds = [int(bound) for bound in offsets.tolist()]
    for bound in bounds:
        if not 0 <= bound <= rows:
            raise IndexError(f"{op}: offsets holds {bound}; allowed: 0 to {rows}")
    for low, high in pairwise(bounds):
        if low > high:
            raise ValueError(
                f"{op}: offsets holds {high} after {low}; allowed: values that do not decrease"
            )
    return bounds


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _reference(rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    check_forward(rows, offsets, weight, bias)
    bounds = read_bounds("grouped_linear", offsets, rows.size(0))
    out = rows.new_zeros(rows.size(0), weight.size(1))
    for expert, (low, high) in enumerate(pairwise(bounds)):
        product = _wide(rows[low:high]) @ _wide(weight[expert]).T
        if bias is not None:
            product = product + bias[expert]
        out[low:high] = product.to(rows.dtype)
    return out


def _fake(rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    check_forward(rows, offsets, weight, bias)
    return rows.new_empty((rows.size(0), weight.size(1)))


def check_backward(grad: Tensor, rows: Tensor, offsets: Tensor, weight: Tensor) -> None:
    op = "grouped_linear_backward"
    check_groups(op, rows, offsets, weight)
    check.dim(op, "grad", grad, "R, N")
    check.dtype(op, "grad", grad, (rows.dtype,), "as rows")
    check.size(op, "grad", "R", grad.size(0), rows.size(0), "as rows")
    check.size(op, "grad", "N", grad.size(1), weight.size(1), "as weight")


def _reference_backward(
    grad: Tensor,
    rows: Tensor,
    offsets: Tensor,
    weight: Tensor,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad, rows, offsets, weight)
    bounds = read_bounds("grouped_linear_backward", offsets, rows.size(0))
    shape = weight.shape
    grad_rows = rows.new_zeros(rows.shape if need_rows else 0)
    grad_weight = rows.new_zeros(shape if need_weight else 0)
    grad_bias = rows.new_zeros(shape[:2] if need_bias else 0)
    for expert, (low, high) in enumerate(pairwise(bounds)):
        part = _wide(grad[low:high])
        if need_rows:
            grad_rows[low:high] = (part @ _wide(weight[expert])).to(rows.dtype)
        if need_weight:
            grad_weight[expert] = (part.T @ _wide(rows[low:high])).to(rows.dtype)
        if need_bias:
            grad_bias[expert] = part.sum(0).to(rows.dtype)
    return grad_rows, grad_weight, grad_bias


def _fake_backward(
    grad: Tensor,
    rows: Tensor,
    offsets: Tensor,
    weight: Tensor,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad, rows, offsets, weight)
    shape = weight.shape
    return (
        rows.new_empty(rows.shape if need_rows else (0,)),
        rows.new_empty(shape if need_weight else (0,)),
        rows.new_empty(shape[:2] if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, offsets, weight, _ = inputs
    ctx.save_for_backward(rows, offsets, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, offsets, weight = ctx.saved_tensors
    # The dispatcher drops an argument that equals its default, so bias may not be there.
    asked = (*ctx.needs_input_grad, False)
    needs = (asked[0], asked[2], asked[3])
    grads = GROUPED_LINEAR_BACKWARD.overload(grad, rows, offsets, weight, *needs)
    grad_rows, grad_weight, grad_bias = (
        each if need else None for each, need in zip(grads, needs, strict=True)
    )
    return grad_rows, None, grad_weight, grad_bias


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    cases = (
        (9, 5, 7, [0, 3, 3, 8]),
        (40, 33, 17, [0, 40]),
        (6, 4, 3, [2, 4, 4, 5]),
        (0, 4, 3, [0, 0]),
        (3, 4, 3, [0, 0, 0]),
        (5, 4, 3, [0]),
    )
    for index, (count, width, out, bounds) in enumerate(cases):
        offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
        rows = tensor(count, width).requires_grad_()
        weight = tensor(len(bounds) - 1, out, width).requires_grad_()
        bias = tensor(len(bounds) - 1, out).requires_grad_() if index % 2 == 0 else None
        yield (rows, offsets, weight, bias), {}
    turned = tensor(2, 5, 3).transpose(1, 2).requires_grad_()
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    yield (tensor(6, 5).requires_grad_(), offsets, turned), {}


def _samples_backward(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for index, ((rows, offsets, weight, *_), _) in enumerate(_samples(device, dtype)):
        grad = torch.randn(rows.size(0), weight.size(1), device=device, dtype=dtype)
        needs = ((True, True, True), (True, False, False), (False, True, True))[index % 3]
        yield (grad, rows.detach(), offsets, weight.detach(), *needs), {}


def _local(offsets: Tensor) -> int:
    return int(offsets[-1] - offsets[0])


def _flops(rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    # Shapes alone, so that the count also works on traced tensors: every row has an expert.
    return 2 * rows.size(0) * weight.size(1) * weight.size(2)


def _flops_backward(
    grad: Tensor,
    rows: Tensor,
    offsets: Tensor,
    weight: Tensor,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
) -> int:
    products = int(need_rows) + int(need_weight)
    return 2 * products * rows.size(0) * weight.size(1) * weight.size(2)


def _nbytes(rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    hit = int((offsets[1:] > offsets[:-1]).sum())
    weights = hit * weight.size(1) * weight.size(2)
    moved = _local(offsets) * rows.size(1) + rows.size(0) * weight.size(1) + weights
    return moved * rows.element_size()


def _nbytes_backward(
    grad: Tensor,
    rows: Tensor,
    offsets: Tensor,
    weight: Tensor,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
) -> int:
    local = _local(offsets)
    moved = local * grad.size(1)
    if need_rows:
        moved += weight.numel() + rows.numel()
    if need_weight:
        moved += weight.numel() + local * rows.size(1)
    return moved * rows.element_size()


GROUPED_LINEAR = register(
    Operator(
        name="grouped_linear",
        family="expert_slice",
        schema="(Tensor rows, Tensor offsets, Tensor weight, Tensor? bias=None) -> Tensor",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        saved_bytes=lambda *_, **__: 0,
        samples=_samples,
        setup_context=_setup_context,
        backward=_backward,
        autocast=Autocast("region"),
        sharding=lambda rows, offsets, weight, bias=None: (
            ("1", "RR11"),
            *((("P", "1R2-"),) if bias is None else ()),
        ),
        triton="ppmoe_ops.kernels.expert_slice.grouped_linear:grouped_linear",
        benchmark="bench_expert_slice",
    )
)

GROUPED_LINEAR_BACKWARD = register(
    Operator(
        name="grouped_linear_backward",
        family="expert_slice",
        schema="(Tensor grad, Tensor rows, Tensor offsets, Tensor weight, bool need_rows, "
        "bool need_weight, bool need_bias) "
        "-> (Tensor grad_rows, Tensor grad_weight, Tensor grad_bias)",
        reference=_reference_backward,
        fake=_fake_backward,
        flops=_flops_backward,
        nbytes=_nbytes_backward,
        samples=_samples_backward,
        no_derivative="grouped_linear has no second derivative; allowed: first derivatives",
        triton="ppmoe_ops.kernels.expert_slice.grouped_linear:grouped_linear_backward",
        benchmark="bench_expert_slice",
    )
)
