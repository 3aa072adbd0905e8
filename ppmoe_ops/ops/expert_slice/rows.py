"""`slice_rows` and `merge_rows`: tokens to the rows of the local experts and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Autocast, Operator, Sample, register


def slice_rows(x: Tensor, slots: Tensor, top_k: int) -> Tensor:
    """Copy each local slot's token into a row, in the order of `slots`; zero rows after the last.

    Args:
        x: [T, H] float32, bfloat16, float16 or float64; rows may be strided.
        slots: [T*K] int32 from `expert_index`: slot numbers t * K + k, each at most once, or -1.
        top_k: K.

    Returns:
        [T*K, H] in the dtype of `x`: row i is x[slots[i] // K], zero where slots[i] is -1.

    Raises:
        ValueError: a shape or dtype that is not as above; on the CPU, a slot that is listed twice.
        IndexError: on the CPU, a slot outside [-1, T*K). (On CUDA it acts as -1, unless
            `PPMOE_OPS_CHECK=1`.)

    Gradient: to `x`, the sum over a token's rows in the order of its choices, accumulated in
    float32 (float64 for float64).
    Saved for backward: no bytes of its own; keeps `slots` alive.

    Source: PPMoE (arXiv 2304.11414) section 3.3.3, dispatch by index.

    Example:
        >>> import torch, ppmoe_ops
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> slots = torch.tensor([2, 1, -1, -1], dtype=torch.int32)
        >>> ppmoe_ops.slice_rows(x, slots, 2).tolist()
        [[3.0, 4.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    """
    return SLICE_ROWS.overload(x, slots, top_k)


def merge_rows(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Add each token's weighted rows up: a gather per token, in the order of its choices.

    Args:
        rows: [T*K, H] float32, bfloat16, float16 or float64, in the order of `slots`.
        slots: [T*K] int32 from `expert_index`: slot numbers t * K + k, each at most once, or -1.
        weights: [T, K] float32 (float64 for float64 rows).

    Returns:
        [T, H] in the dtype of `rows`; accumulated in float32 (float64 for float64). A token
        without a local slot gets exact zeros, so that one all-reduce completes a layer.

    Raises:
        ValueError: a shape or dtype that is not as above; on the CPU, a slot that is listed twice.
        IndexError: on the CPU, a slot outside [-1, T*K).

    Gradient: to `rows` and `weights`; both are zero for slots that are not listed.
    Saved for backward: no bytes of its own; keeps `rows`, `slots` and `weights` alive.

    Source: PPMoE (arXiv 2304.11414) section 3.3.3, local gather by index.

    Example:
        >>> import torch, ppmoe_ops
        >>> rows = torch.tensor([[1.0], [10.0], [100.0], [7.0]])
        >>> slots = torch.tensor([2, 0, 3, -1], dtype=torch.int32)
        >>> weights = torch.tensor([[0.5, 0.5], [1.0, 0.25]])
        >>> ppmoe_ops.merge_rows(rows, slots, weights).tolist()
        [[5.0], [26.0]]
    """
    return MERGE_ROWS.overload(rows, slots, weights)


def _check_slots(op: str, slots: Tensor, expected: int, why: str) -> None:
    check.dim(op, "slots", slots, "T*K")
    check.dtype(op, "slots", slots, (torch.int32,))
    check.size(op, "slots", "T*K", slots.size(0), expected, why)


def check_slot_values(op: str, slots: Tensor) -> None:
    """Raise unless every slot is listed once at most; waits for the device."""
    bad = slots[(slots < -1) | (slots >= slots.numel())]
    if bad.numel():
        raise IndexError(f"{op}: slots holds {int(bad[0])}; allowed: -1 to {slots.numel() - 1}")
    listed = slots[slots >= 0]
    if torch.unique(listed).numel() == listed.numel():
        return
    seen: set[int] = set()
    for slot in listed.tolist():
        if slot in seen:
            raise ValueError(f"{op}: slots holds {slot} twice; allowed: each slot once")
        seen.add(slot)


def _inverse(slots: Tensor) -> Tensor:
    """Row of every slot, or -1: the inverse of the listed part of `slots`."""
    inverse = slots.new_full(slots.shape, -1, dtype=torch.int64)
    listed = slots >= 0
    inverse[slots[listed].long()] = listed.nonzero().flatten()
    return inverse


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_slice(x: Tensor, slots: Tensor, top_k: int) -> None:
    """Raise unless the arguments of `slice_rows` fit each other."""
    op = "slice_rows"
    check.dim(op, "x", x, "T, H")
    check.dtype(op, "x", x, check.FLOATS)
    check.between(op, "top_k", top_k, 1, 2**31 - 1)
    _check_slots(op, slots, x.size(0) * top_k, "T of x times top_k")


def _reference_slice(x: Tensor, slots: Tensor, top_k: int) -> Tensor:
    check_slice(x, slots, top_k)
    check_slot_values("slice_rows", slots)
    if x.size(0) == 0:
        return x.new_zeros(0, x.size(1))
    taken = x.index_select(0, slots.clamp(min=0).long() // top_k)
    return taken.masked_fill((slots < 0).unsqueeze(-1), 0)


def _fake_slice(x: Tensor, slots: Tensor, top_k: int) -> Tensor:
    check_slice(x, slots, top_k)
    return x.new_empty((slots.size(0), x.size(1)))


def check_slice_backward(grad: Tensor, slots: Tensor, top_k: int) -> None:
    """Raise unless the arguments of `slice_rows_backward` fit each other."""
    op = "slice_rows_backward"
    check.dim(op, "grad", grad, "T*K, H")
    check.dtype(op, "grad", grad, check.FLOATS)
    check.between(op, "top_k", top_k, 1, 2**31 - 1)
    _check_slots(op, slots, grad.size(0), "as grad")
    if slots.size(0) % top_k != 0:
        raise ValueError(
            f"{op}: slots has T*K = {slots.size(0)}; expected a multiple of top_k = {top_k}"
        )


def _reference_slice_backward(grad: Tensor, slots: Tensor, top_k: int) -> Tensor:
    check_slice_backward(grad, slots, top_k)
    check_slot_values("slice_rows_backward", slots)
    ones = torch.ones((slots.size(0) // top_k, top_k), dtype=_wide(grad.dtype), device=grad.device)
    return _weighted_sum(grad, slots, ones)


def _fake_slice_backward(grad: Tensor, slots: Tensor, top_k: int) -> Tensor:
    check_slice_backward(grad, slots, top_k)
    return grad.new_empty((slots.size(0) // top_k, grad.size(1)))


def check_merge(op: str, rows: Tensor, slots: Tensor, weights: Tensor) -> None:
    """Raise unless the arguments of `merge_rows`, or of its backward, fit each other."""
    check.dim(op, "rows", rows, "T*K, H")
    check.dtype(op, "rows", rows, check.FLOATS)
    check.dim(op, "weights", weights, "T, K")
    check.dtype(op, "weights", weights, (_wide(rows.dtype),), "for these rows")
    _check_slots(op, slots, rows.size(0), "as rows")
    expected = weights.size(0) * weights.size(1)
    check.size(op, "rows", "T*K", rows.size(0), expected, "T times K of weights")


def _weighted_sum(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    tokens, top_k = weights.shape
    inverse = _inverse(slots).view(tokens, top_k)
    total = weights.new_zeros(tokens, rows.size(1))
    for k in range(top_k):
        here = (inverse[:, k] >= 0).unsqueeze(-1)
        row = rows[inverse[:, k].clamp(min=0)].to(weights.dtype) if tokens else total
        total = torch.where(here, total + weights[:, k : k + 1] * row, total)
    return total.to(rows.dtype)


def _reference_merge(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    check_merge("merge_rows", rows, slots, weights)
    check_slot_values("merge_rows", slots)
    return _weighted_sum(rows, slots, weights)


def _fake_merge(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    check_merge("merge_rows", rows, slots, weights)
    return rows.new_empty((weights.size(0), rows.size(1)))


def check_merge_backward(grad: Tensor, rows: Tensor, slots: Tensor, weights: Tensor) -> None:
    """Raise unless the arguments of `merge_rows_backward` fit each other."""
    op = "merge_rows_backward"
    check_merge(op, rows, slots, weights)
    check.dim(op, "grad", grad, "T, H")
    check.dtype(op, "grad", grad, (rows.dtype,), "as rows")
    check.size(op, "grad", "T", grad.size(0), weights.size(0), "as weights")
    check.size(op, "grad", "H", grad.size(1), rows.size(1), "as rows")


def _reference_merge_backward(
    grad: Tensor, rows: Tensor, slots: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    check_merge_backward(grad, rows, slots, weights)
    check_slot_values("merge_rows_backward", slots)
    grad_rows = torch.zeros_like(rows)
    grad_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    listed = slots >= 0
    slot = slots[listed].long()
    if slot.numel():
        token_grad = grad[slot // weights.size(1)].to(weights.dtype)
        grad_rows[listed] = (weights.flatten()[slot].unsqueeze(-1) * token_grad).to(rows.dtype)
        grad_weights.view(-1)[slot] = (token_grad * rows[listed].to(weights.dtype)).sum(-1)
    return grad_rows, grad_weights


def _fake_merge_backward(
    grad: Tensor, rows: Tensor, slots: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    check_merge_backward(grad, rows, slots, weights)
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _setup_slice(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slots, top_k = inputs
    ctx.save_for_backward(slots)
    ctx.top_k = top_k


def _backward_slice(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (slots,) = ctx.saved_tensors
    return SLICE_ROWS_BACKWARD.overload(grad, slots, ctx.top_k), None, None


def _setup_merge(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_merge(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    rows, slots, weights = ctx.saved_tensors
    grad_rows, grad_weights = MERGE_ROWS_BACKWARD.overload(grad, rows, slots, weights)
    return grad_rows, None, grad_weights


def _index_samples(device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """T, K and slots: some foreign, all local, none local, no tokens at all."""
    for tokens, top_k, local in ((6, 2, 3), (5, 3, 8), (4, 2, 0), (0, 2, 4), (1, 1, 8)):
        ids = torch.rand(tokens, 8, device=device).argsort(-1)[:, :top_k]
        slots, _ = torch.ops.ppmoe_ops.expert_index(ids, 0, local)
        yield tokens, top_k, slots


def _samples_slice(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for tokens, top_k, slots in _index_samples(device):
        x = torch.randn(tokens, 19, device=device, dtype=dtype, requires_grad=True)
        yield (x, slots, top_k), {}
        yield (x.detach()[:, 2:17].requires_grad_(), slots, top_k), {}


def _samples_slice_backward(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for tokens, top_k, slots in _index_samples(device):
        yield (torch.randn(tokens * top_k, 19, device=device, dtype=dtype), slots, top_k), {}


def _samples_merge(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for tokens, top_k, slots in _index_samples(device):
        rows = torch.randn(tokens * top_k, 19, device=device, dtype=dtype, requires_grad=True)
        weights = torch.rand(tokens, top_k, device=device, dtype=_wide(dtype), requires_grad=True)
        yield (rows, slots, weights), {}


def _samples_merge_backward(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for (rows, slots, weights), _ in _samples_merge(device, dtype):
        grad = torch.randn(weights.size(0), rows.size(1), device=device, dtype=dtype)
        yield (grad, rows.detach(), slots, weights.detach()), {}


def _no_flops(*_: Any, **__: Any) -> int:
    return 0


def _local(slots: Tensor) -> int:
    return int((slots >= 0).sum())


def _nbytes_slice(x: Tensor, slots: Tensor, top_k: int) -> int:
    tokens = int(torch.unique(slots[slots >= 0] // top_k).numel())
    return (tokens + slots.numel()) * x.size(1) * x.element_size() + 4 * slots.numel()


def _nbytes_slice_backward(grad: Tensor, slots: Tensor, top_k: int) -> int:
    moved = _local(slots) + slots.numel() // top_k
    return moved * grad.size(1) * grad.element_size() + 4 * slots.numel()


def _nbytes_merge(rows: Tensor, slots: Tensor, weights: Tensor) -> int:
    moved = _local(slots) + weights.size(0)
    return moved * rows.size(1) * rows.element_size() + 8 * slots.numel()


def _nbytes_merge_backward(grad: Tensor, rows: Tensor, slots: Tensor, weights: Tensor) -> int:
    moved = _local(slots) + slots.numel() + grad.size(0)
    return moved * rows.size(1) * rows.element_size() + 12 * slots.numel()


def _nothing(*_: Any, **__: Any) -> int:
    return 0


_NO_SECOND = "{} has no second derivative; allowed: first derivatives"

SLICE_ROWS = register(
    Operator(
        name="slice_rows",
        family="expert_slice",
        schema="(Tensor x, Tensor slots, SymInt top_k) -> Tensor",
        reference=_reference_slice,
        fake=_fake_slice,
        flops=_no_flops,
        nbytes=_nbytes_slice,
        saved_bytes=_nothing,
        samples=_samples_slice,
        triton="ppmoe_ops.kernels.expert_slice.rows:slice_rows",
        setup_context=_setup_slice,
        backward=_backward_slice,
        autocast=Autocast("region"),
        sharding=lambda *_, **__: (("1", "1R"),),
        benchmark="bench_expert_slice",
    )
)

SLICE_ROWS_BACKWARD = register(
    Operator(
        name="slice_rows_backward",
        family="expert_slice",
        schema="(Tensor grad, Tensor slots, SymInt top_k) -> Tensor",
        reference=_reference_slice_backward,
        fake=_fake_slice_backward,
        flops=_no_flops,
        nbytes=_nbytes_slice_backward,
        samples=_samples_slice_backward,
        triton="ppmoe_ops.kernels.expert_slice.rows:slice_rows_backward",
        no_derivative=_NO_SECOND.format("slice_rows"),
        sharding=lambda *_, **__: (("1", "1R"),),
        benchmark="bench_expert_slice",
    )
)

MERGE_ROWS = register(
    Operator(
        name="merge_rows",
        family="expert_slice",
        schema="(Tensor rows, Tensor slots, Tensor weights) -> Tensor",
        reference=_reference_merge,
        fake=_fake_merge,
        flops=_no_flops,
        nbytes=_nbytes_merge,
        saved_bytes=_nothing,
        samples=_samples_merge,
        triton="ppmoe_ops.kernels.expert_slice.rows:merge_rows",
        setup_context=_setup_merge,
        backward=_backward_merge,
        autocast=Autocast("region", keep=("weights",)),
        sharding=lambda *_, **__: (("1", "1RR"),),
        benchmark="bench_expert_slice",
    )
)

MERGE_ROWS_BACKWARD = register(
    Operator(
        name="merge_rows_backward",
        family="expert_slice",
        schema="(Tensor grad, Tensor rows, Tensor slots, Tensor weights) "
        "-> (Tensor grad_rows, Tensor grad_weights)",
        reference=_reference_merge_backward,
        fake=_fake_merge_backward,
        flops=_no_flops,
        nbytes=_nbytes_merge_backward,
        samples=_samples_merge_backward,
        triton="ppmoe_ops.kernels.expert_slice.rows:merge_rows_backward",
        no_derivative=_NO_SECOND.format("merge_rows"),
        sharding=lambda *_, **__: (("1P", "11RR"),),
        benchmark="bench_expert_slice",
    )
)
