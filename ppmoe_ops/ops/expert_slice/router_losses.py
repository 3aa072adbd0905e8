"""`router_losses`: load-balance loss and z-loss of a router, from one read of its logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Autocast, Operator, Sample, register


def router_losses(logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the load-balance loss and the z-loss of a routing decision.

    balance = E * sum_e f_e P_e, f_e being expert e's share of the valid ids and P_e the mean
    softmax probability of expert e: 1 when balanced, for every K. (transformers' value is K times
    this.) z = mean over tokens of logsumexp(logits)^2.

    Args:
        logits: [T, E] float32, bfloat16, float16 or float64.
        experts: [T, K] int32 or int64, the chosen ids; an id outside [0, E) was dropped and does
            not count.

    Returns:
        balance and z, scalars in float32 (float64 for float64 logits). Zero where T is 0, balance
        also where no id is valid.

    Raises:
        ValueError: a shape or dtype that is not as above.

    Gradient: both to `logits`; the shares f_e are counts and have none.
    Saved for backward: 4*(T + E) bytes (log-sum-exp of every token, shares), and the logits.

    Source: balance loss: Switch Transformers (arXiv 2101.03961) equations 4 to 6, generalised to
    K choices; z-loss: ST-MoE (arXiv 2202.08906) equation 5.

    Example:
        >>> import torch, ppmoe_ops
        >>> logits = torch.zeros(4, 2)
        >>> balance, z = ppmoe_ops.router_losses(logits, torch.tensor([[0], [1], [0], [1]]))
        >>> round(balance.item(), 4), round(z.item(), 4)
        (1.0, 0.4805)
    """
    return _composite(logits, experts)


def check_forward(op: str, logits: Tensor, experts: Tensor) -> None:
    """Raise unless the arguments fit each other."""
    check.dim(op, "logits", logits, "T, E")
    check.dtype(op, "logits", logits, check.FLOATS)
    check.between(op, "E", logits.size(1), 1, 2**31 - 1, "axis 1 of logits")
    check.dim(op, "experts", experts, "T, K")
    check.dtype(op, "experts", experts, check.IDS)
    check.size(op, "experts", "T", experts.size(0), logits.size(0), "as logits")


def _wide_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _reference_forward(logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_forward("router_losses", logits, experts)
    wide = logits.to(_wide_dtype(logits))
    tokens, num_experts = wide.shape
    valid = experts[(experts >= 0) & (experts < num_experts)].long()
    counts = wide.new_zeros(num_experts).index_add_(0, valid, wide.new_ones(valid.numel()))
    shares = counts / max(valid.numel(), 1)
    lse = torch.logsumexp(wide, -1)
    mean = torch.softmax(wide, -1).sum(0) / max(tokens, 1)
    balance = num_experts * (shares * mean).sum()
    return balance, lse.square().sum() / max(tokens, 1), shares, lse


def _fake_forward(logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_forward("router_losses", logits, experts)
    wide = _wide_dtype(logits)
    tokens, num_experts = logits.shape
    return (
        logits.new_empty((), dtype=wide),
        logits.new_empty((), dtype=wide),
        logits.new_empty((num_experts,), dtype=wide),
        logits.new_empty((tokens,), dtype=wide),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
    _, _, shares, lse = output
    ctx.mark_non_differentiable(shares, lse)
    ctx.save_for_backward(inputs[0], shares, lse)


def _backward(ctx: Any, grad_balance: Tensor, grad_z: Tensor, *_: Any) -> tuple[Tensor, None]:
    logits, shares, lse = ctx.saved_tensors
    return ROUTER_LOSSES_BACKWARD.overload(grad_balance, grad_z, logits, shares, lse), None


def _composite(logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    balance, z, _, _ = ROUTER_LOSSES_FORWARD.overload(logits, experts)
    return balance, z


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for tokens, num_experts, top_k in ((7, 8, 2), (5, 33, 3), (0, 4, 1), (300, 4, 1)):
        logits = torch.randn(tokens, num_experts, device=device, dtype=dtype, requires_grad=True)
        experts = torch.randint(-1, num_experts, (tokens, top_k), device=device)
        yield (logits, experts.int() if top_k == 2 else experts), {}


def _flops(*_: Any, **__: Any) -> int:
    return 0


def _nbytes(logits: Tensor, experts: Tensor) -> int:
    return (
        logits.numel() * logits.element_size()
        + experts.numel() * experts.element_size()
        + 4 * (logits.size(0) + logits.size(1) + 2)
    )


ROUTER_LOSSES_FORWARD = register(
    Operator(
        name="router_losses_forward",
        family="expert_slice",
        schema="(Tensor logits, Tensor experts) "
        "-> (Tensor balance, Tensor z, Tensor shares, Tensor lse)",
        reference=_reference_forward,
        fake=_fake_forward,
        flops=_flops,
        nbytes=_nbytes,
        saved_bytes=lambda logits, experts: 4 * (logits.size(0) + logits.size(1)),
        samples=_samples,
        triton="ppmoe_ops.kernels.expert_slice.router_losses:router_losses_forward",
        setup_context=_setup_context,
        backward=_backward,
        autocast=Autocast("float32"),
        benchmark="bench_expert_slice",
    )
)

ROUTER_LOSSES = register(
    Operator(
        name="router_losses",
        family="expert_slice",
        schema="(Tensor logits, Tensor experts) -> (Tensor balance, Tensor z)",
        reference=_composite,
        fake=_composite,
        composite=True,
        flops=_flops,
        nbytes=_nbytes,
        saved_bytes=ROUTER_LOSSES_FORWARD.saved_bytes,
        samples=_samples,
        autocast=Autocast("float32"),
        benchmark="bench_expert_slice",
    )
)


def check_backward(
    grad_balance: Tensor, grad_z: Tensor, logits: Tensor, shares: Tensor, lse: Tensor
) -> None:
    """Raise unless the arguments of `router_losses_backward` fit each other."""
    op = "router_losses_backward"
    check.dim(op, "logits", logits, "T, E")
    check.dtype(op, "logits", logits, check.FLOATS)
    check.dim(op, "shares", shares, "E")
    check.size(op, "shares", "E", shares.size(0), logits.size(1), "as logits")
    check.dim(op, "lse", lse, "T")
    check.size(op, "lse", "T", lse.size(0), logits.size(0), "as logits")
    wide = _wide_dtype(logits)
    for name, tensor in (("grad_balance", grad_balance), ("grad_z", grad_z)):
        check.size(op, name, "elements", tensor.numel(), 1, "a scalar")
        check.dtype(op, name, tensor, (wide,), "as the losses")
    for name, tensor in (("shares", shares), ("lse", lse)):
        check.dtype(op, name, tensor, (wide,), "as the losses")


def _reference_backward(
    grad_balance: Tensor, grad_z: Tensor, logits: Tensor, shares: Tensor, lse: Tensor
) -> Tensor:
    check_backward(grad_balance, grad_z, logits, shares, lse)
    tokens, num_experts = logits.shape
    wide = logits.to(_wide_dtype(logits))
    probabilities = torch.exp(wide - lse.unsqueeze(-1))
    mean_share = (probabilities * shares).sum(-1, keepdim=True)
    balance = probabilities * (shares - mean_share) * (grad_balance * num_experts)
    z = probabilities * lse.unsqueeze(-1) * (2 * grad_z)
    return ((balance + z) / max(tokens, 1)).to(logits.dtype)


def _fake_backward(
    grad_balance: Tensor, grad_z: Tensor, logits: Tensor, shares: Tensor, lse: Tensor
) -> Tensor:
    check_backward(grad_balance, grad_z, logits, shares, lse)
    return logits.new_empty(logits.shape)


def _samples_backward(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for (logits, experts), _ in _samples(device, dtype):
        balance, z, shares, lse = ROUTER_LOSSES_FORWARD.overload(logits.detach(), experts)
        yield (torch.randn_like(balance), torch.randn_like(z), logits.detach(), shares, lse), {}


ROUTER_LOSSES_BACKWARD = register(
    Operator(
        name="router_losses_backward",
        family="expert_slice",
        schema="(Tensor grad_balance, Tensor grad_z, Tensor logits, Tensor shares, Tensor lse) "
        "-> Tensor",
        reference=_reference_backward,
        fake=_fake_backward,
        flops=_flops,
        nbytes=lambda grad_balance, grad_z, logits, shares, lse: (
            2 * logits.numel() * logits.element_size() + 4 * (shares.numel() + lse.numel())
        ),
        samples=_samples_backward,
        triton="ppmoe_ops.kernels.expert_slice.router_losses:router_losses_backward",
        no_derivative="router_losses has no second derivative; allowed: first derivatives",
        benchmark="bench_expert_slice",
    )
)
