"""`expert_ffn` in autograd: subsets of gradients, checkpoints, autocast, what is saved and when."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from ffn import (
    ACTIVATIONS,
    FLOAT_ARGUMENTS,
    NAMES,
    Args,
    Shape,
    asking,
    assert_same_bits,
    check_ffn_gradients,
    gradients,
    judge_gradients,
    problem,
    replaced,
    run,
    upstream_of,
)
from slicing import DTYPES, call, dtype_name, plain_expert_ffn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ppmoe_ops
from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import assert_error_rule, cast_sample

SMALL = Shape(26, 17, 14, 2, 6, 1, 4)
SUBSETS = list(product((False, True), repeat=6))


@pytest.mark.kernel
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_every_subset_of_gradients_through_autograd(activation: str) -> None:
    args = problem(SMALL, torch.float32, activation)
    every = dict(zip(FLOAT_ARGUMENTS, check_ffn_gradients(asking(args)), strict=True))
    for subset in SUBSETS[1:]:
        chosen = [at for at, need in zip(FLOAT_ARGUMENTS, subset, strict=True) if need]
        some = asking(args, chosen)
        came = gradients(lambda *args: run(args), some)
        for at, grad in zip(chosen, came, strict=True):
            # Another path may be taken where less is asked for, but not to another result.
            torch.testing.assert_close(grad, every[at], rtol=1e-5, atol=1e-5, msg=NAMES[at])
        judge_gradients(came, some, upstream_of(args))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_subset_of_the_backward_operator(dtype: torch.dtype) -> None:
    args = problem(SMALL, dtype, "geglu")
    x, slots, offsets, weights, w_in, b_in, w_out, b_out, activation = args
    pre = call("expert_ffn_forward", (*args, True))[1]
    pre[int(offsets[-1]) :] = torch.nan
    grad = upstream_of(args)
    full = (grad, x, slots, offsets, weights, w_in, w_out, b_out, pre, activation)
    every = call("expert_ffn_backward", (*full, *[True] * 6))
    judge_gradients(every, asking(args), grad)
    like = (x, weights, w_in, b_in, w_out, b_out)
    for subset in SUBSETS:
        came = call("expert_ffn_backward", (*full, *subset))
        for need, one, whole, tensor in zip(subset, came, every, like, strict=True):
            assert one.dtype == tensor.dtype
            assert one.shape == (tensor.shape if need else (0,))
            if need:
                torch.testing.assert_close(one, whole)


def test_frozen_parameters_get_no_gradient() -> None:
    args = problem(SMALL)
    x = args[0].requires_grad_()
    run(args).sum().backward()
    assert x.grad is not None
    assert all(args[at].grad is None for at in FLOAT_ARGUMENTS[1:])


class Experts(nn.Module):
    def __init__(self, args: Args) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(args[4].clone()), nn.Parameter(args[6].clone())
        self.b_in, self.b_out = nn.Parameter(args[5].clone()), nn.Parameter(args[7].clone())
        self.activation = args[8]

    def forward(self, x: Tensor, slots: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        parameters = (self.w_in, self.b_in, self.w_out, self.b_out)
        return ppmoe_ops.expert_ffn(x, slots, offsets, weights, *parameters, self.activation)


def twice(function: Any, *args: Any) -> Tensor:
    """Two layers that share all their weights."""
    x, *rest = args
    out: Tensor = function(function(x, *rest), *rest)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_the_same_weights_twice_in_one_graph(dtype: torch.dtype) -> None:
    args = asking(problem(SMALL, dtype, "swiglu"))
    upstream = upstream_of(args)
    actual = gradients(lambda *args: twice(ppmoe_ops.expert_ffn, *args), args, upstream)
    plain = gradients(lambda *args: twice(plain_expert_ffn, *args), args, upstream)
    exact = gradients(
        lambda *args: twice(plain_expert_ffn, *args), cast_sample(args, torch.float64), upstream
    )
    for name, *three in zip(NAMES, actual, plain, exact, strict=False):
        assert_error_rule(*three, factor=3.0, name=name)


def test_the_same_tensor_as_two_arguments() -> None:
    # H = F, so one square matrix can be both.
    args = asking(problem(Shape(20, 12, 12, 2, 4), torch.float64, "gelu"))
    shared = replaced(args, w_out=args[4])

    def leaves_alone(function: Any) -> Tensor:
        (grad,) = torch.autograd.grad(function(*shared), args[4], upstream_of(args))
        return grad

    torch.testing.assert_close(leaves_alone(ppmoe_ops.expert_ffn), leaves_alone(plain_expert_ffn))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    args = asking(problem(SMALL, torch.float32, "geglu"))
    expected = gradients(ppmoe_ops.expert_ffn, args)
    out = checkpoint(ppmoe_ops.expert_ffn, *args, use_reentrant=reentrant)
    out.backward(upstream_of(args))
    assert_same_bits([args[at].grad for at in FLOAT_ARGUMENTS], expected)


def test_functional_call() -> None:
    args = problem(SMALL, torch.float32, "silu")
    module = Experts(args)
    values = {
        name: torch.randn_like(each).requires_grad_() for name, each in module.named_parameters()
    }
    given = replaced(args, **values)
    out = torch.func.functional_call(module, values, args[:4])
    assert_same_bits([out], [run(given)])
    came = torch.autograd.grad(out, list(values.values()), upstream_of(args))
    order = [NAMES[at] for at in FLOAT_ARGUMENTS[2:]]
    wanted = dict(zip(order, gradients(lambda *args: run(args), given), strict=True))
    assert_same_bits(came, [wanted[name] for name in values])
    assert all(each.grad is None for each in module.parameters())


def test_gradients_are_added_to_those_that_are_there() -> None:
    args = asking(problem(SMALL, torch.float32, "gelu"))
    leaves = [args[at] for at in FLOAT_ARGUMENTS]
    once = gradients(lambda *args: run(args), args)
    before = [torch.randn_like(each) for each in leaves]
    for leaf, grad in zip(leaves, before, strict=True):
        leaf.grad = grad.clone()
    for _ in range(2):
        run(args).backward(upstream_of(args))
    wanted = [(start + one) + one for start, one in zip(before, once, strict=True)]
    assert_same_bits([leaf.grad for leaf in leaves if leaf.grad is not None], wanted)


def test_a_graph_may_be_walked_twice() -> None:
    args = asking(problem(SMALL, torch.float32, "swiglu"))
    leaves = [args[at] for at in FLOAT_ARGUMENTS]
    out = run(args)
    first = torch.autograd.grad(out, leaves, upstream_of(args), retain_graph=True)
    assert_same_bits(torch.autograd.grad(out, leaves, upstream_of(args)), first)


def test_inputs_are_left_alone() -> None:
    args = asking(problem(SMALL, torch.bfloat16, "gelu"))
    kept = [each.detach().clone() for each in args if isinstance(each, Tensor)]
    gradients(lambda *args: run(args), args)
    assert_same_bits([each for each in args if isinstance(each, Tensor)], kept)


class Recorder(TorchDispatchMode):
    """The `save` argument of every forward call."""

    def __init__(self) -> None:
        super().__init__()
        self.saves: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is OPERATORS["expert_ffn"].overload:  # inference mode does not take it apart
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func is OPERATORS["expert_ffn_forward"].overload:
            self.saves.append(args[-1])
        return func(*args, **(kwargs or {}))


def saves(args: Args) -> tuple[Tensor, list[bool]]:
    with Recorder() as recorder:
        out = run(args)
    return out, recorder.saves


@pytest.mark.kernel
def test_nothing_is_saved_where_nothing_can_be_derived() -> None:
    args = problem(SMALL, torch.float32, "swiglu")
    needing = asking(args)
    saved, what = saves(needing)
    assert what == [True]
    for at in FLOAT_ARGUMENTS:
        assert saves(asking(args, [at]))[1] == [True], NAMES[at]
    assert saves(args)[1] == [False]
    with torch.no_grad():
        out, what = saves(needing)
        assert what == [False]
        assert not out.requires_grad
        assert_same_bits([out], [saved])
    with torch.inference_mode():
        out, what = saves(needing)
        assert what == [False]
        assert out.is_inference()
        assert_same_bits([out.clone()], [saved])


def test_a_call_that_saves_nothing_returns_nothing_saved() -> None:
    args = problem(SMALL, torch.float32, "swiglu")
    with torch.no_grad():
        out, pre = call("expert_ffn_forward", (*args, False))
        assert pre.shape == (0, 28)
        assert_same_bits([out], [call("expert_ffn_forward", (*args, True))[0]])


def test_no_derivative_without_what_is_saved() -> None:
    args = asking(problem(SMALL))
    out, pre = call("expert_ffn_forward", (*args, False))
    assert not pre.requires_grad
    message = "expert_ffn_forward: save is False; allowed for a derivative: True"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        out.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast(activation: str) -> None:
    args = problem(SMALL, torch.float32, activation)
    half = tuple(
        each.bfloat16()
        if isinstance(each, Tensor) and each.is_floating_point() and at != 3
        else each
        for at, each in enumerate(args)
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = run(args)
        double = run(cast_sample(args, torch.float64))
    assert out.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    assert_same_bits([out], [run(half)])


def test_gradients_flow_through_autocast() -> None:
    args = asking(problem(SMALL, torch.float32, "swiglu"))
    half = asking(
        tuple(
            each.detach().bfloat16()
            if isinstance(each, Tensor) and each.is_floating_point() and at != 3
            else each
            for at, each in enumerate(args)
        )
    )
    leaves = [args[at] for at in FLOAT_ARGUMENTS]
    upstream = upstream_of(args).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = run(args)
    came = torch.autograd.grad(out, leaves, upstream)
    assert all(each.dtype == torch.float32 for each in came)
    wanted = gradients(lambda *args: run(args), half, upstream)
    assert_same_bits(came, [each.float() for each in wanted])
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(run(args), leaves, upstream)
    assert_same_bits(inside, came)


def test_float64_weights_of_routing_only_with_float64_tokens() -> None:
    args = problem(SMALL, torch.bfloat16)
    assert args[3].dtype == torch.float32
    assert run(asking(args)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"weights has dtype bfloat16; allowed: float32"):
        run(replaced(args, weights=args[3].bfloat16()))
