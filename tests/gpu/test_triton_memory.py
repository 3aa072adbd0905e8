"""The index and memory-bound Triton kernels on a GPU, also where CUDA C++ serves the operators."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import assert_error_rule, cast_sample

pytest.importorskip("triton")

CUDA = torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = (
    "expert_index",
    "slice_rows",
    "slice_rows_backward",
    "merge_rows",
    "merge_rows_backward",
    "route",
    "route_backward",
    "router_losses_forward",
    "router_losses_backward",
)


def call(name: str, *args: Any, **options: Any) -> Any:
    module, function = str(OPERATORS[name].triton).split(":")
    return getattr(importlib.import_module(module), function)(*args, **options)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def check(name: str, *args: Any, **options: Any) -> None:
    """A launcher against the reference on the same device: integers exactly, others by the rule."""
    args = tuple(each.detach() if isinstance(each, Tensor) else each for each in args)
    got = outputs(call(name, *args, **options))
    plain = outputs(OPERATORS[name].reference(*args, **options))
    wide = cast_sample((args, options), torch.float64)
    exact = outputs(OPERATORS[name].reference(*wide[0], **wide[1]))
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        assert ours.device.type == "cuda"
        if not ours.is_floating_point():
            assert torch.equal(ours, theirs), name
            continue
        factor = 8.0 if ours.dim() == 0 else 3.0 if name.endswith("_backward") else 2.0
        assert_error_rule(ours, theirs, truth, factor, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_parity_on_the_samples(name: str, dtype: torch.dtype) -> None:
    for args, options in OPERATORS[name].samples(CUDA, dtype):
        check(name, *args, **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "first", "local"),
    [
        (16, 8, 128, 0, 128),
        (128, 8, 128, 0, 128),
        (513, 8, 128, 32, 32),
        (8192, 8, 128, 0, 128),
        (4000, 3, 2000, 100, 1500),
        (4000, 3, 4000, 100, 3500),
        (150_000, 8, 64, 0, 64),
    ],
)
def test_expert_index(
    dtype: torch.dtype, tokens: int, top_k: int, experts: int, first: int, local: int
) -> None:
    ids = torch.randint(-1, experts, (tokens, top_k), device=CUDA, dtype=dtype)
    check("expert_index", ids, first, local)
    check("expert_index", torch.full_like(ids, first), first, local)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(16, 4096), (300, 7), (300, 2056), (5000, 64)])
def test_rows(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    ids = torch.rand(tokens, 24, device=CUDA).argsort(-1)[:, :6]
    slots, _ = call("expert_index", ids, 3, 12)
    x = torch.randn(tokens, hidden, device=CUDA).to(dtype)
    rows = torch.randn(tokens * 6, hidden, device=CUDA).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(tokens, 6, device=CUDA, dtype=wide)
    check("slice_rows", x, slots, 6)
    rows[slots < 0] = torch.nan
    check("slice_rows_backward", rows, slots, 6)
    check("merge_rows", rows, slots, weights)
    check("merge_rows_backward", x, rows, slots, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(16, 128, 8), (8192, 128, 8), (8192, 8, 2), (64, 5000, 9)]
)
def test_routing(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    logits = torch.randn(tokens, experts, device=CUDA).to(dtype)
    check("route", logits, top_k)
    weights, ids = call("route", logits, top_k)
    grad = torch.randn_like(weights)
    for score, renormalize in (("softmax", True), ("softmax", False), ("sigmoid", True)):
        args = (grad, weights, ids, logits, experts, dtype, score, renormalize, 1.0)
        check("route_backward", *args)
    check("router_losses_forward", logits, ids)
    _, z, shares, lse = call("router_losses_forward", logits, ids)
    check("router_losses_backward", z, z, logits, shares, lse)


def layer(logits: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Every launcher once, forward and backward."""
    weights, ids = call("route", logits, 4)
    slots, _ = call("expert_index", ids, 4, 8)
    rows = call("slice_rows", x, slots, 4)
    out = call("merge_rows", rows, slots, weights)
    balance, z, shares, lse = call("router_losses_forward", logits, ids)
    grad_rows, grad_weights = call("merge_rows_backward", out, rows, slots, weights)
    kept = (None, 16, logits.dtype, "softmax", True, 1.0)
    return (
        out,
        call("slice_rows_backward", grad_rows, slots, 4),
        call("route_backward", grad_weights, weights, ids, *kept),
        call("router_losses_backward", balance, z, logits, shares, lse),
    )


@pytest.mark.parametrize("tokens", [16, 4096])
def test_graph_capture_replay_and_the_same_bits(tokens: int) -> None:
    def inputs() -> tuple[Tensor, Tensor]:
        logits = torch.randn(tokens, 16, device=CUDA)
        return logits, torch.randn(tokens, 96, device=CUDA, dtype=torch.bfloat16)

    args = inputs()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer(*args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(*args)
    for _ in range(3):
        fresh = inputs()
        for static, new in zip(args, fresh, strict=True):
            static.copy_(new)
        graph.replay()
        for one, other in zip(captured, layer(*fresh), strict=True):
            assert torch.equal(one, other)
