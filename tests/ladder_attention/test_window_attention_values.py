"""What `window_attention` makes of large, infinite, NaN and subnormal values, and reads."""

from __future__ import annotations

import math
import mmap
from itertools import pairwise, product

import pytest
import torch
from ladder import (
    DTYPES,
    PLAIN,
    Args,
    Shape,
    dense_attention,
    dtype_name,
    edges,
    plain_attention,
    run,
    wide,
)
from ladder_problems import attention_args
from ladder_rule import (
    all_results,
    asking,
    assert_equal_bits,
    check_gradients,
    check_result,
    compiled,
    exactly,
    upstream_of,
)
from torch import Tensor

import ppmoe_ops

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
NON_FINITE = (torch.nan, torch.inf, -torch.inf)
MAPS = ("result 0", "q", "k", "v")


def rectangle_of(shape: Shape, row: int, column: int) -> Tensor:
    """Which tokens of the map share a rectangle with the one at (row, column)."""
    masks = []
    for length, window, shift, at in zip(
        (shape.height, shape.width), shape.window, shape.shift, (row, column), strict=True
    ):
        low, high = next(
            pair for pair in pairwise(edges(length, window, shift)) if pair[0] <= at < pair[1]
        )
        here = torch.arange(length)
        masks.append((here >= low) & (here < high))
    return masks[0][:, None] & masks[1][None, :]


def assert_clean_elsewhere(
    came: dict[str, Tensor],
    clean: dict[str, Tensor],
    shape: Shape,
    image: int,
    at: tuple[int, int],
    head: int,
) -> Tensor:
    """Bits of all maps but for one head of one rectangle; its mask comes back."""
    inside = torch.zeros(shape.map, dtype=torch.bool)
    channels = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
    inside[image, :, :, channels] = rectangle_of(shape, *at)[..., None]
    for name in MAPS:
        assert_equal_bits(came[name][~inside], clean[name][~inside], name)
    others = [each for each in range(shape.heads) if each != head]
    assert_equal_bits(came["bias_table"][:, others], clean["bias_table"][:, others], "bias_table")
    return inside


# Corners of a 14x14 map, where one rolled window holds four rectangles, and others.
SHIFTED = Shape(2, 14, 14, 2, 16, (7, 7), (3, 3))
PLACES = [(0, 0), (0, 13), (13, 0), (13, 13), (2, 12), (5, 5), (10, 9)]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("shift", [(3, 3), (-3, -3)], ids=str)
@pytest.mark.parametrize("argument", ["q", "k", "v"])
@DTYPE
def test_a_non_finite_token_stays_in_its_rectangle(
    dtype: torch.dtype, argument: str, shift: tuple[int, int], place: tuple[int, int]
) -> None:
    """Pairs of different rectangles are not computed, even where one rolled window holds both."""
    shape = Shape(2, 14, 14, 2, 16, (7, 7), shift)
    args = attention_args(shape, dtype)
    clean = all_results("window_attention", args)
    for value in NON_FINITE:
        args[argument] = args[argument].clone()
        args[argument][1, place[0], place[1], 16 + 5] = value
        came = all_results("window_attention", args)
        inside = assert_clean_elsewhere(came, clean, shape, 1, place, 1)
        out = came["result 0"]
        if argument == "q":
            assert not out[1, place[0], place[1], 16:].isfinite().any() or math.isinf(value)
            # The query's row alone.
            inside[1, place[0], place[1]] = False
            assert_equal_bits(out[inside], clean["result 0"][inside])
        elif argument == "k" and math.isnan(value):
            assert out[inside].isnan().all()
        elif argument == "v":
            hit = inside.clone()
            hit[..., :21], hit[..., 22:] = False, False
            assert not out[hit].isfinite().any()
            if not math.isnan(value):
                assert torch.equal(out[hit], torch.full_like(out[hit], value))
            assert_equal_bits(out[inside & ~hit], clean["result 0"][inside & ~hit])


@pytest.mark.parametrize("place", PLACES[2:5], ids=str)
@DTYPE
def test_a_non_finite_gradient_stays_in_its_rectangle(
    dtype: torch.dtype, place: tuple[int, int]
) -> None:
    args = attention_args(SHIFTED, dtype)
    grad = upstream_of(args["q"])
    clean = all_results("window_attention", args, grad)
    for value in NON_FINITE:
        worse = grad.clone()
        worse[1, place[0], place[1], 7] = value
        came = all_results("window_attention", args, worse)
        inside = assert_clean_elsewhere(came, clean, SHIFTED, 1, place, 0)
        assert_equal_bits(came["result 0"], clean["result 0"])
        assert not came["q"][1, place[0], place[1], :16].isfinite().any()
        assert not came["k"][inside].isfinite().any()
        hit = inside.clone()
        hit[..., :7], hit[..., 8:] = False, False
        assert not came["v"][hit].isfinite().any()
        assert_equal_bits(came["v"][inside & ~hit], clean["v"][inside & ~hit])
        assert not came["bias_table"][:, 0].isfinite().all()


@DTYPE
def test_a_non_finite_bias_stays_in_its_head_and_offset(dtype: torch.dtype) -> None:
    shape = Shape(1, 8, 8, 2, 8, (4, 4), (2, 2))
    args = attention_args(shape, dtype)
    clean = run("window_attention", args)
    for value in (torch.nan, torch.inf):
        table = args["bias_table"].clone()
        # The offset (0, 3): of windows of width 4 the last query and the first key.
        table[(0 + 3) * 7 + 3 + 3, 1] = value
        out = run("window_attention", {**args, "bias_table": table})
        reached = torch.zeros(8, 8, dtype=torch.bool)
        reached[:, 5] = True  # the only rectangles of full width are the columns 2 to 5
        assert out[0, reached][:, 8:].isnan().all()
        assert_equal_bits(out[0, ~reached], clean[0, ~reached])
        assert_equal_bits(out[..., :8], clean[..., :8])


@DTYPE
def test_a_bias_of_minus_infinity_masks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PLAIN, "window_attention", dense_attention)  # no row of it is masked whole
    # Keys above and to the left alone: a causal order within a window.
    shape = Shape(1, 9, 7, 2, 8, (5, 4), (1, -1))
    args = attention_args(shape, dtype)
    down = torch.arange(-4, 5).repeat_interleave(7)
    across = torch.arange(-3, 4).repeat(9)
    args["bias_table"][(down < 0) | ((down == 0) & (across < 0))] = -torch.inf
    check_result("window_attention", args)
    check_gradients("window_attention", asking(args, ["q", "k", "v"]))
    # The gradient to an entry of minus infinity is zero.
    grads = all_results("window_attention", args)
    assert torch.equal(grads["bias_table"][args["bias_table"].isinf()],
                       torch.zeros(int(args["bias_table"].isinf().sum()), dtype=dtype))  # fmt: skip


@DTYPE
def test_a_row_of_minus_infinities_is_nan(dtype: torch.dtype) -> None:
    # As torch's softmax has it.
    args = attention_args(Shape(1, 4, 4, 1, 8, (2, 2)), dtype)
    args["bias_table"].fill_(-torch.inf)
    assert run("window_attention", args).isnan().all()


@DTYPE
@pytest.mark.parametrize("size", [30.0, 300.0, 3000.0])
def test_scores_far_apart(size: float, dtype: torch.dtype) -> None:
    """exp of differences down to where it underflows, and past it."""
    args = attention_args(Shape(1, 7, 8, 2, 16, (4, 4), (1, 2)), dtype, bias=False)
    scale = size if dtype != torch.float16 else size / 8
    args["scale"] = scale
    out = run("window_attention", args)
    assert out.isfinite().all()
    exact = plain_attention(*exactly(args).values())
    # Weights are off by as much as their scores are, which the products round.
    eps = torch.finfo(wide(dtype)).eps
    allowed = torch.finfo(dtype).eps * 4 + 64 * eps * scale
    assert (out.double() - exact).abs().max().item() <= allowed * args["v"].abs().max().item()


@DTYPE
def test_equal_scores_however_large_give_the_mean(dtype: torch.dtype) -> None:
    shape = Shape(1, 6, 6, 1, 8, (3, 3))
    args = attention_args(shape, dtype, bias=False)
    args["q"], args["k"] = (torch.full(shape.map, 100.0, dtype=dtype) for _ in range(2))
    args["v"] = torch.ones(shape.map, dtype=dtype)
    results = all_results("window_attention", {**args, "scale": 1.0})
    torch.testing.assert_close(results["result 0"], args["v"], rtol=1e-6, atol=0)


def test_weights_that_underflow_keep_their_neighbours_exact() -> None:
    # One score 200 above the others: a value alone, whatever else is in the sum.
    args = attention_args(Shape(1, 4, 4, 1, 8, (4, 4)))
    args["q"], args["k"] = torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 8)
    args["bias_table"].fill_(-200.0)
    args["bias_table"][3 * 7 + 3] = 0.0
    results = all_results("window_attention", args)
    assert torch.equal(results["result 0"], args["v"])
    assert results["q"].isfinite().all()
    assert not results["q"].any()


# Not bfloat16: the dot-product instruction takes subnormal numbers as zero, whatever is set.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=dtype_name)
def test_subnormal_values(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    args = attention_args(Shape(1, 5, 6, 1, 16, (3, 4), (1, 1)), dtype)
    args["v"] = (torch.randn(1, 5, 6, 16, dtype=torch.float64) * tiny).to(dtype)
    out = run("window_attention", args)
    exact = plain_attention(*exactly(args).values())
    eps = torch.finfo(dtype).eps
    assert out.any()
    allowed = 12 * tiny * eps + 16 * eps * exact.abs().max().item()
    assert (out.double() - exact).abs().max().item() <= allowed


def test_subnormal_scores_and_gradients() -> None:
    args = attention_args(Shape(1, 6, 6, 1, 8, (3, 3), (1, 1)))
    args["q"] = args["q"] * 1e-40
    args = asking(args)
    assert args["q"].any()
    out = run("window_attention", args)
    (grad,) = torch.autograd.grad(out, args["k"], upstream_of(out) * 1e-30)
    assert out.isfinite().all()
    assert grad.isfinite().all()


@DTYPE
def test_windows_of_one_token_pass_values_on(dtype: torch.dtype) -> None:
    """More than 65535 windows; the softmax of one score is one."""
    if not compiled("window_attention"):
        return  # the reference takes them one after the other
    shape = Shape(1, 260, 257, 1, 8, (1, 1))
    q, k, v = (torch.randn(shape.map).to(dtype) for _ in range(3))
    args: Args = {"q": q, "k": k, "v": v, "bias_table": torch.randn(1, 1).to(dtype),
                  "num_heads": 1, "window": [1, 1], "shift": [0, 0], "scale": None}  # fmt: skip
    assert shape.height * shape.width > 65535
    results = all_results("window_attention", args)
    assert_equal_bits(results["result 0"], v)
    assert_equal_bits(results["v"], upstream_of(v))
    for name in ("q", "k", "bias_table"):
        assert results[name].abs().max().item() <= 1e-4 * 66820**0.5, name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_more_windows_than_16_bits_count(dtype: torch.dtype) -> None:
    if not compiled("window_attention"):
        return  # the reference takes them one after the other
    shape = Shape(2, 363, 363, 1, 8, (2, 2), (1, 1))
    q, k, v = (torch.randn(shape.map).to(dtype) for _ in range(3))
    assert 2 * 182 * 182 > 65535
    table = torch.randn(9, 1).to(dtype)
    results = all_results("window_attention", {
        "q": q, "k": k, "v": v, "bias_table": table, "num_heads": 1, "window": [2, 2],
        "shift": [1, 1], "scale": None,
    })  # fmt: skip
    grad = upstream_of(v)
    # Whole windows begin at 1; the last of both images, and corners, each as a map of its own.
    for image, row, column in product((0, 1), (1, 361), (1, 177, 361)):
        area = (slice(image, image + 1), slice(row, row + 2), slice(column, column + 2))
        alone = all_results("window_attention", {
            "q": q[area], "k": k[area], "v": v[area], "bias_table": table, "num_heads": 1,
            "window": [2, 2], "shift": [0, 0], "scale": None,
        }, grad[area])  # fmt: skip
        for name in MAPS:
            assert_equal_bits(alone[name], results[name][area], name)
    assert results["result 0"].isfinite().all()


def far_apart(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A map whose elements lie so far apart that 32 bits do not count to them; touched memory alone
    is there."""
    extent = 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    no_reserve = 0x4000
    size = torch.empty((), dtype=dtype).element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, extent * size, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(sizes, strides)


@pytest.mark.parametrize("axis", ["batch", "rows", "columns", "channels"])
def test_elements_beyond_32_bits(axis: str) -> None:
    shape, far = Shape(2, 3, 3, 1, 8, (2, 2), (1, 1)), 2**31 + 64
    strides = {
        "batch": (far, 24, 8, 1), "rows": (72, far // 2 + 8, 8, 1),
        "columns": (72, 24, far // 2 + 8, 1), "channels": (9, 3, 1, far // 7 + 1),
    }[axis]  # fmt: skip
    args = attention_args(shape, torch.bfloat16)
    wanted = all_results("window_attention", args)
    turned = {name: far_apart(shape.map, strides, torch.bfloat16) for name in ("q", "k", "v")}
    for name, map_ in turned.items():
        map_.copy_(args[name])
    grad = far_apart(shape.map, strides, torch.bfloat16)
    grad.copy_(upstream_of(args["q"]))
    came = all_results("window_attention", {**args, **turned}, grad)
    for name, each in wanted.items():
        assert_equal_bits(came[name], each, name)


@DTYPE
def test_inputs_are_left_alone(dtype: torch.dtype) -> None:
    args = attention_args(SHIFTED, dtype)
    grad = upstream_of(args["q"])
    kept = {name: args[name].clone() for name in ("q", "k", "v", "bias_table")}
    kept_grad = grad.clone()
    all_results("window_attention", args, grad)
    assert torch.equal(grad, kept_grad)
    for name, before in kept.items():
        assert torch.equal(args[name], before)


def test_results_are_fresh_memory() -> None:
    args = attention_args(Shape(1, 4, 4, 1, 8, (1, 1)))
    q, k, v = args["q"], args["k"], args["v"]
    out = ppmoe_ops.window_attention(q, k, v, None, 1, 1)
    assert out.data_ptr() not in {each.data_ptr() for each in (q, k, v)}
