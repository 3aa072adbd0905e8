"""`expert_index`: which (token, choice) slots belong to the experts of this rank, by expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Operator, Sample, register


def expert_index(experts: Tensor, first_expert: int, num_local: int) -> tuple[Tensor, Tensor]:
    """List the slots of the local experts, sorted by expert and stable within one.

    A slot is one choice of one token, numbered t * K + k. Local are the experts
    `first_expert <= id < first_expert + num_local`; every other id, -1 included, is another rank's
    or was dropped. Shapes do not depend on the ids and nothing waits for a device.

    Args:
        experts: [T, K] int32 or int64 expert ids.
        first_expert: the first local expert's id, at least 0.
        num_local: L, how many experts are local, at least 0.

    Returns:
        slots [T*K] int32: the local slots, then -1; and offsets [L+1] int32: local expert e owns
        slots[offsets[e] : offsets[e + 1]].

    Raises:
        ValueError: a shape, dtype or value that is not as above, or T*K of 2**31 or more.

    Gradient: none, both results are integers. Saved for backward: nothing.

    Source: PPMoE (arXiv 2304.11414) section 3.3.3, index selection.

    Example:
        The eight tokens of the paper's Figure 4, seen from the first of two ranks:

        >>> import torch, ppmoe_ops
        >>> order = torch.tensor([2, 3, 1, 2, 0, 3, 2, 0]).view(8, 1)
        >>> slots, offsets = ppmoe_ops.expert_index(order, 0, 2)
        >>> slots.tolist(), offsets.tolist()
        ([4, 7, 2, -1, -1, -1, -1, -1], [0, 2, 3])
    """
    return EXPERT_INDEX.overload(experts, first_expert, num_local)


def check_forward(experts: Tensor, first_expert: int, num_local: int) -> None:
    """Raise unless the arguments fit each other."""
    op = "expert_index"
    check.dim(op, "experts", experts, "T, K")
    check.dtype(op, "experts", experts, check.IDS)
    check.between(op, "first_expert", first_expert, 0, 2**31 - 1)
    check.between(op, "num_local", num_local, 0, 2**31 - 2)
    check.between(op, "T*K", experts.numel(), 0, 2**31 - 1, "slots are int32")


def _reference(experts: Tensor, first_expert: int, num_local: int) -> tuple[Tensor, Tensor]:
    check_forward(experts, first_expert, num_local)
    local = experts.flatten().long() - first_expert
    local = torch.where((local >= 0) & (local < num_local), local, num_local)
    order = torch.sort(local, stable=True).indices
    foreign = torch.sort(local, stable=True).values == num_local
    slots = torch.where(foreign, -1, order).to(torch.int32)
    ends = torch.bincount(local, minlength=num_local + 1)[:num_local].cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return slots, offsets


def _fake(experts: Tensor, first_expert: int, num_local: int) -> tuple[Tensor, Tensor]:
    check_forward(experts, first_expert, num_local)
    return (
        experts.new_empty((experts.size(0) * experts.size(1),), dtype=torch.int32),
        experts.new_empty((num_local + 1,), dtype=torch.int32),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    cases = ((7, 2, 8, 0, 8), (7, 2, 8, 4, 2), (5, 3, 6, 2, 0), (0, 2, 4, 0, 4), (300, 4, 9, 3, 5))
    for tokens, top_k, num_experts, first, local in cases:
        ids = torch.randint(-1, num_experts, (tokens, top_k), device=device)
        yield (ids, first, local), {}
        yield (ids.int(), first, local), {}


def _nbytes(experts: Tensor, first_expert: int, num_local: int) -> int:
    return experts.numel() * (experts.element_size() + 4) + 4 * (num_local + 1)


def _flops(*_: Any, **__: Any) -> int:
    return 0


EXPERT_INDEX = register(
    Operator(
        name="expert_index",
        family="expert_slice",
        schema="(Tensor experts, SymInt first_expert, SymInt num_local) "
        "-> (Tensor slots, Tensor offsets)",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        samples=_samples,
        triton="ppmoe_ops.kernels.expert_slice.expert_index:expert_index",
        benchmark="bench_expert_slice",
    )
)
