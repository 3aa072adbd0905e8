"""A PSLT that is fused for inference: the same results, and nothing in common with its model."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from pslt_pair import SIZES, calls, images, pair
from torch import nn

from ppmoe_models import PSLT, pslt_fused_convs
from ppmoe_ops.testing import assert_error_rule


def fused_pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, PSLT]:
    plain, ours = pair(dtype, **options)
    return plain.eval(), ours.fuse_for_inference()


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_equals_the_plain_model(size: tuple[int, int]) -> None:
    """In float64: a batch norm's offset folded wrongly at a border shows in all later maps."""
    plain, fused = fused_pair()
    x = images(2, 3, *size)
    for found, exact in zip(fused.features(x), plain.features(x), strict=True):
        assert_error_rule(found, exact, exact, factor=4.0)
    assert_error_rule(fused(x), plain(x), plain(x))


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
@torch.no_grad()
def test_float32_keeps_the_error_rule(size: tuple[int, int]) -> None:
    plain, fused = fused_pair(torch.float32)
    x = images(1, 3, *size, dtype=torch.float32)
    exact = copy.deepcopy(plain).double().features(x.double())
    for found, narrow, good in zip(fused.features(x), plain.features(x), exact, strict=True):
        assert_error_rule(found, narrow, good)


@torch.no_grad()
def test_bfloat16_keeps_the_error_rule() -> None:
    plain, ours = pair(torch.bfloat16)
    x = images(1, 3, 224, 64, dtype=torch.bfloat16)
    exact = copy.deepcopy(plain).double().eval()(x.double())
    for fused in (ours.fuse_for_inference(), ours.float().fuse_for_inference().bfloat16()):
        out = fused(x)
        assert out.dtype == torch.bfloat16
        assert_error_rule(out, plain.eval()(x), exact)


@torch.no_grad()
def test_a_batch_norm_without_scale() -> None:
    """Its offset is all that is left, inside the map and not beside it."""
    plain, ours = pair()
    for model in (plain, ours):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[::2] = 0
    x = images(1, 3, 96, 64)
    exact = plain.eval()(x)
    assert_error_rule(ours.fuse_for_inference()(x), exact, exact)


@torch.no_grad()
def test_a_ladder_block_is_one_operator() -> None:
    _, fused = fused_pair()
    with calls() as mode:
        fused(images(1, 3, 224, 224))
    assert [name for name, _ in mode.seen] == ["ladder_block"] * 3
    for (_, args), (heads, shift) in zip(mode.seen, [(4, 3), (4, 3), (8, 0)], strict=True):
        assert len(args[1]) == 54
        assert args[2:] == (heads, [7, 7], [shift, shift]) or args[2:] == (
            heads,
            (7, 7),
            (shift,) * 2,
        )
    with calls() as mode:
        fused(images(1, 3, 144, 144))
    # 9x9 maps are padded in the authors' way, for which there is no fused operator; 5x5 are not.
    names = [name for name, _ in mode.seen]
    assert names.count("window_attention") == 6
    assert names.count("ladder_block") == 1


@torch.no_grad()
def test_ragged_maps_are_one_operator_too() -> None:
    _, ours = pair(padding="ragged")
    fused, x = ours.eval().fuse_for_inference(), images(1, 3, 144, 240)
    with calls() as mode:
        found = fused(x)
    assert [name for name, _ in mode.seen] == ["ladder_block"] * 3
    assert_error_rule(found, ours(x), ours(x))


@torch.no_grad()
def test_parts_of_a_batch_make_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = fused_pair()
    x = images(5, 3, 64, 48)
    whole = fused.features(x)
    for images_at_once in (1, 2):
        nbytes = images_at_once * 48 * 32 * 24 * 8
        monkeypatch.setattr(pslt_fused_convs, "_CACHED_BYTES", nbytes)
        for part, exact in zip(fused.features(x), whole, strict=True):
            assert_error_rule(part, exact, exact)
    for part, exact in zip(fused.features(x[:0]), whole, strict=True):
        assert part.shape == (0, *exact.shape[1:])
    assert fused(x[:0]).shape == (0, 5)


@torch.no_grad()
def test_copies_and_conversions() -> None:
    _, fused = fused_pair(torch.float32)
    x = images(1, 3, 64, 64, dtype=torch.float32)
    out = fused(x)
    assert torch.equal(copy.deepcopy(fused)(x), out)
    stored = io.BytesIO()
    torch.save(fused, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(x), out)
    wide = copy.deepcopy(fused).double()(x.double())
    torch.testing.assert_close(out.double(), wide, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"images are torch.float64, the fused model is"):
        fused(x.double())


@torch.no_grad()
def test_shares_nothing_with_its_model() -> None:
    _, ours = pair(torch.float32)
    ours.eval()
    fused, x = ours.fuse_for_inference(), images(1, 3, 96, 64, dtype=torch.float32)
    before = fused(x)
    for each in (*ours.parameters(), *ours.buffers()):
        each.zero_()
    assert torch.equal(fused(x), before)
    _, ours = pair(torch.float32)
    state = {name: each.clone() for name, each in ours.state_dict().items()}
    ours.fuse_for_inference()(x)
    assert ours.training
    assert all(torch.equal(each, state[name]) for name, each in ours.state_dict().items())


def test_refuses_to_be_trained_or_loaded() -> None:
    _, fused = fused_pair(torch.float32)
    x = images(1, 3, 64, 64, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="train the model it was made from"):
        fused.train()
    with pytest.raises(RuntimeError, match="load the state dict first, then fuse"):
        fused.load_state_dict({})
    with pytest.raises(RuntimeError, match="fused for inference already"):
        fused.fuse_for_inference()
    with pytest.raises(RuntimeError, match="asked for a gradient to x"):
        fused(x.requires_grad_())
    assert not fused(x.detach()).requires_grad
    assert not fused.eval().training


@torch.no_grad()
def test_autocast() -> None:
    _, fused = fused_pair(torch.float32)
    x = images(1, 3, 224, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), fused(x), rtol=0.1, atol=0.1)


@pytest.mark.slow
@torch.no_grad()
def test_compiles_as_one_graph(tmp_path: Path) -> None:
    _, fused = fused_pair(torch.float32)
    compiled = torch.compile(fused, fullgraph=True)
    x = images(2, 3, 224, 64, dtype=torch.float32)
    torch.testing.assert_close(compiled(x), fused(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["fused", "inference", "training"])
def test_graphs_take_any_batch(form: str) -> None:
    torch._dynamo.reset()
    _, model = pair(torch.float32, drop_path_rate=0.3, depths=(1, 1))
    model = model.fuse_for_inference() if form == "fused" else model.train(form == "training")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for batch in (3, 2):
        x = images(batch, 3, 224, 64, dtype=torch.float32)
        # With height and width symbolic too, torch takes minutes over its convolutions' shapes.
        torch._dynamo.mark_dynamic(x, 0)
        with torch.set_grad_enabled(form == "training"):
            torch.manual_seed(7)
            exact = model(x)
            torch.manual_seed(7)
            found = compiled(x)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        if form == "training":
            found.square().sum().backward()
    torch._dynamo.reset()
