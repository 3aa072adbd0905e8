"""Swin layers of torchvision and timm, swapped and not; stand-ins for them, and they themselves.

The libraries' own layers are tested where the libraries import.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_swin import STAND_INS
from torch import Tensor, nn

import ppmoe_ops
from ppmoe_models import restore_attention, swin_layers, use_window_attention

PLACES = {
    "torchvision": "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision_v2": "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
    "timm": "timm.models.swin_transformer.SwinTransformerBlock",
    "timm_v2": "timm.models.swin_transformer_v2.SwinTransformerV2Block",
}
# Beside another torch, torchvision has no kernels but registers shapes for two of them.
_WITHOUT_KERNELS = ("nms", "qnms")
_DEFINED: list[torch.library.Library] = []


def class_of(peer: str) -> Any:
    """A library's class, or a skip."""
    module, _, name = PLACES[peer].rpartition(".")
    library = peer.partition("_")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} does not import: it is not installed")
    for attempt in range(2):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, RuntimeError) as error:
            if attempt:
                pytest.skip(f"{library} does not import: {error}")
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _DEFINED.append(torch.library.Library("torchvision", "FRAGMENT"))
            for operator in _WITHOUT_KERNELS:
                _DEFINED[-1].define(operator + schema)
    raise AssertionError


def make(
    kind: Any, peer: str, window: tuple[int, int], shift: tuple[int, int], dropout: float = 0.0
) -> Any:
    """A layer of 16 channels and 2 heads with parameters that all matter."""
    if peer.startswith("torchvision"):
        layer = kind(16, list(window), list(shift), 2)
        layer.attention_dropout = dropout
    else:
        layer = kind(
            16, (14, 21), num_heads=2, window_size=window, shift_size=shift, attn_drop=dropout,
            dynamic_mask=True,
        )  # fmt: skip
    for name, parameter in layer.named_parameters():
        if "logit_scale" in name:
            nn.init.uniform_(parameter, 0.5, 2.5)
        else:
            nn.init.normal_(parameter, std=0.4)
    return layer.double()


def run(layer: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    layer.zero_grad()
    out = layer(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = {name: each.grad for name, each in layer.named_parameters()}
    return out.detach(), {
        name: each.clone() for name, each in gradients.items() if each is not None
    }


CASES = [
    # map, window, shift
    ((14, 21), (7, 7), (3, 3)),
    ((14, 21), (7, 7), (0, 0)),
    ((9, 16), (7, 7), (0, 0)),
    ((12, 12), (4, 6), (2, 3)),
    ((15, 17), (7, 7), (3, 3)),
    ((15, 17), (7, 7), (3, 0)),
    ((7, 14), (7, 7), (3, 3)),
]


def check(
    kind: Any, peer: str, height: int, width: int, window: Any, shift: Any, said: Any
) -> None:
    layer, x = make(kind, peer, window, shift), torch.randn(2, height, width, 16).double()
    window, shift = layer.window_size, layer.shift_size  # timm fits them to its maps
    own = run(layer, x)
    names, before = list(layer.state_dict()), len(said())
    assert use_window_attention(layer) == 1
    swapped = run(layer, x)
    assert list(layer.state_dict()) == names
    torch.testing.assert_close(own[0], swapped[0], rtol=1e-9, atol=1e-10)
    assert own[1].keys() == swapped[1].keys()
    for name, gradient in own[1].items():
        torch.testing.assert_close(gradient, swapped[1][name], rtol=1e-7, atol=1e-7, msg=name)
    # timm's other ways of padding are its own.
    odd = peer.startswith("timm") and any(shift) and (height % window[0] or width % window[1])
    assert len(said()) == before + bool(odd)
    assert restore_attention(layer) == 1
    assert torch.equal(run(layer, x)[0], own[0])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been announced; nothing counts as said before."""
    caplog.set_level(logging.WARNING, "ppmoe_models")

    def messages() -> list[str]:
        swin_layers._warn.cache_clear()
        return [each.message for each in caplog.records if each.name == "ppmoe_models"]

    return messages


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("peer", PLACES)
def test_outputs_and_gradients(peer: str, case: Any, said: Any) -> None:
    (height, width), window, shift = case
    check(STAND_INS[peer], peer, height, width, window, shift, said)


@pytest.mark.parametrize("peer", PLACES)
def test_the_libraries_own_layers(peer: str, said: Any) -> None:
    for (height, width), window, shift in CASES:
        check(class_of(peer), peer, height, width, window, shift, said)


@pytest.mark.parametrize("peer", PLACES)
def test_attention_dropout_is_the_librarys(peer: str, said: Any) -> None:
    layer, x = make(STAND_INS[peer], peer, (7, 7), (3, 3), 0.3), torch.randn(1, 14, 21, 16).double()
    torch.manual_seed(1)
    own = layer(x)
    use_window_attention(layer)
    torch.manual_seed(1)
    assert torch.equal(layer(x), own)
    assert [each.endswith("computes its attention itself: attention dropout") for each in said()]
    layer.eval()
    swapped = layer(x)
    restore_attention(layer)
    torch.testing.assert_close(layer(x), swapped)


@pytest.mark.parametrize("peer", PLACES)
def test_heads_may_have_any_width(peer: str) -> None:
    layer, x = make(STAND_INS[peer], peer, (7, 7), (3, 3)), torch.randn(1, 14, 21, 16).double()
    assert layer(x).shape == x.shape
    own = layer(x)
    use_window_attention(layer)
    torch.testing.assert_close(layer(x), own)


def test_hooks_on_what_the_operator_replaces_are_called(said: Any) -> None:
    layer = make(STAND_INS["timm"], "timm", (7, 7), (3, 3))
    use_window_attention(layer)
    x, seen = torch.randn(1, 14, 21, 16).double(), []
    handle = layer.attn.register_forward_hook(lambda *_: seen.append(1))
    layer(x)
    assert seen == [1]
    assert "hooks on its attention" in said()[0]
    handle.remove()
    layer(x)
    assert len(said()) == 1


def test_a_mask_for_another_map_is_timms_own(said: Any) -> None:
    layer = make(STAND_INS["timm"], "timm", (7, 7), (3, 3))
    layer.dynamic_mask = False
    use_window_attention(layer)
    layer(torch.randn(1, 14, 21, 16).double())
    assert not said()
    # As many windows, which is why timm does not notice.
    layer(torch.randn(1, 21, 14, 16).double())
    assert "its mask is for another map" in said()[0]


def test_biases_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(STAND_INS["timm_v2"], "timm_v2", (7, 7), (3, 3)), torch.randn(1, 14, 21, 16)
    own = layer(x.double())
    layer.attn.qkv_bias_separate = True
    use_window_attention(layer)
    torch.testing.assert_close(layer(x.double()), own)
    layer.attn.q_bias = layer.attn.v_bias = layer.attn.k_bias = None
    taken: list[Tensor] = []
    operator = ppmoe_ops.window_attention
    monkeypatch.setattr(
        ppmoe_ops, "window_attention", lambda *args: taken.append(args[2]) or operator(*args)
    )
    layer(x.double())
    torch.testing.assert_close(taken[0], layer.attn.qkv(x.double()).chunk(3, -1)[2])
