"""What ladder-attention operators are called with: maps of PSLT and Swin, and seeded weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .seeded import Source

Arguments = tuple[Any, ...]
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Maps:
    """One call's worth of work.

    Attributes:
        batch, side: B square maps of so many rows and columns.
        width: channels of one branch; a block and its fusion have three times as many.
        heads: of one branch.
        dtype: of the data and of all weights.
        shift: of the windows, either sign.
        given: a branch's value is given to it; None is where windows are shifted.
        window: its side.
        training: batch norms take the statistics of the batch.
        seed: of everything random in it.
    """

    batch: int
    side: int
    width: int
    heads: int
    dtype: torch.dtype = torch.float32
    shift: int = 0
    window: int = 7
    training: bool = False
    given: bool | None = None
    seed: int = 0

    @property
    def later(self) -> bool:
        """Whether it is a branch whose value is that of the one before."""
        return self.shift != 0 if self.given is None else self.given

    @property
    def channels(self) -> int:
        """Of a block."""
        return 3 * self.width

    @property
    def grid(self) -> tuple[int, list[int], list[int]]:
        """Heads, window and shift, as operators take them."""
        return self.heads, [self.window] * 2, [self.shift] * 2

    @property
    def steps(self) -> tuple[int, int, int]:
        """Shifts of a block's branches: none where one window is the whole map, as in PSLT."""
        by = self.window // 2 if self.side > self.window else 0
        return 0, by, -by


def _maps(source: Source, work: Maps, channels: int) -> Tensor:
    return source.randn(work.batch, work.side, work.side, channels)


def _table(source: Source, work: Maps) -> Tensor:
    return source.randn((2 * work.window - 1) ** 2, work.heads)


def _norm(source: Source, *shape: int) -> tuple[Tensor, Tensor]:
    """Scale and offset, near those of a norm that has not been trained."""
    weight = 1 + source.randn(*shape, dtype=torch.float32, scale=0.1)
    return weight.to(source.workload.dtype), source.randn(*shape, scale=0.1)


def _linear(source: Source, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    return source.randn(outputs, inputs, scale=inputs**-0.5), source.randn(outputs, scale=0.1)


def _window_attention(work: Maps, device: torch.device) -> Arguments:
    """Queries, keys and values are slices of one projection."""
    source = Source(work, device)
    fused = _maps(source, work, 3 * work.width)
    return (*fused.chunk(3, -1), _table(source, work), *work.grid, None)


def _window_attention_backward(work: Maps, device: torch.device) -> Arguments:
    grad = _maps(Source(work, device, stream=1), work, work.width)
    return (grad, *_window_attention(work, device), True)


def attention_parameters(source: Source, work: Maps, given: bool) -> list[Tensor]:
    """ln_w, ln_b, w_in, b_in, bias_table, w_out and b_out of a branch."""
    g = work.width
    into = _linear(source, (2 if given else 3) * g, g)
    return [*_norm(source, g), *into, _table(source, work), *_linear(source, g, g)]


def _ladder_attention(work: Maps, device: torch.device) -> Arguments:
    """x is a slice of a block's map."""
    source, given = Source(work, device), work.later
    x = _maps(source, work, work.channels)[..., : work.width]
    v = _maps(source, work, work.width) if given else None
    return (x, v, *attention_parameters(source, work, given), None, *work.grid, EPS)


def _ladder_attention_backward(work: Maps, device: torch.device) -> Arguments:
    args = list(_ladder_attention(work, device))
    del args[8]
    grad = _maps(Source(work, device, stream=1), work, work.width)
    return (grad, *args, True, True)


def _ladder_ffn(work: Maps, device: torch.device) -> Arguments:
    source, g = Source(work, device), work.width
    x = _maps(source, work, g)
    parameters = [
        *_norm(source, g), *_linear(source, g, g),
        source.randn(g, 3, 3, scale=1 / 3), source.randn(g, scale=0.1),
        *_linear(source, g, g), *_norm(source, 3, g),
    ]  # fmt: skip
    running = source.randn(3, g, scale=0.1), (0.5 + source.rand(3, g)).to(work.dtype)
    return (x, *parameters, *running, None, work.training, EPS)


def _ladder_ffn_backward(work: Maps, device: torch.device) -> Arguments:
    x, *rest = _ladder_ffn(work, device)
    _, mean, var = torch.ops.ppmoe_ops.ladder_ffn(x, *rest)
    grad = _maps(Source(work, device, stream=1), work, work.width)
    return (grad, x, *rest[:10], mean, var, None, work.training, EPS)


def fusion_parameters(source: Source, work: Maps) -> list[Tensor]:
    """w1, b1, w2, b2, wp and bp; the gate is half as wide as the map."""
    c = work.channels
    sizes = ((c // 2, c), (c, c // 2), (c, c))
    return [each for size in sizes for each in _linear(source, *size)]


def _pixel_adaptive_fusion(work: Maps, device: torch.device) -> Arguments:
    source = Source(work, device)
    return (_maps(source, work, work.channels), *fusion_parameters(source, work))


def _pixel_adaptive_fusion_backward(work: Maps, device: torch.device) -> Arguments:
    grad = _maps(Source(work, device, stream=1), work, work.channels)
    return (grad, *_pixel_adaptive_fusion(work, device)[:6])


def core(work: Maps, device: torch.device) -> Arguments:
    """x and 27 parameters: seven of each branch, six of the fusion."""
    source = Source(work, device)
    x = _maps(source, work, work.channels)
    branches = [each for i in range(3) for each in attention_parameters(source, work, i > 0)]
    return (x, *branches, *fusion_parameters(source, work))


def _ladder_block(work: Maps, device: torch.device) -> Arguments:
    source, g = Source(work, device), work.width
    x = _maps(source, work, work.channels)
    parameters = []
    for given in (False, True, True):
        parameters += attention_parameters(source, work, given)
        parameters += [
            *_norm(source, g), *_linear(source, g, g),
            source.randn(g, 3, 3, scale=1 / 3), source.randn(g, scale=0.1),
            source.randn(g, 3, 3, scale=0.03), *_linear(source, g, g),
        ]  # fmt: skip
    parameters += fusion_parameters(source, work)
    _, window, _ = work.grid
    return x, parameters, work.heads, window, [work.steps[1]] * 2


BUILDERS: dict[str, Callable[[Any, torch.device], Arguments]] = {
    "window_attention": _window_attention,
    "window_attention_backward": _window_attention_backward,
    "ladder_attention": _ladder_attention,
    "ladder_attention_backward": _ladder_attention_backward,
    "ladder_ffn": _ladder_ffn,
    "ladder_ffn_backward": _ladder_ffn_backward,
    "pixel_adaptive_fusion": _pixel_adaptive_fusion,
    "pixel_adaptive_fusion_backward": _pixel_adaptive_fusion_backward,
    "ladder_block": _ladder_block,
}
