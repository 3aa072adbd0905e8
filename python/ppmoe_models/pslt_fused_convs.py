"""PSLT's stem and MBV2 blocks at inference, as one operator.

Convolutions are oneDNN's, with the GELU behind them and weights packed once, where it serves (CPU,
float32 and bfloat16), else torch's. The batch norm between a GELU and a zero-padded convolution is
applied to the map, as only then are the zeros at its border exact; all others are folded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppmoe_models.pslt_convs import ConvBlock, Stem
from ppmoe_models.pslt_fold import fold_around, scale_and_offset

STRIDES = (2, 1, 1, 2, 1, 1, 2)
"""Of the MBV2 blocks; those of stride 1 have a residual."""
_RESULTS = (2, 5, 6)
# Bytes of the largest map of the images that are worked on at once: more leave the last cache.
_CACHED_BYTES = 8 << 20


class FusedConvolutions(nn.Module):
    """Images to the maps at strides 4 and 8 and the one that the ladder starts with.

    Args:
        stem, blocks: at inference; copied.
        img_size: rows of the images that weights are packed for; others work too.
    """

    def __init__(self, stem: Stem, blocks: Iterable[ConvBlock], img_size: int) -> None:
        super().__init__()
        weights: list[Tensor] = []
        rest: list[Tensor] = []
        self.hints: list[tuple[int, int, int, int]] = []  # stride, padding, groups, rows

        def convolution(weight: Tensor, stride: int, groups: int, rows: int) -> int:
            weights.append(weight)
            self.hints.append((stride, weight.size(-1) // 2, groups, rows))
            return -(-rows // stride)

        def affine(norm: nn.BatchNorm2d, like: Tensor) -> None:
            rest.extend(each.to(like.dtype).view(1, -1, 1, 1) for each in scale_and_offset(norm))

        rows = img_size
        convs, norms = _kinds(stem.proj)
        for index, conv in enumerate(convs):
            rows = convolution(conv.weight, conv.stride[0], 1, rows)
            if index < 2:
                affine(norms[index], conv.weight)
        before: nn.BatchNorm2d | None = norms[2]
        for block in blocks:
            (into, deep, out), norms = _kinds(block.conv)
            weight, bias = fold_around(into.weight.flatten(1), into.bias, before, None)
            convolution(weight[:, :, None, None], 1, 1, rows)
            rest.append(bias)
            affine(norms[0], weight)
            rows = convolution(deep.weight, deep.stride[0], deep.groups, rows)
            weight, bias = fold_around(out.weight.flatten(1), out.bias, norms[1], norms[2])
            convolution(weight[:, :, None, None], 1, 1, rows)
            gate = block.se
            rest += [bias, gate.fc1.weight, gate.fc1.bias, gate.fc2.weight, gate.fc2.bias]
            before = None
        for name, tensors in (("weight", weights), ("rest", rest)):
            for place, tensor in enumerate(tensors):
                self.register_buffer(f"{name}{place}", tensor.detach().clone())
        self.counts = len(weights), len(rest)
        self._packed: list[Tensor] = []
        self._pack()

    def _weights(self) -> list[Tensor]:
        return [self.get_buffer(f"weight{place}") for place in range(self.counts[0])]

    def _pack(self) -> None:
        weights = self._weights()
        self._packed = weights
        if _onednn_serves(weights[0]):
            self._packed = [
                torch.ops.mkldnn._reorder_convolution_weight(
                    weight, [pad] * 2, [stride] * 2, [1, 1], groups,
                    [1, weight.size(1) * groups, rows, rows],
                )
                for weight, (stride, pad, groups, rows) in zip(weights, self.hints, strict=True)
            ]  # fmt: skip

    def _apply(self, fn: Any, recurse: bool = True) -> FusedConvolutions:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._pack()
        return self

    # Packed weights can be neither copied nor stored.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.dtype != self.rest0.dtype:
            raise ValueError(f"PSLT: images are {x.dtype}, the fused model is {self.rest0.dtype}")
        rest = [self.get_buffer(f"rest{place}") for place in range(self.counts[1])]
        maps: list[Tensor] = _convolutions(x, self._packed, rest)
        return maps


def _kinds(layers: nn.Sequential) -> tuple[list[nn.Conv2d], list[nn.BatchNorm2d]]:
    convs = [each for each in layers if isinstance(each, nn.Conv2d)]
    return convs, [each for each in layers if isinstance(each, nn.BatchNorm2d)]


def _onednn_serves(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


# An operator, so that a compiler takes it as it is: packed weights and parts of a batch are not for
# a graph, and the element-wise kernels it would make are none that oneDNN has not.
@torch.library.custom_op("ppmoe_models::pslt_convolutions", mutates_args=())
def _convolutions(x: Tensor, weights: list[Tensor], rest: list[Tensor]) -> list[Tensor]:
    if x.numel() == 0:
        return _shapes(x, weights, rest)
    with torch.autocast(x.device.type, enabled=False):
        x = x.contiguous(memory_format=torch.channels_last)
        largest = rest[4].size(0) * x.size(2) * x.size(3) // 4 * x.element_size()
        images = max(1, _CACHED_BYTES // max(largest, 1))
        parts = [_run(part, weights, rest) for part in x.split(images)]
    return parts[0] if len(parts) == 1 else [torch.cat(same) for same in zip(*parts, strict=True)]


@_convolutions.register_fake
def _shapes(x: Tensor, weights: list[Tensor], rest: list[Tensor]) -> list[Tensor]:
    maps: list[Tensor] = []
    for index, stride in zip(_RESULTS, (4, 8, 16), strict=True):
        # Not halved again and again: a compiler works long on such sizes where they are symbols.
        height, width = (x.size(2) + stride - 1) // stride, (x.size(3) + stride - 1) // stride
        channels = rest[4 + 8 * index + 3].size(0)
        maps.append(x.new_empty(x.size(0), height, width, channels).permute(0, 3, 1, 2))
    return maps


def _run(x: Tensor, weights: list[Tensor], rest: list[Tensor]) -> list[Tensor]:
    weight, other = iter(weights), iter(rest)

    def convolve(x: Tensor, bias: Tensor | None, stride: int, groups: int, gelu: bool) -> Tensor:
        w = next(weight)
        pad = w.size(-1) // 2
        out: Tensor
        if not w.is_mkldnn:
            out = F.conv2d(x, w, bias, stride, pad, 1, groups)
            return F.gelu(out) if gelu else out
        name, algorithm = ("gelu", "none") if gelu else ("none", "")
        out = torch.ops.mkldnn._convolution_pointwise(
            x, w, bias, [pad] * 2, [stride] * 2, [1, 1], groups, name, [], algorithm
        )
        return out

    def norm(x: Tensor) -> Tensor:
        scale, offset = itertools.islice(other, 2)
        return torch.addcmul(offset, x, scale, out=x)

    x = norm(convolve(x, None, 2, 1, True))
    x = norm(convolve(x, None, 1, 1, True))
    x = convolve(x, None, 1, 1, True)
    maps: list[Tensor] = []
    for index, stride in enumerate(STRIDES):
        hidden = norm(convolve(x, next(other), 1, 1, True))
        hidden = convolve(hidden, None, stride, hidden.size(1), True)
        out = convolve(hidden, next(other), 1, 1, False)
        squeezed = F.linear(out.mean((2, 3)), next(other), next(other)).relu_()
        scale = F.linear(squeezed, next(other), next(other)).sigmoid_()[:, :, None, None]
        x = torch.addcmul(x, out, scale) if stride == 1 else out.mul_(scale)
        if index in _RESULTS:
            maps.append(x)
    return maps
