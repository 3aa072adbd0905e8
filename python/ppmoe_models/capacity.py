"""Capacity: at most so many slots an expert, and which ones are dropped."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def decimal_ratio(factor: float) -> tuple[int, int]:
    """The decimal number that `factor` prints as, as an integer ratio: 1.1 is eleven tenths.

    Rounding of binary fractions then never adds a slot.

    Example:
        >>> decimal_ratio(1.1)
        (11, 10)
    """
    exact = Fraction(str(factor))
    return exact.numerator, exact.denominator


def expert_capacity(tokens: int, top_k: int, num_experts: int, factor: tuple[int, int]) -> int:
    """ceil(top_k * factor * tokens / num_experts), the slots that one expert may take.

    Args:
        tokens: T of the call.
        top_k: K.
        num_experts: E.
        factor: a ratio; (1, 1) is the load of perfect balance.

    Example:
        >>> expert_capacity(40, 2, 8, (11, 10)), expert_capacity(1, 1, 64, (1, 1))
        (11, 1)
    """
    # Integers alone, so that a traced number of tokens stays symbolic.
    parts = factor[1] * num_experts
    return (top_k * tokens * factor[0] + parts - 1) // parts


def drop_late_slots(experts: Tensor, slots: Tensor, offsets: Tensor, capacity: int) -> Tensor:
    """Set the ids beyond an expert's capacity to -1, the latest tokens first to go.

    Priority is that of position: of the slots that chose an expert those of the first `capacity`
    tokens stay. Whether a token is dropped then never depends on a later one.

    Args:
        experts: [T, K] integer ids in [0, E), those of a token distinct.
        slots: [T*K] int32, and ...
        offsets: [E+1] int32: `expert_index(experts, 0, E)`.
        capacity: slots that an expert may take.

    Returns:
        [T, K] ids in the dtype of `experts`.

    Example:
        >>> import torch, ppmoe_ops
        >>> ids = torch.tensor([[0, 1], [0, 2], [1, 0]])
        >>> drop_late_slots(ids, *ppmoe_ops.expert_index(ids, 0, 3), 1).tolist()
        [[0, 1], [-1, 2], [-1, -1]]
    """
    flat = experts.flatten()
    order = slots.long()  # a permutation, as every id is in range
    by_expert = flat[order]
    place = torch.arange(flat.numel(), device=flat.device) - offsets[by_expert.long()]
    kept = torch.where(place < capacity, by_expert, -1)
    return torch.empty_like(flat).scatter(0, order, kept).view_as(experts)
