"""The ways of tuning beside LION: what each trains, where it starts, how many parameters it has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lion_backbones import TRANSFORMERS, made
from torch import Tensor, nn

from ppmoe_models.lion_small import SmallViT
from ppmoe_models.prompt_modes import MODES, build
from ppmoe_models.prompt_modes_base import TunedModel

LABELS = torch.tensor([0, 2, 1, 4])
SIZES = {"small": (24, 24, 2), "vit": (16, 16, 2)}  # of a token, of the features, blocks


def model_of(mode: str, name: str, **options: Any) -> tuple[TunedModel, Tensor]:
    backbone, images, _, told = made(name)
    torch.manual_seed(1)
    return build(mode, backbone, 5, **told, **options), images


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_parameter_counts(name: str) -> None:
    tokens, features, blocks = SIZES[name]
    backbone = made(name)[0]
    head = (features + 1) * 5
    biases = sum(each.numel() for key, each in backbone.named_parameters() if key.endswith("bias"))
    expected = {
        "linear": 0,
        "full": sum(each.numel() for each in backbone.parameters()),
        "bias": biases,
        "adapter": blocks * (2 * tokens * 3 + 3 + tokens),
        "vpt_shallow": 7 * tokens,
        "vpt_deep": blocks * 7 * tokens,
    }
    options: dict[str, dict[str, int]] = {
        "adapter": {"width": 3}, "vpt_shallow": {"tokens": 7}, "vpt_deep": {"tokens": 7},
    }  # fmt: skip
    for mode, count in expected.items():
        model, _ = model_of(mode, name, **options.get(mode, {}))
        assert model.parameter_counts().nominal == head + count, mode


def test_counts_of_the_usual_sizes() -> None:
    """VPT on ViT-B/16 as other implementations count it, and bottlenecks at width 16."""

    class Standing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 768))
            self.blocks = nn.Sequential(*[nn.Identity() for _ in range(12)])

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.blocks(self.cls_token.expand(len(images), 197, 768))
            return found

    def count(mode: str, **options: Any) -> int:
        return build(mode, Standing(), 10, image_size=32, **options).parameter_counts().nominal

    assert count("linear") == 7690
    assert count("vpt_shallow", tokens=5) == 11530
    assert count("vpt_deep", tokens=5) == 53770
    without_injection = count("lion", input_width=16) - 7690 - 2 - 3 * 16 - 768 * 16
    assert without_injection == 27795 == 2435 + 25360


@pytest.mark.parametrize("name", ["small", "vit", "cnn", "swin", "resnet"])
@pytest.mark.parametrize("mode", MODES)
def test_each_trains_what_it_says_and_nothing_else(mode: str, name: str) -> None:
    if mode.startswith("vpt") and name not in TRANSFORMERS:
        backbone, _, _, told = made(name)
        with pytest.raises(ValueError, match="without a class token; expected a vision transf"):
            build(mode, backbone, 5, **told)
        return
    options: dict[str, Any] = {}
    if mode == "adapter" and name == "cnn":
        with pytest.raises(ValueError, match="AdapterTuning: backbone is a Sequential without"):
            model_of(mode, name)
        backbone, images, _, told = made(name)
        options = {"blocks": [backbone[2], backbone[6]]}  # type: ignore[index]
        torch.manual_seed(1)
        model = build(mode, backbone, 5, **told, **options)
    else:
        model, images = model_of(mode, name)
    trained = {key for key, each in model.named_parameters() if each.requires_grad}
    assert set(map(id, model.trained_parameters())) == {
        id(each) for each in model.parameters() if each.requires_grad
    }
    before = copy.deepcopy(dict(model.backbone.named_parameters()))
    buffers = copy.deepcopy(dict(model.backbone.named_buffers()))
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.05)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), LABELS).backward()
        optimizer.step()
    moved = {
        f"backbone.{key}" for key, each in model.backbone.named_parameters()
        if not torch.equal(each, before[key])
    }  # fmt: skip
    assert moved <= trained
    if mode in ("full", "bias"):
        assert moved
    assert model.backbone.training == (mode == "full")
    if mode != "full":
        for key, value in model.backbone.named_buffers():
            assert torch.equal(value, buffers[key]), key
    for module in model.backbone.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks

    # What is kept is what was trained (and, for all of the backbone, its buffers).
    state = model.state_dict()
    assert set(state) == trained | {
        f"backbone.{key}" for key in model.backbone.state_dict()
        if mode == "full"
    }  # fmt: skip
    backbone, _, _, told = made(name)
    if "blocks" in options:
        options = {"blocks": [backbone[2], backbone[6]]}  # type: ignore[index]
    other = build(mode, backbone, 5, **told, **options)
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), other.eval()(images))


@pytest.mark.parametrize("mode", ["full", "bias", "adapter", "lion"])
def test_all_but_prompt_tokens_start_as_linear_probing(mode: str) -> None:
    model, images = model_of(mode, "vit")
    probe, _ = model_of("linear", "vit")
    assert torch.equal(model.eval()(images), probe.eval()(images))


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("deep", [False, True])
def test_prompt_tokens_stand_behind_the_class_token(name: str, deep: bool) -> None:
    """Against the blocks called one by one."""
    model, images = model_of("vpt_deep" if deep else "vpt_shallow", name, tokens=3)
    model.eval()
    backbone: Any = model.backbone
    prompts = model.prompts
    assert isinstance(prompts, Tensor)
    if name == "small":
        x = backbone.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((backbone.cls_token.expand(4, -1, -1), x), 1) + backbone.position
        blocks = backbone.blocks
    else:
        x, blocks = backbone.embeddings(images), backbone.layers
    own = x.size(1) - 1
    for index, block in enumerate(blocks):
        if deep or index == 0:
            behind = x[:, -own:]
            x = torch.cat((x[:, :1], prompts[index].expand(4, -1, -1), behind), 1)
        x = block(x)
    first = torch.cat((x[:, :1], x[:, -own:]), 1)
    if name == "small":
        expected = backbone.norm(first[:, 0])
    else:
        expected = backbone.pooler(backbone.layernorm(first))
    torch.testing.assert_close(model.prompted_features(images), expected)
    mean, _ = model_of("vpt_deep" if deep else "vpt_shallow", name, tokens=3, pooling="mean")
    assert mean(images).shape == (4, 5)


def test_what_is_not_allowed() -> None:
    backbone = SmallViT(24, depth=1)
    for mode, options, message in (
        ("vpt", {}, "mode is 'vpt'; allowed: linear, full, bias, adapter, vpt_shallow, vpt_deep"),
        ("vpt_deep", {"tokens": 0}, "VPT: tokens is 0; allowed: 1 or more"),
        ("adapter", {"width": 0}, "AdapterTuning: width is 0; allowed: 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            build(mode, backbone, 5, **options)
    with pytest.raises(TypeError):
        build("linear", backbone, 5, tokens=3)
