"""The language model: what it may see, what it can learn, what it counts, what it writes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppmoe_models import FeedForward, LanguageModel, LanguageModelConfig, PPMoELayer
from ppmoe_models.language_model import rotary_table, rotate

SMALL = LanguageModelConfig(
    context=24, layers=2, hidden=32, heads=2, width=24, experts=4, activation="swiglu"
)


def small(**options: Any) -> LanguageModel:
    return LanguageModel(dataclasses.replace(SMALL, **options))


def ids(*shape: int) -> Tensor:
    return torch.randint(256, shape)


def overfit(model: LanguageModel, text: Tensor, steps: int) -> float:
    """Train on one text alone; the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    nats = torch.zeros(())
    for _ in range(steps):
        out = model(text[:, :-1])
        nats = F.cross_entropy(out.logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        (nats + out.router_loss).backward()
        optimizer.step()
    return nats.item()


@pytest.mark.parametrize("options", [{}, {"experts": None}, {"ranks": 2, "capacity_factor": 2.0}])
def test_learns_a_text_by_heart_and_says_it(options: dict[str, Any]) -> None:
    line = b"to be, or not to be"
    text = torch.tensor([list(line)])
    model = small(**options)
    assert overfit(model, text, 250) < 0.05
    said = model.generate(text[:, :7], len(line) - 7, temperature=0)
    assert bytes(said[0].tolist()) == line


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.6, "top_k": 1}])
def test_no_position_sees_a_later_one(options: dict[str, Any]) -> None:
    model = small(**options)
    one = ids(2, 20)
    other = one.clone()
    other[1, 12:] = ids(8)
    first, second = model(one).logits, model(other).logits
    same = (first - second).abs().amax(-1) < 1e-5
    assert same[0].all()
    assert same[1, :12].all()
    assert not same[1, 12:].any()


def test_turned_products_depend_on_the_distance_alone() -> None:
    table = rotary_table(30, 8)
    query, key = torch.randn(8), torch.randn(8)
    queries = rotate(query.expand(30, 8), table)
    keys = rotate(key.expand(30, 8), table)
    products = queries @ keys.T
    for distance in (0, 1, 7):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert products[0].std() > 0.1
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(30))


def test_experts_in_every_other_layer() -> None:
    kinds = [type(block.ffn) for block in small(layers=5).blocks]
    assert kinds == [FeedForward, PPMoELayer, FeedForward, PPMoELayer, FeedForward]
    every = [type(block.ffn) for block in small(layers=2, moe_every=1).blocks]
    assert every == [PPMoELayer, PPMoELayer]
    assert not any(isinstance(each, PPMoELayer) for each in small(experts=None).modules())


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_dense_backbone_has_the_active_parameters(
    top_k: int, shared: int, activation: str
) -> None:
    model = small(layers=4, top_k=top_k, shared_experts=shared, activation=activation)
    dense = LanguageModel(model.config.dense())
    routers = 2 * model.config.hidden * 4
    assert dense.num_active_parameters() == dense.num_parameters()
    assert model.num_active_parameters() == dense.num_parameters() + routers
    matrices = 3 if activation == "swiglu" else 2
    idle = 2 * (4 - top_k) * matrices * model.config.width * model.config.hidden
    assert model.num_parameters() - model.num_active_parameters() == idle


def test_router_loss_is_the_sum_over_layers() -> None:
    model = small(layers=4, balance_weight=0.5)
    out = model(ids(2, 9))
    assert len(out.losses) == 2
    torch.testing.assert_close(out.router_loss, out.losses[0].total + out.losses[1].total)
    for losses in out.losses:
        assert int(losses.load.sum()) == 2 * 9 * 2
    dense = small(experts=None)(ids(2, 9))
    assert dense.losses == ()
    assert dense.router_loss.item() == 0.0


def test_recomputed_blocks_give_the_same_bits() -> None:
    keeps = small(jitter=0.2)
    again = small(jitter=0.2, checkpoint=True)
    again.load_state_dict(keeps.state_dict())
    text = ids(2, 12)
    grads = []
    for model in (keeps, again):
        torch.manual_seed(7)
        out = model(text)
        (out.logits.square().mean() + out.router_loss).backward()
        grads.append({name: each.grad for name, each in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_residual_weights_are_drawn_smaller() -> None:
    model = small(layers=8, hidden=64, width=64, shared_experts=1)
    expert, dense = model.blocks[1].ffn, model.blocks[0].ffn
    for weight in (expert.w_out, expert.shared.w_out.weight, dense.w_out.weight):
        assert weight.std().item() == pytest.approx(0.005, rel=0.1)
    for weight in (expert.w_in, dense.w_in.weight, model.embedding.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_generation_is_the_same_for_the_same_generator() -> None:
    model = small()
    start = ids(3, 4)

    def draw(seed: int, temperature: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(start, 9, temperature=temperature, generator=generator)

    assert draw(1).shape == (3, 13)
    assert torch.equal(draw(1)[:, :4], start)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, temperature=0), draw(2, temperature=0))


def test_generation_goes_on_beyond_the_context_and_keeps_the_mode() -> None:
    model = small(jitter=0.5)
    start = ids(1, 30)
    once = model.generate(start, 40, temperature=0)
    assert once.shape == (1, 70)
    assert model.training
    # What lies before the context does not matter, nor does jitter, which is for training.
    assert torch.equal(model.generate(start[:, 6:], 40, temperature=0), once[:, 6:])
    assert not model.eval().training
    model.generate(start, 1)
    assert not model.training


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"hidden is 30; allowed: multiples of 2 \* heads = 4"):
        small(hidden=30)
    with pytest.raises(ValueError, match="moe_every is 0; allowed: 1 or more"):
        small(moe_every=0)
    with pytest.raises(ValueError, match=r"ids has shape \[1, 25\].*at most 24"):
        small()(ids(1, 25))
    with pytest.raises(ValueError, match="S at least 1"):
        small().generate(ids(1, 0), 2)
    with pytest.raises(ValueError, match="temperature is -1"):
        small().generate(ids(1, 2), 2, temperature=-1)
