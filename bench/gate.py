"""Checks an operator's result before its time is reported, and measures what autograd keeps.

The rule for floating-point results: max|y - y64| <= f max|t - y64| + eps(dtype) max|y64|, where
y64 is the plain-PyTorch reference on the same inputs in float64, t the reference in the dtype
itself, and f is 2, or 3 for gradients. Integer results are exact.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops._library import OPERATORS

SELECTION_ULPS = 4


def _listed_rows(args: Sequence[Any], results: list[Tensor]) -> list[Tensor]:
    """Of the rows that `pre` reserves, those of local slots: the others hold nothing."""
    offsets = args[2]
    return [results[0], results[1][int(offsets[0]) : int(offsets[-1])]]


# Operators of whose results a part alone is defined, and which part.
DEFINED: dict[str, Callable[[Sequence[Any], list[Tensor]], list[Tensor]]] = {
    "expert_ffn_forward": _listed_rows
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a result may be timed; `reason` says why not."""

    passed: bool
    reason: str = ""
    error: float = 0.0
    allowed: float = 0.0


def outputs(result: Any) -> list[Tensor]:
    """The tensors of an operator's result."""
    return list(result) if isinstance(result, (tuple, list)) else [result]


def in_float64(args: Sequence[Any]) -> tuple[Any, ...]:
    """`args` with floating-point tensors, and a dtype argument, in float64."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        if isinstance(value, (list, tuple)):
            return type(value)(widen(each) for each in value)
        return value

    return tuple(widen(value) for value in args)


def compare(came: Tensor, plain: Tensor, exact: Tensor, factor: float) -> Verdict:
    """Apply the rule to one tensor; `plain` is t and `exact` is y64."""
    if came.shape != plain.shape or came.dtype != plain.dtype:
        return Verdict(
            False, f"{list(came.shape)} {came.dtype}; expected {list(plain.shape)} {plain.dtype}"
        )
    if not came.is_floating_point():
        different = int((came != plain).sum())
        return Verdict(different == 0, f"{different} of {came.numel()} integers differ")
    if came.numel() == 0:
        return Verdict(True)
    finite = exact.isfinite()
    if not torch.equal(came.isfinite(), finite):
        return Verdict(False, "non-finite values where the reference has none, or the reverse")
    zero = exact.new_zeros(())
    error = torch.where(finite, came.double() - exact, zero).abs().max().item()
    plain_error = torch.where(finite, plain.double() - exact, zero).abs().max().item()
    scale = torch.where(finite, exact, zero).abs().max().item()
    allowed = factor * plain_error + torch.finfo(came.dtype).eps * scale
    if error <= allowed:
        return Verdict(True, "", error, allowed)
    return Verdict(False, f"error {error:.3g} is above {allowed:.3g}", error, allowed)


def check(operator: str, args: Sequence[Any], result: Any) -> Verdict:
    """Whether `result` is what `operator` should return for `args`."""
    if operator == "route":
        return check_route(args, result)
    # A composite's own reference would call the kernel that is being checked.
    source = f"{operator}_forward" if OPERATORS[operator].composite else operator
    reference = OPERATORS[source].reference
    factor = 3.0 if operator.endswith("_backward") else 2.0
    came = outputs(result)
    args = (*args, *_switches(reference, args))
    plain, exact = outputs(reference(*args)), outputs(reference(*in_float64(args)))
    if source != operator:
        plain, exact = plain[: len(came)], exact[: len(came)]
    elif operator in DEFINED:
        came, plain, exact = (DEFINED[operator](args, each) for each in (came, plain, exact))
    return agree(came, plain, exact, factor)


def agree(
    came: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], factor: float
) -> Verdict:
    """Apply the rule to every tensor; the verdict on the worst one."""
    if len(came) != len(plain):
        return Verdict(False, f"{len(came)} results; expected {len(plain)}")
    worst = Verdict(True)
    for position, tensors in enumerate(zip(came, plain, exact, strict=True)):
        verdict = compare(*tensors, factor)
        if not verdict.passed:
            return dataclasses.replace(verdict, reason=f"result {position}: {verdict.reason}")
        if verdict.error >= worst.error:
            worst = verdict
    return worst


def agree_in_norm(
    came: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], slack: float = 5e-3
) -> Verdict:
    """For gradients through several operators, a relu among them: |y - y64| <= 3 |t - y64| + slack.

    Where a relu's argument is next to zero, rounding decides whether a pixel counts at all; one of
    them may be more than all other errors together, and less than `slack` of the whole.
    """
    worst = Verdict(True)
    for position, (a, b, c) in enumerate(zip(came, plain, exact, strict=True)):
        error, scale = float((a.double() - c).norm()), float(c.norm())
        allowed = 3 * float((b.double() - c).norm()) + slack * scale
        verdict = Verdict(error <= allowed, "", error, allowed)
        if not verdict.passed:
            reason = f"gradient {position}: error {error:.3g} in norm is above {allowed:.3g}"
            return dataclasses.replace(verdict, reason=reason)
        if error >= worst.error:
            worst = verdict
    return worst


def _switches(reference: Callable[..., Any], args: Sequence[Any]) -> list[bool]:
    """A forward operator's switches, off, where `args` are those of its composite."""
    given = inspect.signature(reference).parameters.values()
    needed = [each for each in given if each.kind is each.POSITIONAL_OR_KEYWORD]
    needed = [each for each in needed[len(args) :] if each.default is each.empty]
    return [False] * len(needed)


def check_route(args: Sequence[Any], result: Any) -> Verdict:
    """`route`: ids are exact by logits, else right up to a few ulp of the key; then the weights.

    Scores that differ by less than the rounding of `exp` may change places, and a group may then
    change with them, so the ids are checked for being *a* right choice instead of the reference's.
    """
    logits, _, score, renormalize, bias, groups, top_groups, scale = args
    weights, experts = outputs(result)
    if score == "softmax" and bias is None and groups == 1:
        expected: Tensor = OPERATORS["route"].reference(*args)[1]
        verdict = compare(experts, expected, expected, 0.0)
    else:
        verdict = _check_choice(logits, experts, score, bias, groups, top_groups)
    if not verdict.passed:
        return dataclasses.replace(verdict, reason=f"experts: {verdict.reason}")
    index = experts.long()

    def expected_weights(values: Tensor) -> Tensor:
        scores = values.softmax(-1) if score == "softmax" else values.sigmoid()
        chosen = scores.gather(1, index)
        if renormalize:
            floor = 0.0 if score == "softmax" else 1e-20
            chosen = chosen / (chosen.sum(-1, keepdim=True) + floor)
        return chosen.mul(scale)

    wide = logits if logits.dtype == torch.float64 else logits.float()
    verdict = compare(weights, expected_weights(wide), expected_weights(logits.double()), 2.0)
    return dataclasses.replace(verdict, reason=verdict.reason and f"weights: {verdict.reason}")


def _check_choice(
    logits: Tensor, experts: Tensor, score: str, bias: Tensor | None, groups: int, top_groups: int
) -> Verdict:
    tokens, num_experts = logits.shape
    values = logits.double()
    key = values.softmax(-1) if score == "softmax" else values.sigmoid()
    if bias is not None:
        key = key + bias.double()
    # Keys are float32 in the operator: a few of its ulp at the largest key of the row.
    slack = SELECTION_ULPS * torch.finfo(torch.float32).eps * key.abs().amax(-1, keepdim=True)
    index = experts.long()
    chosen = torch.zeros(tokens, num_experts, dtype=torch.bool, device=logits.device)
    chosen.scatter_(1, index, True)
    if not bool((chosen.sum(-1) == index.size(1)).all()):
        return Verdict(False, "ids repeat within a token")
    picked = key.gather(1, index)
    if not bool((picked[:, 1:] <= picked[:, :-1] + slack).all()):
        return Verdict(False, "ids are not best first")

    width = num_experts // groups
    by_group = key.view(tokens, groups, width)
    group_key = by_group.topk(min(2, width), -1).values.sum(-1)
    threshold = group_key.topk(top_groups, -1).values[:, -1:]
    used = chosen.view(tokens, groups, width).any(-1)
    if not bool((group_key >= threshold - 2 * slack)[used].all()):
        return Verdict(False, "an id is from a group that was not chosen")
    certain = (group_key > threshold + 2 * slack) | used
    rivals = by_group.masked_fill(~certain.unsqueeze(-1), -torch.inf).flatten(1)
    rivals = rivals.masked_fill(chosen, -torch.inf).amax(-1, keepdim=True)
    if not bool((rivals <= picked[:, -1:] + slack).all()):
        return Verdict(False, "a better expert was left out")
    return Verdict(True)


def saved_bytes(call: Callable[[], Any], inputs: Sequence[Any]) -> int:
    """Bytes that autograd keeps after `call`, beyond its inputs and results."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    for value in (*inputs, *outputs(result)):
        if isinstance(value, Tensor):
            kept.pop(value.untyped_storage().data_ptr(), None)
    return sum(kept.values())
