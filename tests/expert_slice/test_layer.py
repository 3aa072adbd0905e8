"""The operators together: an expert layer, whole and cut over ranks, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from slicing import DTYPES, call, dtype_name
from torch import Tensor
from torch.nn.functional import gelu

from ppmoe_ops import moe_ffn
from ppmoe_ops.testing import assert_error_rule, cast_sample

Layer = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
TOP_K = 3


def problem(dtype: torch.dtype, tokens: int = 37, experts: int = 8) -> Layer:
    """x, router logits, and the weights of all experts."""
    hidden, width = 40, 52

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(dtype).requires_grad_()

    return (
        tensor(tokens, hidden),
        tensor(tokens, experts),
        tensor(experts, width, hidden, scale=hidden**-0.5),
        tensor(experts, width),
        tensor(experts, hidden, width, scale=width**-0.5),
        tensor(experts, hidden),
    )


def rank(layer: Layer, first: int, local: int) -> Tensor:
    """What one rank, with `local` experts from `first` on, adds to the layer's output."""
    x, logits, *parameters = layer
    w_in, b_in, w_out, b_out = (each[first : first + local] for each in parameters)
    weights, experts = call("route", (logits, TOP_K))
    slots, offsets = call("expert_index", (experts, first, local))
    rows = call("slice_rows", (x, slots, TOP_K))
    hidden = gelu(call("grouped_linear", (rows, offsets, w_in, b_in)))
    rows = call("grouped_linear", (hidden, offsets, w_out, b_out))
    out: Tensor = call("merge_rows", (rows, slots, weights))
    return out


def cut(layer: Layer, ranks: int) -> Tensor:
    """The layer over `ranks` ranks, their results added up."""
    local = layer[1].size(1) // ranks
    return torch.stack([rank(layer, r * local, local) for r in range(ranks)]).sum(0)


def dense(
    x: Tensor, logits: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor
) -> Tensor:
    """The layer one token and one choice at a time."""
    values = logits if logits.dtype == torch.float64 else logits.float()
    ids = values.sort(dim=-1, descending=True, stable=True).indices[:, :TOP_K]
    weights = values.gather(1, ids).softmax(-1)
    tokens = []
    for t, row in enumerate(x):
        total = x.new_zeros(x.size(1)).to(weights.dtype)
        for k, e in enumerate(ids[t].tolist()):
            hidden = gelu(w_in[e] @ row + b_in[e])
            total = total + weights[t, k] * (w_out[e] @ hidden + b_out[e])
        tokens.append(total.to(x.dtype))
    return torch.stack(tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_a_loop_over_tokens(ranks: int, dtype: torch.dtype) -> None:
    layer = problem(dtype)
    assert_error_rule(cut(layer, ranks), dense(*layer), dense(*cast_sample(layer, torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_equal_those_of_the_loop(ranks: int, dtype: torch.dtype) -> None:
    layer = problem(dtype, tokens=19)
    wide = cast_sample(layer, torch.float64)
    upstream = torch.randn(layer[0].shape)
    actual = torch.autograd.grad(cut(layer, ranks), layer, upstream.to(dtype))
    plain = torch.autograd.grad(dense(*layer), layer, upstream.to(dtype))
    exact = torch.autograd.grad(dense(*wide), wide, upstream.double())
    for name, *three in zip(
        ("x", "logits", "w_in", "b_in", "w_out", "b_out"), actual, plain, exact, strict=True
    ):
        assert_error_rule(*three, factor=3.0, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_add_up_to_the_whole(ranks: int, dtype: torch.dtype) -> None:
    layer = problem(dtype)
    whole, parts = cut(layer, 1), cut(layer, ranks)
    exact = dense(*cast_sample(layer, torch.float64))
    # Each rank rounds its own sum to the dtype before they are added.
    allowed = 2 * ranks * torch.finfo(dtype).eps * exact.abs().max().item()
    assert (whole.double() - parts.double()).abs().max().item() <= allowed


def test_one_rank_is_the_same_as_all_experts_in_one_call() -> None:
    layer = problem(torch.float32)
    assert torch.equal(cut(layer, 1), rank(layer, 0, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("first", "local"), [(0, 8), (2, 3)])
def test_the_layer_in_one_call(first: int, local: int, dtype: torch.dtype) -> None:
    layer = problem(dtype)
    x, logits, *parameters = layer
    mine = [each[first : first + local] for each in parameters]
    fused = moe_ffn(x, logits, *mine, top_k=TOP_K, activation="gelu", first_expert=first)
    parts = rank(layer, first, local)
    wide = cast_sample(layer, torch.float64)
    exact = rank(wide, first, local)
    assert_error_rule(fused, parts, exact)
    upstream = torch.randn(x.shape)
    grads = [
        torch.autograd.grad(out, leaves, upstream.to(out.dtype))
        for out, leaves in ((fused, layer), (parts, layer), (exact, wide))
    ]
    for name, *three in zip(("x", "logits", "w_in", "b_in", "w_out", "b_out"), *grads, strict=True):
        assert_error_rule(*three, factor=3.0, name=name)


def test_a_rank_without_tokens_adds_exact_zeros() -> None:
    x, logits, *parameters = problem(torch.float32)
    logits = logits.detach().clone()
    logits[:, 4:] = -100.0
    w_in, b_in, w_out, b_out = parameters
    out = rank((x, logits, w_in, b_in, w_out, b_out), 4, 4)
    assert torch.equal(out, torch.zeros_like(x))


def test_the_papers_figure_4_over_two_ranks() -> None:
    # Eight tokens, one choice each, two ranks of two experts: slots 4, 7, 2 and 0, 3, 6, 1, 5.
    order = torch.tensor([2, 3, 1, 2, 0, 3, 2, 0]).view(8, 1)
    x = torch.arange(8.0).view(8, 1)
    scale = torch.tensor([10.0, 100.0, 1000.0, 10000.0]).view(4, 1, 1)
    total = torch.zeros(8, 1)
    for first, expected in ((0, [4, 7, 2]), (2, [0, 3, 6, 1, 5])):
        slots, offsets = call("expert_index", (order, first, 2))
        rows = call("slice_rows", (x, slots, 1))
        assert rows.flatten().tolist() == [*map(float, expected), *[0.0] * (8 - len(expected))]
        rows = call("grouped_linear", (rows, offsets, scale[first : first + 2]))
        total += call("merge_rows", (rows, slots, torch.ones(8, 1)))
    wanted = [t * 10.0 ** (e + 1) for t, e in enumerate(order.flatten().tolist())]
    assert total.flatten().tolist() == wanted
