"""Expert slicing (PPMoE, arXiv 2304.11414): route, index, slice rows, multiply, merge, and the
fused layer."""

from ppmoe_ops.ops.expert_slice import expert_ffn_backward  # noqa: F401 (registers it)
from ppmoe_ops.ops.expert_slice.expert_ffn import expert_ffn
from ppmoe_ops.ops.expert_slice.expert_index import expert_index
from ppmoe_ops.ops.expert_slice.grouped_linear import grouped_linear
from ppmoe_ops.ops.expert_slice.moe_ffn import moe_ffn
from ppmoe_ops.ops.expert_slice.route import route
from ppmoe_ops.ops.expert_slice.router_losses import router_losses
from ppmoe_ops.ops.expert_slice.rows import merge_rows, slice_rows

__all__ = [
    "expert_ffn",
    "expert_index",
    "grouped_linear",
    "merge_rows",
    "moe_ffn",
    "route",
    "router_losses",
    "slice_rows",
]
