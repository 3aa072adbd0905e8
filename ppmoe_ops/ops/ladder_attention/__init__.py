"""Ladder attention (PSLT, arXiv 2304.03481): shifted-window attention on strided maps, the branches
of a ladder block, their fusion, and the whole block for inference."""

from ppmoe_ops.ops.ladder_attention import (  # noqa: F401 (registers them)
    ladder_attention_backward,
    ladder_ffn_backward,
)
from ppmoe_ops.ops.ladder_attention.ladder_attention import ladder_attention
from ppmoe_ops.ops.ladder_attention.ladder_block import ladder_block
from ppmoe_ops.ops.ladder_attention.ladder_ffn import ladder_ffn
from ppmoe_ops.ops.ladder_attention.pixel_adaptive_fusion import pixel_adaptive_fusion
from ppmoe_ops.ops.ladder_attention.window_attention import window_attention

__all__ = [
    "ladder_attention",
    "ladder_block",
    "ladder_ffn",
    "pixel_adaptive_fusion",
    "window_attention",
]
