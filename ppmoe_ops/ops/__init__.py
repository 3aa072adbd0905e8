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

__all__ = [
    "expert_ffn",
    "expert_index",
    "grouped_linear",
    "merge_rows",
    "route",
    "router_losses",
    "slice_rows",
]
