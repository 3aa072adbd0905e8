"""How results and gradients of the ladder-attention operators are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ladder import PLAIN, Args, run
from torch import Tensor

from ppmoe_ops._backends import choices
from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import assert_error_rule, cast_sample

# Results of so few elements may be near the exact ones by luck, and drawn ones of any size.
FEW = 128
ANY = 1 << 62
NOT_DIFFERENTIABLE = ("row_scale", "running_mean", "running_var")


def outputs_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def detached(args: Args) -> Args:
    return {
        name: value.detach() if isinstance(value, Tensor) else value for name, value in args.items()
    }


def differentiable(args: Args) -> list[str]:
    return [
        name
        for name, value in args.items()
        if isinstance(value, Tensor) and name not in NOT_DIFFERENTIABLE
    ]


def asking(args: Args, names: Sequence[str] | None = None) -> Args:
    """The arguments as leaves that ask for a gradient, strides kept."""
    wanted = differentiable(args) if names is None else names
    return {
        name: value.detach().requires_grad_(name in wanted) if isinstance(value, Tensor) else value
        for name, value in args.items()
    }


def upstream_of(map_: Tensor) -> Tensor:
    """A gradient that every dtype holds exactly, the same for every call."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(map_.shape, generator=generator).to(torch.bfloat16).to(map_.dtype)


def gradients(
    function: Callable[..., Any], args: Args, upstream: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradient of the first result to every argument that asks for one."""
    leaves = {
        name: value
        for name, value in args.items()
        if isinstance(value, Tensor) and value.requires_grad
    }
    out = outputs_of(function(*args.values()))[0]
    grad = upstream_of(out) if upstream is None else upstream.to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if each is None else each
        for (name, leaf), each in zip(leaves.items(), found, strict=True)
    }


def exactly(args: Args) -> Args:
    made: Args = cast_sample(args, torch.float64)
    return made


def spread(function: Callable[[Args], Tensor], args: Args, dtype: torch.dtype) -> float:
    """What roundings to `dtype` move a result by: those of the inputs, once more and at random, and
    those on the way, from the error that the next narrower dtype makes."""
    exact = exactly(args)
    base = function(exact).detach()
    narrow = torch.float32 if dtype == torch.float64 else torch.bfloat16
    coarse = function(cast_sample(exact, narrow)).detach().double()
    farthest = (coarse - function(cast_sample(cast_sample(exact, narrow), torch.float64))).detach()
    farthest = farthest.abs().max() * (torch.finfo(dtype).eps / torch.finfo(narrow).eps)

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(each) for each in value]
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        change = (torch.rand(value.shape).double() * 2 - 1) * torch.finfo(dtype).eps
        return (value.detach() * (1 + change)).requires_grad_(value.requires_grad)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        for _ in range(3):
            other = function({name: moved(value) for name, value in exact.items()}).detach()
            farthest = torch.maximum(farthest, (other - base).abs().max())
    return farthest.item()


def farther(one: Tensor, other: Tensor, exact: Tensor) -> Tensor:
    """Of two results the one that is farther off, element by element."""
    worse = (one.double() - exact).abs() >= (other.double() - exact).abs()
    return torch.where(worse, one, other)


def judge(
    came: Tensor,
    plain: Tensor,
    exact: Tensor,
    factor: float,
    what: str,
    moves: Callable[[], float],
    few: int = FEW,
) -> None:
    """The error rule.

    Where `plain` errs least by luck, its largest error is no measure: few elements may be off by
    eight times what roundings typically do, and float32, which is what sums are kept in, by six
    times. Nothing is wider than float64.
    """
    try:
        assert_error_rule(came, plain, exact, factor=factor, name=what)
    except AssertionError:
        times = 8 if came.numel() <= few or came.dtype == torch.float64 else 6
        narrow = came.dtype in (torch.bfloat16, torch.float16) and came.numel() > few
        if narrow or not torch.equal(came.isfinite(), exact.isfinite()):
            raise
        error = (came.detach().double() - exact.detach())[exact.isfinite()].abs()
        if not error.numel() or error.max().item() > times * moves():
            raise


def judge_both(
    came: Tensor,
    reference: Tensor,
    plain: Tensor,
    exact: Tensor,
    factor: float,
    what: str,
    moves: Callable[[], float],
    few: int,
) -> None:
    """The error rule for the operator and for its reference, which serves where no kernel does.

    In float32 the reference and the composition differ by the order of their sums alone, and the
    worse of the two is the measure.
    """
    judge(reference, plain, exact, 2 * factor, f"the reference's {what}", moves, few)
    measure = farther(reference, plain, exact) if came.dtype == torch.float32 else plain
    judge(came, measure, exact, factor, what, moves, few)


def check_result(name: str, args: Args, few: int = FEW) -> list[Tensor]:
    """The error rule for every result of an operator and of its reference; returns the results."""
    args = detached(args)
    first = next(iter(args.values()))
    plain = outputs_of(PLAIN[name](*args.values()))
    exact = outputs_of(PLAIN[name](*exactly(args).values()))
    came = outputs_of(run(name, args))
    reference = outputs_of(OPERATORS[name].reference(*args.values()))
    for number, four in enumerate(zip(came, reference, plain, exact, strict=True)):
        assert four[0].is_contiguous()
        assert four[0].dtype == four[1].dtype == four[2].dtype

        def moves(at: int = number) -> float:
            def result(inputs: Args) -> Tensor:
                return outputs_of(PLAIN[name](*inputs.values()))[at]

            return spread(result, args, first.dtype)

        judge_both(*four, 2.0, f"{name}: result {number}", moves, few)
    assert came[0].shape == first.shape
    assert came[0].dtype == first.dtype
    return came


def check_gradients(
    name: str, args: Args, upstream: Tensor | None = None, few: int = FEW
) -> dict[str, Tensor]:
    """The error rule for the gradient of every argument that asks for one, with factor 3."""
    came = gradients(OPERATORS[name].overload, args, upstream)
    judge_gradients(name, came, args, upstream, few)
    return came


def exact_gradients(name: str, args: Args, upstream: Tensor | None) -> dict[str, Tensor]:
    found = gradients(PLAIN[name], exactly(args), upstream)
    if name == "ladder_ffn" and args["training"]:
        # The next norm's mean takes these shifts away again; what is left is rounding.
        if "b2" in found:
            found["b2"].zero_()
        if "bn_b" in found:
            found["bn_b"][1] = 0
    return found


def judge_gradients(
    name: str,
    came: dict[str, Tensor],
    args: Args,
    upstream: Tensor | None = None,
    few: int = FEW,
) -> None:
    first = next(iter(args.values()))
    plain = gradients(PLAIN[name], args, upstream)
    exact = exact_gradients(name, args, upstream)
    reference = gradients(OPERATORS[name].reference, args, upstream)
    assert came.keys() == plain.keys()
    for each, grad in came.items():
        assert grad.shape == args[each].shape, each
        assert grad.dtype == args[each].dtype, each

        def moves(each: str = each) -> float:
            def result(inputs: Args) -> Tensor:
                return gradients(PLAIN[name], inputs, upstream)[each]

            return spread(result, args, first.dtype)

        four = (grad, reference[each], plain[each], exact[each])
        judge_both(*four, 3.0, f"{name}: gradient of {each}", moves, few)


def all_results(name: str, args: Args, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """The results, and the gradients of all arguments that have one."""
    args = asking(args)
    results = outputs_of(run(name, args))
    leaves = {each: args[each] for each in differentiable(args)}
    grad = upstream_of(results[0]) if upstream is None else upstream.to(results[0].dtype)
    grads = torch.autograd.grad(results[0], list(leaves.values()), grad)
    named = {f"result {at}": each.detach() for at, each in enumerate(results)}
    return {**named, **dict(zip(leaves, grads, strict=True))}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_same_bits(came: dict[str, Tensor], wanted: dict[str, Tensor], what: str = "") -> None:
    assert came.keys() == wanted.keys()
    for name, one in came.items():
        assert one.shape == wanted[name].shape, f"{what}: {name}"
        assert torch.equal(bits(one), bits(wanted[name])), f"{what}: {name} differs"


def assert_equal_bits(came: Tensor, wanted: Tensor, what: str = "result") -> None:
    assert_same_bits({what: came}, {what: wanted})


def compiled(name: str) -> bool:
    """Whether a kernel serves the operator here, and not its reference."""
    return choices()[name]["cpu"].backend == "cpp"


def assert_agree(
    name: str, came: dict[str, Tensor], wanted: dict[str, Tensor], what: str = ""
) -> None:
    """The same bits from a kernel; torch's own products may take sums in another order."""
    if compiled(name):
        assert_same_bits(came, wanted, what)
        return
    assert came.keys() == wanted.keys()
    for each, one in came.items():
        near = 64 * torch.finfo(one.dtype).eps
        scale = wanted[each].abs().max().item() if one.numel() else 0.0
        torch.testing.assert_close(one, wanted[each], rtol=near, atol=near * (1 + scale))
