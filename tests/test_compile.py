"""Operators inside torch.compile: one graph, one compilation for many sizes, eager's results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import gelu

import ppmoe_ops

TOKENS = (7, 12, 33, 5)
HIDDEN, WIDTH, EXPERTS, TOP_K = 16, 24, 8, 2


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, and an error instead of compiling the same code again."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def ids(tokens: int) -> Tensor:
    return torch.rand(tokens, EXPERTS).argsort(-1)[:, :TOP_K]


def slots_and_offsets(tokens: int) -> tuple[Tensor, Tensor]:
    slots, offsets = ppmoe_ops.expert_index(ids(tokens), 1, 5)
    return slots, offsets


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def ffn_arguments(tokens: int, activation: str, experts: int = 5) -> tuple[Any, ...]:
    slots, offsets = ppmoe_ops.expert_index(ids(tokens), 1, experts)
    inner = 2 * WIDTH if activation == "swiglu" else WIDTH
    parameters = (
        leaf(experts, inner, HIDDEN), leaf(experts, inner), leaf(experts, HIDDEN, WIDTH),
        leaf(experts, HIDDEN),
    )  # fmt: skip
    return leaf(tokens, HIDDEN), slots, offsets, leaf(tokens, TOP_K), *parameters, activation


# Arguments for a number of tokens; those that ask for a gradient get one.
CALLS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Any, ...]]]] = {
    "route": (ppmoe_ops.route, lambda t: (leaf(t, EXPERTS), TOP_K)),
    "route_raw": (
        lambda x, k: ppmoe_ops.route(x, k, "softmax", False, None, 4, 2, 2.5),
        lambda t: (leaf(t, EXPERTS), TOP_K),
    ),
    "route_sigmoid": (
        lambda x, b: ppmoe_ops.route(x, 3, "sigmoid", True, b),
        lambda t: (leaf(t, EXPERTS), torch.randn(EXPERTS)),
    ),
    "router_losses": (ppmoe_ops.router_losses, lambda t: (leaf(t, EXPERTS), ids(t))),
    "expert_index": (ppmoe_ops.expert_index, lambda t: (ids(t), 2, 4)),
    "slice_rows": (
        ppmoe_ops.slice_rows,
        lambda t: (leaf(t, HIDDEN), slots_and_offsets(t)[0], TOP_K),
    ),
    "merge_rows": (
        ppmoe_ops.merge_rows,
        lambda t: (leaf(t * TOP_K, HIDDEN), slots_and_offsets(t)[0], leaf(t, TOP_K)),
    ),
    "grouped_linear": (
        ppmoe_ops.grouped_linear,
        lambda t: (
            leaf(t * TOP_K, HIDDEN),
            slots_and_offsets(t)[1],
            leaf(5, WIDTH, HIDDEN),
            leaf(5, WIDTH),
        ),
    ),
    "expert_ffn": (ppmoe_ops.expert_ffn, lambda t: ffn_arguments(t, "gelu")),
    "expert_ffn_gated": (ppmoe_ops.expert_ffn, lambda t: ffn_arguments(t, "swiglu")),
    "expert_ffn_frozen": (
        ppmoe_ops.expert_ffn,
        lambda t: tuple(
            each.detach() if isinstance(each, Tensor) and at not in (0, 4) else each
            for at, each in enumerate(ffn_arguments(t, "relu"))
        ),
    ),
    "expert_ffn_without_gradients": (
        ppmoe_ops.expert_ffn,
        lambda t: tuple(
            each.detach() if isinstance(each, Tensor) else each for each in ffn_arguments(t, "silu")
        ),
    ),
}


def outputs_and_gradients(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    out = function(*args)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    leaves = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
    if not leaves:
        return outputs
    loss = sum((each.square().sum() for each in outputs if each.requires_grad), torch.zeros(()))
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def assert_same(came: list[Tensor], wanted: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(came, wanted, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("name", CALLS)
def test_one_compilation_serves_every_number_of_tokens(name: str) -> None:
    function, arguments = CALLS[name]
    check_compiled(function, arguments, "aot_eager")


def check_compiled(
    function: Callable[..., Any],
    arguments: Callable[[int], tuple[Any, ...]],
    backend: str,
    **tolerance: float,
) -> None:
    """Compile at the first number of tokens; the others must give eager's results by that code."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for tokens in TOKENS:
        args = arguments(tokens)
        wanted = outputs_and_gradients(function, args)
        assert_same(outputs_and_gradients(compiled, args), wanted, **tolerance)
        graphs.append(counter.frame_count)
    # The first number may be 2: a float argument makes Dynamo start the same frame over once.
    assert graphs == graphs[:1] * len(TOKENS)


@pytest.mark.parametrize("name", ["route", "slice_rows"])
def test_one_compilation_serves_every_number_of_choices(name: str) -> None:
    counter = CompileCounterWithBackend("eager")
    function = CALLS[name][0]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for top_k in (2, 3, 5):
        if name == "route":
            args: tuple[Any, ...] = (torch.randn(6, EXPERTS), top_k)
        else:
            slots = torch.arange(6 * top_k).int()
            args = (torch.randn(6, HIDDEN), slots, top_k)
        assert_same(outputs_and_gradients(compiled, args), outputs_and_gradients(function, args))
    assert counter.frame_count == 1


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_one_compilation_serves_every_number_of_experts(activation: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = ppmoe_ops.expert_ffn
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for tokens, experts in ((7, 4), (12, 6), (5, 3), (9, 7)):
        args = ffn_arguments(tokens, activation, experts)
        assert_same(outputs_and_gradients(compiled, args), outputs_and_gradients(function, args))
    assert counter.frame_count == 1


def fused_layer(x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    return ppmoe_ops.moe_ffn(
        x, x @ router, w_in, None, w_out, None, top_k=TOP_K, activation="geglu"
    )


def fused_arguments(tokens: int) -> tuple[Tensor, ...]:
    return (
        leaf(tokens, HIDDEN),
        leaf(HIDDEN, EXPERTS),
        leaf(EXPERTS, 2 * WIDTH, HIDDEN),
        leaf(EXPERTS, HIDDEN, WIDTH),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fused_layer_in_one_graph_with_dynamic_tokens(backend: str) -> None:
    check_compiled(fused_layer, fused_arguments, backend, rtol=1e-4, atol=1e-3)


def expert_layer(
    x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logits = x @ router
    weights, experts = ppmoe_ops.route(logits, TOP_K)
    balance, z = ppmoe_ops.router_losses(logits, experts)
    slots, offsets = ppmoe_ops.expert_index(experts, 0, EXPERTS)
    rows = ppmoe_ops.slice_rows(x, slots, TOP_K)
    rows = gelu(ppmoe_ops.grouped_linear(rows, offsets, w_in))
    rows = ppmoe_ops.grouped_linear(rows, offsets, w_out)
    return ppmoe_ops.merge_rows(rows, slots, weights), balance, z


def layer_arguments(tokens: int) -> tuple[Tensor, ...]:
    return (
        leaf(tokens, HIDDEN),
        leaf(HIDDEN, EXPERTS),
        leaf(EXPERTS, WIDTH, HIDDEN),
        leaf(EXPERTS, HIDDEN, WIDTH),
    )


def test_whole_layer_in_one_graph_with_dynamic_tokens() -> None:
    check_compiled(expert_layer, layer_arguments, "aot_eager")


def test_whole_layer_through_inductor() -> None:
    # Inductor's own GELU and products round in another way.
    check_compiled(expert_layer, layer_arguments, "inductor", rtol=1e-4, atol=1e-3)


def test_errors_are_found_while_tracing() -> None:
    compiled = torch.compile(ppmoe_ops.route, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="route: top_k is 9; allowed: 1 to 8"):
        compiled(torch.randn(3, EXPERTS), 9)


def test_autocast_inside_a_compiled_function() -> None:
    def function(rows: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ppmoe_ops.grouped_linear(rows, offsets, weight)

    args = (torch.randn(6, 8), torch.tensor([0, 6], dtype=torch.int32), torch.randn(1, 4, 8))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert compiled(*args).dtype == torch.bfloat16
    assert torch.equal(compiled(*args), function(*args))
