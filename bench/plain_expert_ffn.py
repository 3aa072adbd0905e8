"""What `expert_ffn` is measured against: plain PyTorch, and the experts of transformers.

All take (x, ids, weights, w_in, w_out), as a router leaves them: ids [T, K] int64 count from the
first local expert and are L where the expert is another rank's, weights [T, K] are in the dtype of
`x` and zero there. That is the convention of transformers' expert parallelism. Experts are SwiGLU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ppmoe_ops


def layer(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor,
          first: int) -> Tensor:  # fmt: skip
    """The operator's side, from ids on as well; ids are those of all ranks, as int32."""
    slots, offsets = ppmoe_ops.expert_index(ids, first, w_in.size(0))
    return ppmoe_ops.expert_ffn(x, slots, offsets, weights, w_in, None, w_out, None, "swiglu")


def _by_expert(ids: Tensor, local: int) -> tuple[Tensor, Tensor]:
    """Slots in the order of their experts, foreign ones last, and how many each expert has."""
    flat = ids.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=local + 1)[:local]


def loop(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Select, multiply, add: one expert after the other, and no work for foreign slots.

    Weights are unbound once: indexing them would fill a whole gradient for every expert.
    """
    slots, counts = _by_expert(ids, w_in.size(0))
    out, scale = torch.zeros_like(x), weights.flatten()
    rows = counts.tolist()
    parts = slots[: sum(rows)].split(rows)
    for slot, into, out_of in zip(parts, w_in.unbind(), w_out.unbind(), strict=True):
        if slot.numel() == 0:
            continue
        token = slot // ids.size(1)
        gate, up = F.linear(x.index_select(0, token), into).chunk(2, -1)
        result = F.linear(F.silu(gate) * up, out_of)
        out.index_add_(0, token, result * scale.index_select(0, slot).unsqueeze(-1))
    return out


def grouped(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Sort, two grouped products, unsort, sum: what torch.compile is given.

    Rows of foreign slots are zeroed before the products, which leave them undefined, and after.
    """
    slots, counts = _by_expert(ids, w_in.size(0))
    ends = counts.cumsum(0).to(torch.int32)
    foreign = (torch.arange(slots.numel(), device=x.device) >= ends[-1]).unsqueeze(-1)
    rows = x[slots // ids.size(1)].masked_fill(foreign, 0)
    pre = F.grouped_mm(rows, w_in.transpose(1, 2), offs=ends)
    gate, up = pre.masked_fill(foreign, 0).chunk(2, -1)
    result = F.grouped_mm(F.silu(gate) * up, w_out.transpose(1, 2), offs=ends)
    result = result.masked_fill(foreign, 0) * weights.flatten()[slots].unsqueeze(-1)
    place = torch.empty_like(slots).scatter_(0, slots, torch.arange(slots.numel()).to(slots))
    return result[place].unflatten(0, ids.shape).sum(1)


def dense(rows: Tensor, hidden: Tensor, w_in: Tensor, w_out: Tensor, *_: Tensor) -> Any:
    """The two products of equal FLOPs: all rows by one expert's weights."""
    return torch.mm(rows, w_in.T), torch.mm(hidden, w_out.T)


def dense_step(rows: Tensor, hidden: Tensor, w_in: Tensor, w_out: Tensor, grad: Tensor) -> Any:
    """The six products of a forward and a backward."""
    pre, _ = dense(rows, hidden, w_in, w_out)
    into_hidden = torch.mm(grad, w_out), torch.mm(grad.T, hidden)
    return into_hidden, torch.mm(pre, w_in), torch.mm(pre.T, rows)


def why_no_transformers() -> str:
    """Why transformers cannot be measured here; empty where it can."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        experts = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
        importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    except (ImportError, AttributeError) as error:
        return f"this transformers has no experts implementations ({error})"
    return "" if "grouped_mm" in experts else "this transformers has no grouped_mm experts"


def transformers_experts(implementation: str, local: int) -> Callable[..., Tensor]:
    """The experts of transformers' Qwen3-MoE, `local` of them, by one of its implementations."""
    model = "transformers.models.qwen3_moe"
    settings = importlib.import_module(f"{model}.configuration_qwen3_moe")
    modeling = importlib.import_module(f"{model}.modeling_qwen3_moe")
    config = settings.Qwen3MoeConfig(num_experts=local, hidden_act="silu")
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = modeling.Qwen3MoeExperts(config)

    def experts(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        # Past `nn.Module`'s checks, which would cost a small call more than they do a user.
        module._parameters.update(gate_up_proj=w_in, down_proj=w_out)
        found: Tensor = module(x, ids, weights)
        return found

    return experts
