"""The sparse blocks of transformers, by their own parameters: outputs and every gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ffn import assert_same_bits
from slicing import dtype_name, plain_expert_ffn, plain_weights
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import ppmoe_ops
from ppmoe_ops.testing import assert_error_rule, cast_sample

HIDDEN, WIDTH, EXPERTS = 40, 28, 8
SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": 2, "experts_implementation": "eager"}
# In a narrower dtype another expert may be chosen where two logits are this near.
MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class Model:
    """A block, and its conventions: the activation, and whether kept scores are renormalised."""

    build: Callable[[], nn.Module]
    top_k: int
    activation: str
    renormalize: bool


def mixtral(**options: Any) -> nn.Module:
    config = MixtralConfig(
        **{**SIZES, "intermediate_size": WIDTH, "num_local_experts": EXPERTS, **options}
    )
    return MixtralSparseMoeBlock(config)


def qwen3(**options: Any) -> nn.Module:
    config = Qwen3MoeConfig(
        **{**SIZES, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS, **options}
    )
    return Qwen3MoeSparseMoeBlock(config)


def olmoe(**options: Any) -> nn.Module:
    config = OlmoeConfig(**{**SIZES, "intermediate_size": WIDTH, "num_experts": EXPERTS, **options})
    return OlmoeSparseMoeBlock(config)


MODELS = {
    "mixtral": Model(mixtral, 2, "swiglu", True),
    "mixtral_gelu": Model(lambda: mixtral(hidden_act="gelu"), 2, "geglu", True),
    "qwen3_moe": Model(
        lambda: qwen3(norm_topk_prob=True, num_experts_per_tok=4), 4, "swiglu", True
    ),
    "qwen3_moe_raw": Model(lambda: qwen3(norm_topk_prob=False), 2, "swiglu", False),
    "olmoe": Model(lambda: olmoe(num_experts_per_tok=3), 3, "swiglu", False),
    "olmoe_normed": Model(lambda: olmoe(norm_topk_prob=True), 2, "swiglu", True),
    "one_choice": Model(lambda: qwen3(num_experts_per_tok=1), 1, "swiglu", False),
}


def block_of(model: Model, dtype: torch.dtype) -> Any:
    block = model.build()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.to(dtype)


def tokens_of(block: Any, top_k: int, dtype: torch.dtype, count: int = 60) -> Tensor:
    """[2, T/2, H] of tokens whose choice does not hang on a rounding."""
    found = torch.randn(20 * count, HIDDEN).to(dtype)
    logits = linear(found.double(), block.gate.weight.double())
    best = logits.sort(-1, descending=True).values
    clear = (best[:, :top_k] - best[:, 1 : top_k + 1]).amin(-1) > MARGIN
    assert int(clear.sum()) >= count
    return found[clear][:count].view(2, count // 2, HIDDEN).requires_grad_()


def parameters_of(block: Any) -> list[Tensor]:
    parameters = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    assert len(parameters) == len(list(block.parameters()))
    return parameters


def by_operators(block: Any, x: Tensor, model: Model) -> Tensor:
    """The block's forward, from its own parameters."""
    rows = x.view(-1, HIDDEN)
    logits = linear(rows, block.gate.weight)
    weights, experts = ppmoe_ops.route(logits, model.top_k, "softmax", model.renormalize)
    slots, offsets = ppmoe_ops.expert_index(experts, 0, EXPERTS)
    out = ppmoe_ops.expert_ffn(
        rows, slots, offsets, weights, block.experts.gate_up_proj, None, block.experts.down_proj,
        None, model.activation,
    )  # fmt: skip
    return out.view_as(x)


def in_one_call(block: Any, x: Tensor, model: Model) -> Tensor:
    rows = x.view(-1, HIDDEN)
    out = ppmoe_ops.moe_ffn(
        rows, linear(rows, block.gate.weight), block.experts.gate_up_proj, None,
        block.experts.down_proj, None, top_k=model.top_k, activation=model.activation,
        renormalize=model.renormalize,
    )  # fmt: skip
    return out.view_as(x)


def exactly(x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor, model: Model) -> Tensor:
    """In the dtype of the arguments, float64, all through; the blocks' softmax is in float32."""
    rows = x.view(-1, HIDDEN)
    logits = linear(rows, router)
    ids = logits.sort(-1, descending=True).indices[:, : model.top_k]
    weights = plain_weights(logits, ids, "softmax", model.renormalize, 1.0)
    slots, offsets = ppmoe_ops.expert_index(ids, 0, EXPERTS)
    out = plain_expert_ffn(rows, slots, offsets, weights, w_in, None, w_out, None, model.activation)
    return out.view_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("name", MODELS)
def test_output_and_every_gradient(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]
    block = block_of(model, dtype)
    x = tokens_of(block, model.top_k, dtype)
    leaves = [x, *parameters_of(block)]
    wide = cast_sample(leaves, torch.float64)
    theirs, exact = block(x), exactly(*wide, model)
    upstream = torch.randn(x.shape).bfloat16()
    their_grads = torch.autograd.grad(theirs, leaves, upstream.to(dtype))
    exact_grads = torch.autograd.grad(exact, wide, upstream.double())
    # The composition follows the block's conventions, or it would measure nothing.
    near = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(
        theirs.double(), exact, rtol=near, atol=near * exact.abs().max().item()
    )
    for function in (by_operators, in_one_call):
        ours = function(block, x, model)
        assert_error_rule(ours, theirs, exact, name=name)
        grads = torch.autograd.grad(ours, leaves, upstream.to(dtype))
        names = ("x", "router", "gate_up_proj", "down_proj")
        for which, *three in zip(names, grads, their_grads, exact_grads, strict=True):
            assert_error_rule(*three, factor=3.0, name=f"{name}: gradient of {which}")


@pytest.mark.parametrize("name", MODELS)
def test_in_float64(name: str) -> None:
    model = MODELS[name]
    block = block_of(model, torch.float64)
    x = tokens_of(block, model.top_k, torch.float64)
    leaves = [x, *parameters_of(block)]
    theirs, ours = block(x), by_operators(block, x, model)
    # Their routing weights are float32 all the same.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(x.shape).double()
    for one, other in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_experts_over_ranks(name: str) -> None:
    model = MODELS[name]
    block = block_of(model, torch.float32)
    x = tokens_of(block, model.top_k, torch.float32)
    rows = x.view(-1, HIDDEN)
    total = torch.zeros_like(rows)
    for first in range(0, EXPERTS, 2):
        mine = [
            each[first : first + 2]
            for each in (block.experts.gate_up_proj, block.experts.down_proj)
        ]
        total = total + ppmoe_ops.moe_ffn(
            rows, linear(rows, block.gate.weight), mine[0], None, mine[1], None,
            top_k=model.top_k, activation=model.activation, renormalize=model.renormalize,
            first_expert=first,
        )  # fmt: skip
    torch.testing.assert_close(total, by_operators(block, x, model).view(-1, HIDDEN))
    torch.testing.assert_close(total, block(x).view(-1, HIDDEN), rtol=1e-4, atol=1e-4)


def test_the_parameters_are_taken_as_they_are() -> None:
    model = MODELS["qwen3_moe"]
    block = block_of(model, torch.float32)
    x = tokens_of(block, model.top_k, torch.float32)
    kept = [each.detach().clone() for each in block.parameters()]
    pointers = [each.data_ptr() for each in block.parameters()]
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        by_operators(block, x, model).sum().backward()
    assert {each.data_ptr() for each in parameters_of(block)} <= set(saved)
    assert [each.data_ptr() for each in block.parameters()] == pointers
    assert_same_bits(list(block.parameters()), kept)
    assert all(each.grad is not None for each in block.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_router_is_theirs(name: str) -> None:
    model = MODELS[name]
    block = block_of(model, torch.float32)
    x = tokens_of(block, model.top_k, torch.float32)
    logits, scores, ids = block.gate(x)
    weights, experts = ppmoe_ops.route(logits, model.top_k, "softmax", model.renormalize)
    assert torch.equal(experts.long(), ids)
    torch.testing.assert_close(weights, scores)
