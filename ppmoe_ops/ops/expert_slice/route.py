"""`route`: scores, top-k, group limit, bias and normalisation of a router in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Autocast, Operator, Sample, register

SCORES = ("softmax", "sigmoid")
SIGMOID_SUM_FLOOR = 1e-20


def route(
    logits: Tensor,
    top_k: int,
    score: str = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for every token and weigh them.

    Scores are taken over all E experts. Without bias, sigmoid and groups the order is that of the
    float32 logits, else that of score + bias; equal ones go to the lower id and NaN ranks as
    -inf, so ids are always valid and distinct. Weights are the selected scores without the bias,
    divided by their sum when `renormalize` (sigmoid: sum + 1e-20), times `scale`. A row with a NaN
    or an infinite largest logit has NaN softmax weights.

    Args:
        logits: [T, E] float32, bfloat16, float16 or float64.
        top_k: K, experts per token; 1 to `top_groups * E / groups`.
        score: `"softmax"` or `"sigmoid"`.
        renormalize: divide by the sum of the selected scores. With K = 1 and softmax that makes
            every weight 1 and leaves the router no gradient: pass False there.
        selection_bias: [E] floating point, added to the scores for the choice alone; no gradient.
        groups: the experts form this many equal groups, ...
        top_groups: ... of which this many, those with the largest sums of their two best
            score + bias, may be chosen from.
        scale: a factor on the weights.

    Returns:
        weights [T, K] float32 (float64 for float64 logits) and experts [T, K] int32, best first.

    Raises:
        ValueError: a shape, dtype or value that is not as above.

    Gradient: `weights` to `logits`, through the selected scores.
    Saved for backward: weights and experts (8*T*K bytes, both outputs), and the logits too unless
    it is softmax with `renormalize`. Nothing else.

    Source: PPMoE (arXiv 2304.11414) section 3.3.3 for the gate; group limit and selection bias as
    in DeepSeek-V3 (arXiv 2412.19437) section 2.1.2.

    Example:
        >>> import torch, ppmoe_ops
        >>> logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
        >>> weights, experts = ppmoe_ops.route(logits, 2)
        >>> experts.tolist(), [round(w, 4) for w in weights[0].tolist()]
        ([[1, 2]], [0.7311, 0.2689])
    """
    return ROUTE.overload(
        logits, top_k, score, renormalize, selection_bias, groups, top_groups, scale
    )


def check_forward(
    logits: Tensor,
    top_k: int,
    score: str,
    selection_bias: Tensor | None,
    groups: int,
    top_groups: int,
) -> None:
    """Raise unless the arguments fit each other."""
    check.dim("route", "logits", logits, "T, E")
    check.dtype("route", "logits", logits, check.FLOATS)
    experts = logits.size(1)
    check.choice("route", "score", score, SCORES)
    check.between("route", "groups", groups, 1, experts, "E experts in equal groups")
    if experts % groups != 0:
        raise ValueError(f"route: groups is {groups}; allowed: divisors of E = {experts}")
    check.between("route", "top_groups", top_groups, 1, groups, "at most groups")
    most = top_groups * (experts // groups)
    check.between("route", "top_k", top_k, 1, most, "experts that may be chosen")
    if selection_bias is not None:
        check.dim("route", "selection_bias", selection_bias, "E")
        check.dtype("route", "selection_bias", selection_bias, check.FLOATS)
        check.size("route", "selection_bias", "E", selection_bias.size(0), experts, "as logits")


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _reference(
    logits: Tensor,
    top_k: int,
    score: str = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    check_forward(logits, top_k, score, selection_bias, groups, top_groups)
    wide = _wide(logits)
    tokens, num_experts = wide.shape
    scores = torch.softmax(wide, -1) if score == "softmax" else torch.sigmoid(wide)

    key = scores
    if score == "softmax" and selection_bias is None and groups == 1:
        key = wide  # the same order as softmax's, without its ties by underflow
    if selection_bias is not None:
        key = scores + selection_bias.to(scores.dtype)
    key = key.masked_fill(key.isnan(), -torch.inf)
    if groups > 1:
        by_group = key.view(tokens, groups, num_experts // groups)
        best_two = by_group.topk(min(2, num_experts // groups), -1).values.sum(-1)
        best_two = best_two.masked_fill(best_two.isnan(), -torch.inf)
        chosen = best_two.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
        allowed = torch.zeros_like(best_two, dtype=torch.bool).scatter_(1, chosen, True)
        key = by_group.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
    experts = key.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]

    if score == "softmax" and renormalize:
        # Equal to dividing by the sum, and right where the selected scores underflow.
        weights = torch.softmax(wide.gather(1, experts), -1)
        poisoned = scores.sum(-1, keepdim=True).isnan()
        weights = weights.masked_fill(poisoned, torch.nan)
    else:
        weights = scores.gather(1, experts)
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + SIGMOID_SUM_FLOOR)
    return weights * scale, experts.to(torch.int32)


def _fake(
    logits: Tensor,
    top_k: int,
    score: str = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    check_forward(logits, top_k, score, selection_bias, groups, top_groups)
    shape = (logits.size(0), top_k)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(shape, dtype=wide), logits.new_empty(shape, dtype=torch.int32)


def _needs_logits(score: str, renormalize: bool) -> bool:
    return score == "sigmoid" or not renormalize


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, score, renormalize, _, _, _, scale = inputs
    weights, experts = output
    ctx.mark_non_differentiable(experts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weights, experts, logits if _needs_logits(score, renormalize) else None)
    ctx.attributes = (logits.size(1), logits.dtype, score, renormalize, scale)


def _backward(ctx: Any, grad_weights: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_weights is None:
        return (None,) * 8
    weights, experts, logits = ctx.saved_tensors
    num_experts, dtype, score, renormalize, scale = ctx.attributes
    grad = ROUTE_BACKWARD.overload(
        grad_weights, weights, experts, logits, num_experts, dtype, score, renormalize, scale
    )
    return (grad, *(None,) * 7)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def logits(tokens: int, experts: int) -> Tensor:
        return torch.randn(tokens, experts, device=device, dtype=dtype, requires_grad=True)

    bias = torch.randn(16, device=device)
    yield (logits(7, 8), 2), {}
    yield (logits(5, 16), 1), {"renormalize": False}
    yield (logits(3, 70), 5), {"scale": 2.5}
    yield (logits(4, 16), 4), {"score": "sigmoid", "selection_bias": bias, "scale": 1.5}
    yield (logits(4, 16), 3), {"score": "sigmoid", "renormalize": False, "groups": 4,
                               "top_groups": 2, "selection_bias": bias}  # fmt: skip
    yield (logits(4, 16), 3), {"groups": 4, "top_groups": 2}
    yield (logits(0, 8), 2), {}


def _vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, top_k: int, *rest: Any) -> Any:
    if in_dims[0] is None or any(dim is not None for dim in in_dims[2:]):
        raise ValueError("route: vmap over selection_bias; allowed: over logits alone")
    batched = logits.movedim(in_dims[0], 0)
    weights, experts = ROUTE.overload(batched.flatten(0, 1), top_k, *rest)
    shape = (*batched.shape[:2], top_k)
    return (weights.view(shape), experts.view(shape)), (0, 0)


def _flops(*_: Any, **__: Any) -> int:
    return 0


def _nbytes(logits: Tensor, top_k: int, *_: Any, **__: Any) -> int:
    return logits.numel() * logits.element_size() + logits.size(0) * top_k * 8


def _saved_bytes(*_: Any, **__: Any) -> int:
    return 0


ROUTE = register(
    Operator(
        name="route",
        family="expert_slice",
        schema='(Tensor logits, SymInt top_k, str score="softmax", bool renormalize=True, '
        "Tensor? selection_bias=None, SymInt groups=1, SymInt top_groups=1, float scale=1.0) "
        "-> (Tensor weights, Tensor experts)",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        saved_bytes=_saved_bytes,
        samples=_samples,
        triton="ppmoe_ops.kernels.expert_slice.route:route",
        setup_context=_setup_context,
        backward=_backward,
        autocast=Autocast("float32"),
        vmap=_vmap,
        sharding=lambda *_, **__: (("00", "0R"),),
        benchmark="bench_expert_slice",
    )
)


def _reference_backward(
    grad_weights: Tensor,
    weights: Tensor,
    experts: Tensor,
    logits: Tensor | None,
    num_experts: int,
    dtype: torch.dtype,
    score: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    check_backward(grad_weights, weights, experts, logits, num_experts, dtype, score, renormalize)
    check_backward_ids(experts, num_experts)
    tokens = weights.size(0)
    index = experts.long()
    grad_scores = grad_weights.to(weights.dtype) * scale
    if score == "softmax" and renormalize:
        shares = weights / scale if scale != 0 else torch.zeros_like(weights)
        selected = shares * (grad_scores - (grad_scores * shares).sum(-1, keepdim=True))
        grad = weights.new_zeros(tokens, num_experts).scatter_(1, index, selected)
    elif score == "softmax":
        probabilities = torch.softmax(_wide(_given(logits)), -1)
        grad = weights.new_zeros(tokens, num_experts).scatter_(1, index, grad_scores)
        grad = probabilities * (grad - (grad * probabilities).sum(-1, keepdim=True))
    else:
        # From the logits and not from the weights: 1 - score would cancel where a score is near 1.
        selected_logits = _wide(_given(logits)).gather(1, index)
        scores = torch.sigmoid(selected_logits)
        if renormalize:
            total = scores.sum(-1, keepdim=True) + SIGMOID_SUM_FLOOR
            mean = (grad_scores * scores).sum(-1, keepdim=True) / total
            grad_scores = (grad_scores - mean) / total
        selected = grad_scores * scores * torch.sigmoid(-selected_logits)
        grad = weights.new_zeros(tokens, num_experts).scatter_(1, index, selected)
    return grad.to(dtype)


def check_backward_ids(experts: Tensor, num_experts: int) -> None:
    """Raise unless every id is an expert's; waits for the device."""
    bad = experts[(experts < 0) | (experts >= num_experts)]
    if bad.numel():
        raise IndexError(
            f"route_backward: experts holds {int(bad[0])}; allowed: 0 to {num_experts - 1}"
        )


def _given(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise ValueError("route_backward: logits is None; expected a tensor (for this score)")
    return logits


def check_backward(
    grad_weights: Tensor,
    weights: Tensor,
    experts: Tensor,
    logits: Tensor | None,
    num_experts: int,
    dtype: torch.dtype,
    score: str,
    renormalize: bool,
) -> None:
    """Raise unless the arguments of `route_backward` fit each other."""
    op = "route_backward"
    check.choice(op, "score", score, SCORES)
    check.dim(op, "weights", weights, "T, K")
    check.dtype(op, "weights", weights, (torch.float32, torch.float64))
    check.dim(op, "experts", experts, "T, K")
    check.dtype(op, "experts", experts, (torch.int32,))
    check.dim(op, "grad_weights", grad_weights, "T, K")
    check.dtype(op, "grad_weights", grad_weights, (weights.dtype,), "as weights")
    for name, tensor in (("grad_weights", grad_weights), ("experts", experts)):
        check.size(op, name, "T", tensor.size(0), weights.size(0), "as weights")
        check.size(op, name, "K", tensor.size(1), weights.size(1), "as weights")
    check.between(op, "num_experts", num_experts, 1, 2**31 - 1)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    allowed = (torch.float64,) if weights.dtype == torch.float64 else narrow
    check.result_dtype(op, dtype, allowed, "for these weights")
    if _needs_logits(score, renormalize):
        check.dim(op, "logits", _given(logits), "T, E")
        check.dtype(op, "logits", _given(logits), (dtype,), "as dtype")
        check.size(op, "logits", "T", _given(logits).size(0), weights.size(0), "as weights")
        check.size(op, "logits", "E", _given(logits).size(1), num_experts, "num_experts")


def _fake_backward(
    grad_weights: Tensor,
    weights: Tensor,
    experts: Tensor,
    logits: Tensor | None,
    num_experts: int,
    dtype: torch.dtype,
    score: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    check_backward(grad_weights, weights, experts, logits, num_experts, dtype, score, renormalize)
    return weights.new_empty((weights.size(0), num_experts), dtype=dtype)


def _nbytes_backward(
    grad_weights: Tensor,
    weights: Tensor,
    experts: Tensor,
    logits: Tensor | None,
    num_experts: int,
    dtype: torch.dtype,
    score: str,
    *_: Any,
    **__: Any,
) -> int:
    logits_bytes = 0
    if logits is not None:
        used = logits.numel() if score == "softmax" else weights.numel()
        logits_bytes = used * logits.element_size()
    return weights.numel() * 12 + logits_bytes + weights.size(0) * num_experts * dtype.itemsize


def _samples_backward(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for args, options in _samples(device, dtype):
        logits = args[0].detach()
        score = options.get("score", "softmax")
        renormalize = options.get("renormalize", True)
        scale = options.get("scale", 1.0)
        weights, experts = ROUTE.overload(logits, *args[1:], **options)
        kept = logits if _needs_logits(score, renormalize) else None
        grad = torch.randn_like(weights)
        yield (
            (grad, weights, experts, kept, logits.size(1), dtype, score, renormalize, scale),
            {},
        )


ROUTE_BACKWARD = register(
    Operator(
        name="route_backward",
        family="expert_slice",
        schema="(Tensor grad_weights, Tensor weights, Tensor experts, Tensor? logits, "
        "SymInt num_experts, ScalarType dtype, str score, bool renormalize, float scale) "
        "-> Tensor",
        reference=_reference_backward,
        fake=_fake_backward,
        flops=_flops,
        nbytes=_nbytes_backward,
        samples=_samples_backward,
        triton="ppmoe_ops.kernels.expert_slice.route:route_backward",
        no_derivative="route has no second derivative; allowed: first derivatives",
        sharding=lambda *_, **__: (("0", "0000"),),
        benchmark="bench_expert_slice",
    )
)
