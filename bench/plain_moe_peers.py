"""What a device run measures the expert layer against: other projects, and plain PyTorch.

All take (x, ids, weights, w_in, w_out) as in `plain_expert_ffn`: ids [T, K] int64 from the first
local expert on, L where the expert is another rank's, with a weight of zero there. A peer that is
not installed, or that has no notion of other ranks' experts, is left out with that reason.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import plain_expert_ffn as plain
from .inputs import Workload

Experts = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Peer:
    """One baseline.

    Attributes:
        name: for people, and for the command line.
        make: the callable for a work; raises `ValueError` with the reason where there is none.
        slow: seconds for one call of a large forward and backward, which then is left out.
    """

    name: str
    make: Callable[[Workload], Experts]
    slow: bool = False


def _grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows by weight [L, N, K] of each group, by whichever name this PyTorch has."""
    turned = weight.transpose(1, 2)
    if hasattr(F, "grouped_mm"):
        return F.grouped_mm(rows, turned, offs=ends)
    older: Any = torch._grouped_mm
    return older(rows, turned, offs=ends)


def grouped_glue(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Sort, two grouped products, unsort, sum, without a host synchronisation.

    Counts come from a search in the sorted ids, since `bincount` reads its result on the host.
    """
    local, top_k = w_in.size(0), ids.size(1)
    ordered, slots = ids.flatten().sort(stable=True)
    experts = torch.arange(local, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ordered, experts, right=True).to(torch.int32)
    foreign = (ordered >= local).unsqueeze(-1)
    rows = x[slots // top_k].masked_fill(foreign, 0)
    gate, up = _grouped_mm(rows, w_in, ends).masked_fill(foreign, 0).chunk(2, -1)
    result = _grouped_mm(F.silu(gate) * up, w_out, ends).masked_fill(foreign, 0)
    result = result * weights.flatten()[slots].unsqueeze(-1)
    place = torch.empty_like(slots).scatter_(
        0, slots, torch.arange(slots.numel(), device=slots.device)
    )
    return result[place].unflatten(0, ids.shape).sum(1)


def _needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{module} is not installed")


def _only_one_rank(work: Workload, name: str) -> None:
    if work.local < work.model.experts:
        raise ValueError(f"{name} has no ids for experts of other ranks")


def _transformers(implementation: str) -> Callable[[Workload], Experts]:
    def make(work: Workload) -> Experts:
        missing = plain.why_no_transformers()
        if missing:
            raise ValueError(missing)
        if implementation == "eager":
            _only_one_rank(work, "transformers eager")
        return plain.transformers_experts(implementation, work.local)

    return make


def _compiled_glue(work: Workload) -> Experts:
    if not (hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")):
        raise ValueError("this PyTorch has no grouped_mm")
    if work.dtype != torch.bfloat16:
        raise ValueError("torch.compile takes grouped_mm in bfloat16 alone")
    # Shapes of earlier rows count towards a limit, past which compiling stops without a word.
    torch.compiler.reset()
    compiled: Experts = torch.compile(grouped_glue, dynamic=False)
    return compiled


def _liger(work: Workload) -> Experts:
    _needs("liger_kernel")
    _only_one_rank(work, "Liger's fused MoE")
    try:
        function: Any = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    except (ImportError, AttributeError) as error:
        raise ValueError(f"this liger_kernel has no fused MoE ({error})") from error

    def experts(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        found: Tensor = function.apply(x, w_in, w_out, ids.int(), weights)
        return found

    return experts


def _scattermoe(work: Workload) -> Experts:
    _needs("scattermoe")
    _only_one_rank(work, "ScatterMoE")
    try:
        module: Any = importlib.import_module("scattermoe")
        index, linear = module.flatten_sort_count, module.parallel_linear
    except (ImportError, AttributeError) as error:
        raise ValueError(f"this scattermoe lacks its linear layer ({error})") from error

    def experts(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        ordered, slots, ends = index(ids, num_experts=w_in.size(0))
        where = (ordered, slots, ends)
        pre = linear(x, w_in.transpose(1, 2), ids.size(1), *where, grouped_out=True)
        gate, up = pre.chunk(2, -1)
        hidden = F.silu(gate) * up
        options: dict[str, Any] = {"gates": weights, "grouped_in": True}
        found: Tensor = linear(hidden, w_out.transpose(1, 2), 1, *where, **options)
        return found

    return experts


PEERS: tuple[Peer, ...] = (
    Peer("transformers grouped_mm", _transformers("grouped_mm")),
    Peer("Liger", _liger),
    Peer("torch grouped_mm, compiled", _compiled_glue),
    Peer("ScatterMoE", _scattermoe),
    Peer("torch grouped_mm", lambda work: grouped_glue),
    Peer("transformers eager", _transformers("eager"), slow=True),
)


def peer(name: str) -> Peer:
    """The peer of that name."""
    for each in PEERS:
        if each.name == name:
            return each
    allowed = ", ".join(each.name for each in PEERS)
    raise ValueError(f"bench: no peer '{name}'; allowed: {allowed}")


def balanced_dense(rows: Tensor, w_in: Tensor, hidden: Tensor, w_out: Tensor) -> Any:
    """Batched dense products of equal FLOPs: every expert has the same number of rows."""
    return torch.bmm(rows, w_in.transpose(1, 2)), torch.bmm(hidden, w_out.transpose(1, 2))


def balanced_dense_step(
    rows: Tensor, w_in: Tensor, hidden: Tensor, w_out: Tensor, grad: Tensor
) -> Any:
    """The six batched products of a forward and a backward."""
    pre, _ = balanced_dense(rows, w_in, hidden, w_out)
    by_hidden = torch.bmm(grad, w_out), torch.bmm(grad.transpose(1, 2), hidden)
    return by_hidden, torch.bmm(pre, w_in), torch.bmm(pre.transpose(1, 2), rows)
