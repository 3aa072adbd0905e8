"""The parts of PSLT's last two stages: ladder blocks on the `ladder_attention` operators, merging.

Maps are [B, H, W, C]. Modules only hold parameters where an operator does their work; their names
are those of the authors' state dicts.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppmoe_ops

WINDOW = 7
SHIFT = 3
PADDINGS = ("authors", "ragged")


def window_and_shift(height: int, width: int, shift: int) -> tuple[int, int]:
    """Side of the windows and shift on a map of this size: small maps are one window across."""
    side = min(height, width)
    return (max(side, 1), 0) if side <= WINDOW else (WINDOW, shift)


def smaller_table(table: Tensor, window: int) -> Tensor:
    """The rows that a bias table has in common with that of a smaller window."""
    if window == WINDOW:
        return table
    side, cut = 2 * WINDOW - 1, WINDOW - window
    inner = table.unflatten(0, (side, side))[cut : side - cut, cut : side - cut]
    return inner.flatten(0, 1)


def _draw_row_scale(x: Tensor, rate: float) -> Tensor:
    """[B]: 0 where an image loses a residual, else what makes up for it."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.empty(x.size(0), dtype=wide, device=x.device)
    return scale.bernoulli_(1 - rate).div_(1 - rate)


class BranchAttention(nn.Module):
    """Parameters of a branch's attention; with `given`, the value comes from the branch before."""

    def __init__(self, dim: int, heads: int, given: bool) -> None:
        super().__init__()
        table = torch.empty((2 * WINDOW - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        # The authors' name; its outputs are queries, then keys.
        self.add_module("kv" if given else "qkv", nn.Linear(dim, (2 if given else 3) * dim))
        self.proj = nn.Linear(dim, dim)
        self.given = given

    @property
    def into(self) -> nn.Linear:
        return cast(nn.Linear, self.kv if self.given else self.qkv)


class BranchFFN(nn.Module):
    """Parameters and running statistics of `ladder_ffn`, named as a sequence of layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, 1), nn.GELU(), nn.BatchNorm2d(dim),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.GELU(), nn.BatchNorm2d(dim),
            nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim),
        )  # fmt: skip

    @property
    def norms(self) -> list[nn.BatchNorm2d]:
        return [cast(nn.BatchNorm2d, self.conv[i]) for i in (2, 5, 7)]

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        return [cast(nn.Conv2d, self.conv[i]) for i in (0, 3, 6)]

    def forward(self, z: Tensor, norm: nn.LayerNorm, row_scale: Tensor | None) -> Tensor:
        first, deep, last = self.convolutions
        norms = self.norms
        training = norms[0].training
        if any(each.training != training for each in norms):
            raise ValueError("BranchFFN: its batch norms are in different modes; expected one")
        statistics: tuple[Tensor | None, Tensor | None] = (None, None)
        if not training:
            statistics = (
                torch.stack([cast(Tensor, each.running_mean) for each in norms]),
                torch.stack([cast(Tensor, each.running_var) for each in norms]),
            )
        out: Tensor
        out, mean, var = ppmoe_ops.ladder_ffn(
            z, norm.weight, norm.bias,
            first.weight.flatten(1), cast(Tensor, first.bias),
            deep.weight.squeeze(1), cast(Tensor, deep.bias),
            last.weight.flatten(1), cast(Tensor, last.bias),
            torch.stack([each.weight for each in norms]),
            torch.stack([each.bias for each in norms]),
            statistics[0], statistics[1], row_scale, training, norm.eps,
        )  # fmt: skip
        if training:
            self._update_running(mean, var, z.shape[:3].numel())
        return out

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, count: int) -> None:
        unbiased = var * (count / (count - 1))
        for norm, *found in zip(self.norms, mean.unbind(), unbiased.unbind(), strict=True):
            for running, value in zip((norm.running_mean, norm.running_var), found, strict=True):
                running = cast(Tensor, running)
                running.lerp_(value.to(running.dtype), cast(float, norm.momentum))
            cast(Tensor, norm.num_batches_tracked).add_(1)


class LadderBranch(nn.Module):
    """One branch: attention whose value may come from the branch before, and the FFN."""

    def __init__(
        self, dim: int, heads: int, shift: int, given: bool, drop: float, padding: str
    ) -> None:
        super().__init__()
        self.heads, self.shift, self.drop, self.padding = heads, shift, drop, padding
        self.norm1 = nn.LayerNorm(dim)
        self.attn = BranchAttention(dim, heads, given)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = BranchFFN(dim)

    def _row_scale(self, x: Tensor) -> Tensor | None:
        return _draw_row_scale(x, self.drop) if self.training and self.drop else None

    def forward(self, x: Tensor, v: Tensor | None) -> Tensor:
        z = self._attention(x, v, self._row_scale(x))
        out: Tensor = self.mlp(z, self.norm2, self._row_scale(x))
        return out

    def _attention(self, x: Tensor, v: Tensor | None, row_scale: Tensor | None) -> Tensor:
        height, width = x.shape[1:3]
        window, shift = window_and_shift(height, width, self.shift)
        table = smaller_table(self.attn.relative_position_bias_table, window)
        if self.padding == "authors" and (height % window or width % window):
            return self._padded_attention(x, v, row_scale, table, window, shift)
        into, out = self.attn.into, self.attn.proj
        return ppmoe_ops.ladder_attention(
            x, v, self.norm1.weight, self.norm1.bias, into.weight, into.bias, table,
            out.weight, out.bias, row_scale, self.heads, window, shift, self.norm1.eps,
        )  # fmt: skip

    def _padded_attention(
        self,
        x: Tensor,
        v: Tensor | None,
        row_scale: Tensor | None,
        table: Tensor,
        window: int,
        shift: int,
    ) -> Tensor:
        """The same with zeros right of and below the normalised map and the value.

        Zeros take part: they get queries and keys from the biases, and are attended to.
        """
        height, width, dim = x.shape[1:]
        pad = (0, 0, 0, -width % window, 0, -height % window)
        n = self.norm1(x)
        parts = self.attn.into(F.pad(n, pad)).split(dim, -1)
        value = parts[2] if v is None else F.pad(v.to(parts[0].dtype), pad)
        a = ppmoe_ops.window_attention(parts[0], parts[1], value, table, self.heads, window, shift)
        out = self.attn.proj(a[:, :height, :width])
        if v is not None:
            out = out + n
        if row_scale is not None:
            out = out * row_scale.to(out.dtype).view(-1, 1, 1, 1)
        return x + out


class Gate(nn.Module):
    """Parameters of a squeeze-and-excitation gate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim)


class LadderBlock(nn.Module):
    """Three branches with shifts 0, +3 and -3, each the value of the next, and their fusion.

    Args:
        dim: channels, a multiple of 3 * heads.
        heads: of each branch.
        drop: how often an image loses a residual in training.
        shifts: without them the windows of all branches lie alike.
        padding: what happens on maps that windows do not fit into; see `PSLT`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        drop: float = 0.0,
        *,
        shifts: bool = True,
        padding: str = "authors",
    ) -> None:
        super().__init__()
        if dim % (3 * heads) != 0:
            raise ValueError(
                f"LadderBlock: dim is {dim}; allowed: multiples of 3 * heads = {3 * heads}"
            )
        if padding not in PADDINGS:
            raise ValueError(f"LadderBlock: padding is '{padding}'; allowed: {', '.join(PADDINGS)}")
        self.heads, self.padding, self.shift = heads, padding, SHIFT if shifts else 0
        self.blocks = nn.ModuleList(
            LadderBranch(dim // 3, heads, shift, index > 0, drop, padding)
            for index, shift in enumerate((0, self.shift, -self.shift))
        )
        self.se = Gate(dim)
        self.pointconv = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        outs: list[Tensor] = []
        for branch, part in zip(self.blocks, x.chunk(3, -1), strict=True):
            outs.append(branch(part, outs[-1] if outs else None))
        first, second, last = self.se.fc1, self.se.fc2, self.pointconv
        return ppmoe_ops.pixel_adaptive_fusion(
            torch.cat(outs, -1), first.weight, first.bias, second.weight, second.bias,
            last.weight, last.bias,
        )  # fmt: skip


class PatchMerging(nn.Module):
    """Swin's: neighbours of 2x2, norm, linear. Odd sides get a row or column of zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows, columns = (height + 1) // 2, (width + 1) // 2
        if height != 2 * rows or width != 2 * columns:
            x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
        # Of the four neighbours, those of the even column come first, and of them the even row.
        x = x.unflatten(2, (columns, 2)).unflatten(1, (rows, 2)).permute(0, 1, 3, 4, 2, 5)
        out: Tensor = self.reduction(self.norm(x.flatten(3)))
        return out


class Stage(nn.Module):
    """Ladder blocks, and behind those of the first stage the merging."""

    downsample: PatchMerging | None

    def __init__(
        self,
        dim: int,
        heads: int,
        drops: list[float],
        *,
        merging: bool,
        shifts: bool,
        padding: str,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            LadderBlock(dim, heads, drop, shifts=shifts, padding=padding) for drop in drops
        )
        self.downsample = PatchMerging(dim) if merging else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
