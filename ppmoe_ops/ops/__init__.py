"""The contracts, one package or file per operator family."""

from ppmoe_ops.ops.expert_slice import (
    expert_ffn,
    expert_index,
    grouped_linear,
    merge_rows,
    route,
    router_losses,
    slice_rows,
)
from ppmoe_ops.ops.ladder_attention import (
    ladder_attention,
    ladder_block,
    ladder_ffn,
    pixel_adaptive_fusion,
    window_attention,
)

__all__ = [
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
