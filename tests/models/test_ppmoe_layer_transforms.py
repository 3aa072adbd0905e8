"""`PPMoELayer` under checkpointing, `torch.func`, `torch.compile` and a state_dict round trip."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ppmoe_models import PPMoELayer

OPTIONS: dict[str, dict[str, Any]] = {
    "dropless": {"activation": "swiglu"},
    "all": {"top_k": 3, "score": "sigmoid", "groups": 4, "top_groups": 2, "selection_bias": True,
            "capacity_factor": 1.1, "shared_experts": 1, "ranks": 2},
}  # fmt: skip


def make(**options: Any) -> PPMoELayer:
    return PPMoELayer(8, 12, num_experts=8, **options)


def results(layer: Any, x: Tensor, parameters: Any) -> list[Tensor]:
    """Output, losses and gradients to the input and the parameters."""
    out, losses = layer(x)
    loss = out.square().sum() + losses.total
    return [out, *losses, *torch.autograd.grad(loss, [x, *parameters])]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_to_one_graph_for_all_sizes(name: str) -> None:
    layer = make(**OPTIONS[name])
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    parameters = list(layer.parameters())
    for tokens in (7, 12, 33):
        x = torch.randn(tokens, 8, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        expected = results(layer, x, parameters)
        for actual, eager in zip(results(compiled, x, parameters), expected, strict=True):
            torch.testing.assert_close(actual, eager)
    assert backend.frame_count == 1


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpointing_gives_the_same_bits(name: str) -> None:
    layer = make(jitter=0.2, **OPTIONS[name])
    x = torch.randn(21, 8, requires_grad=True)
    parameters = list(layer.parameters())

    def again(x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=False)

    torch.manual_seed(5)
    expected = results(layer, x, parameters)
    torch.manual_seed(5)
    for actual, eager in zip(results(again, x, parameters), expected, strict=True):
        assert torch.equal(actual, eager)


def test_functional_call_uses_the_parameters_it_is_given() -> None:
    one, other = make(ranks=2), make(ranks=2)
    x = torch.randn(9, 8)
    out, losses = torch.func.functional_call(one, other.state_dict(), (x,))
    assert not torch.equal(out, one(x)[0])
    assert torch.equal(out, other(x)[0])
    assert torch.equal(losses.total, other(x)[1].total)


@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict_round_trip(name: str) -> None:
    layer, fresh = make(**OPTIONS[name]), make(**OPTIONS[name])
    if layer.selection_bias is not None:
        layer.selection_bias.uniform_()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(9, 8)
    assert torch.equal(layer(x)[0], fresh(x)[0])


def test_layers_are_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = make(**OPTIONS["all"])
    assert all(each.is_meta for each in (*layer.parameters(), *layer.buffers()))
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert real(torch.ones(5, 8))[0].isfinite().all()
