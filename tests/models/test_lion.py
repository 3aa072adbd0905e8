"""LION around backbones of all kinds: where it starts, what it trains, what it leaves alone."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lion_backbones import BACKBONES, TRANSFORMERS, cnn, made, vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppmoe_models import LION
from ppmoe_models.lion_backbone import pooled
from ppmoe_models.lion_small import SmallViT
from ppmoe_models.prompt_modes import build

LABELS = torch.tensor([0, 2, 1, 4])
PROMPTS = [
    {}, {"input_prompt": None}, {"representation_prompt": None},
    {"representation_prompt": "image", "image_grid": 2},
]  # fmt: skip


def lion(name: str, **options: Any) -> tuple[LION, Tensor]:
    backbone, images, _, told = made(name)
    torch.manual_seed(1)
    return LION(backbone, 5, **told, **options), images


def train(model: nn.Module, images: Tensor, steps: int = 2) -> None:
    """Some steps of SGD; gradients are left as they were in the last."""
    model.train()
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), LABELS).backward()
        optimizer.step()


def with_prompts(model: LION) -> LION:
    """The same model with prompts that count."""
    with torch.no_grad():
        for scale in (model.input_scale, model.representation_scale):
            if scale is not None:
                scale.fill_(0.5)
    return model


def variants() -> list[Any]:
    found = []
    for name in BACKBONES:
        for options in PROMPTS:
            found.append((name, options))
    for name in (*TRANSFORMERS, "swin"):
        found.append((name, {"input_prompt": "patches"}))
    return found


@pytest.mark.parametrize(("name", "options"), variants())
def test_it_starts_as_linear_probing_and_trains_all_it_should(
    name: str, options: dict[str, Any]
) -> None:
    model, images = lion(name, **options)
    assert not any(each.training for each in model.backbone.modules())
    backbone, _, dim, told = made(name)
    torch.manual_seed(1)
    probe = build("linear", backbone, 5, **told)
    assert model.feature_dim == dim
    for mode in (True, False):
        assert torch.equal(model.train(mode)(images), probe.train(mode)(images))
    before = copy.deepcopy(model.backbone.state_dict())

    # At the first step the scales get gradients, and the prompts zeros; at the second all do.
    train(model, images, 1)
    for layer in (model.input_prompt, model.representation_prompt):
        for parameter in () if layer is None else layer.parameters():
            assert parameter.grad is not None
            assert parameter.grad.count_nonzero() == 0
    for scale in (model.input_scale, model.representation_scale):
        assert scale is None or (scale.grad is not None and scale.grad != 0)
    train(model, images, 1)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.count_nonzero() > 0, key

    # The backbone is as it was, its statistics included, and in evaluation mode.
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(each.training for each in model.backbone.modules())
    assert model.training
    assert all(each.grad is None for each in model.backbone.parameters())
    assert not torch.equal(model(images), probe(images))


def expected_count(model: LION, dim: int, channels: int, tokens: int | None, **sizes: int) -> int:
    r1, r2 = sizes["input"], sizes["representation"]
    count = (dim + 1) * 5
    if tokens is not None:
        count += 3 * tokens * r1 + r1 + tokens + 1
    else:
        count += 9 * r1**2 + 2 * channels * r1 + 2 * r1 + channels + channels * r1 + 1
    injected = channels * sizes["grid"] ** 2 if model.from_image else dim
    return count + 2 * dim * r2 + r2 + dim + injected * r2 + 1


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("fed_by", ["feature", "image"])
def test_parameter_counts(name: str, fed_by: str) -> None:
    widths = {"input_width": 3, "representation_width": 7}
    model, images = lion(name, representation_prompt=fed_by, image_grid=2, **widths)
    expected = expected_count(
        model, model.feature_dim, images.size(1), None, input=3, representation=7, grid=2
    )
    assert model.parameter_counts() == (expected, model.parameter_counts().nonzero)
    assert model.parameter_counts().nonzero == expected - 2, "but for the two scales"
    assert sum(each.numel() for each in model.trained_parameters()) == expected
    own = sum(each.numel() for each in model.prompt_parameters())
    assert own == expected - 5 * (model.feature_dim + 1)
    if name in TRANSFORMERS:
        model, _ = lion(name, input_prompt="patches", **widths)
        expected = expected_count(model, 24 if name == "small" else 16, 0,
                                  24 if name == "small" else 16,
                                  input=3, representation=7, grid=2)  # fmt: skip
        assert model.parameter_counts().nominal == expected


@pytest.mark.parametrize("options", [{}, {"input_prompt": "patches"}])
def test_gradients_pass_through_the_backbone(options: dict[str, Any]) -> None:
    """Those of the input prompt are as if the whole were unrolled and differentiated."""
    model, images = lion("small", input_rtol=1e-12, representation_rtol=1e-12, max_iter=100,
                         **options)  # fmt: skip
    model = with_prompts(model).double()
    images = images.double()
    F.cross_entropy(model(images), LABELS).backward()
    assert model.input_prompt is not None
    for name in ("w1", "b1", "inject"):
        parameter = getattr(model.input_prompt, name)
        direction = torch.randn_like(parameter)
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step * direction)
                losses.append(F.cross_entropy(model(images), LABELS).item())
                parameter.sub_(step * direction)
        found = (parameter.grad * direction).sum().item()
        assert found == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4, abs=1e-9), name


def test_one_model_twice_in_a_graph() -> None:
    model, images = lion("cnn")
    model = with_prompts(model)
    others = images.flip(0) * 0.7
    names = [name for name, each in model.named_parameters() if each.requires_grad]
    parameters = [dict(model.named_parameters())[name] for name in names]

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), LABELS)

    both = torch.autograd.grad(loss(images) + loss(others) * 2, parameters)
    one, other = (torch.autograd.grad(loss(x), parameters) for x in (images, others))
    for name, a, b, c in zip(names, both, one, other, strict=True):
        torch.testing.assert_close(a, b + 2 * c, rtol=1e-4, atol=1e-6, msg=name)


def test_compiled_and_checkpointed() -> None:
    model, images = lion("small")
    model = with_prompts(model)
    model(images).square().sum().backward()
    expected = [each.grad.clone() for each in model.trained_parameters() if each.grad is not None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for call in (compiled, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        call(images).square().sum().backward()
        for each, grad in zip(model.trained_parameters(), expected, strict=True):
            assert each.grad is not None
            torch.testing.assert_close(each.grad, grad, rtol=1e-4, atol=1e-5)


def test_solves_of_the_last_call() -> None:
    model, images = lion("small")
    model(images)
    assert set(model.last_solves) == {"input", "representation"}
    for solve in model.last_solves.values():
        assert solve.steps.dtype == torch.int32
        assert solve.steps.shape == solve.residual.shape == solve.converged.shape == (4,)
        assert solve.converged.all()
        assert (solve.steps >= 1).all()
        assert (solve.relative <= 1e-3).all()
        assert not solve.residual.requires_grad
    patches, images = lion("small", input_prompt="patches", representation_prompt=None)
    patches(images)
    assert list(patches.last_solves) == ["input"]
    assert patches.last_solves["input"].steps.shape == (4 * 17,)


def test_a_solve_that_does_not_converge_is_told_once() -> None:
    model, images = lion("small", max_iter=1)
    with pytest.warns(RuntimeWarning, match=r"4 of 4 solves of the input prompt have not conv"):
        model(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)
        quiet, _ = lion("small", max_iter=1, warn=False)
        quiet(images)
    assert not quiet.last_solves["input"].converged.any()


def test_a_bad_image_is_its_own_trouble() -> None:
    model, images = lion("small", warn=False)
    model = with_prompts(model).eval()
    with torch.no_grad():
        good = model(images)
        images[1, 0, 3, 3] = float("nan")
        found = model(images)
    assert found[1].isnan().all()
    assert model.last_solves["input"].residual[1].isinf()
    assert not model.last_solves["input"].converged[1]
    torch.testing.assert_close(found[[0, 2, 3]], good[[0, 2, 3]])


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpoints(name: str, whole: bool) -> None:
    model, images = lion(name, whole_state=whole)
    train(model, images)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    trained = {key for key, each in model.named_parameters() if each.requires_grad}
    if whole:
        assert {key.partition(".")[0] for key in set(state) - trained} == {"backbone"}
    else:
        assert set(state) == trained
    other, _ = lion(name)
    if whole:
        for parameter in other.backbone.parameters():
            nn.init.normal_(parameter)
    other.load_state_dict(state)
    assert torch.equal(model.eval()(images), other.eval()(images))
    # As a part of another module too.
    nn.ModuleDict({"a": other}).load_state_dict({f"a.{key}": each for key, each in state.items()})
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "head.bias"'):
        other.load_state_dict(state)
    if whole:
        state = model.state_dict()
        del state[next(key for key in state if key.startswith("backbone."))]
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "backbone'):
            other.load_state_dict(state)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_whole_and_apart(again: Any) -> None:
    model, images = lion("small", input_prompt="patches")
    model = with_prompts(model)
    other = again(model)
    train(other, images)
    fresh, _ = lion("small", input_prompt="patches")
    assert torch.equal(model(images), with_prompts(fresh)(images))
    assert not torch.equal(model(images), other(images))


def test_no_hooks_stay_behind() -> None:
    model, images = lion("small", input_prompt="patches")
    model(images)
    with pytest.raises(RuntimeError):
        model(images[..., :4])
    for module in model.backbone.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_features_are_anyones_function() -> None:
    def last_map(backbone: Any, images: Tensor) -> Tensor:
        found: Tensor = backbone[:4](images)
        return found

    model = LION(cnn(), 5, features=last_map, image_size=12)
    assert model.feature_dim == 6
    assert model(torch.randn(2, 3, 12, 12)).shape == (2, 5)
    given = LION(cnn(), 5, feature_dim=8)  # nothing is run
    assert given(torch.randn(2, 3, 10, 14)).shape == (2, 5)


def test_pooling() -> None:
    backbone, images, _, _ = made("vit")
    out = backbone.eval()(images)
    for pooling, expected in (
        ("auto", out.pooler_output),
        ("cls", out.last_hidden_state[:, 0]),
        ("mean", out.last_hidden_state.mean(1)),
    ):
        model = LION(backbone, 5, pooling=pooling)
        assert torch.equal(model.represent(images), expected), pooling
    bare = vit(add_pooling_layer=False).eval()
    tokens = bare(images).last_hidden_state
    assert torch.equal(LION(bare, 5).represent(images), tokens[:, 0])
    maps = torch.randn(2, 3, 4, 5)
    assert torch.equal(pooled(maps, "auto", True), maps.mean((2, 3)))
    assert torch.equal(pooled(maps[:, :, 0], "auto", False), maps[:, :, 0].mean(1))
    assert torch.equal(pooled({"last_hidden_state": maps[:, 0]}, "auto", True), maps[:, 0, 0])


@pytest.mark.parametrize("name", ["small", "cnn"])
def test_bfloat16_models_and_autocast(name: str) -> None:
    model, images = lion(name)
    model = with_prompts(model).eval()
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(images).float()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    narrow = model.to(torch.bfloat16)(images.to(torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_prompt": "image"}, "input_prompt is 'image'; allowed: 'pixels', 'patches', None"),
        (
            {"representation_prompt": "h"},
            "representation_prompt is 'h'; allowed: 'feature', 'image",
        ),
        ({"solver": "newton"}, "solver is 'newton' with input_prompt 'pixels'; allowed: anderson"),
        ({"image_grid": 0}, "image_grid is 0; allowed: 1 or more"),
        ({"pooling": "max"}, "pooling is 'max'; allowed: auto, cls, mean"),
        ({"input_width": 65}, "input_width is 65; allowed: 1 to 64"),
        ({"num_classes": 0}, "num_classes is 0; allowed: 1 or more"),
        ({"features": lambda *_: None}, "backbone returns a NoneType without pooler_output"),
        ({"features": lambda _, x: x[0, 0, 0]}, r"features are \[8\]; expected \[B, d\]"),
    ],
)
def test_what_is_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LION(SmallViT(24, depth=1), **{"num_classes": 5, **options})


def test_patches_need_blocks() -> None:
    with pytest.raises(ValueError, match="LION: backbone is a Sequential without a list of blocks"):
        LION(cnn(), 5, input_prompt="patches", feature_dim=8)
    with pytest.raises(ValueError, match="SmallViT: image_size is 9; allowed: multiples of 2"):
        SmallViT(24, image_size=9)
