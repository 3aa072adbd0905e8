"""`PPMoELayer` against a loop over tokens, and its promises about ranks, losses and jitter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_layer import plain_layer
from torch import Tensor

import ppmoe_ops
from ppmoe_models import PPMoELayer
from ppmoe_ops.testing import assert_error_rule

HIDDEN, WIDTH, EXPERTS = 12, 10, 8
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_choice": {"top_k": 1, "activation": "relu", "bias": False},
    "raw_weights": {"top_k": 3, "renormalize": False, "activation": "gelu_tanh", "scale": 2.5},
    "sigmoid": {"top_k": 3, "score": "sigmoid", "activation": "swiglu", "groups": 4,
                "top_groups": 2, "selection_bias": True, "scale": 1.5},
    "sigmoid_one_choice": {"top_k": 1, "score": "sigmoid", "activation": "silu"},
    "shared": {"shared_experts": 2, "activation": "geglu", "bias": False},
    "capacity": {"capacity_factor": 0.75, "shared_experts": 1, "activation": "silu"},
    "capacity_one_choice": {"capacity_factor": 1.0, "top_k": 1},
    "every_expert": {"top_k": 8, "balance_weight": 0.5, "z_weight": 0.25},
}  # fmt: skip


def make(dtype: torch.dtype = torch.float64, **options: Any) -> PPMoELayer:
    layer = PPMoELayer(HIDDEN, WIDTH, EXPERTS, **options).to(dtype)
    with torch.no_grad():
        layer.router.weight.mul_(3)  # so that the experts are not chosen evenly
        if layer.selection_bias is not None:
            layer.selection_bias.copy_(torch.randn(EXPERTS) * 0.2)
    return layer


def gradients(layer: PPMoELayer, x: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Of a loss to x and to every parameter."""
    named = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(named, torch.autograd.grad(loss, tuple(named.values())), strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_loop_over_tokens(name: str, ranks: int) -> None:
    layer = make(ranks=ranks, **CONFIGS[name])
    x = torch.randn(3, 7, HIDDEN, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 7, HIDDEN, dtype=torch.float64)

    out, losses = layer(x)
    plain = plain_layer(layer, x)
    assert_error_rule(out, plain.out, plain.out)
    for loss in ("total", "balance", "z"):
        actual, exact = getattr(losses, loss), getattr(plain, loss)
        assert_error_rule(actual, exact, exact, name=loss)

    actual = gradients(layer, x, (out * upstream).sum() + losses.total)
    exact = gradients(layer, x, (plain.out * upstream).sum() + plain.total)
    for key in exact:
        assert exact[key].abs().max() > 0, f"{key}: nothing to compare"
        assert_error_rule(actual[key], exact[key], exact[key], factor=3.0, name=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "sigmoid", "capacity"])
def test_narrow_dtypes_keep_the_error_rule(name: str, dtype: torch.dtype) -> None:
    layer = make(dtype, ranks=2, **CONFIGS[name])
    x = torch.randn(19, HIDDEN).to(dtype).requires_grad_()
    wide, wide_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    out, losses = layer(x)
    plain, exact = plain_layer(layer, x), plain_layer(wide, wide_x)
    assert plain.chosen == exact.chosen
    assert out.dtype == dtype
    assert losses.total.dtype == torch.float32
    assert_error_rule(out, plain.out, exact.out)
    assert_error_rule(losses.total, plain.total, exact.total)

    of_plain = gradients(layer, x, plain.out.float().square().sum() + plain.total)
    of_exact = gradients(wide, wide_x, exact.out.square().sum() + exact.total)
    # The upstream gradient is 2 * out in both, so that each sees its own rounding of it.
    for key, actual in gradients(layer, x, out.float().square().sum() + losses.total).items():
        assert_error_rule(actual, of_plain[key], of_exact[key], factor=3.0, name=key)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("capacity", [None, 0.6])
def test_ranks_add_up_to_the_same_bits(ranks: int, top_k: int, capacity: float | None) -> None:
    whole = make(torch.float32, top_k=top_k, capacity_factor=capacity)
    cut = make(torch.float32, top_k=top_k, capacity_factor=capacity, ranks=ranks)
    cut.load_state_dict(whole.state_dict())
    x = torch.randn(33, HIDDEN)
    one, other = whole(x), cut(x)
    assert torch.equal(one[0], other[0])
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert torch.equal(mine, theirs)


def figure_4(ranks: int) -> tuple[PPMoELayer, Tensor]:
    """A layer whose router reads the paper's order off the tokens, and the eight tokens."""
    order = torch.tensor([2, 3, 1, 2, 0, 3, 2, 0])
    layer = PPMoELayer(5, 6, num_experts=4, top_k=1, ranks=ranks, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight.copy_(10 * torch.eye(4, 5))
    x = torch.zeros(8, 5, dtype=torch.float64)
    x[torch.arange(8), order] = 1.0
    x[:, 4] = torch.arange(8)
    return layer, x


def test_the_papers_figure_4_row_sets() -> None:
    layer, x = figure_4(ranks=2)
    rows = {}
    for expert in range(4):
        alone = copy.deepcopy(layer)
        with torch.no_grad():
            for parameter in (alone.w_out, alone.b_out):
                parameter[torch.arange(4) != expert] = 0.0
        rows[expert] = alone(x)[0].abs().sum(-1).nonzero().flatten().tolist()
    assert rows == {0: [4, 7], 1: [2], 2: [0, 3, 6], 3: [1, 5]}
    ranks = [set(rows[0] + rows[1]), set(rows[2] + rows[3])]
    assert ranks == [{2, 4, 7}, {0, 1, 3, 5, 6}]
    assert not ranks[0] & ranks[1]
    assert ranks[0] | ranks[1] == set(range(8))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_papers_figure_4_output(ranks: int) -> None:
    layer, x = figure_4(ranks)
    out, losses = layer(x)
    plain = plain_layer(layer, x)
    assert plain.chosen == [[2], [3], [1], [2], [0], [3], [2], [0]]
    assert losses.load.tolist() == [2, 1, 3, 2]
    assert_error_rule(out, plain.out, plain.out)


@pytest.mark.parametrize("name", ["plain", "capacity", "capacity_one_choice", "every_expert"])
def test_load_and_dropped_are_counts(name: str) -> None:
    layer = make(**CONFIGS[name])
    x = torch.randn(2, 20, HIDDEN, dtype=torch.float64)
    _, losses = layer(x)
    plain = plain_layer(layer, x)
    picked = [e for ids in plain.chosen for e in ids]
    assert losses.load.tolist() == [picked.count(e) for e in range(EXPERTS)]
    assert int(losses.dropped) == sum(ids.count(-1) for ids in plain.kept)
    assert losses.load.dtype == losses.dropped.dtype == torch.int64


def test_losses_of_an_even_router() -> None:
    layer = PPMoELayer(4, 4, num_experts=8, balance_weight=0.5, z_weight=2.0)
    torch.nn.init.zeros_(layer.router.weight)
    _, losses = layer(torch.randn(5, 4))
    z = torch.log(torch.tensor(8.0)).square().item()
    assert losses.balance.item() == pytest.approx(1.0)
    assert losses.z.item() == pytest.approx(z)
    assert losses.total.item() == pytest.approx(0.5 + 2 * z)


def test_jitter_is_of_the_stated_size_and_for_the_router_alone() -> None:
    # One feature, one expert and a router of 1: z is the square of the noise itself, and the
    # expert's weight is 1 whatever the noise is.
    layer = PPMoELayer(1, 4, num_experts=1, top_k=1, jitter=0.25)
    torch.nn.init.ones_(layer.router.weight)
    x = torch.ones(1, 1)
    calls = [layer(x) for _ in range(400)]
    noise = torch.stack([losses.z for _, losses in calls]).sqrt()
    assert 0.75 <= noise.min().item() < 0.77
    assert 1.23 < noise.max().item() <= 1.25
    assert noise.mean().item() == pytest.approx(1.0, abs=0.03)
    outputs = torch.stack([out for out, _ in calls])
    assert (outputs == outputs[0]).all()


def test_jitter_in_training_alone() -> None:
    layer = make(torch.float32, jitter=0.3)
    quiet = make(torch.float32)
    quiet.load_state_dict(layer.state_dict())
    x = torch.randn(9, HIDDEN)
    assert not torch.equal(layer(x)[0], quiet(x)[0])
    assert torch.equal(layer.eval()(x)[0], quiet(x)[0])


def test_input_of_any_number_of_axes() -> None:
    layer = make(torch.float32)
    x = torch.randn(2, 3, 5, HIDDEN)
    flat = layer(x.view(30, HIDDEN))[0]
    assert torch.equal(layer(x)[0], flat.view(x.shape))
    # Rows in another place or number may be summed in another order.
    turned = layer(x.transpose(0, 2))[0].transpose(0, 2)
    torch.testing.assert_close(turned, flat.view(x.shape))
    torch.testing.assert_close(layer(x[1, 2, 4])[0], flat[29])
    assert layer(x[:0])[0].shape == (0, 3, 5, HIDDEN)


def test_autocast_leaves_the_router_in_float32() -> None:
    layer = make(torch.float32, ranks=2, shared_experts=1)
    x = torch.randn(17, HIDDEN)
    out, losses = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, same = layer(x)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(same.total, losses.total)
    assert torch.equal(same.load, losses.load)
    torch.testing.assert_close(narrow.float(), out, atol=0.03, rtol=0.03)


def test_selection_bias_moves_the_load() -> None:
    layer = PPMoELayer(4, 4, num_experts=4, top_k=1, selection_bias=True)
    torch.nn.init.zeros_(layer.router.weight)
    x = torch.randn(6, 4)
    assert layer(x)[1].load.tolist() == [6, 0, 0, 0]
    layer.adjust_selection_bias(layer(x)[1].load, step=0.25)
    assert layer.selection_bias.tolist() == [-0.25, 0.25, 0.25, 0.25]
    assert layer(x)[1].load.tolist() == [0, 6, 0, 0]
    with pytest.raises(ValueError, match="selection_bias"):
        PPMoELayer(4, 4, num_experts=4).adjust_selection_bias(torch.zeros(4))


def test_fresh_parameters_are_as_linear_draws_them() -> None:
    torch.manual_seed(3)
    layer = PPMoELayer(64, 256, num_experts=4, activation="swiglu", shared_experts=1)
    for parameter, features in (
        (layer.router.weight, 64), (layer.w_in, 64), (layer.b_in, 64), (layer.w_out, 256),
        (layer.b_out, 256), (layer.shared.w_in.weight, 64), (layer.shared.w_out.bias, 256),
    ):  # fmt: skip
        bound = features**-0.5
        assert parameter.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    normal = PPMoELayer(64, 256, num_experts=4, shared_experts=1, init_std=0.02)
    for weight in (normal.router.weight, normal.w_in, normal.w_out, normal.shared.w_in.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    for bias in (normal.b_in, normal.b_out, normal.shared.w_out.bias):
        assert not bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 1, "renormalize": True}, "renormalize is True with top_k = 1"),
        ({"ranks": 3}, "ranks is 3; allowed: divisors of num_experts = 8"),
        ({"ranks": 0}, "ranks is 0; allowed: 1 or more"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0; allowed: None, or above 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor is nan"),
        ({"jitter": 1.0}, "jitter is 1.0; allowed: at least 0 and below 1"),
        ({"activation": "tanh"}, "PPMoELayer: activation is 'tanh'; allowed: gelu, "),
        ({"shared_experts": -1}, "shared_experts is -1; allowed: 0 or more"),
        ({"top_k": 9}, "top_k is 9; allowed: 1 to 8"),
        ({"score": "max"}, "score is 'max'; allowed: softmax, sigmoid"),
        ({"groups": 3}, "groups is 3; allowed: divisors of E = 8"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPMoELayer(HIDDEN, WIDTH, EXPERTS, **options)


@pytest.mark.parametrize("shape", [(3, HIDDEN + 1), ()])
def test_bad_input(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x has shape .*; expected \[\.\.\., 12\]"):
        make()(torch.zeros(shape))


def test_repr_names_what_is_not_default() -> None:
    text = repr(make(ranks=2, capacity_factor=1.25, selection_bias=True))
    for part in ("12, 10, num_experts=8", "ranks=2", "capacity_factor=1.25", "selection_bias=True"):
        assert part in text
    assert "jitter" not in text


def test_inactive_parameters_are_those_of_experts_not_chosen() -> None:
    layer = make(top_k=3, activation="swiglu")
    each = 2 * WIDTH * HIDDEN + 2 * WIDTH + HIDDEN * WIDTH + HIDDEN
    assert layer.num_inactive_parameters() == 5 * each


def test_the_operators_see_the_ids_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    index = ppmoe_ops.expert_index

    def spy(experts: Tensor, first: int, local: int) -> tuple[Tensor, Tensor]:
        calls.append((first, local))
        return index(experts, first, local)

    monkeypatch.setattr(ppmoe_ops, "expert_index", spy)
    make(ranks=4)(torch.randn(3, HIDDEN, dtype=torch.float64))
    assert calls == [(0, 8), (0, 2), (2, 2), (4, 2), (6, 2)]
