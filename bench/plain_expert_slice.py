"""Plain-PyTorch compositions of expert slicing: what the operators are measured against.

Each takes the arguments of its operator and computes the same, in the way a user would write it
for a case whose conditions (every slot local, say) its own words name.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_topk(logits: Tensor, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    """What most routers do: softmax over all experts, top-k, normalise."""
    weights, experts = torch.softmax(logits.float(), -1).topk(top_k, -1)
    return weights / weights.sum(-1, keepdim=True), experts


def topk_softmax(logits: Tensor, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    """The same weights from the chosen logits alone."""
    chosen, experts = logits.float().topk(top_k, -1)
    return torch.softmax(chosen, -1), experts


def sigmoid_groups(
    logits: Tensor,
    top_k: int,
    score: str,
    renormalize: bool,
    bias: Tensor | None,
    groups: int,
    top_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """A group-limited router with a selection bias, as in DeepSeek-V3."""
    scores = torch.sigmoid(logits.float())
    key = scores if bias is None else scores + bias
    by_group = key.unflatten(-1, (groups, -1))
    best = by_group.topk(2, -1).values.sum(-1).topk(top_groups, -1, sorted=False).indices
    allowed = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, True)
    key = by_group.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
    experts = key.topk(top_k, -1).indices
    weights = scores.gather(1, experts)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale, experts


def losses(logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Load-balance and z-loss with one softmax, one log-sum-exp and one histogram."""
    wide, num_experts = logits.float(), logits.size(1)
    shares = torch.bincount(experts.flatten(), minlength=num_experts) / experts.numel()
    balance = num_experts * (shares * torch.softmax(wide, -1).mean(0)).sum()
    return balance, torch.logsumexp(wide, -1).square().mean()


def sort_index(experts: Tensor, first: int, local: int) -> tuple[Tensor, Tensor]:
    """Stable sort, histogram and running sum; foreign slots are masked where there are any."""
    ids = experts.flatten() - first if first else experts.flatten()
    ids = torch.where((ids < 0) | (ids >= local), local, ids)
    return _sorted_slots(ids, local, masked=True)


def sort_index_unmasked(experts: Tensor, first: int, local: int) -> tuple[Tensor, Tensor]:
    """The same where every expert is local, so that nothing has to be masked."""
    return _sorted_slots(experts.flatten(), local, masked=False)


def _sorted_slots(ids: Tensor, local: int, masked: bool) -> tuple[Tensor, Tensor]:
    ordered, slots = torch.sort(ids, stable=True)
    offsets = F.pad(torch.bincount(ids, minlength=local)[:local].cumsum(0), (1, 0))
    if masked:
        slots = slots.masked_fill(ordered == local, -1)
    return slots, offsets


def select_rows(x: Tensor, slots: Tensor, top_k: int) -> Tensor:
    """index_select where every slot is local."""
    return x.index_select(0, slots // top_k)


def select_rows_masked(x: Tensor, slots: Tensor, top_k: int) -> Tensor:
    """index_select of any row for foreign slots, then a mask."""
    rows = x.index_select(0, slots.clamp(min=0) // top_k)
    return rows.masked_fill((slots < 0).unsqueeze(-1), 0)


def select_rows_prefix(x: Tensor, slots: Tensor, top_k: int) -> Tensor:
    """index_select of the local slots alone, then zeros; reads the count on the host."""
    local = int((slots >= 0).sum())
    return F.pad(x.index_select(0, slots[:local] // top_k), (0, 0, 0, slots.numel() - local))


def inverse(slots: Tensor) -> Tensor:
    """Row of every slot, where every slot is local."""
    rows = torch.arange(slots.numel(), device=slots.device)
    return torch.empty_like(rows).scatter_(0, slots.long(), rows)


def gather_sum(grad: Tensor, slots: Tensor, top_k: int) -> Tensor:
    """Backward of slicing written by hand: gather by token, sum over choices."""
    by_token: Tensor = grad.index_select(0, inverse(slots)).unflatten(0, (-1, top_k))
    return by_token.sum(1)


def merge_gather(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Gather by token, multiply, sum over choices."""
    by_token: Tensor = rows.index_select(0, inverse(slots)).unflatten(0, weights.shape)
    return (by_token * weights.unsqueeze(-1).to(rows.dtype)).sum(1)


def merge_bmm(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Gather by token, then one small product a token."""
    by_token: Tensor = rows.index_select(0, inverse(slots)).unflatten(0, weights.shape)
    return torch.bmm(weights.unsqueeze(1).to(rows.dtype), by_token).squeeze(1)


def merge_index_add(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Multiply in row order, add into the tokens."""
    weighted = rows * weights.flatten()[slots].unsqueeze(-1).to(rows.dtype)
    out = rows.new_zeros(weights.size(0), rows.size(1))
    return out.index_add_(0, slots // weights.size(1), weighted)


def loop_of_mm(rows: Tensor, offsets: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """One product an expert; weights are unbound once, so gradients are not rebuilt per expert."""
    bounds = offsets.tolist()
    parts = rows.split([high - low for low, high in itertools.pairwise(bounds)])
    products = (part @ each.T for part, each in zip(parts, weight.unbind(), strict=True))
    return torch.cat(list(products))


def grouped_mm(rows: Tensor, offsets: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """PyTorch's own grouped product."""
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets[1:])


def dense(rows: Tensor, offsets: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """One product of equal FLOPs: all rows by one expert's weight."""
    return torch.mm(rows, weight[0].T)


def dense_backward(grad: Tensor, rows: Tensor, offsets: Tensor, weight: Tensor, *_: Any) -> Any:
    """The two products of equal FLOPs."""
    return torch.mm(grad, weight[0]), torch.mm(grad.T, rows)
