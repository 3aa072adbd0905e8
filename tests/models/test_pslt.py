"""PSLT against the plain model and against the numbers that describe it."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from pslt_pair import SIZES, images, ladder_blocks, pair
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ppmoe_models import PSLT, pslt_large, pslt_tiny
from ppmoe_models.pslt import pslt
from ppmoe_models.pslt_blocks import LadderBlock
from ppmoe_ops.testing import assert_error_rule

MAKERS = {"tiny": pslt_tiny, "base": pslt, "large": pslt_large}
PARTS = ("stem", "stage 1", "stage 2", "down", "stage 3", "merge", "stage 4", "head")
PARAMETERS = {
    "tiny": (8_220, 57_432, 216_240, 153_120, 1_466_360, 296_448, 1_715_400, 385_768),
    "base": (18_162, 124_164, 476_424, 340_272, 3_233_880, 665_856, 3_820_392, 578_152),
    "large": (31_992, 216_240, 837_984, 601_152, 5_697_720, 1_182_720, 6_760_968, 770_536),
}
MULTIPLY_ADDS = {
    "tiny": (101.61, 172.51, 165.76, 44.07, 313.22, 14.45, 87.93, 0.38),
    "base": (225.57, 377.99, 367.88, 98.64, 674.55, 32.51, 193.31, 0.58),
    "large": (398.30, 662.95, 649.49, 174.91, 1172.36, 57.80, 339.63, 0.77),
}


COUNTED = re.compile(r"patch_embed|conv_layers\.\d|layers\.\d|layers\.0\.downsample|head")


def part_of(name: str) -> str:
    """The part that a parameter or module of this name is in."""
    first, *rest = name.split(".")
    if first == "patch_embed":
        return "stem"
    if first == "conv_layers":
        return ("stage 1", "stage 2", "down")[int(rest[0]) // 3]
    if first == "layers":
        return "merge" if "downsample" in rest else ("stage 3", "stage 4")[int(rest[0])]
    return "head"


def on_meta(variant: str, **options: Any) -> PSLT:
    with torch.device("meta"):
        return MAKERS[variant](**options)


@pytest.mark.parametrize("variant", MAKERS)
def test_parameters_of_every_part(variant: str) -> None:
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in on_meta(variant).named_parameters():
        found[part_of(name)] += parameter.numel()
    assert tuple(found.values()) == PARAMETERS[variant]
    total = {"tiny": 4_298_988, "base": 9_257_302, "large": 16_099_312}[variant]
    assert sum(found.values()) == total
    bare = on_meta(variant, features_only=True)
    without = sum(each.numel() for each in bare.parameters())
    assert without == total - PARAMETERS[variant][-1]


def test_parameters_inside_a_ladder_block() -> None:
    first, last = (on_meta("base").layers[i].blocks[0] for i in (0, 1))
    for block, counts in ((first, (58_468, 49_156, 49_156)), (last, (227_528, 190_472, 190_472))):
        branches = tuple(sum(p.numel() for p in each.parameters()) for each in block.blocks)
        assert branches == counts
    for part, counts in (("se", (83_376, 332_640)), ("pointconv", (83_232, 332_352))):
        for block, count in zip((first, last), counts, strict=True):
            assert sum(p.numel() for p in block.get_submodule(part).parameters()) == count


@pytest.mark.parametrize("variant", MAKERS)
def test_multiply_adds_of_every_part(variant: str) -> None:
    model = on_meta(variant).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    found = dict.fromkeys(PARTS, 0.0)
    for key, by_operator in counter.get_flop_counts().items():
        name = key.removeprefix("PSLT.")
        if COUNTED.fullmatch(name):
            found[part_of(name)] += sum(by_operator.values()) / 2e6
    # The tables round to 0.01 M, which is more than 0.1% of a head.
    for (part, count), exact in zip(found.items(), MULTIPLY_ADDS[variant], strict=True):
        assert count == pytest.approx(exact, rel=1e-3, abs=0.0051), part
    total = {"tiny": 899.9, "base": 1971.0, "large": 3456.2}[variant]
    assert counter.get_total_flops() / 2e6 == pytest.approx(total, rel=1e-3)


def test_names_are_those_of_the_authors() -> None:
    plain, ours = pair()
    skipped = ("relative_position_index", "attn_mask")
    names = [name for name in plain.state_dict() if not name.endswith(skipped)]
    assert list(ours.state_dict()) == names
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_initial_values() -> None:
    model = pslt_tiny()
    for name, parameter in model.named_parameters():
        if name.endswith("bias_table"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.weight.abs().max() > 0.05
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_plain_model_at_inference(size: tuple[int, int]) -> None:
    plain, ours = (each.eval() for each in pair())
    x = images(2, 3, *size)
    with torch.no_grad():
        assert_error_rule(ours(x), plain(x), plain(x))
        for mine, exact in zip(ours.features(x), plain.features(x), strict=True):
            assert_error_rule(mine, exact, exact)


def test_float32_keeps_the_error_rule() -> None:
    plain, ours = (each.eval() for each in pair(torch.float32))
    x = images(1, 3, 224, 224, dtype=torch.float32)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        assert_error_rule(ours(x), plain(x), exact)


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_training_step_equals_the_plain_models(size: tuple[int, int]) -> None:
    """With stochastic depth: the same seed drops the same residuals."""
    plain, ours = pair(drop_path_rate=0.5)
    x, upstream = images(3, 3, *size), images(3, 5)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for model in (plain, ours):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        named = {"x": leaf, **dict(model.named_parameters())}
        grads = torch.autograd.grad((out * upstream).sum(), tuple(named.values()))
        found.append((out, dict(zip(named, grads, strict=True))))
    (exact, exact_grads), (out, grads) = found
    assert_error_rule(out, exact, exact, factor=8.0)
    scale = max(each.abs().max().item() for each in exact_grads.values())
    for name, grad in exact_grads.items():
        # Some are zero but for rounding: a batch norm takes away what a bias before it adds.
        bound = 1e-10 * grad.abs().max().item() + 1e-13 * scale
        assert (grads[name] - grad).abs().max().item() <= bound, name
    state = plain.state_dict()
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, state[name], rtol=1e-11, atol=1e-12, msg=name)
        assert buffer.dtype == state[name].dtype


def test_float32_training_keeps_the_error_rule() -> None:
    plain, ours = pair(torch.float32, drop_path_rate=0.0)
    wide = copy.deepcopy(plain).double()
    x = images(2, 3, 224, 224, dtype=torch.float32)
    out, mine, exact = plain(x), ours(x), wide(x.double())
    assert_error_rule(mine, out, exact)
    for model, result in ((plain, out), (ours, mine), (wide, exact)):
        result.square().sum().backward()
        assert all(each.grad is not None for each in model.parameters())
    for index in (0, 1):
        names = [
            f"layers.{index}.blocks.0.blocks.1.{n}" for n in ("norm1.weight", "attn.kv.weight")
        ]
        for name in names:
            mine, narrow, good = (m.get_parameter(name).grad for m in (ours, plain, wide))
            assert_error_rule(mine, narrow, good, factor=3.0, name=name)


def test_stochastic_depth_grows_along_the_blocks() -> None:
    rates = [each.blocks[0].drop for stage in on_meta("base").layers for each in stage.blocks]
    assert rates == pytest.approx([0.2 * i / 12 for i in range(13)])
    for stage in on_meta("base").layers:
        for block in stage.blocks:
            assert len({branch.drop for branch in block.blocks}) == 1
    _, ours = pair(drop_path_rate=0.999999)
    with torch.no_grad():
        block = ours.layers[1].blocks[0]
        x = images(4, 7, 7, 192)
        # Nothing but the fusion is left of a block that drops all residuals.
        assert torch.equal(block.blocks[0](x[..., :64], None), x[..., :64])
        block.eval()
        assert not torch.equal(block.blocks[0](x[..., :64], None), x[..., :64])


def test_frozen_batch_norms() -> None:
    """As in detection: norms at inference, the rest in training."""
    plain, ours = pair(drop_path_rate=0.0)
    for model in (plain, ours):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    x = images(1, 3, 112, 64)
    out, exact = ours(x), plain(x)
    assert_error_rule(out, exact, exact)
    branch = ours.layers[0].blocks[0].blocks[1]
    branch.mlp.conv[5].train()
    with pytest.raises(ValueError, match="batch norms are in different modes; expected one"):
        ours(x)


def test_no_call_leaves_a_trace() -> None:
    """The released code keeps the small window for good once a map was small."""
    _, ours = pair()
    ours.eval()
    large, small = images(1, 3, 224, 160), images(1, 3, 64, 96)
    with torch.no_grad():
        first = ours(large)
        ours(small)
        assert torch.equal(ours(large), first)


def test_without_shifts() -> None:
    plain, ours = (each.eval() for each in pair(shifts=False))
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        assert_error_rule(ours(x), plain(x), plain(x))


@pytest.mark.parametrize(("height", "width"), [(9, 15), (8, 8), (10, 4)])
def test_ragged_maps_are_cut_not_padded(height: int, width: int) -> None:
    """Against attention over the whole map, with all pairs masked that share no rectangle."""
    plain, ours = ladder_blocks(48, 2, padding="ragged")
    x = images(2, height, width, 48)
    outs: list[Tensor] = []
    for branch, part in zip(plain.blocks, x.chunk(3, -1), strict=True):
        z = part + whole_map_attention(branch, part, outs[-1] if outs else None)
        outs.append(z + branch.mlp(branch.norm2(z)))
    t = plain.se(torch.cat(outs, -1))
    exact = plain.pointconv(t) + t
    assert_error_rule(ours(x), exact, exact)


def whole_map_attention(branch: nn.Module, x: Tensor, v: Tensor | None) -> Tensor:
    batch, height, width, dim = x.shape
    small = min(height, width) <= 7
    window, shift = (min(height, width), 0) if small else (7, branch.attn.shift)
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)

    def rectangle(at: Tensor) -> Tensor:
        return torch.div(at - shift, window, rounding_mode="floor")

    same = (rectangle(rows)[:, None] == rectangle(rows)) & (
        rectangle(columns)[:, None] == rectangle(columns)
    )
    apart = [(at[:, None] - at).clamp(-6, 6) + 6 for at in (rows, columns)]
    bias = branch.attn.relative_position_bias_table[apart[0] * 13 + apart[1]].permute(2, 0, 1)
    n = branch.norm1(x).flatten(1, 2)
    attn, heads = branch.attn, branch.attn.heads
    parts = list((attn.qkv if v is None else attn.kv)(n).split(dim, -1))
    if v is not None:
        parts.append(v.flatten(1, 2))
    q, k, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in parts)
    scores = q @ k.transpose(-1, -2) * (dim // heads) ** -0.5 + bias
    a = scores.masked_fill(~same, -torch.inf).softmax(-1) @ value
    out = attn.proj(a.transpose(1, 2).flatten(2))
    return (out if v is None else out + n).view(batch, height, width, dim)


def test_bad_arguments() -> None:
    for options, message in (
        ({"dim": 30}, r"PSLT: dim is 30; allowed: multiples of 12"),
        ({"drop_path_rate": 1.0}, r"PSLT: drop_path_rate is 1.0; allowed: at least 0 and below 1"),
        ({"depths": (3,)}, r"PSLT: depths is \[3\]; allowed: two numbers above 0"),
        ({"heads": (4, 0)}, r"PSLT: heads is \[4, 0\]; allowed: two numbers above 0"),
        ({"padding": "swin"}, r"padding is 'swin'; allowed: authors, ragged"),
    ):
        with pytest.raises(ValueError, match=message):
            PSLT(**{"dim": 12, **options})
    with pytest.raises(ValueError, match=r"dim is 100; allowed: multiples of 3 \* heads = 12"):
        LadderBlock(100, 4)


def test_feature_maps_have_the_strides_of_a_backbone() -> None:
    model = PSLT(12, depths=(1, 1), features_only=True, drop_path_rate=0.0)
    maps = model(images(1, 3, 75, 130, dtype=torch.float32))
    assert [list(each.shape) for each in maps] == [
        [1, 24, 19, 33], [1, 48, 10, 17], [1, 96, 5, 9], [1, 192, 3, 5],
    ]  # fmt: skip
    sum(each.square().mean() for each in maps).backward()
    missing = [name for name, each in model.named_parameters() if each.grad is None]
    assert missing == []
