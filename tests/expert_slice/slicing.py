"""Inputs for the expert-slicing tests, and the operators once more as plain compositions.

The compositions here share nothing with the package's references, are differentiable by autograd
alone, and run in any dtype: in float64 they give the exact results of the error rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import assert_error_rule, cast_sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIGMOID_FLOOR = 1e-20
# Where a choice is by score and not by logit, ids may differ if their keys are this near.
SELECTION_ULPS = 4


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of routing weights, and of sums, beside data of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def distinct_ids(tokens: int, top_k: int, num_experts: int) -> Tensor:
    """[T, K] ids, distinct within a token."""
    return torch.rand(tokens, num_experts).argsort(-1)[:, :top_k]


def index_of(ids: Tensor, first: int, local: int) -> tuple[Tensor, Tensor]:
    """slots and offsets by a loop over tokens and choices."""
    by_expert: list[list[int]] = [[] for _ in range(local)]
    for slot, expert in enumerate(ids.flatten().tolist()):
        if first <= expert < first + local:
            by_expert[expert - first].append(slot)
    offsets = [0]
    for each in by_expert:
        offsets.append(offsets[-1] + len(each))
    listed = [slot for each in by_expert for slot in each]
    listed += [-1] * (ids.numel() - len(listed))
    return torch.tensor(listed, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)


def plain_weights(
    logits: Tensor, experts: Tensor, score: str, renormalize: bool, scale: float
) -> Tensor:
    """Weights of a choice that has been made."""
    values = logits if logits.dtype == torch.float64 else logits.float()
    if score == "softmax" and renormalize:
        # Shares of the selected scores, without dividing zero by zero where those underflow.
        return values.gather(1, experts.long()).softmax(-1) * scale
    scores = values.softmax(-1) if score == "softmax" else values.sigmoid()
    chosen = scores.gather(1, experts.long())
    if renormalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + SIGMOID_FLOOR)
    return chosen * scale


def plain_losses(logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    values = logits if logits.dtype == torch.float64 else logits.float()
    tokens, num_experts = values.shape
    hits = torch.stack([(experts == e).sum() for e in range(num_experts)]).to(values.dtype)
    shares = hits / hits.sum().clamp(min=1)
    mean = values.softmax(-1).sum(0) / max(tokens, 1)
    z = values.logsumexp(-1).square().sum() / max(tokens, 1)
    return num_experts * (shares * mean).sum(), z


def plain_slice(x: Tensor, slots: Tensor, top_k: int) -> Tensor:
    rows = [x[slot // top_k] if slot >= 0 else x.new_zeros(x.size(1)) for slot in slots.tolist()]
    return torch.stack(rows) if rows else x.new_zeros(0, x.size(1))


def plain_merge(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of a token's rows as a dense matrix product."""
    tokens, top_k = weights.shape
    kept = [(row, slot) for row, slot in enumerate(slots.tolist()) if slot >= 0]
    if not kept:
        return rows.new_zeros(tokens, rows.size(1)) + 0 * rows.sum() + 0 * weights.sum()
    taken = rows[[row for row, _ in kept]].to(weights.dtype)
    slot = torch.tensor([each for _, each in kept])
    scaled = taken * weights.flatten()[slot].unsqueeze(-1)
    total = weights.new_zeros(tokens, rows.size(1)).index_add(0, slot // top_k, scaled)
    return total.to(rows.dtype)


def plain_grouped_linear(
    rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Every row against a mask of its expert: no loop over experts."""
    owner = torch.full((rows.size(0),), -1)
    bounds = offsets.tolist()
    for expert in range(len(bounds) - 1):
        owner[bounds[expert] : bounds[expert + 1]] = expert
    hit = torch.nn.functional.one_hot(owner.clamp(min=0), max(weight.size(0), 1))
    hit = (hit * (owner >= 0).unsqueeze(-1)).to(rows.dtype)[:, : weight.size(0)]
    clean = rows.masked_fill((owner < 0).unsqueeze(-1), 0)
    out = torch.einsum("re,rk,enk->rn", hit, clean, weight)
    return out if bias is None else out + hit @ bias


def plain_activation(pre: Tensor, activation: str) -> Tensor:
    """torch's own functions; a gate is the first half."""
    functions = torch.nn.functional
    if activation in ("swiglu", "geglu"):
        half = pre.size(-1) // 2
        gate = functions.silu if activation == "swiglu" else functions.gelu
        return gate(pre[..., :half]) * pre[..., half:]
    if activation == "gelu_tanh":
        return functions.gelu(pre, approximate="tanh")
    return {"gelu": functions.gelu, "relu": torch.relu, "silu": functions.silu}[activation](pre)


def plain_expert_ffn(
    x: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str = "gelu",
    act: Callable[[Tensor, str], Tensor] = plain_activation,
) -> Tensor:
    """Every token through every expert, and a dense [L, T] matrix of shares; no gathering."""
    (tokens, top_k), local = weights.shape, w_out.size(0)
    hit = weights.new_zeros(local, tokens * top_k)
    bounds = offsets.tolist()
    for expert in range(local):
        hit[expert, slots[bounds[expert] : bounds[expert + 1]].long()] = 1
    share = (hit.view(local, tokens, top_k) * weights).sum(-1)
    pre = torch.einsum("th,efh->etf", x, w_in)
    if b_in is not None:
        pre = pre + b_in.unsqueeze(1)
    rows = torch.einsum("etf,ehf->eth", act(pre, activation), w_out)
    if b_out is not None:
        rows = rows + b_out.unsqueeze(1)
    return (share.unsqueeze(-1) * rows.to(weights.dtype)).sum(0).to(x.dtype)


def call(name: str, args: Sequence[Any], options: dict[str, Any] | None = None) -> Any:
    """The operator, as it is dispatched."""
    return OPERATORS[name].overload(*args, **(options or {}))


def check_result(name: str, args: Sequence[Any], plain: Callable[..., Tensor]) -> None:
    """The error rule between an operator, its reference, and `plain` in float64."""
    actual, reference = call(name, args), OPERATORS[name].reference(*args)
    exact = plain(*cast_sample(tuple(args), torch.float64))
    # A wrong reference would allow the operator any error.
    assert_error_rule(reference, plain(*args), exact, factor=4.0, name="reference")
    assert_error_rule(actual, reference, exact)


def check_gradients(
    function: Callable[..., Any], plain: Callable[..., Any], args: Sequence[Any]
) -> None:
    """The error rule, with factor 3, for the gradients of every argument that asks for one."""

    def gradients(fn: Callable[..., Any], values: Sequence[Any]) -> list[Tensor]:
        inputs = [each for each in values if isinstance(each, Tensor) and each.requires_grad]
        out = fn(*values)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        outputs = [each for each in outputs if each.requires_grad]
        generator = torch.Generator().manual_seed(7)
        upstream = [
            torch.randn(each.shape, generator=generator).to(torch.bfloat16).to(each.dtype)
            for each in outputs
        ]
        found = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
        return [
            torch.zeros_like(each) if grad is None else grad
            for each, grad in zip(inputs, found, strict=True)
        ]

    names = [
        f"gradient of argument {position}"
        for position, each in enumerate(args)
        if isinstance(each, Tensor) and each.requires_grad
    ]
    actual = gradients(function, args)
    again = gradients(plain, args)
    exact = gradients(plain, cast_sample(tuple(args), torch.float64))
    for name, *three in zip(names, actual, again, exact, strict=True):
        assert_error_rule(*three, factor=3.0, name=name)


def check_route(
    args: Sequence[Any], options: dict[str, Any] | None = None, exact_ids: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Ids against the reference, flips of near keys allowed only by score; weights by the rule."""
    full = dict(
        zip(
            ("top_k", "score", "renormalize", "selection_bias", "groups", "top_groups", "scale"),
            (1, "softmax", True, None, 1, 1, 1.0),
            strict=True,
        )
    )
    full.update(zip(full, args[1:], strict=False))
    full.update(options or {})
    logits = args[0].detach()
    score, renormalize, scale = full["score"], full["renormalize"], full["scale"]
    weights, experts = call("route", (logits,), full)
    expected_weights, expected = OPERATORS["route"].reference(logits, **full)
    assert experts.dtype == torch.int32
    assert weights.dtype == wide(logits.dtype)
    assert experts.shape == weights.shape == expected.shape
    if experts.numel():
        assert int(experts.min()) >= 0
        assert int(experts.max()) < logits.size(1)
    assert all(len(set(row)) == len(row) for row in experts.tolist()), "ids repeat in a token"
    by_logit = score == "softmax" and full["selection_bias"] is None and full["groups"] == 1
    if by_logit if exact_ids is None else exact_ids:
        assert torch.equal(experts, expected)
    else:
        check_near_choice(logits, experts, expected, score, full["selection_bias"])
    same = (experts == expected).all(-1)
    exact = plain_weights(logits.double(), experts, score, renormalize, scale)[same]
    plain = plain_weights(logits, experts, score, renormalize, scale)[same]
    assert_error_rule(weights[same], expected_weights[same], exact, name="weights")
    if plain.isfinite().all():  # the reference alone knows which rows are NaN
        assert_error_rule(expected_weights[same], plain, exact, factor=4.0, name="reference")
    return weights, experts


def check_near_choice(
    logits: Tensor, experts: Tensor, expected: Tensor, score: str, bias: Tensor | None
) -> None:
    """Where two choices differ, the keys (score + bias) differ by at most 4 ulp."""
    values = logits.double()
    key = values.softmax(-1) if score == "softmax" else values.sigmoid()
    if bias is not None:
        key = key + bias.double()
    chosen = key.gather(1, experts.long())
    right = key.gather(1, expected.long())
    eps = torch.finfo(wide(logits.dtype)).eps
    slack = SELECTION_ULPS * eps * torch.maximum(chosen.abs(), right.abs())
    flipped = experts != expected
    apart = flipped & ((chosen - right).abs() > slack)
    assert not apart.any(), f"ids {experts[apart.any(-1)]} for {expected[apart.any(-1)]}"
