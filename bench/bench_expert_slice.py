"""Cases of expert slicing, and the plain-PyTorch compositions that they are measured against.

Also a pytest-benchmark file: `pytest bench --benchmark-enable` gives absolute times and JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ppmoe_ops
from ppmoe_ops._library import OPERATORS

from .harness import AUTOGRAD, Baseline, Case, Problem
from .inputs import (
    DEEPSEEK_V3,
    MIXTRAL,
    MODELS,
    OLMOE,
    QWEN3_30B,
    ROUTINGS,
    TINY,
    Workload,
    build,
)

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


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
    # Ids of all experts need no mask: what a user with one rank would write.
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
    return grad.index_select(0, inverse(slots)).unflatten(0, (-1, top_k)).sum(1)


def merge_gather(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Gather by token, multiply, sum over choices."""
    by_token = rows.index_select(0, inverse(slots)).unflatten(0, weights.shape)
    return (by_token * weights.unsqueeze(-1).to(rows.dtype)).sum(1)


def merge_bmm(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Gather by token, then one small product a token."""
    by_token = rows.index_select(0, inverse(slots)).unflatten(0, weights.shape)
    return torch.bmm(weights.unsqueeze(1).to(rows.dtype), by_token).squeeze(1)


def merge_index_add(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Multiply in row order, add into the tokens."""
    weighted = rows * weights.flatten()[slots].unsqueeze(-1).to(rows.dtype)
    out = rows.new_zeros(weights.size(0), rows.size(1))
    return out.index_add_(0, slots // weights.size(1), weighted)


def loop_of_mm(rows: Tensor, offsets: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """One product an expert; weights are unbound once, so gradients are not rebuilt per expert."""
    bounds = offsets.tolist()
    parts = rows.split([high - low for low, high in zip(bounds, bounds[1:], strict=False)])
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


def _forward_baselines(operator: str, work: Workload) -> dict[str, Callable[..., Any]]:
    """Compositions of what `operator` computes, best known last."""
    whole = work.local == work.model.experts
    if operator == "route":
        if work.model.score == "sigmoid":
            return {"sigmoid, groups, topk": sigmoid_groups}
        return {"softmax, topk, normalise": softmax_topk, "topk, softmax": topk_softmax}
    if operator in ("router_losses", "router_losses_forward"):
        return {"softmax, logsumexp, bincount": losses}
    if operator == "expert_index":
        return {"sort, bincount, cumsum": sort_index_unmasked if whole else sort_index}
    if operator == "slice_rows":
        if whole:
            return {"index_select": select_rows}
        return {"index_select, mask": select_rows_masked, "index_select, pad": select_rows_prefix}
    if operator == "merge_rows":
        return {
            "gather, mul, sum": merge_gather,
            "mul, index_add": merge_index_add,
            "gather, bmm": merge_bmm,
        }
    if operator == "grouped_linear":
        return {"loop of mm": loop_of_mm, "grouped_mm": grouped_mm}
    raise ValueError(f"bench: no baselines for '{operator}'")


_WRT = {"route": (0,), "router_losses_forward": (0,), "slice_rows": (0,), "merge_rows": (0, 2),
        "grouped_linear": (0, 2)}  # fmt: skip
_GRADS = {"router_losses_forward": 2}


def problem(operator: str, work: Workload, device: torch.device) -> Problem:
    """Arguments and baselines of one operator, forward or backward."""
    args = build(operator, work, device)
    if not operator.endswith("_backward"):
        baselines = [
            Baseline(name, function, args)
            for name, function in _forward_baselines(operator, work).items()
        ]
        if operator == "grouped_linear":
            baselines.insert(0, Baseline("one dense GEMM", dense, args, same_result=False))
        return Problem(args, tuple(baselines))

    forward = operator.removesuffix("_backward")
    forward = forward if forward in _WRT else f"{forward}_forward"
    inputs, wrt = build(forward, work, device), _WRT[forward]
    grads = tuple(args[: _GRADS.get(forward, 1)])
    baselines = [
        Baseline(f"autograd of {name}", function, inputs, wrt, grads)
        for name, function in _forward_baselines(forward, work).items()
    ]
    if operator == "slice_rows_backward":
        baselines.append(Baseline("gather, sum", gather_sum, args))
    if operator == "grouped_linear_backward":
        baselines.insert(0, Baseline("two dense GEMMs", dense_backward, args, same_result=False))
    fair = Baseline(AUTOGRAD, OPERATORS[forward].overload, inputs, wrt, grads)
    return Problem(args, tuple(baselines), fair)


def call_cost(operator: str, device: torch.device) -> Problem:
    """One token through small widths, beside the cheapest call that PyTorch has."""
    args = build(operator, Workload(TINY, 1), device)
    x = torch.ones(1, device=device)
    return Problem(args, (Baseline("x.mul(1)", x.mul, (1,), same_result=False),))


def case(operator: str, work: Workload, *, quick: bool = True, headline: str = "") -> Case:
    """One case, labelled by what matters to the operator."""
    name = str(work.dtype).removeprefix("torch.")
    return Case(
        operator=operator,
        label=_label(operator, work),
        dtype="int32" if operator == "expert_index" else name,
        build=partial(problem, operator, work),
        scaled=work.scaled,
        quick=quick,
        headline=headline,
    )


def _label(operator: str, work: Workload) -> str:
    model = work.model
    parts = [model.name, f"T={work.tokens}"]
    if operator.startswith("grouped_linear"):
        parts += [f"L={work.local}", work.projection]
    elif operator.startswith(("slice_rows", "merge_rows")):
        parts += [f"H={model.hidden}", f"K={model.top_k}"]
    else:
        parts += [f"E={model.experts}", f"K={model.top_k}"]
    if work.routing != "balanced":
        parts.append(work.routing)
    return " ".join(parts)


def _quick() -> Iterator[Case]:
    qwen, olmoe, mixtral = Workload(QWEN3_30B, 8192), Workload(OLMOE, 8192), Workload(MIXTRAL, 8192)
    deepseek = Workload(DEEPSEEK_V3, 8192)
    half = partial(dataclasses.replace, dtype=BFLOAT16)
    yield case("route", qwen, headline="softmax router")
    yield case("route", half(olmoe))
    yield case("route", mixtral)
    yield case("route", deepseek, headline="group-limited sigmoid router")
    yield case("route_backward", qwen)
    yield case("route_backward", deepseek)
    yield case("router_losses", qwen, headline="router losses")
    yield case("router_losses_forward", half(olmoe))
    yield case("router_losses_backward", qwen)
    eighth = dataclasses.replace(qwen, first_expert=16, local_experts=16, routing="zipf")
    yield case("expert_index", qwen, headline="expert index")
    yield case("expert_index", eighth)
    yield case("expert_index", dataclasses.replace(mixtral, routing="one_expert"))

    # T*K rows of H in this dtype are 64 MB.
    rows = Workload(QWEN3_30B, 1024)
    rows_half = Workload(QWEN3_30B, 2048, BFLOAT16)
    wide = Workload(MIXTRAL, 2048)
    rank = dataclasses.replace(rows, first_expert=16, local_experts=16)
    yield case("slice_rows", rows, headline="slice rows, 64 MB")
    yield case("slice_rows", rows_half)
    yield case("slice_rows", rank)
    yield case("slice_rows_backward", rows)
    yield case("slice_rows_backward", rows_half)
    yield case("merge_rows", rows, headline="merge rows, 64 MB")
    yield case("merge_rows", rows_half)
    yield case("merge_rows", wide)
    yield case("merge_rows_backward", rows)
    yield case("merge_rows_backward", rows_half)

    # 256 rows an expert: T = 256 E / K, and as many experts as one rank of several would hold.
    up = Workload(QWEN3_30B, 4096, local_experts=16)
    down = Workload(OLMOE, 2048, local_experts=16, projection="down")
    one = Workload(MIXTRAL, 1024, local_experts=1, projection="down")
    uneven = dataclasses.replace(up, routing="zipf")
    yield case("grouped_linear", up, headline="grouped linear, float32")
    yield case("grouped_linear", half(up), headline="grouped linear, bfloat16")
    yield case("grouped_linear", half(uneven))
    yield case("grouped_linear", down)
    yield case("grouped_linear", half(one))
    yield case("grouped_linear_backward", down)
    yield case("grouped_linear_backward", half(up))

    for name in ppmoe_ops.ops.expert_slice.__all__:
        yield Case(
            operator=name,
            label=f"T=1 E={TINY.experts} K={TINY.top_k} H={TINY.hidden}",
            dtype="float32",
            build=partial(call_cost, name),
            function=getattr(ppmoe_ops, name),
        )


def _full() -> Iterator[Case]:
    dtypes = (FLOAT32, BFLOAT16, FLOAT16)
    for model in MODELS:
        for dtype in dtypes:
            for tokens in (1, 16, 256, 2048, 8192, 32768):
                work = Workload(model, tokens, dtype)
                yield case("route", work, quick=False)
                yield case("route_backward", work, quick=False)
                yield case("router_losses", work, quick=False)
                yield case("router_losses_backward", work, quick=False)
            for tokens in (16, 256, 1024):
                for name in ("slice_rows", "slice_rows_backward", "merge_rows",
                             "merge_rows_backward"):  # fmt: skip
                    yield case(name, Workload(model, tokens, dtype), quick=False)
            for projection in ("up", "down"):
                for rows in (16, 256):
                    work = Workload(
                        model,
                        rows * model.experts // model.top_k,
                        dtype,
                        local_experts=max(1, model.experts // 8),
                        projection=projection,
                    )
                    yield case("grouped_linear", work, quick=False)
                    yield case("grouped_linear_backward", work, quick=False)
        for routing in ROUTINGS:
            for tokens in (16, 1024, 8192, 32768):
                for local in (model.experts, max(1, model.experts // 8)):
                    work = Workload(model, tokens, routing=routing, local_experts=local)
                    yield case("expert_index", work, quick=False)


def cases() -> list[Case]:
    """Quick cases, then the rest; a case of both is listed once."""
    found: dict[str, Case] = {}
    for each in (*_quick(), *_full()):
        found.setdefault(each.key, each)
    return list(found.values())


def test_expert_slice(benchmark: Any, bench_call: Callable[[], Any]) -> None:
    """One absolute row of pytest-benchmark; `conftest.py` makes the cases."""
    benchmark(bench_call)
