"""PSLT's ladder blocks as they are at inference: batch norms folded, one operator a block."""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn

import ppmoe_ops
from ppmoe_models.pslt_blocks import (
    WINDOW,
    LadderBlock,
    LadderBranch,
    smaller_table,
    window_and_shift,
)
from ppmoe_models.pslt_fold import fold_around, scale_and_offset

_BRANCH_TENSORS = 16
_BIAS_TABLE = 4  # its place among them


def _branch_tensors(branch: LadderBranch) -> list[Tensor]:
    into, proj, ffn = branch.attn.into, branch.attn.proj, branch.mlp
    first, deep, last = ffn.convolutions
    before, between, behind = ffn.norms
    scale, offset = (each[:, None, None] for each in scale_and_offset(before))
    taps = deep.weight.detach().squeeze(1).double()
    out_weight, out_bias = fold_around(last.weight.flatten(1), last.bias, between, behind)
    return [
        branch.norm1.weight, branch.norm1.bias, into.weight, into.bias,
        branch.attn.relative_position_bias_table, proj.weight, proj.bias,
        branch.norm2.weight, branch.norm2.bias,
        first.weight.flatten(1), cast(Tensor, first.bias),
        (taps * scale).to(deep.weight.dtype), cast(Tensor, deep.bias),
        (taps * offset).to(deep.weight.dtype), out_weight, out_bias,
    ]  # fmt: skip


class FusedLadderBlock(nn.Module):
    """A ladder block as one `ladder_block` call; maps that get padded take its operators instead.

    Args:
        block: in inference mode; copied.
    """

    def __init__(self, block: LadderBlock) -> None:
        super().__init__()
        self.heads, self.shift, self.padding = block.heads, block.shift, block.padding
        gate, branches = block.se, [cast(LadderBranch, each) for each in block.blocks]
        tensors = [
            *(each for branch in branches for each in _branch_tensors(branch)),
            gate.fc1.weight, gate.fc1.bias, gate.fc2.weight, gate.fc2.bias,
            block.pointconv.weight, block.pointconv.bias,
        ]  # fmt: skip
        for place, tensor in enumerate(tensors):
            self.register_buffer(f"param{place}", tensor.detach().clone())
        self.padded = copy.deepcopy(block) if block.padding == "authors" else None

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window, shift = window_and_shift(height, width, self.shift)
        if self.padded is not None and (height % window or width % window):
            out: Tensor = self.padded(x)
            return out
        params = [cast(Tensor, each) for each in self._buffers.values()]
        if window != WINDOW:
            for branch in range(3):
                at = branch * _BRANCH_TENSORS + _BIAS_TABLE
                params[at] = smaller_table(params[at], window)
        return ppmoe_ops.ladder_block(x, params, self.heads, window, shift)
