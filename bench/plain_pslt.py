"""PSLT in plain PyTorch: what the package's model is measured against, and compared with in tests.

Windows are made by roll, partition and an additive mask, as is usual; it shares no code with
`ppmoe_ops`. Maps are [B, H, W, C] in the ladder. State dicts have the authors' names, their buffers
(`relative_position_index`, `attn_mask`) included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW, SHIFT = 7, 3
DEPTHS, HEADS = (10, 3), (4, 8)
WIDTHS = {"tiny": 24, "base": 36, "large": 48}


def partition(x: Tensor, window: int) -> Tensor:
    """[B, H, W, C] to [B * windows, window * window, C]."""
    x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window))
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def merge(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of `partition`."""
    x = windows.view(-1, height // window, width // window, window, window, windows.size(-1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def relative_index(window: int, table: int = WINDOW) -> Tensor:
    """[N, N]: the row of a table made for windows of `table` that a query and a key meet at."""
    at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    apart = at[:, None] - at[None] + table - 1
    return apart[..., 0] * (2 * table - 1) + apart[..., 1]


def shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """[windows, N, N]: -100 where one of two tokens of a rolled map has wrapped around."""

    def wrapped(length: int) -> Tensor:
        at = torch.arange(length)
        return (at >= length - shift if shift > 0 else at < -shift).float()

    flags = wrapped(height)[:, None] * 2 + wrapped(width)[None]
    flags = partition(flags[None, :, :, None], window).squeeze(-1)
    return torch.where(flags[:, :, None] == flags[:, None], 0.0, -100.0)


class DropPath(nn.Module):
    """Stochastic depth: a residual is dropped for a whole image."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.size(0), 1, 1, 1).bernoulli_(keep).div_(keep)


class WindowAttention(nn.Module):
    """Attention in windows; with `given`, the value comes from the caller and has no weights."""

    relative_position_index: Tensor
    attn_mask: Tensor | None

    def __init__(self, dim: int, heads: int, shift: int, given: bool, sdpa: bool) -> None:
        super().__init__()
        self.heads, self.shift, self.sdpa = heads, shift, sdpa
        table = torch.empty((2 * WINDOW - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.register_buffer("relative_position_index", relative_index(WINDOW))
        self.given = given
        if given:
            self.kv = nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self, window: int, mask: Tensor | None) -> Tensor:
        """[1 or windows, heads, N, N]."""
        index = self.relative_position_index
        if window != WINDOW:
            index = relative_index(window).to(index.device)
        bias = self.relative_position_bias_table[index.flatten()].view(*index.shape, self.heads)
        bias = bias.permute(2, 0, 1).unsqueeze(0)
        return bias if mask is None else bias + mask.to(bias.dtype).unsqueeze(1)

    def forward(self, n: Tensor, v: Tensor | None, window: int, mask: Tensor | None) -> Tensor:
        """n, v [B * windows, N, C] -> the same; mask [windows, N, N]."""
        rows, count, dim = n.shape
        parts = (self.kv if self.given else self.qkv)(n)
        parts = parts.view(rows, count, -1, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k = parts[0], parts[1]
        v = parts[2] if v is None else v.view(rows, count, self.heads, -1).transpose(1, 2)
        bias = self.bias(window, mask)
        if self.sdpa:
            full = bias.repeat(rows // bias.size(0), 1, 1, 1) if bias.size(0) > 1 else bias
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=full)
        else:
            scores = (q * (dim // self.heads) ** -0.5) @ k.transpose(-2, -1)
            windows = bias.size(0)
            scores = (scores.unflatten(0, (-1, windows)) + bias).flatten(0, 1)
            out = scores.softmax(-1) @ v
        u: Tensor = self.proj(out.transpose(1, 2).reshape(rows, count, dim))
        return u + n if self.given else u


class Mlp(nn.Module):
    """1x1, GELU, BN, depth-wise 3x3, GELU, BN, 1x1, BN on the whole map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, 1), nn.GELU(), nn.BatchNorm2d(dim),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.GELU(), nn.BatchNorm2d(dim),
            nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1)


class Branch(nn.Module):
    """One branch of a ladder block; `ffn=False` leaves the attention sub-layer alone."""

    def __init__(
        self, dim: int, heads: int, shift: int, given: bool, drop: float, sdpa: bool, ffn: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, shift, given, sdpa)
        self.drop_path = DropPath(drop)
        self.ffn = ffn
        if ffn:
            self.norm2 = nn.LayerNorm(dim)
            self.mlp = Mlp(dim)
        self.register_buffer("attn_mask", None)

    def keep_mask(self, size: int) -> None:
        """Keep the mask of square maps of this size, as a buffer."""
        if self.attn.shift and size > WINDOW:
            side = -(-size // WINDOW) * WINDOW
            self.attn_mask = shift_mask(side, side, WINDOW, self.attn.shift)

    def _mask(self, height: int, width: int, window: int, shift: int) -> Tensor | None:
        if shift == 0:
            return None
        kept, windows = self.attn_mask, (height // window) * (width // window)
        if kept is not None and height == width and kept.size(0) == windows:
            return kept
        weight = self.attn.proj.weight
        return shift_mask(height, width, window, shift).to(weight)

    def attention(self, x: Tensor, v: Tensor | None) -> Tensor:
        """The attention sub-layer without its outer residual."""
        height, width = x.shape[1:3]
        small = min(height, width) <= WINDOW
        window, shift = (min(height, width), 0) if small else (WINDOW, self.attn.shift)
        n = self.norm1(x)
        below, right = -height % window, -width % window
        mask = self._mask(height + below, width + right, window, shift)

        def windows(t: Tensor) -> Tensor:
            if below or right:
                t = F.pad(t, (0, 0, 0, right, 0, below))
            if shift:
                t = t.roll((-shift, -shift), (1, 2))
            return partition(t, window)

        u = self.attn(windows(n), None if v is None else windows(v), window, mask)
        u = merge(u, window, height + below, width + right)
        if shift:
            u = u.roll((shift, shift), (1, 2))
        return u[:, :height, :width]

    def forward(self, x: Tensor, v: Tensor | None) -> Tensor:
        z = x + self.drop_path(self.attention(x, v))
        return z + self.drop_path(self.mlp(self.norm2(z))) if self.ffn else z


class SqueezeExcite(nn.Module):
    """Per token in the ladder (`pool=False`), per image in a convolution block."""

    def __init__(self, dim: int, pool: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.pool = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim), pool

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3)) if self.pool else x
        scale = self.fc2(self.fc1(means).relu()).sigmoid()
        return x * (scale[:, :, None, None] if self.pool else scale)


class LadderBlock(nn.Module):
    """Three branches, each giving its output to the next as the value, and the fusion."""

    def __init__(
        self,
        dim: int,
        heads: int,
        drop: float = 0.0,
        *,
        sdpa: bool = False,
        shifts: bool = True,
        ffn: bool = True,
    ) -> None:
        super().__init__()
        steps = (0, SHIFT, -SHIFT) if shifts else (0, 0, 0)
        self.blocks = nn.ModuleList(
            Branch(dim // 3, heads, shift, i > 0, drop, sdpa, ffn) for i, shift in enumerate(steps)
        )
        self.se = SqueezeExcite(dim, pool=False)
        self.pointconv = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        outs: list[Tensor] = []
        for branch, part in zip(self.blocks, x.chunk(3, -1), strict=True):
            outs.append(branch(part, outs[-1] if outs else None))
        t = self.se(torch.cat(outs, -1))
        out: Tensor = self.pointconv(t)
        return out + t


def ladder_core(dim: int, heads: int, *, sdpa: bool = False) -> LadderBlock:
    """A ladder block without its FFNs: three attention sub-layers and the fusion."""
    return LadderBlock(dim, heads, sdpa=sdpa, ffn=False)


class PatchMerging(nn.Module):
    """Swin's: 2x2 neighbours, LN, linear; odd sides are zero-padded."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.size(2) % 2, 0, x.size(1) % 2))
        parts = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        out: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return out


class Stage(nn.Module):
    """Ladder blocks, and in the first stage the merging behind them."""

    downsample: PatchMerging | None

    def __init__(
        self, dim: int, heads: int, drops: list[float], merging: bool, sdpa: bool, shifts: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            LadderBlock(dim, heads, drop, sdpa=sdpa, shifts=shifts) for drop in drops
        )
        self.downsample = PatchMerging(dim) if merging else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


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
        self.se = SqueezeExcite(out, pool=True)
        self.residual = stride == 1 and dim == out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.se(self.conv(x))
        return x + out if self.residual else out


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2."""

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


class PlainPSLT(nn.Module):
    """The whole classifier; `img_size` is the one whose masks are kept, any other works too."""

    def __init__(
        self,
        variant: str = "base",
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.2,
        img_size: int = 224,
        sdpa: bool = False,
        shifts: bool = True,
        dim: int | None = None,
        depths: tuple[int, int] = DEPTHS,
    ) -> None:
        super().__init__()
        d = WIDTHS[variant] if dim is None else dim
        self.patch_embed = Stem(in_chans, d)
        sizes = ((d, 2 * d, 2), (2 * d, 2 * d, 1), (2 * d, 2 * d, 1), (2 * d, 4 * d, 2),
                 (4 * d, 4 * d, 1), (4 * d, 4 * d, 1), (4 * d, 8 * d, 2))  # fmt: skip
        self.conv_layers = nn.ModuleList(ConvBlock(*each) for each in sizes)
        rates = torch.linspace(0, drop_path_rate, sum(depths), dtype=torch.float64).tolist()
        cut = depths[0]
        self.layers = nn.ModuleList([
            Stage(8 * d, HEADS[0], rates[:cut], True, sdpa, shifts),
            Stage(16 * d, HEADS[1], rates[cut:], False, sdpa, shifts),
        ])  # fmt: skip
        self.norm = nn.LayerNorm(16 * d)
        self.head = nn.Linear(16 * d, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for stage, stride in zip(self.layers, (16, 32), strict=True):
            for branch in stage.modules():
                if isinstance(branch, Branch):
                    branch.keep_mask(-(-img_size // stride))

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps [B, C, H, W] at strides 4, 8, 16 and 32; the third is taken before merging."""
        x = self.patch_embed(x)
        maps: list[Tensor] = []
        for i, block in enumerate(self.conv_layers):
            x = block(x)
            if i in (2, 5):
                maps.append(x)
        x = x.permute(0, 2, 3, 1)
        for stage in self.layers:
            assert isinstance(stage, Stage)
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        last = self.features(x)[-1].permute(0, 2, 3, 1)
        out: Tensor = self.head(self.norm(last.flatten(1, 2)).mean(1))
        return out
