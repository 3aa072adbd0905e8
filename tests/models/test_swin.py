"""Swin models of transformers with their attention swapped, against the same model unswapped."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    Swinv2Config,
    Swinv2ForImageClassification,
    Swinv2Model,
)

import ppmoe_ops
from ppmoe_models import restore_attention, swin_layers, use_window_attention
from ppmoe_ops.testing import assert_error_rule

SMALL: dict[str, Any] = {
    "image_size": 56, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 7,
    "drop_path_rate": 0.0, "num_labels": 3,
}  # fmt: skip


def v1(**options: Any) -> SwinModel:
    return drawn(SwinModel(SwinConfig(**{**SMALL, **options})))


def v2(**options: Any) -> Swinv2Model:
    return drawn(Swinv2Model(Swinv2Config(**{**SMALL, **options})))


def drawn(model: Any) -> Any:
    """Parameters that leave no part of the attention without effect."""
    for name, parameter in model.named_parameters():
        if "logit_scale" in name:
            nn.init.uniform_(parameter, 0.5, 2.5)
        elif "norm" in name:
            nn.init.normal_(parameter, float(name.endswith("weight")), 0.1)
        else:
            nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.15)
    return model.double()


def image(height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64).to(dtype)


def run(model: Any, x: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of every parameter."""
    model.zero_grad()
    out = model(x, **options)[0]
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view_as(out)
    (out * weights.to(out.dtype)).sum().backward()
    return out.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same(one: Any, other: Any, tolerance: float = 1e-11) -> None:
    """Outputs and gradients, each beside the largest value of its kind."""
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=tolerance * one[0].abs().max().item())
    assert one[1].keys() == other[1].keys()
    # Some gradients are zero but for rounding: a bias of k moves all scores of a query alike.
    most = max(each.abs().max().item() for each in one[1].values())
    for name, gradient in one[1].items():
        error = (gradient - other[1][name]).abs().max().item()
        assert error <= tolerance * most, f"{name}: {error} beside gradients up to {most}"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every call of the operator."""
    made: list[tuple[Any, ...]] = []
    operator = ppmoe_ops.window_attention

    def counted(*args: Any) -> Tensor:
        made.append(args)
        return operator(*args)

    monkeypatch.setattr(ppmoe_ops, "window_attention", counted)
    return made


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been announced so far, as if nothing had been before the test."""
    swin_layers._warn.cache_clear()
    caplog.set_level(logging.WARNING, "ppmoe_models")
    return lambda: [each.message for each in caplog.records if each.name == "ppmoe_models"]


@pytest.mark.parametrize("size", [(56, 56), (60, 101)])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (v1, {}),
        (v1, {"window_size": 4, "patch_size": 2, "qkv_bias": False}),
        (v2, {}),
        (v2, {"window_size": 4, "patch_size": 2, "pretrained_window_sizes": [6, 3]}),
    ],
)
def test_outputs_and_gradients(
    make: Any, options: Any, size: tuple[int, int], calls: list[Any], said: Any
) -> None:
    model, x = make(**options).train(), image(*size)
    names, parameters = list(model.state_dict()), list(model.parameters())
    own = run(model, x)
    assert use_window_attention(model) == 4
    swapped = run(model, x)
    assert len(calls) == 4
    assert not said()
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert_same(own, swapped)
    assert "table" not in "".join(own[1]) or any("table" in n and own[1][n].any() for n in own[1])
    assert restore_attention(model) == 4
    again = run(model, x)
    assert len(calls) == 4
    assert torch.equal(again[0], own[0])


def test_a_bias_table_has_a_gradient() -> None:
    model = v1()
    use_window_attention(model)
    gradients = run(model, image(56, 56))[1]
    tables = [each for name, each in gradients.items() if "bias_table" in name]
    assert len(tables) == 4
    assert all(each.count_nonzero() == each.numel() for each in tables)


@pytest.mark.parametrize("make", [v1, v2])
def test_224_pixels(make: Any) -> None:
    model, x = make(image_size=224, depths=[2, 2, 2], num_heads=[2, 4, 8]), image(224, 224)[:1]
    own = run(model, x)
    use_window_attention(model)
    assert_same(own, run(model, x))


def test_swin_t_at_224_pixels() -> None:
    model = SwinModel(SwinConfig(image_size=224, embed_dim=96)).float()
    for layer in model.modules():
        if hasattr(layer, "relative_position_bias_table"):
            nn.init.normal_(layer.relative_position_bias_table, std=0.5)
    model.eval()  # without stochastic depth
    x = image(224, 224, torch.float32)[:1]
    own = run(model, x)
    assert use_window_attention(model) == 12
    assert_same(own, run(model, x), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [v1, v2])
def test_error_rule(make: Any, dtype: torch.dtype) -> None:
    model = make(depths=[2], num_heads=[2]).to(dtype)
    # Nothing is padded, as v2 in transformers makes NaN of padding in float16.
    exact, x = copy.deepcopy(model).double(), image(56, 84, dtype)
    plain, right = run(model, x), run(exact, x.double())
    use_window_attention(model)
    ours = run(model, x)
    assert_error_rule(ours[0], plain[0], right[0], 2.0)
    for name, gradient in ours[1].items():
        if "k_proj.bias" not in name:  # zero but for rounding
            assert_error_rule(gradient, plain[1][name], right[1][name], 3.0, name)


@pytest.mark.parametrize("make", [v1, v2])
def test_autocast(make: Any) -> None:
    model, x = make().float(), image(56, 56, torch.float32)
    right = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model, x)
        use_window_attention(model)
        ours = run(model, x)
    assert ours[0].dtype == plain[0].dtype
    assert_error_rule(ours[0].float(), plain[0].float(), right[0], 2.0)


def test_transformers_drops_the_shift_of_small_maps(calls: list[Any]) -> None:
    model = v1(depths=[2], num_heads=[2])
    use_window_attention(model)
    model(image(56, 56))
    x = image(28, 56)  # a map of 7 x 14
    swapped = run(model, x)
    assert [each[6] for each in calls] == [[0, 0], [3, 3], [0, 0], [0, 0]]
    model(image(56, 56))
    assert calls[-1][6] == [0, 0], "transformers leaves the shift out from then on"
    restore_attention(model)
    assert_same(run(model, x), swapped)


def test_maps_smaller_than_a_window_fail_as_they_did(said: Any) -> None:
    messages = []
    for swapped in (False, True):
        model = v1()
        if swapped:
            use_window_attention(model)
        with pytest.raises(RuntimeError, match="must match the size") as failed:
            model(image(24, 56))
        messages.append(str(failed.value))
    assert messages[0] == messages[1]
    assert "smaller than the window" in said()[0]


def test_small_maps_are_padded_where_always_partition_says_so() -> None:
    model, x = v1(), image(24, 44)
    own = run(model, x, always_partition=True)
    use_window_attention(model)
    assert_same(own, run(model, x, always_partition=True))


DECLINED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "attentions": (v1, {"attn_implementation": "eager"}, "output_attentions is given"),
    "attentions_v2": (v2, {}, "output_attentions is given"),
    "configured": (
        v1,
        {"output_attentions": True, "attn_implementation": "eager"},
        "output_attentions is given",
    ),
    "scaling": (v1, {}, "head_mask is given"),
    "dropout": (v1, {"attention_probs_dropout_prob": 0.2}, "attention dropout"),
    "dropout_v2": (v2, {"attention_probs_dropout_prob": 0.2}, "attention dropout"),
    "hooks": (v1, {}, "hooks on its attention"),
    "hooks_v2": (v2, {}, "hooks on its attention"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_the_operator_does_not_do_goes_the_own_way(
    case: str, calls: list[Any], said: Any
) -> None:
    make, options, reason = DECLINED[case]
    model, x = make(**options).train(), image(56, 56)
    given: dict[str, Any] = {}
    if case.startswith("attentions"):
        given["output_attentions"] = True
    if case == "scaling":
        given["head_mask"] = torch.ones(2, dtype=torch.float64)
    seen: list[int] = []
    if case.startswith("hooks"):
        for name, layer in model.named_modules():
            if name.endswith(("attention", "attention.self")):
                layer.register_forward_hook(lambda *_: seen.append(1))

    def outputs() -> Any:
        torch.manual_seed(3)
        return model(x, **given)

    own = outputs()
    count = len(seen)
    use_window_attention(model)
    swapped = outputs()
    assert torch.equal(own[0], swapped[0])
    assert len(seen) == 2 * count
    if "output_attentions" in reason:
        assert len(own.attentions) == 2
        for one, other in zip(own.attentions, swapped.attentions, strict=True):
            assert torch.equal(one, other)
    assert not calls
    outputs()
    assert len(said()) == 1
    assert f"{'Swinv2Layer' if make is v2 else 'SwinLayer'} computes its" in said()[0]
    assert reason in said()[0]
    if "dropout" in case:
        model.eval()
        outputs()
        assert len(calls) == 4


@pytest.mark.parametrize("make", [v1, v2])
def test_other_arguments_are_no_reason(make: Any, calls: list[Any]) -> None:
    model = make()
    use_window_attention(model)
    options = {"output_hidden_states": True, "output_attentions": False, "return_dict": True}
    out = model(image(56, 56), **options)
    assert len(out.hidden_states) == 3
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (SwinForImageClassification, SwinConfig),
        (Swinv2ForImageClassification, Swinv2Config),
        (SwinBackbone, SwinConfig),
    ],
)
def test_other_models_of_these_layers(kind: Any, config: Any) -> None:
    model, x = drawn(kind(config(**SMALL))), image(56, 72)
    with torch.no_grad():
        own = model(x)[0]
        use_window_attention(model)
        swapped = model(x)[0]
    pairs = zip(own, swapped, strict=True) if isinstance(own, tuple) else [(own, swapped)]
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_gradient_checkpointing(calls: list[Any]) -> None:
    model, x = v1().train(), image(56, 56)
    own = run(model, x)
    use_window_attention(model)
    model.gradient_checkpointing_enable()
    assert_same(own, run(model, x))
    assert len(calls) > 4


@pytest.mark.parametrize("make", [v1, v2])
def test_compiles_in_one_piece(make: Any) -> None:
    model, x = make(depths=[2], num_heads=[2]), image(60, 56)
    own = model(x)[0]
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        operator = torch.ops.ppmoe_ops.window_attention.default
        graphs.append(sum(node.target is operator for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(x)
    use_window_attention(model)
    torch.testing.assert_close(compiled(x)[0], own)
    restore_attention(model)
    torch.testing.assert_close(compiled(x)[0], own)
    assert graphs == [0, 2]


def test_compiled_gradients() -> None:
    model, x = v1(depths=[2], num_heads=[2]), image(60, 56)
    own = run(model, x)
    use_window_attention(model)
    model.compile(backend="aot_eager", fullgraph=True)
    assert_same(own, run(model, x))


def test_what_is_declined_compiles_too(said: Any) -> None:
    model = v1(depths=[1], num_heads=[2], attention_probs_dropout_prob=0.2).train()
    x = image(56, 56)
    torch.manual_seed(5)
    own = model(x)[0]
    use_window_attention(model)
    torch.manual_seed(5)
    out = torch.compile(model, backend="eager", fullgraph=True)(x)[0]
    torch.testing.assert_close(out, own)
    assert len(said()) == 1


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_are_swapped_too(way: Callable[[Any], Any], calls: list[Any]) -> None:
    model, x = v1(), image(56, 56)
    use_window_attention(model)
    other = way(model)
    own = model(x)[0]
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(other(x)[0], own)
    assert len(calls) == 8
    assert restore_attention(other) == 4
    assert use_window_attention(model) == 4


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="model is a Linear without a layer that is known; exp"):
        use_window_attention(nn.Linear(2, 2))


def test_other_versions_are_refused_before_anything_is_changed() -> None:
    model = v1()
    del model.encoder.layers[1].blocks[1].attention.q_proj
    with pytest.raises(ValueError, match=r"modeling_swin.SwinLayer has no attention.q_proj; exp"):
        use_window_attention(model)
    assert restore_attention(model) == 0
