"""Capacity against a loop over tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppmoe_ops
from ppmoe_models import PPMoELayer
from ppmoe_models.capacity import decimal_ratio, drop_late_slots, expert_capacity


@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 4),
    experts=st.integers(4, 9),
    capacity=st.integers(0, 12),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_drops_what_a_loop_drops(
    tokens: int, top_k: int, experts: int, capacity: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # The square makes low ids the more frequent ones.
    ids = torch.rand(tokens, experts, generator=generator).square().argsort(-1)[:, :top_k].int()
    room = [capacity] * experts
    expected = []
    for row in ids.tolist():
        expected.append([e if room[e] > 0 else -1 for e in row])
        for e in row:
            room[e] -= 1
    slots, offsets = ppmoe_ops.expert_index(ids, 0, experts)
    kept = drop_late_slots(ids, slots, offsets, capacity)
    assert kept.tolist() == expected
    assert kept.dtype == ids.dtype


@pytest.mark.parametrize("factor", [0.1, 0.3, 0.7, 1.0, 1.1, 1.2, 1.25, 2.0, 3.3])
@pytest.mark.parametrize("experts", [1, 3, 8, 10])
def test_capacity_is_the_exact_ceiling(factor: float, experts: int) -> None:
    for tokens in range(60):
        for top_k in (1, 2, 3):
            exact = math.ceil(Fraction(str(factor)) * top_k * tokens / experts)
            assert expert_capacity(tokens, top_k, experts, decimal_ratio(factor)) == exact


def test_a_dropped_slot_changes_nothing_else() -> None:
    layer = PPMoELayer(6, 8, num_experts=3, top_k=2, capacity_factor=0.5)
    # Every token chooses experts 0 and 1, with weights of its own.
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0], layer.router.weight[1, 1] = 1.0, 1.0
    x = torch.randn(6, 6)
    x[:, :2] = x[:, :2].abs() + 1
    out, losses = layer(x)
    whole = PPMoELayer(6, 8, num_experts=3, top_k=2)
    whole.load_state_dict(layer.state_dict())
    # ceil(2 * 0.5 * 6 / 3) = 2 slots each: the first two tokens stay, the others get nothing.
    assert torch.equal(out[:2], whole(x[:2])[0])
    assert not out[2:].any()
    assert losses.load.tolist() == [6, 6, 0]
    assert int(losses.dropped) == 8


def test_dropped_slots_get_no_gradient() -> None:
    layer = PPMoELayer(6, 8, num_experts=3, top_k=1, capacity_factor=0.5)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1, 0] = 1.0
    x = torch.rand(4, 6).add(1).requires_grad_()
    out, _ = layer(x)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad[0].any()
    assert not x.grad[1:].any()


def test_a_roomy_capacity_is_dropless() -> None:
    torch.manual_seed(1)
    layer = PPMoELayer(6, 8, num_experts=4, capacity_factor=4.0)
    free = PPMoELayer(6, 8, num_experts=4)
    free.load_state_dict(layer.state_dict())
    x = torch.randn(9, 6)
    assert torch.equal(layer(x)[0], free(x)[0])
