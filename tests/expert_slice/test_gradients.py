"""First derivatives by finite differences on the compiled kernels, and no second ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from slicing import call, distinct_ids
from torch import Tensor
from torch.autograd import gradcheck

from ppmoe_ops._library import OPERATORS

pytestmark = pytest.mark.kernel

ROUTES: dict[str, tuple[Any, ...]] = {
    "softmax": (3,),
    "softmax_raw": (3, "softmax", False, None, 1, 1, 0.5),
    "softmax_bias": (2, "softmax", True, "bias", 1, 1, 2.5),
    "softmax_groups": (2, "softmax", False, None, 2, 1),
    "sigmoid": (3, "sigmoid", True, None, 1, 1, 1.5),
    "sigmoid_raw": (3, "sigmoid", False, None, 1, 1, -2.0),
    "sigmoid_bias_groups": (3, "sigmoid", True, "bias", 4, 2),
    "all_experts": (8, "softmax", True),
    "one_expert": (1, "softmax", False),
}


def spaced_logits(tokens: int, experts: int) -> Tensor:
    """Logits so far apart that a finite difference changes no choice."""
    return (torch.rand(tokens, experts).argsort(-1) * 0.4 - 1.3).double().requires_grad_()


@pytest.mark.parametrize("choice", ROUTES)
def test_route(choice: str) -> None:
    bias = (torch.rand(8).argsort() * 0.3).double()
    options = [bias if each == "bias" else each for each in ROUTES[choice]]
    logits = spaced_logits(4, 8)
    assert gradcheck(lambda x: call("route", (x, *options))[0], (logits,))


@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_router_losses(top_k: int) -> None:
    ids = torch.randint(-1, 20, (5, top_k))
    assert gradcheck(
        lambda x: call("router_losses", (x, ids)), (torch.randn(5, 19).double().requires_grad_(),)
    )


def local_slots(tokens: int, top_k: int, experts: int, local: int) -> Tensor:
    slots: Tensor = call("expert_index", (distinct_ids(tokens, top_k, experts), 0, local))[0]
    return slots


@pytest.mark.parametrize("local", [0, 3, 6])
def test_slice_rows(local: int) -> None:
    slots = local_slots(5, 2, 6, local)
    x = torch.randn(5, 11).double().requires_grad_()
    assert gradcheck(lambda x: call("slice_rows", (x, slots, 2)), (x,))


@pytest.mark.parametrize("local", [0, 3, 6])
def test_merge_rows(local: int) -> None:
    slots = local_slots(4, 2, 6, local)
    rows = torch.randn(8, 9).double().requires_grad_()
    weights = torch.randn(4, 2).double().requires_grad_()
    assert gradcheck(
        lambda rows, weights: call("merge_rows", (rows, slots, weights)), (rows, weights)
    )


@pytest.mark.parametrize("bounds", [[0, 2, 2, 6], [1, 4], [0, 0], [2]])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_linear(bounds: list[int], bias: bool) -> None:
    offsets = torch.tensor(bounds, dtype=torch.int32)
    local = len(bounds) - 1
    args = [torch.randn(7, 5).double(), torch.randn(local, 3, 5).double()]
    if bias:
        args.append(torch.randn(local, 3).double())
    for each in args:
        each.requires_grad_()

    def function(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return call("grouped_linear", (rows, offsets, weight, bias))

    assert gradcheck(function, tuple(args))


def double(*shape: int) -> Tensor:
    return torch.randn(*shape).double().requires_grad_()


def feed_forward() -> tuple[Any, ...]:
    slots, offsets = call("expert_index", (distinct_ids(4, 2, 6), 0, 4))
    parameters = (double(4, 6, 5), double(4, 6), double(4, 5, 3), double(4, 5))
    return (double(4, 5), slots, offsets, double(4, 2), *parameters, "swiglu")


def differentiable() -> dict[str, Callable[[], Any]]:
    """Every differentiable operator, called so that its gradient depends on its inputs."""
    slots = local_slots(4, 2, 6, 4)
    ids = torch.randint(0, 8, (4, 2))
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    return {
        "route": lambda: call("route", (double(4, 8), 2))[0],
        "router_losses": lambda: call("router_losses", (double(4, 8), ids))[0],
        "router_losses_forward": lambda: call("router_losses_forward", (double(4, 8), ids))[1],
        "slice_rows": lambda: call("slice_rows", (double(4, 5), slots, 2)).square(),
        "merge_rows": lambda: call("merge_rows", (double(8, 5), slots, double(4, 2))),
        "grouped_linear": lambda: call("grouped_linear", (double(8, 5), offsets, double(2, 3, 5))),
        "expert_ffn": lambda: call("expert_ffn", feed_forward()),
        "expert_ffn_forward": lambda: call("expert_ffn_forward", (*feed_forward(), True))[0],
    }


def test_every_differentiable_operator_is_here() -> None:
    expected = {
        op.name
        for op in OPERATORS.values()
        if op.family == "expert_slice" and (op.backward is not None or op.saved_bytes is not None)
    }
    assert set(differentiable()) == expected


@pytest.mark.parametrize("name", sorted(differentiable()))
def test_the_second_derivative_raises_in_the_contracts_words(name: str) -> None:
    out = differentiable()[name]()
    leaves = [each for each in leaves_of(out.grad_fn) if each.requires_grad]
    first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    base = name.removesuffix("_forward")
    backward = OPERATORS[f"{base}_backward"]
    assert backward.no_derivative == f"{base} has no second derivative; allowed: first derivatives"
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad([each.sum() for each in first], leaves)
    assert str(error.value) == f"{base}_backward: {backward.no_derivative}"


def leaves_of(node: Any) -> list[Tensor]:
    """Leaf tensors below an autograd node."""
    if node is None:
        return []
    if hasattr(node, "variable"):
        return [node.variable]
    return [leaf for child, _ in node.next_functions for leaf in leaves_of(child)]


def test_integer_results_have_no_gradient() -> None:
    logits = double(4, 8)
    assert not call("route", (logits, 2))[1].requires_grad
    _, _, shares, lse = call("router_losses_forward", (logits, torch.zeros(4, 1).long()))
    assert not shares.requires_grad
    assert not lse.requires_grad


def test_what_is_saved_has_no_gradient() -> None:
    out, pre = call("expert_ffn_forward", (*feed_forward(), True))
    assert out.requires_grad
    assert not pre.requires_grad
