"""What operators are called with: shapes of real models, routing, and seeded tensors.

One registry for tests, benchmarks and device runs: `build("slice_rows", workload, device)` returns
the arguments of `torch.ops.ppmoe_ops.slice_rows` for that workload, and so for every operator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from . import equilibrium_inputs, ladder_inputs
from .seeded import Source as _Source

Arguments = tuple[Any, ...]
Routing = Literal["balanced", "uniform", "zipf", "one_expert"]
ROUTINGS: tuple[Routing, ...] = ("balanced", "uniform", "zipf", "one_expert")


@dataclasses.dataclass(frozen=True)
class Model:
    """The mixture-of-experts part of a published model."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int
    score: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    selection_bias: bool = False


QWEN3_30B = Model("Qwen3-30B-A3B", 2048, 768, 128, 8)
OLMOE = Model("OLMoE", 2048, 1024, 64, 8)
MIXTRAL = Model("Mixtral 8x7B", 4096, 14336, 8, 2)
DEEPSEEK_V3 = Model(
    "DeepSeek-V3", 7168, 2048, 256, 8, "sigmoid", 8, 4, scale=2.5, selection_bias=True
)
FINE_GRAINED = Model("fine-grained", 1024, 512, 32, 4)
TINY = Model("tiny", 64, 64, 8, 2)
MODELS = (QWEN3_30B, OLMOE, MIXTRAL, DEEPSEEK_V3)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call's worth of work.

    Attributes:
        model: whose shapes.
        tokens: T.
        dtype: of the floating-point data.
        routing: how evenly tokens spread over experts: `balanced` gives every expert the same
            count, `uniform` draws experts with equal odds, `zipf` makes the n-th most popular one
            1/n as popular as the first, and `one_expert` is every token's first choice.
        first_expert, local_experts: the experts of this rank; `None` is all from the first on.
        projection: which of an expert's matrices a product uses: `up` is the fused gate and up
            projection [2F, H] of a gated expert, `down` is [H, F].
        seed: of everything random in it.
    """

    model: Model
    tokens: int
    dtype: torch.dtype = torch.float32
    routing: Routing = "balanced"
    first_expert: int = 0
    local_experts: int | None = None
    projection: Literal["up", "down"] = "up"
    seed: int = 0

    @property
    def local(self) -> int:
        """L, how many experts are local."""
        rest = self.model.experts - self.first_expert
        return rest if self.local_experts is None else self.local_experts

    @property
    def features(self) -> tuple[int, int]:
        """K_in and N of the expert product."""
        hidden, width = self.model.hidden, self.model.width
        return (hidden, 2 * width) if self.projection == "up" else (width, hidden)

    @property
    def scaled(self) -> str:
        """How the workload is smaller than the model, for the row; empty where it is not."""
        if self.local == self.model.experts:
            return ""
        return f"{self.local} of {self.model.experts} experts"


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of routing weights and losses beside data of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expert_ids(workload: Workload) -> Tensor:
    """[T, K] int32 ids over all experts, distinct within a token, on the CPU."""
    model, tokens = workload.model, workload.tokens
    generator = torch.Generator().manual_seed(workload.seed)
    if workload.routing == "one_expert":
        rest = _balanced(tokens, model.experts - 1, model.top_k - 1, generator) + 1
        return torch.cat([rest.new_zeros(tokens, 1), rest], 1)
    if workload.routing == "balanced":
        return _balanced(tokens, model.experts, model.top_k, generator)
    # The K largest of log-probability plus Gumbel noise are a draw without replacement.
    uniform = torch.rand(tokens, model.experts, generator=generator).clamp_(1e-20, 1 - 1e-7)
    noisy = -torch.log(-torch.log(uniform))
    if workload.routing == "zipf":
        noisy += _zipf_log_popularity(model.experts, generator)
    return noisy.topk(model.top_k, -1).indices.int()


def _balanced(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Equal counts wherever T*K divides evenly: permutations of the experts, cut into tokens."""
    if top_k == 0:
        return torch.empty(tokens, 0, dtype=torch.int32)
    per_permutation = experts // top_k
    if experts % top_k == 0:
        blocks = -(-tokens // per_permutation)
        ids = torch.rand(blocks, experts, generator=generator).argsort(-1)
        return ids.view(blocks * per_permutation, top_k)[:tokens].int().contiguous()
    start = torch.arange(tokens).unsqueeze(1) * top_k
    relabel = torch.randperm(experts, generator=generator)
    ids = relabel[(start + torch.arange(top_k)) % experts]
    return ids[torch.randperm(tokens, generator=generator)].int()


def _zipf_log_popularity(experts: int, generator: torch.Generator) -> Tensor:
    ranks = torch.arange(1, experts + 1, dtype=torch.float32)
    return -ranks.log()[torch.randperm(experts, generator=generator)]


def _index(workload: Workload, device: torch.device) -> tuple[Tensor, Tensor]:
    ids = expert_ids(workload)
    first, local = workload.first_expert, workload.local
    slots, offsets = torch.ops.ppmoe_ops.expert_index(ids, first, local)
    if device.type == "meta":
        # Costs are counted from shapes and from these values.
        return slots, offsets
    return slots.to(device), offsets.to(device)


def _route(workload: Workload, device: torch.device) -> Arguments:
    model, source = workload.model, _Source(workload, device)
    logits = source.randn(workload.tokens, model.experts)
    if workload.routing != "balanced":
        generator = torch.Generator().manual_seed(workload.seed)
        popularity = _zipf_log_popularity(model.experts, generator).to(device)
        logits = (logits + popularity).to(workload.dtype)
    bias = None
    if model.selection_bias:
        bias = source.randn(model.experts, dtype=torch.float32, scale=0.1)
    groups = (model.groups, model.top_groups, model.scale)
    return (logits, model.top_k, model.score, True, bias, *groups)


def _route_backward(workload: Workload, device: torch.device) -> Arguments:
    logits, top_k, score, renormalize, *rest = _route(workload, device)
    args = (logits, top_k, score, renormalize, *rest)
    weights, experts = torch.ops.ppmoe_ops.route(*args)
    grad = _Source(workload, device, stream=1).randn(*weights.shape, dtype=weights.dtype)
    kept = logits if (score == "softmax") != renormalize else None
    sizes = (logits.size(1), logits.dtype)
    return (grad, weights, experts, kept, *sizes, score, renormalize, workload.model.scale)


def _router_losses(workload: Workload, device: torch.device) -> Arguments:
    model = workload.model
    logits = _Source(workload, device).randn(workload.tokens, model.experts)
    return logits, expert_ids(workload).to(device)


def _router_losses_backward(workload: Workload, device: torch.device) -> Arguments:
    logits, experts = _router_losses(workload, device)
    balance, z, shares, lse = torch.ops.ppmoe_ops.router_losses_forward(logits, experts)
    return torch.full_like(balance, 0.01), torch.full_like(z, 0.001), logits, shares, lse


def _expert_index(workload: Workload, device: torch.device) -> Arguments:
    return expert_ids(workload).to(device), workload.first_expert, workload.local


def _slice_rows(workload: Workload, device: torch.device) -> Arguments:
    slots, _ = _index(workload, device)
    x = _Source(workload, device).randn(workload.tokens, workload.model.hidden)
    return x, slots, workload.model.top_k


def _slice_rows_backward(workload: Workload, device: torch.device) -> Arguments:
    slots, _ = _index(workload, device)
    grad = _Source(workload, device, stream=1).randn(slots.size(0), workload.model.hidden)
    return grad, slots, workload.model.top_k


def _merge_rows(workload: Workload, device: torch.device) -> Arguments:
    slots, _ = _index(workload, device)
    source = _Source(workload, device)
    rows = source.randn(slots.size(0), workload.model.hidden)
    shape = (workload.tokens, workload.model.top_k)
    return rows, slots, source.rand(*shape, dtype=wide_dtype(workload.dtype))


def _merge_rows_backward(workload: Workload, device: torch.device) -> Arguments:
    args = _merge_rows(workload, device)
    shape = (workload.tokens, workload.model.hidden)
    return (_Source(workload, device, stream=1).randn(*shape), *args)


def _grouped_linear(workload: Workload, device: torch.device) -> Arguments:
    """The local rows alone, so that every row has an expert and FLOP counts are executed ones."""
    _, offsets = _index(workload, device)
    width, out = workload.features
    source = _Source(workload, device)
    rows = source.randn(int(offsets[-1]), width)
    return rows, offsets, source.randn(workload.local, out, width, scale=width**-0.5), None


def _grouped_linear_backward(workload: Workload, device: torch.device) -> Arguments:
    rows, offsets, weight, _ = _grouped_linear(workload, device)
    grad = _Source(workload, device, stream=1).randn(rows.size(0), weight.size(1))
    return grad, rows, offsets, weight, True, True, False


def _expert_ffn(workload: Workload, device: torch.device) -> Arguments:
    model, source = workload.model, _Source(workload, device)
    slots, offsets = _index(workload, device)
    hidden, width, local = model.hidden, model.width, workload.local
    x = source.randn(workload.tokens, hidden)
    weights = source.rand(workload.tokens, model.top_k, dtype=wide_dtype(workload.dtype))
    weights = weights / weights.sum(-1, keepdim=True)
    w_in = source.randn(local, 2 * width, hidden, scale=hidden**-0.5)
    w_out = source.randn(local, hidden, width, scale=width**-0.5)
    return x, slots, offsets, weights, w_in, None, w_out, None, "swiglu"


def _expert_ffn_forward(workload: Workload, device: torch.device) -> Arguments:
    return (*_expert_ffn(workload, device), True)


def _expert_ffn_backward(workload: Workload, device: torch.device) -> Arguments:
    """All gradients but those of biases, which these models do not have."""
    args = _expert_ffn_forward(workload, device)
    x, slots, offsets, weights, w_in, _, w_out, b_out, activation, _ = args
    _, pre = torch.ops.ppmoe_ops.expert_ffn_forward(*args)
    grad = _Source(workload, device, stream=1).randn(*x.shape)
    needs = (True, True, True, False, True, False)
    return grad, x, slots, offsets, weights, w_in, w_out, b_out, pre, activation, *needs


BUILDERS: dict[str, Callable[[Any, torch.device], Arguments]] = {
    "route": _route,
    "route_backward": _route_backward,
    "router_losses": _router_losses,
    "router_losses_forward": _router_losses,
    "router_losses_backward": _router_losses_backward,
    "expert_index": _expert_index,
    "slice_rows": _slice_rows,
    "slice_rows_backward": _slice_rows_backward,
    "merge_rows": _merge_rows,
    "merge_rows_backward": _merge_rows_backward,
    "grouped_linear": _grouped_linear,
    "grouped_linear_backward": _grouped_linear_backward,
    "expert_ffn": _expert_ffn,
    "expert_ffn_forward": _expert_ffn_forward,
    "expert_ffn_backward": _expert_ffn_backward,
    **ladder_inputs.BUILDERS,
    **equilibrium_inputs.BUILDERS,
}


def build(
    operator: str,
    workload: Workload | ladder_inputs.Maps | equilibrium_inputs.Work,
    device: torch.device | str = "cpu",
) -> Arguments:
    """The positional arguments of `torch.ops.ppmoe_ops.<operator>` for `workload`.

    Operators of ladder attention take a `ladder_inputs.Maps`, equilibrium operators what their
    builder in `equilibrium_inputs` takes, the others a `Workload`.
    """
    if operator not in BUILDERS:
        raise ValueError(f"inputs: no builder for '{operator}'; allowed: {', '.join(BUILDERS)}")
    return BUILDERS[operator](workload, torch.device(device))
