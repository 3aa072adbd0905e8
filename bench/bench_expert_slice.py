"""Cases of expert slicing, and the plain-PyTorch compositions that they are measured against.

Also a pytest-benchmark file: `pytest bench --benchmark-only` gives absolute times and JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import ppmoe_ops
from ppmoe_ops._library import OPERATORS

from . import expert_ffn_cases as ffn
from . import plain_expert_slice as plain
from .harness import AUTOGRAD, Baseline, Case, Problem
from .inputs import (
    DEEPSEEK_V3,
    FINE_GRAINED,
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


def _forward_baselines(operator: str, work: Workload) -> dict[str, Callable[..., Any]]:
    """Compositions of what `operator` computes."""
    whole = work.local == work.model.experts
    if operator == "route":
        if work.model.score == "sigmoid":
            return {"sigmoid, groups, topk": plain.sigmoid_groups}
        return {"softmax, topk, normalise": plain.softmax_topk, "topk, softmax": plain.topk_softmax}
    if operator in ("router_losses", "router_losses_forward"):
        return {"softmax, logsumexp, bincount": plain.losses}
    if operator == "expert_index":
        return {"sort, bincount, cumsum": plain.sort_index_unmasked if whole else plain.sort_index}
    if operator == "slice_rows":
        if whole:
            return {"index_select": plain.select_rows}
        return {
            "index_select, mask": plain.select_rows_masked,
            "index_select, pad": plain.select_rows_prefix,
        }
    if operator == "merge_rows":
        return {
            "gather, mul, sum": plain.merge_gather,
            "mul, index_add": plain.merge_index_add,
            "gather, bmm": plain.merge_bmm,
        }
    if operator == "grouped_linear":
        return {"loop of mm": plain.loop_of_mm, "grouped_mm": plain.grouped_mm}
    raise ValueError(f"bench: no baselines for '{operator}'")


_WRT = {"route": (0,), "router_losses_forward": (0,), "slice_rows": (0,), "merge_rows": (0, 2),
        "grouped_linear": (0, 2)}  # fmt: skip
_GRADS = {"router_losses_forward": 2}
_DENSE: dict[str, Any] = {"same_result": False, "dense": True}


def problem(operator: str, work: Workload, device: torch.device) -> Problem:
    """Arguments and baselines of one operator, forward or backward."""
    if operator in ("expert_ffn", "expert_ffn_forward", "expert_ffn_backward"):
        return ffn.problem(operator, work, device)
    args = build(operator, work, device)
    if not operator.endswith("_backward"):
        baselines = [
            Baseline(name, function, args)
            for name, function in _forward_baselines(operator, work).items()
        ]
        if operator == "grouped_linear":
            baselines.insert(0, Baseline("one dense GEMM", plain.dense, args, **_DENSE))
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
        baselines.append(Baseline("gather, sum", plain.gather_sum, args))
    if operator == "grouped_linear_backward":
        baselines.insert(0, Baseline("two dense GEMMs", plain.dense_backward, args, **_DENSE))
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
    yield case("expert_index", dataclasses.replace(qwen, routing="uniform"))
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

    step = Workload(FINE_GRAINED, 1024, BFLOAT16)
    yield from ffn.quick_cases()
    yield case("expert_ffn_forward", step)
    yield case("expert_ffn_backward", step)

    for name in (each for each in ppmoe_ops.ops.expert_slice.__all__ if each in OPERATORS):
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
    yield from ffn.full_cases()
    for dtype in dtypes:
        for ranks in (1, 4):
            work = Workload(FINE_GRAINED, 1024, dtype, local_experts=FINE_GRAINED.experts // ranks)
            yield case("expert_ffn_forward", work, quick=False)
            yield case("expert_ffn_backward", work, quick=False)


def cases() -> list[Case]:
    """Quick cases, then the rest; a case of both is listed once."""
    found: dict[str, Case] = {}
    for each in (*_quick(), *_full()):
        found.setdefault(each.key, each)
    return list(found.values())


def test_expert_slice(benchmark: Any, bench_call: Callable[[], Any]) -> None:
    """One absolute row of pytest-benchmark; `conftest.py` makes the cases."""
    benchmark(bench_call)
