"""Bugs in the contracts: references, autograd, arguments passed on."""

from __future__ import annotations

from mutations.mutation import OPS, mutations

CONTRACTS = (
    *mutations(
        f"{OPS}/route.py", "test_route", "",
        ("weights.masked_fill(poisoned, torch.nan)", "weights", "reference without NaN"),
        ("descending=True, stable=True).indices[:, :top_k]", "stable=True).indices[:, :top_k]",
         "the reference takes the worst"),
        ('return score == "sigmoid" or not renormalize', 'return score == "sigmoid"',
         "logits are not kept"),
        ("logits, num_experts, dtype, score, renormalize, scale\n    )\n    return (grad",
         "logits, num_experts, dtype, score, renormalize, 1.0\n    )\n    return (grad",
         "scale does not reach the backward"),
        ("- (grad_scores * shares).sum(-1, keepdim=True)", "", "reference without the mean"),
    ),
    *mutations(
        f"{OPS}/router_losses.py", "test_router_losses", "",
        ("overload(grad_balance, grad_z, logits, shares, lse), None",
         "overload(grad_z, grad_balance, logits, shares, lse), None", "gradients swapped"),
        ("lse.square().sum() / max", "lse.sum() / max", "z of the reference is not squared"),
    ),
    *mutations(
        f"{OPS}/expert_index.py", "test_expert_index", "",
        ("(local >= 0) & (local < num_local)", "(local >= 0) & (local <= num_local)",
         "one expert more"),
    ),
    *mutations(
        f"{OPS}/grouped_linear.py", "test_grouped_linear", "",
        ("(asked[0], asked[2], asked[3])", "(asked[0], asked[3], asked[2])", "the wrong gradients"),
        ("product = product + bias[expert]", "product = product - bias[expert]",
         "sign of the reference's bias"),
        ("part.sum(0).to(rows.dtype)", "part.mean(0).to(rows.dtype)", "a mean for a sum"),
    ),
    *mutations(
        f"{OPS}/rows.py", "test_rows", "",
        ("torch.where(here, total + weights", "torch.where(here, total - weights",
         "sign of the reference"),
        ("x.index_select(0, slots.clamp(min=0).long() // top_k)",
         "x.index_select(0, slots.clamp(min=0).long() % x.size(0))", "another token"),
        ("return grad_rows, None, grad_weights", "return -grad_rows, None, grad_weights", "sign"),
    ),
    *mutations(
        f"{OPS}/expert_ffn.py", "test_expert_ffn", "",
        ("hidden = hidden + b_in[expert]", "hidden = hidden - b_in[expert]",
         "sign of the reference's bias"),
        ("row * weights.reshape(-1)[group].unsqueeze(-1)", "row", "reference without weights"),
    ),
    *mutations(
        f"{OPS}/expert_ffn.py", "test_expert_ffn_autograd", "",
        ("needs = (asked[0], *asked[3:8])", "needs = (asked[0], *asked[2:7])",
         "the wrong gradients"),
        ("save = torch.is_grad_enabled() and any(", "save = any(", "saved without a derivative"),
    ),
    *mutations(
        f"{OPS}/expert_ffn_backward.py", "test_expert_ffn", "",
        ("dots = dots + row_grad", "dots = dots - row_grad", "sign of the reference's bias"),
        ("(weight * activated).to(x.dtype)", "activated.to(x.dtype)", "w_out without weights"),
        ("(weight * row_grad).sum(0)", "row_grad.sum(0)", "b_out without weights"),
    ),
    *mutations(
        f"{OPS}/activations.py", "test_expert_ffn", "",
        ("s * (1 + x * (1 - s))", "s * (1 + x * s)", "slope of silu"),
        ("(1 + 3 * 0.044715 * x * x)", "(1 + 0.044715 * x * x)", "slope of the cubic"),
        ("return _pointwise(gate, activation) * up", "return _pointwise(up, activation) * gate",
         "the wrong half"),
    ),
    *mutations(
        f"{OPS}/moe_ffn.py", "test_moe_ffn", "",
        ("expert_index(experts, first_expert,", "expert_index(experts, 0,", "the first experts"),
    ),
)  # fmt: skip
