"""`moe_ffn`: a whole mixture-of-experts layer, from router logits on, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops.ops.expert_slice.expert_ffn import expert_ffn
from ppmoe_ops.ops.expert_slice.expert_index import expert_index
from ppmoe_ops.ops.expert_slice.route import route


def moe_ffn(
    x: Tensor,
    logits: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    top_k: int,
    activation: str = "gelu",
    score: str = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    first_expert: int = 0,
) -> Tensor:
    """Route tokens and run them through the local experts: `route`, `expert_index`, `expert_ffn`.

    Args:
        x: [T, H], as `expert_ffn` takes it.
        logits: [T, E] of the router, over all experts of all ranks.
        w_in, b_in, w_out, b_out, activation: the local experts, as `expert_ffn` takes them.
        top_k, score, renormalize, selection_bias, groups, top_groups, scale: as `route` takes them.
            A layer with top_k=1 passes renormalize=False: its gate has no gradient else.
        first_expert: the id of the first local expert; the L of `w_in` follow from there.

    Returns:
        [T, H] in the dtype of `x`. With every expert local this is the layer's output; else it is
        this rank's part, and the sum over ranks is the output.

    Raises:
        ValueError: experts from `first_expert` on that are not among the E of `logits`.
        ValueError, IndexError: as the three operators do.

    Gradient: to `x`, `logits`, `w_in`, `b_in`, `w_out` and `b_out`.
    Saved for backward: what the three operators save.

    Source: PPMoE (arXiv 2304.11414) section 3.3.

    Example:
        >>> import torch, ppmoe_ops
        >>> x, logits = torch.ones(3, 4), torch.zeros(3, 2)
        >>> w_in, w_out = torch.ones(2, 8, 4), torch.ones(2, 4, 8)
        >>> ppmoe_ops.moe_ffn(
        ...     x, logits, w_in, None, w_out, None, top_k=2, activation="relu"
        ... )[0].tolist()
        [32.0, 32.0, 32.0, 32.0]
    """
    check.dim("moe_ffn", "w_in", w_in, "L, F, H")
    check.dim("moe_ffn", "logits", logits, "T, E")
    most = max(logits.size(1) - w_in.size(0), 0)
    check.between("moe_ffn", "first_expert", first_expert, 0, most, "E - L")
    options = (score, renormalize, selection_bias, groups, top_groups, scale)
    weights, experts = route(logits, top_k, *options)
    slots, offsets = expert_index(experts, first_expert, w_in.size(0))
    weights = weights.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return expert_ffn(x, slots, offsets, weights, w_in, b_in, w_out, b_out, activation)
