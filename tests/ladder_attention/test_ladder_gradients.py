"""First derivatives by finite differences on the compiled kernels, and no second ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ladder import Args, Shape, run
from ladder_problems import attention_args, block_args, branch_args, ffn_args, fusion_args
from ladder_rule import asking, differentiable, outputs_of
from torch import Tensor
from torch.autograd import gradcheck

from ppmoe_ops._library import OPERATORS

pytestmark = pytest.mark.kernel

SMALL = Shape(2, 3, 4, 2, 8, (2, 3), (1, -1))
NARROW = Shape(1, 3, 3, 1, 8, (2, 2), (1, 1))
DOUBLE = torch.float64


def fusion_away_from_the_kink() -> Args:
    args = fusion_args((2, 3, 6), 4, DOUBLE)
    # Every hidden value is far from zero, and as many are below it as above.
    args["w1"] = args["w1"] * 0.1
    args["b1"] = torch.tensor([1.0, -1.0, 1.5, -2.0]).double()
    return args


PROBLEMS: dict[str, Callable[[], tuple[str, Args]]] = {
    "window_attention": lambda: ("window_attention", attention_args(SMALL, DOUBLE)),
    "window_attention scaled": lambda: (
        "window_attention", attention_args(NARROW, DOUBLE, scale=-0.7)
    ),
    "window_attention without_bias": lambda: (
        "window_attention", attention_args(SMALL, DOUBLE, bias=False)
    ),
    "window_attention odd_heads": lambda: (
        "window_attention", attention_args(Shape(1, 3, 4, 2, 5, (2, 3), (1, -1)), DOUBLE)
    ),
    "ladder_attention own_value": lambda: (
        "ladder_attention", branch_args(NARROW, DOUBLE, value=False, scaled=True)
    ),
    "ladder_attention given_value": lambda: (
        "ladder_attention", branch_args(Shape(2, 2, 3, 1, 8, (2, 2), (-1, 0)), DOUBLE, scaled=True)
    ),
    "ladder_ffn evaluation": lambda: ("ladder_ffn", ffn_args((2, 3, 2, 5), DOUBLE, scaled=True)),
    "ladder_ffn training": lambda: (
        "ladder_ffn", ffn_args((2, 3, 2, 5), DOUBLE, training=True, scaled=True)
    ),
    "ladder_ffn large_eps": lambda: (
        "ladder_ffn", ffn_args((1, 3, 3, 8), DOUBLE, training=True, eps=0.1)
    ),
    "pixel_adaptive_fusion": lambda: ("pixel_adaptive_fusion", fusion_away_from_the_kink()),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS)
def test_finite_differences(problem: str) -> None:
    name, args = PROBLEMS[problem]()
    names = differentiable(args)
    leaves = tuple(args[each].clone().requires_grad_() for each in names)

    def function(*values: Tensor) -> Tensor:
        return outputs_of(run(name, {**args, **dict(zip(names, values, strict=True))}))[0]

    assert gradcheck(function, leaves)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_each_argument_on_its_own(problem: str) -> None:
    """A directional derivative for every single argument, the others frozen."""
    name, args = PROBLEMS[problem]()
    step = 1e-6
    for each in differentiable(args):
        alone = asking(args, [each])
        out = outputs_of(run(name, alone))[0]
        grad = torch.randn(out.shape, dtype=DOUBLE)
        (came,) = torch.autograd.grad(out, alone[each], grad)
        along = torch.randn(args[each].shape, dtype=DOUBLE)
        ends = [
            outputs_of(run(name, {**args, each: args[each] + sign * step * along}))[0]
            for sign in (1, -1)
        ]
        wanted = ((ends[0] - ends[1]) * grad).sum() / (2 * step)
        torch.testing.assert_close((came * along).sum(), wanted, rtol=1e-5, atol=1e-6)


def test_every_differentiable_operator_is_here() -> None:
    expected = {
        op.name
        for op in OPERATORS.values()
        if op.family == "ladder_attention" and op.backward is not None
    }
    assert {each.split()[0] for each in PROBLEMS} == expected


@pytest.mark.parametrize(
    "problem", ["window_attention", "ladder_attention given_value", "ladder_ffn training",
                "ladder_ffn evaluation", "pixel_adaptive_fusion"]
)  # fmt: skip
def test_the_second_derivative_raises_in_the_contracts_words(problem: str) -> None:
    name, args = PROBLEMS[problem]()
    args = asking(args)
    leaves = [args[each] for each in differentiable(args)]
    out = outputs_of(run(name, args))[0]
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    backward = OPERATORS[f"{name}_backward"]
    assert backward.no_derivative == f"{name} has no second derivative; allowed: first derivatives"
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad([each.sum() for each in first], leaves)
    assert str(error.value) == f"{name}_backward: {backward.no_derivative}"


def backward_args(name: str, args: Args) -> list[Any]:
    """Arguments of the backward operator for a call of the forward one, all gradients wanted."""
    out = run(name, args)
    grad = torch.randn_like(outputs_of(out)[0])
    values = list(args.values())
    if name == "window_attention":
        return [grad, *values, True]
    if name == "ladder_attention":
        return [grad, *values[:8], *values[9:], True, True]
    if name == "ladder_ffn":
        return [grad, *values[:11], *out[1:], *values[13:]]
    return [grad, *values[:6]]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_kernel_and_reference_of_the_backward_agree(problem: str) -> None:
    name, args = PROBLEMS[problem]()
    values = backward_args(name, args)
    operator = OPERATORS[f"{name}_backward"]
    for came, wanted in zip(operator.overload(*values), operator.reference(*values), strict=True):
        assert came.shape == wanted.shape
        assert came.stride() == wanted.stride()
        torch.testing.assert_close(came, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("need_maps", [False, True])
@pytest.mark.parametrize("need_parameters", [False, True])
@pytest.mark.parametrize("value", [False, True])
def test_gradients_of_a_branch_that_nobody_needs_are_empty(
    value: bool, need_parameters: bool, need_maps: bool
) -> None:
    args = branch_args(SMALL, value=value)
    operator = OPERATORS["ladder_attention_backward"]
    values = backward_args("ladder_attention", args)
    whole = operator.overload(*values)
    some = operator.overload(*values[:-2], need_maps, need_parameters)
    reference = operator.reference(*values[:-2], need_maps, need_parameters)
    for at, (one, other, theirs) in enumerate(zip(some, whole, reference, strict=True)):
        assert one.shape == theirs.shape
        needed = need_maps if at < 2 else need_parameters
        if needed and one.numel():
            assert torch.equal(one, other)
        elif not needed:
            assert one.numel() == 0


@pytest.mark.parametrize("bias", [False, True])
def test_the_tables_gradient_is_empty_where_nobody_needs_it(bias: bool) -> None:
    args = attention_args(SMALL, bias=bias)
    operator = OPERATORS["window_attention_backward"]
    values = backward_args("window_attention", args)
    whole, some = operator.overload(*values), operator.overload(*values[:-1], False)
    assert some[3].shape == (0,)
    assert whole[3].shape == ((15, 2) if bias else (0,))
    for one, other in zip(some[:3], whole[:3], strict=True):
        assert torch.equal(one, other)


def test_the_block_has_no_derivative_even_where_parameters_alone_ask() -> None:
    args = block_args(NARROW)
    args["params"][20].requires_grad_()
    with pytest.raises(RuntimeError, match=r"ladder_block: .*ladder_ffn"):
        run("ladder_block", args).sum().backward()
