"""The contracts, one package or file per operator family."""

from ppmoe_ops.ops.equilibrium.anderson_mix import anderson_mix
from ppmoe_ops.ops.equilibrium.equilibrium_cell import equilibrium_cell
from ppmoe_ops.ops.equilibrium.equilibrium_conv_cell import equilibrium_conv_cell
from ppmoe_ops.ops.expert_slice import (
    expert_ffn,
    expert_index,
    grouped_linear,
    merge_rows,
    route,
    router_losses,
    slice_rows,
)
from ppmoe_ops.ops.ladder_attention.ladder_attention import ladder_attention
from ppmoe_ops.ops.ladder_attention.ladder_block import ladder_block
from ppmoe_ops.ops.ladder_attention.ladder_ffn import ladder_ffn
from ppmoe_ops.ops.ladder_attention.pixel_adaptive_fusion import pixel_adaptive_fusion
from ppmoe_ops.ops.ladder_attention.window_attention import window_attention

__all__ = [
    "anderson_mix",
    "equilibrium_cell",
    "equilibrium_conv_cell",
    "expert_ffn",
    "expert_index",
    "grouped_linear",
    "ladder_attention",
    "ladder_block",
    "ladder_ffn",
    "merge_rows",
    "pixel_adaptive_fusion",
    "route",
    "router_losses",
    "slice_rows",
    "window_attention",
]
