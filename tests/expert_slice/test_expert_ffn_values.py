"""What `expert_ffn` computes at large, infinite and NaN values, and what it must not read."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from ffn import (
    ACTIVATIONS,
    Args,
    Shape,
    all_results,
    asking,
    assert_same_bits,
    gradients,
    problem,
    replaced,
    run,
    upstream_of,
)
from slicing import DTYPES, call, dtype_name, index_of, plain_activation, wide
from torch import Tensor

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import poison_memory

pytestmark = pytest.mark.kernel

NON_FINITE = (torch.nan, torch.inf, -torch.inf)
# Tokens 0 to 9 have no local slot; experts 1 and 4 of the five that are local have none either.
TOKENS, LOCAL = 50, 5


def partly_hit(rows: str, dtype: torch.dtype, activation: str = "swiglu") -> tuple[Args, Tensor]:
    """A problem with untouched tokens and experts, and the ids of its choices."""
    tokens = 20 if rows == "few" else TOKENS
    args = problem(Shape(tokens, 19, 21, 2, 8, 0, LOCAL), dtype, activation)
    ids = torch.tensor([0, 2, 3])[torch.rand(tokens, 3).argsort(-1)[:, :2]]
    ids[::3, 1] = 6
    ids[:10] = torch.tensor([5, 7])
    slots, offsets = index_of(ids, 0, LOCAL)
    return replaced(args, slots=slots, offsets=offsets), ids


def names_of(results: list[Tensor]) -> dict[str, Tensor]:
    names = ("out", "x", "weights", "w_in", "b_in", "w_out", "b_out")
    return dict(zip(names, results, strict=True))


ROWS = pytest.mark.parametrize("rows", ["few", "many"])
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@ROWS
@DTYPE
def test_what_nothing_reaches_is_an_exact_zero(dtype: torch.dtype, rows: str) -> None:
    args, ids = partly_hit(rows, dtype)
    # Memory is full of NaN; once more full of other bytes, which an unwritten row would show.
    for byte in (0xFF, 0x7F):
        with poison_memory(byte):
            came = names_of(all_results(args))
            zeros = [
                came["out"][:10], came["x"][:10], came["weights"][ids >= LOCAL],
                *(came[name][[1, 4]] for name in ("w_in", "b_in", "w_out", "b_out")),
            ]  # fmt: skip
            assert_same_bits(zeros, [torch.zeros_like(each) for each in zeros])
            assert all(each.isfinite().all() for each in came.values())
            assert (came["weights"][ids < LOCAL] != 0).all()


@ROWS
@DTYPE
@pytest.mark.parametrize("value", NON_FINITE)
def test_what_nothing_reaches_is_not_read(dtype: torch.dtype, rows: str, value: float) -> None:
    args, ids = partly_hit(rows, dtype)
    expected = all_results(args)
    x, slots, offsets, weights, w_in, b_in, w_out, b_out, _ = args
    grad = upstream_of(args).clone()
    x[:10], grad[:10] = value, value
    weights[ids >= LOCAL] = value
    for each in (w_in, b_in, w_out, b_out):
        each[[1, 4]] = value
    assert slots[int(offsets[-1])] == -1
    assert_same_bits(all_results(args, grad), expected)


@ROWS
@DTYPE
@pytest.mark.parametrize("value", NON_FINITE)
def test_a_non_finite_token_stays_in_its_row(dtype: torch.dtype, rows: str, value: float) -> None:
    args, ids = partly_hit(rows, dtype, "gelu")
    clean = names_of(all_results(args))
    token = 15
    hit = [int(each) for each in ids[token] if each < LOCAL]
    assert hit
    args[0][token, 5] = value
    came = names_of(all_results(args))
    others = torch.arange(ids.size(0)) != token
    assert not came["out"][token].isfinite().any()
    for name in ("out", "x", "weights"):
        assert_same_bits([came[name][others]], [clean[name][others]], name)
    rest = [each for each in range(LOCAL) if each not in hit]
    for name in ("w_in", "b_in", "w_out", "b_out"):
        assert_same_bits([came[name][rest]], [clean[name][rest]], name)
    assert not came["w_in"][hit].isfinite().all()
    assert not came["w_out"][hit].isfinite().all()


@ROWS
@DTYPE
@pytest.mark.parametrize("value", NON_FINITE)
def test_a_non_finite_gradient_stays_in_its_row(
    dtype: torch.dtype, rows: str, value: float
) -> None:
    args, ids = partly_hit(rows, dtype, "silu")
    clean = names_of(all_results(args))
    token = 12
    hit = [int(each) for each in ids[token] if each < LOCAL]
    grad = upstream_of(args).clone()
    grad[token, 3] = value
    came = names_of(all_results(args, grad))
    others = torch.arange(ids.size(0)) != token
    rest = [each for each in range(LOCAL) if each not in hit]
    assert not came["x"][token].isfinite().any()
    assert not came["weights"][token][ids[token] < LOCAL].isfinite().any()
    for name in ("x", "weights"):
        assert_same_bits([came[name][others]], [clean[name][others]], name)
    for name in ("w_in", "b_in", "w_out", "b_out"):
        assert_same_bits([came[name][rest]], [clean[name][rest]], name)
    for expert in hit:
        assert not came["w_in"][expert].isfinite().any()
        assert not came["w_out"][expert][3].isfinite().any()
        assert not came["b_out"][expert][3].isfinite()


@ROWS
@DTYPE
@pytest.mark.parametrize("argument", ["w_in", "b_in", "w_out", "b_out"])
def test_non_finite_parameters_stay_with_their_expert(
    dtype: torch.dtype, rows: str, argument: str
) -> None:
    args, ids = partly_hit(rows, dtype, "geglu")
    clean = names_of(all_results(args))
    came_args = dict(zip(("w_in", "b_in", "w_out", "b_out"), args[4:8], strict=True))
    came_args[argument][2] = torch.nan
    came = names_of(all_results(args))
    reached = (ids == 2).any(-1)
    assert reached.any()
    assert came["out"][reached].isnan().all()
    assert_same_bits([came["out"][~reached]], [clean["out"][~reached]])
    assert_same_bits([came["x"][~reached]], [clean["x"][~reached]])
    assert_same_bits([came["weights"][ids != 2]], [clean["weights"][ids != 2]])
    for name in ("w_in", "b_in", "w_out", "b_out"):
        assert_same_bits([came[name][[0, 3]]], [clean[name][[0, 3]]], name)


@ROWS
@pytest.mark.parametrize("value", NON_FINITE)
def test_a_non_finite_routing_weight_stays_with_its_token(value: float, rows: str) -> None:
    args, ids = partly_hit(rows, torch.float32)
    clean = run(args)
    token = 13
    args[3][token][ids[token] < LOCAL] = value
    out = run(args)
    others = torch.arange(ids.size(0)) != token
    assert not out[token].isfinite().any()
    assert_same_bits([out[others]], [clean[others]])


def grid_of(dtype: torch.dtype) -> Tensor:
    """257 values: dense around zero, where each activation bends, and far out."""
    dense = torch.linspace(-13, 13, 235, dtype=torch.float64)
    ends = torch.tensor([0.0, 1e-3, 1e-6, 20.0, 27.5, 60.0, 100.0, 103.9, 1000.0, 1e4, 3e4])
    return torch.cat((dense, ends.double(), -ends.double())).to(dtype)


def activations_of(grid: Tensor, tokens: int, activation: str) -> tuple[Args, Tensor]:
    """Arguments such that out[t] is act(grid), for every token, and so are a gate's two halves."""
    size, dtype = grid.numel(), grid.dtype
    gated = activation in ("swiglu", "geglu")
    x = torch.zeros(tokens, size, dtype=dtype)
    x[:, 0] = 1
    w_in = torch.zeros(1, (2 if gated else 1) * size, size, dtype=dtype)
    w_in[0, :size, 0] = grid
    pre = grid
    if gated:
        up = torch.randn(size).to(dtype).clamp(-2, 2)
        w_in[0, size:, 0] = up
        pre = torch.cat((grid, up))
    slots, offsets = call("expert_index", (torch.zeros(tokens, 1).long(), 0, 1))
    weights = torch.ones(tokens, 1, dtype=wide(dtype))
    b_in = torch.zeros(1, w_in.size(1), dtype=dtype)
    w_out = torch.eye(size).to(dtype).unsqueeze(0)
    return (x, slots, offsets, weights, w_in, b_in, w_out, None, activation), pre


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@DTYPE
def test_activations_and_slopes_over_the_whole_range(
    dtype: torch.dtype, activation: str, tokens: int
) -> None:
    args, pre = activations_of(grid_of(dtype), tokens, activation)
    values = pre.double().requires_grad_()
    exact = plain_activation(values, activation)
    (slope,) = torch.autograd.grad(exact.sum(), values)
    args = asking(args)
    out = run(args)
    grad = torch.zeros_like(out)
    grad[-1] = 1  # of one token alone, so that its slopes are what is summed
    (came,) = torch.autograd.grad(out, args[5], grad)
    eps, rounding = torch.finfo(wide(dtype)).eps, torch.finfo(dtype).eps
    up = pre[exact.numel() :].double().abs() if exact.numel() < pre.numel() else torch.ones(1)
    # GELU by its formula cancels on the negative side: an error of some eps of its argument.
    near = 8 * eps * up * pre[: exact.numel()].double().abs() + torch.finfo(dtype).tiny
    allowed = (near + rounding * exact.abs()).detach()
    assert out.isfinite().all()
    for row in out:
        assert ((row.double() - exact).abs() <= allowed).all()
    large = 16 * eps * (1 + pre.double().abs().clamp(max=64)) * (1 + slope.abs())
    error = (came[0].double() - slope).abs()
    assert (error <= large + rounding * slope.abs() + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@DTYPE
def test_far_out_an_activation_is_its_limit(dtype: torch.dtype, activation: str) -> None:
    ends = torch.tensor([100.0, 300.0, 1e4, 3e4, -100.0, -300.0, -1e4, -3e4]).to(dtype)
    args, pre = activations_of(ends, 2, activation)
    out = run(args)
    up = pre[8:] if pre.numel() > 8 else torch.ones(8, dtype=dtype)
    assert torch.equal(out[0][:4], (ends * up)[:4])
    assert (out[0][4:].double().abs() <= torch.finfo(wide(dtype)).tiny * 2 + 1e-30).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("value", NON_FINITE)
@DTYPE
def test_activations_of_non_finite_values(
    dtype: torch.dtype, value: float, activation: str
) -> None:
    # One by one, so that no product of zero and infinity is summed.
    for tokens in (1, 40):
        x = torch.full((tokens, 1), value, dtype=dtype)
        one = torch.ones(1, 1, 1, dtype=dtype)
        slots, offsets = call("expert_index", (torch.zeros(tokens, 1).long(), 0, 1))
        weights = torch.ones(tokens, 1, dtype=wide(dtype))
        out = run((x, slots, offsets, weights, one, None, one, None, activation))
        # torch's own functions give the limit or NaN at an infinity, as their code path goes.
        if math.isnan(value):
            assert out.isnan().all()
        elif value > 0:
            assert (out.isnan() | (out == value)).all()
        else:
            assert (out == 0).all() if activation == "relu" else (out.isnan() | (out == 0)).all()


@pytest.mark.parametrize("rows", [1, 30])
def test_an_activation_too_large_for_float16_is_infinite(rows: int) -> None:
    x, tiny = torch.full((rows, 1), 300.0).half(), torch.full((1, 1, 1), 2.0**-10).half()
    slots, offsets = call("expert_index", (torch.zeros(rows, 1).long(), 0, 1))
    w_in = torch.ones(1, 2, 1).half()
    out = run((x, slots, offsets, torch.ones(rows, 1), w_in, None, tiny, None, "swiglu"))
    assert torch.equal(out, torch.full_like(out, math.inf))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rows", [3, 40])
def test_the_activation_is_rounded_between_the_products(dtype: torch.dtype, rows: int) -> None:
    # relu of 1 + eps + eps / 4 rounds to 1 + eps, and less 1 by the second row of w_in leaves eps.
    eps = torch.finfo(dtype).eps
    x = torch.tensor([[1.0, eps / 4]]).to(dtype).expand(rows, 2)
    w_in = torch.tensor([[[1 + eps, 1.0], [1.0, 0.0]]], dtype=torch.float64).to(dtype)
    w_out = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]]).to(dtype)
    slots, offsets = call("expert_index", (torch.zeros(rows, 1).long(), 0, 1))
    weights = torch.ones(rows, 1, dtype=wide(dtype))
    out = run((x, slots, offsets, weights, w_in, None, w_out, None, "relu"))
    assert torch.equal(out[:, 0], torch.full((rows,), eps).to(dtype))


def pre_of(args: Args) -> tuple[Tensor, Tensor]:
    out, pre = call("expert_ffn_forward", (*args, True))
    return out, pre


@ROWS
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@DTYPE
def test_saved_rows_are_those_of_local_slots_in_their_order(
    dtype: torch.dtype, activation: str, rows: str
) -> None:
    args, _ = partly_hit(rows, dtype, activation)
    out, pre = pre_of(args)
    assert torch.equal(out, run(args))
    wanted = OPERATORS["expert_ffn_forward"].reference(*args, True)[1]
    count = int(args[2][-1])
    assert pre.shape == wanted.shape == (args[0].size(0) * 2, args[4].size(1))
    near = torch.finfo(dtype).eps + 32 * torch.finfo(wide(dtype)).eps
    torch.testing.assert_close(pre[:count], wanted[:count], rtol=near, atol=near)


@ROWS
def test_kernel_and_reference_read_each_others_saved_rows(rows: str) -> None:
    args, _ = partly_hit(rows, torch.float64, "geglu")
    x, slots, offsets, weights, w_in, _, w_out, b_out, activation = args
    needs = (True,) * 6
    grad = upstream_of(args)

    def backward(function: Callable[..., tuple[Tensor, ...]], pre: Tensor) -> tuple[Tensor, ...]:
        pre = pre.clone()
        pre[int(offsets[-1]) :] = torch.nan
        return function(
            grad, x, slots, offsets, weights, w_in, w_out, b_out, pre, activation, *needs
        )

    kernel = OPERATORS["expert_ffn_backward"].overload
    reference = OPERATORS["expert_ffn_backward"].reference
    theirs = OPERATORS["expert_ffn_forward"].reference(*args, True)[1]
    ours = pre_of(args)[1]
    expected = gradients(lambda *args: run(args), asking(args), grad)
    for came in (backward(kernel, theirs), backward(reference, ours), backward(kernel, ours)):
        for one, other in zip(came, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
