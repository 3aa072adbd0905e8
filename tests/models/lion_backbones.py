"""Small backbones for the tests of LION and the other ways of tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel, SwinConfig, SwinModel, ViTConfig, ViTModel

from ppmoe_models.lion_small import SmallViT


class Plain(nn.Module):
    """A module that no library knows: one linear layer on pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.linear(images.flatten(1)).tanh()
        return out


def cnn() -> nn.Module:
    """[B, 3, H, W] to maps, with batch norm and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
    )  # fmt: skip


def vit(**more: Any) -> nn.Module:
    return ViTModel(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, hidden_dropout_prob=0.3,
    ), **more)  # fmt: skip


def swin() -> nn.Module:
    return SwinModel(SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    ))  # fmt: skip


def resnet() -> nn.Module:
    return ResNetModel(ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"
    ))  # fmt: skip


# Of each: what makes it, the channels and side of its images, the size of its features, and what
# has to be said to a TunedModel.
BACKBONES: dict[str, tuple[Any, tuple[int, int], int, dict[str, Any]]] = {
    "small": (lambda: SmallViT(24, depth=2), (1, 8), 24, {}),
    "plain": (Plain, (1, 8), 10, {"in_chans": 1, "image_size": 8}),
    "cnn": (cnn, (3, 12), 8, {"image_size": 12}),
    "vit": (vit, (3, 16), 16, {}),
    "swin": (swin, (3, 16), 16, {}),
    "resnet": (resnet, (3, 32), 12, {"image_size": 32}),
}
TRANSFORMERS = ("small", "vit")


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, int, dict[str, Any]]:
    """A backbone, four images, the size of its features, and what a TunedModel has to be told."""
    make, (channels, side), dim, options = BACKBONES[name]
    torch.manual_seed(seed)
    return make(), torch.randn(4, channels, side, side), dim, dict(options)
