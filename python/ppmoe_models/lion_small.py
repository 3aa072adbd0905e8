"""`SmallViT`: a vision transformer for small images, the backbone that `train_lion` pre-trains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallBlock(nn.Module):
    """Attention and a feed-forward network, each behind a layer norm and added to its input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class SmallViT(nn.Module):
    """Images [B, in_chans, image_size, image_size] to the class token's features [B, dim].

    Args:
        dim: of a token.
        depth, heads: blocks, and heads of each.
        image_size, patch_size: pixels a side.
        in_chans: channels of an image.

    Example:
        >>> import torch
        >>> SmallViT(32, image_size=8, patch_size=2)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        dim: int = 64,
        *,
        depth: int = 4,
        heads: int = 4,
        image_size: int = 8,
        patch_size: int = 2,
        in_chans: int = 1,
    ) -> None:
        super().__init__()
        for name, whole, part in (("dim", dim, heads), ("image_size", image_size, patch_size)):
            if part < 1 or whole < 1 or whole % part:
                raise ValueError(f"SmallViT: {name} is {whole}; allowed: multiples of {part}")
        self.dim, self.image_size = dim, image_size
        self.patch_embed = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        tokens = (image_size // patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        self.blocks = nn.ModuleList(SmallBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.size(0), -1, -1), x), 1) + self.position
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x[:, 0])
        return out
