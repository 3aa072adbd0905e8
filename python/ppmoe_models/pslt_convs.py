"""The parts of PSLT's first two stages: the stem, and MBV2 blocks with squeeze and excitation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppmoe_models.pslt_blocks import Gate


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2; GELU comes before the batch norm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((in_chans, dim // 2, 2), (dim // 2, dim, 1), (dim, dim, 1)):
            conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            layers += [conv, nn.GELU(), nn.BatchNorm2d(after)]
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


class ConvBlock(nn.Module):
    """MBV2 with squeeze and excitation on its output; hidden is four times the input."""

    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False), nn.GELU(), nn.BatchNorm2d(hidden),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.GELU(),
            nn.BatchNorm2d(hidden), nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.se = Gate(out)
        self.residual = stride == 1 and dim == out

    def forward(self, x: Tensor) -> Tensor:
        return gated(self.conv(x), self.se, x if self.residual else None)


def gated(out: Tensor, gate: Gate, residual: Tensor | None) -> Tensor:
    """Scale channels by a gate of their means over the map, and add what came in."""
    scale = gate.fc2(gate.fc1(out.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
    return out * scale if residual is None else torch.addcmul(residual, out, scale)
