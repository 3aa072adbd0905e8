"""Problems for the tests of `expert_ffn`, and how its results are judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from slicing import call, distinct_ids, index_of, plain_expert_ffn, wide
from torch import Tensor

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.ops.expert_slice.activations import ACTIVATIONS as ACTIVATIONS
from ppmoe_ops.ops.expert_slice.activations import GATED as GATED
from ppmoe_ops.testing import assert_error_rule, cast_sample

Args = tuple[Any, ...]
NAMES = (
    "x", "slots", "offsets", "weights", "w_in", "b_in", "w_out", "b_out", "activation"
)  # fmt: skip
FLOAT_ARGUMENTS = (0, 3, 4, 5, 6, 7)
# Results of so few elements may be near the exact ones by luck.
FEW = 64
# Experts of up to so many rows may sum products in an order that the weights' strides decide.
FEW_ROWS = 16
BIASES = ((True, True), (True, False), (False, True), (False, False))


@dataclasses.dataclass(frozen=True)
class Shape:
    """T tokens of width H choose K of E experts, of which `local` from `first` on are here.

    `routing` is how they choose: drawn; dropped (two in five ids are -1); one (all tokens choose
    the same experts); stairs (expert e gets e + 1 tokens, K = 1); rare (expert 1 gets 22 tokens
    and expert 2 nine, expert 0 all others, K = 1); absent (every id is -1).
    """

    tokens: int
    hidden: int
    width: int
    top_k: int = 2
    experts: int = 4
    first: int = 0
    local: int = -1
    routing: str = "drawn"

    @property
    def here(self) -> int:
        return self.experts if self.local < 0 else self.local

    def ids(self) -> Tensor:
        tokens, top_k = self.tokens, self.top_k
        if self.routing == "one":
            return torch.arange(top_k).expand(tokens, top_k)
        if self.routing == "stairs":
            counts = torch.arange(1, self.experts + 1)
            ids = torch.arange(self.experts).repeat_interleave(counts)
            assert ids.numel() == tokens
            return ids[torch.randperm(tokens)].view(tokens, 1)
        if self.routing == "rare":
            ids = torch.zeros(tokens, 1, dtype=torch.int64)
            chosen = torch.randperm(tokens)
            ids[chosen[:22]], ids[chosen[22:31]] = 1, 2
            return ids
        if self.routing == "absent":
            return torch.full((tokens, top_k), -1)
        ids = distinct_ids(tokens, top_k, self.experts)
        if self.routing == "dropped":
            ids = torch.where(torch.rand(tokens, top_k) < 0.4, -1, ids)
        return ids


def problem(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    activation: str = "gelu",
    biases: tuple[bool, bool] = (True, True),
) -> Args:
    """Arguments of `expert_ffn`, contiguous, without gradients."""
    local, inner = shape.here, (2 if activation in GATED else 1) * shape.width
    slots, offsets = index_of(shape.ids(), shape.first, local)

    def tensor(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes) * scale).to(dtype)

    return (
        tensor(shape.tokens, shape.hidden),
        slots,
        offsets,
        torch.randn(shape.tokens, shape.top_k, dtype=wide(dtype)),
        tensor(local, inner, shape.hidden, scale=max(shape.hidden, 1) ** -0.5),
        tensor(local, inner, scale=0.5) if biases[0] else None,
        tensor(local, shape.hidden, shape.width, scale=max(shape.width, 1) ** -0.5),
        tensor(local, shape.hidden, scale=0.5) if biases[1] else None,
        activation,
    )


def asking(args: Sequence[Any], which: Sequence[int] = FLOAT_ARGUMENTS) -> Args:
    """The arguments as leaves that ask for a gradient, strides kept."""
    return tuple(
        each.detach().requires_grad_(position in which)
        if isinstance(each, Tensor) and each.is_floating_point()
        else each
        for position, each in enumerate(args)
    )


def replaced(args: Sequence[Any], **changes: Any) -> Args:
    return tuple({**dict(zip(NAMES, args, strict=True)), **changes}.values())


def run(args: Sequence[Any]) -> Tensor:
    out: Tensor = call("expert_ffn", args)
    return out


def upstream_of(args: Sequence[Any]) -> Tensor:
    """A gradient that every dtype holds exactly, the same for every call."""
    generator = torch.Generator().manual_seed(7)
    x = args[0]
    return torch.randn(x.shape, generator=generator).to(torch.bfloat16).to(x.dtype)


def gradients(function: Any, args: Sequence[Any], upstream: Tensor | None = None) -> list[Tensor]:
    leaves = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
    out = function(*args)
    if upstream is None:
        upstream = upstream_of(args)
    found = torch.autograd.grad(out, leaves, upstream.to(out.dtype), allow_unused=True)
    return [
        torch.zeros_like(leaf) if each is None else each
        for leaf, each in zip(leaves, found, strict=True)
    ]


def reference_gradients(args: Sequence[Any], upstream: Tensor) -> list[Tensor]:
    """By the references of the two halves, of the arguments that ask for one."""
    plain = [each.detach() if isinstance(each, Tensor) else each for each in args]
    x, slots, offsets, weights, w_in, _, w_out, b_out, activation = plain
    _, pre = OPERATORS["expert_ffn_forward"].reference(*plain, True)
    needs = [isinstance(args[at], Tensor) and args[at].requires_grad for at in FLOAT_ARGUMENTS]
    grads = OPERATORS["expert_ffn_backward"].reference(
        upstream, x, slots, offsets, weights, w_in, w_out, b_out, pre, activation, *needs
    )
    return [grad for grad, need in zip(grads, needs, strict=True) if need]


def _farther(one: Tensor, other: Tensor, exact: Tensor) -> Tensor:
    """Of two results the one that is farther off, element by element."""
    worse = (one.double() - exact).abs() >= (other.double() - exact).abs()
    return torch.where(worse, one, other)


def _bounding(pre: Tensor, activation: str) -> Tensor:
    """At least any activation of values up to `pre`, with slopes at least theirs."""
    if activation in GATED:
        gate, up = pre.chunk(2, -1)
        return (gate + gate * gate) * up
    return pre + pre * pre


def _all_positive(args: Sequence[Any]) -> Args:
    """In float64, and no two terms of a sum cancel."""
    return tuple(
        each.detach().double().abs().requires_grad_(each.requires_grad)
        if isinstance(each, Tensor) and each.is_floating_point()
        else each
        for each in args
    )


def _bounding_ffn(*args: Any) -> Tensor:
    return plain_expert_ffn(*args, act=_bounding)


def judge(
    actual: Tensor,
    reference: Tensor,
    plain: Tensor,
    exact: Tensor,
    factor: float,
    name: str,
    terms: Callable[[], Tensor],
    dtype: torch.dtype,
    few: int = FEW,
) -> None:
    """The error rule for data of `dtype`. The reference, which keeps sums wide, is the measure.

    Where a result has few elements, the measure may be exact by luck although terms have cancelled.
    Those may be off by four roundings of `terms()`, the sums of the terms' sizes.
    """
    measure = reference
    if actual.dtype in (torch.float32, torch.float64):
        measure = _farther(reference, plain, exact)
    for came, against, times, what in (
        (reference, plain, 2 * factor, f"reference's {name}"),
        (actual, measure, factor, name),
    ):
        try:
            assert_error_rule(came, against, exact, factor=times, name=what)
        except AssertionError:
            # In a narrow dtype what is between the products is rounded to it.
            rounded = dtype if actual.numel() <= FEW else wide(dtype)
            error = (came.detach().double() - exact.detach()).abs()
            allowed = 4 * torch.finfo(rounded).eps * terms().detach().max()
            if not (actual.numel() <= few and (error <= allowed).all()):
                raise


def check_ffn(args: Sequence[Any], few: int = FEW) -> Tensor:
    """The error rule for the output, which is returned."""
    plain = [each.detach() if isinstance(each, Tensor) else each for each in args]
    out = run(plain)
    assert out.shape == plain[0].shape
    assert out.dtype == plain[0].dtype
    assert out.is_contiguous()
    exact = plain_expert_ffn(*cast_sample(tuple(plain), torch.float64))
    reference = OPERATORS["expert_ffn_forward"].reference(*plain, False)[0]
    judge(
        out, reference, plain_expert_ffn(*plain), exact, 2.0, "result",
        lambda: _bounding_ffn(*_all_positive(plain)), out.dtype, few,
    )  # fmt: skip
    return out


def check_ffn_gradients(args: Sequence[Any], upstream: Tensor | None = None) -> list[Tensor]:
    """The error rule for the gradient of every argument that asks for one."""
    grad = upstream_of(args) if upstream is None else upstream
    actual = gradients(lambda *args: run(args), args, grad)
    judge_gradients(actual, args, grad)
    return actual


def judge_gradients(
    actual: Sequence[Tensor], args: Sequence[Any], upstream: Tensor, few: int = FEW
) -> None:
    again = gradients(plain_expert_ffn, args, upstream)
    exact = gradients(plain_expert_ffn, cast_sample(tuple(args), torch.float64), upstream)
    reference = reference_gradients(args, upstream)
    leaves = [
        (name, each)
        for name, each in zip(NAMES, args, strict=True)
        if isinstance(each, Tensor) and each.requires_grad
    ]
    for at, (name, leaf) in enumerate(leaves):
        assert actual[at].shape == leaf.shape
        assert actual[at].dtype == leaf.dtype
        judge(
            actual[at], reference[at], again[at], exact[at], 3.0, f"gradient of {name}",
            lambda at=at: gradients(_bounding_ffn, _all_positive(args), upstream.abs())[at],
            args[0].dtype, few,
        )  # fmt: skip


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in memory with other strides."""
    wider = tensor.new_full((*tensor.shape[:-1], tensor.size(-1) + 3), torch.nan)
    wider[..., 1:-2] = tensor
    spread = tensor.new_full((*tensor.shape[:-1], 2 * tensor.size(-1)), torch.nan)
    spread[..., ::2] = tensor
    taller = tensor.new_full((2 * tensor.size(0) + 1, *tensor.shape[1:]), torch.nan)
    taller[1::2] = tensor
    return {
        "closed": tensor.contiguous(),
        "columns_of_wider": wider[..., 1:-2],
        "every_other_column": spread[..., ::2],
        "every_other_of_the_first_axis": taller[1::2],
        "transposed": tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
        "last_axis_first": tensor.movedim(-1, 0).contiguous().movedim(0, -1),
    }


def assert_same_bits(came: Sequence[Tensor], wanted: Sequence[Tensor], what: str = "") -> None:
    for number, (one, other) in enumerate(zip(came, wanted, strict=True)):
        assert one.shape == other.shape, f"{what}: result {number}"
        same = one.detach().contiguous().flatten().view(torch.uint8)
        bits = other.detach().contiguous().flatten().view(torch.uint8)
        assert torch.equal(same, bits), f"{what}: result {number} differs"


def summed_alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether weights are contiguous along the same axes; then no bit may differ."""
    axes = ((4, 2), (6, 2), (6, 1))
    return all((one[at].stride(d) == 1) == (other[at].stride(d) == 1) for at, d in axes)


def of_many_rows(
    results: Sequence[Tensor], args: Sequence[Any], needs: Sequence[int] = FLOAT_ARGUMENTS
) -> list[Tensor]:
    """What experts of more than FEW_ROWS rows alone reach, of the output and the gradients."""
    slots, offsets, weights = args[1:4]
    few_slots = torch.zeros(weights.shape, dtype=torch.bool)
    many = []
    for low, high in pairwise(offsets.tolist()):
        many.append(high - low > FEW_ROWS)
        if not many[-1]:
            few_slots.view(-1)[slots[low:high].long()] = True
    tokens, experts = ~few_slots.any(-1), torch.tensor(many, dtype=torch.bool)
    masks = {0: tokens, 3: ~few_slots}
    asked = [at for at in needs if args[at] is not None]
    chosen = [tokens, *(masks.get(at, experts) for at in asked)]
    return [each[mask] for each, mask in zip(results, chosen, strict=True)]


def assert_layouts_agree(
    came: Sequence[Tensor],
    wanted: Sequence[Tensor],
    turned: Sequence[Any],
    closed: Sequence[Any],
    grad: Tensor,
    what: str,
) -> None:
    """Equal bits of `all_results` in two layouts; for few rows the error rule where it must do."""
    if summed_alike(turned, closed):
        assert_same_bits(came, wanted, what)
        return
    assert_same_bits(of_many_rows(came, turned), of_many_rows(wanted, turned), what)
    check_ffn(turned)
    judge_gradients(came[1:], asking(turned), grad)


def all_results(args: Sequence[Any], upstream: Tensor | None = None) -> list[Tensor]:
    """The output and every gradient."""
    args = asking(args)
    leaves = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
    out = run(args)
    grad = upstream_of(args) if upstream is None else upstream
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
