"""`moe_ffn`: three operators in one call, whole and cut over ranks, against a loop over tokens."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from ffn import ACTIVATIONS, BIASES, GATED, assert_same_bits
from slicing import (
    DTYPES,
    call,
    dtype_name,
    plain_activation,
    plain_expert_ffn,
    plain_weights,
    wide,
)
from torch import Tensor

import ppmoe_ops
from ppmoe_ops.testing import assert_error_rule, cast_sample

Layer = tuple[Any, ...]
HIDDEN, WIDTH, EXPERTS = 24, 30, 8


def layer_of(
    dtype: torch.dtype,
    tokens: int = 37,
    activation: str = "gelu",
    biases: tuple[bool, bool] = (True, True),
) -> Layer:
    """x, router logits and the parameters of all experts; all ask for a gradient."""

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(dtype).requires_grad_()

    inner = 2 * WIDTH if activation in GATED else WIDTH
    return (
        tensor(tokens, HIDDEN),
        tensor(tokens, EXPERTS),
        tensor(EXPERTS, inner, HIDDEN, scale=HIDDEN**-0.5),
        tensor(EXPERTS, inner, scale=0.5) if biases[0] else None,
        tensor(EXPERTS, HIDDEN, WIDTH, scale=WIDTH**-0.5),
        tensor(EXPERTS, HIDDEN, scale=0.5) if biases[1] else None,
    )


def leaves_of(layer: Layer) -> list[Tensor]:
    return [each for each in layer if each is not None]


def loop(
    layer: Layer, ids: Tensor, activation: str, score: str, renormalize: bool, scale: float
) -> Tensor:
    """One token and one choice at a time, with choices that have been made."""
    x, logits, w_in, b_in, w_out, b_out = layer
    weights = plain_weights(logits, ids, score, renormalize, scale).to(wide(x.dtype))
    tokens = []
    for t, row in enumerate(x):
        total = x.new_zeros(x.size(1)).to(weights.dtype)
        for k, e in enumerate(ids[t].tolist()):
            pre = w_in[e] @ row
            if b_in is not None:
                pre = pre + b_in[e]
            out = w_out[e] @ plain_activation(pre, activation)
            if b_out is not None:
                out = out + b_out[e]
            total = total + weights[t, k] * out
        tokens.append(total.to(x.dtype))
    return torch.stack(tokens)


CHOICES: dict[str, dict[str, Any]] = {
    "softmax": {"top_k": 2},
    "softmax_raw": {"top_k": 3, "renormalize": False},
    "one": {"top_k": 1, "renormalize": False},
    "sigmoid": {"top_k": 2, "score": "sigmoid", "scale": 2.5},
    "all": {"top_k": EXPERTS},
    "biased_groups": {
        "top_k": 2, "score": "sigmoid", "groups": 4, "top_groups": 2,
        "selection_bias": torch.linspace(-1, 1, EXPERTS),
    },
}  # fmt: skip


def route_options(options: dict[str, Any]) -> dict[str, Any]:
    return {"score": "softmax", "renormalize": True, "scale": 1.0, **options}


@pytest.mark.kernel
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_layer_and_its_gradients(dtype: torch.dtype, choice: str) -> None:
    turn = list(CHOICES).index(choice) + DTYPES.index(dtype)
    activation = ACTIVATIONS[turn % len(ACTIVATIONS)]
    layer = layer_of(dtype, activation=activation, biases=BIASES[turn % 4])
    full = route_options(CHOICES[choice])
    ids = call("route", (layer[1],), full)[1].long()
    options = (activation, full["score"], full["renormalize"], full["scale"])
    exact_layer = cast_sample(layer, torch.float64)
    results = [
        ppmoe_ops.moe_ffn(*layer, activation=activation, **CHOICES[choice]),
        loop(layer, ids, *options),
        loop(exact_layer, ids, *options),
    ]
    assert_error_rule(*results)
    upstream = torch.randn(layer[0].shape).bfloat16()
    grads = [
        torch.autograd.grad(out, leaves_of(each), upstream.to(out.dtype))
        for out, each in zip(results, (layer, layer, exact_layer), strict=True)
    ]
    for number, three in enumerate(zip(*grads, strict=True)):
        assert_error_rule(*three, factor=3.0, name=f"gradient {number}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_it_is_the_three_operators(dtype: torch.dtype) -> None:
    layer = layer_of(dtype, activation="swiglu")
    parameters = [each[2:7] for each in layer[2:]]
    out = ppmoe_ops.moe_ffn(
        layer[0], layer[1], *parameters, top_k=3, activation="swiglu", first_expert=2, scale=0.5
    )
    weights, experts = ppmoe_ops.route(layer[1], 3, "softmax", True, None, 1, 1, 0.5)
    slots, offsets = ppmoe_ops.expert_index(experts, 2, 5)
    wanted = ppmoe_ops.expert_ffn(layer[0], slots, offsets, weights, *parameters, "swiglu")
    assert_same_bits([out], [wanted])
    plain = plain_expert_ffn(layer[0], slots, offsets, weights, *parameters, "swiglu")
    assert plain.dtype == out.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_router_logits_may_have_another_dtype(dtype: torch.dtype) -> None:
    layer = layer_of(dtype)
    for other in DTYPES:
        logits = layer[1].detach().to(other).requires_grad_()
        out = ppmoe_ops.moe_ffn(layer[0], logits, *layer[2:], top_k=2)
        assert out.dtype == dtype
        (grad,) = torch.autograd.grad(out.sum(), logits)
        assert grad.dtype == other
        assert grad.abs().sum() > 0


def partial(layer: Layer, rank: int, ranks: int, top_k: int) -> Tensor:
    local = EXPERTS // ranks
    mine = [each[rank * local : (rank + 1) * local] for each in layer[2:]]
    return ppmoe_ops.moe_ffn(
        layer[0], layer[1], *mine, top_k=top_k, activation="geglu", first_expert=rank * local,
        renormalize=top_k > 1,
    )  # fmt: skip


@pytest.mark.kernel
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_ranks_add_up_bit_for_bit(dtype: torch.dtype, top_k: int) -> None:
    layer = layer_of(dtype, 200, "geglu")
    whole = partial(layer, 0, 1, top_k)
    upstream = torch.randn(whole.shape).to(dtype)
    expected = torch.autograd.grad(whole, layer, upstream)
    for ranks in (2, 4, 8):
        total = torch.zeros_like(whole)
        for rank in range(ranks):
            total = total + partial(layer, rank, ranks, top_k)
        assert torch.equal(total, whole), f"{ranks} ranks"
        for one, other in zip(torch.autograd.grad(total, layer, upstream), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_ranks_add_up_to_the_whole(dtype: torch.dtype, ranks: int) -> None:
    layer = layer_of(dtype, 61, "geglu")
    ids = call("route", (layer[1], 4))[1].long()
    exact = loop(cast_sample(layer, torch.float64), ids, "geglu", "softmax", True, 1.0)
    total = torch.stack([partial(layer, rank, ranks, 4) for rank in range(ranks)]).sum(0)
    allowed = 2 * ranks * torch.finfo(dtype).eps * exact.abs().max().item()
    assert (total.double() - exact).abs().max().item() <= allowed


def test_errors_name_the_operator_at_fault() -> None:
    layer = layer_of(torch.float32)
    with pytest.raises(ValueError, match="route: top_k is 9; allowed: 1 to 8"):
        ppmoe_ops.moe_ffn(*layer, top_k=9)
    with pytest.raises(ValueError, match="moe_ffn: first_expert is -1; allowed: 0 to 0"):
        ppmoe_ops.moe_ffn(*layer, top_k=2, first_expert=-1)
    with pytest.raises(ValueError, match="expert_ffn: activation is 'tanh'; allowed: gelu, "):
        ppmoe_ops.moe_ffn(*layer, top_k=2, activation="tanh")
    with pytest.raises(ValueError, match="expert_ffn: weights has T = 36; expected 37"):
        ppmoe_ops.moe_ffn(layer[0], layer[1][1:], *layer[2:], top_k=2)


def test_it_is_public_and_described() -> None:
    assert "moe_ffn" in ppmoe_ops.__all__
    doc = inspect.getdoc(ppmoe_ops.moe_ffn) or ""
    for section in ("Args:", "Returns:", "Raises:", "Gradient:", "Saved for backward:", "Source:"):
        assert section in doc
    described = doc.split("Args:")[1].split("Returns:")[0]
    parameters = inspect.signature(ppmoe_ops.moe_ffn).parameters
    assert [name for name in parameters if name not in described] == []
    # What `route` takes is taken here, with the same defaults.
    theirs = inspect.signature(ppmoe_ops.route).parameters
    for name, each in theirs.items():
        if name != "logits":
            assert parameters[name].default == each.default, name


def test_autocast_takes_the_router_wide_and_the_experts_narrow() -> None:
    layer = layer_of(torch.float32, activation="swiglu")
    with torch.autocast("cpu", torch.bfloat16):
        out = ppmoe_ops.moe_ffn(*layer, top_k=2, activation="swiglu")
    half = [None if each is None else each.bfloat16() for each in layer[2:]]
    wanted = ppmoe_ops.moe_ffn(layer[0].bfloat16(), layer[1], *half, top_k=2, activation="swiglu")
    assert_same_bits([out], [wanted])
    grads = torch.autograd.grad(out.float().sum(), leaves_of(layer))
    assert all(each.dtype == torch.float32 for each in grads)
