"""Drawn maps, windows, shifts, heads and strides: every operator against its composition."""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ladder import DTYPES, Args, Shape, run
from ladder_problems import attention_args, block_args, branch_args, ffn_args, fusion_args
from ladder_rule import ANY, all_results, asking, check_gradients, check_result
from torch import Tensor

SIDES = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 11, 14])
WINDOWS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13])
HEAD_DIMS = st.sampled_from([8, 16, 24, 32, 40, 48, 56, 64, 72])
WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 33, 48, 65])
DTYPE = st.sampled_from(DTYPES)

FULL = 10 if os.environ.get("PPMOE_OPS_FULL") == "1" else 1


def drawn(examples: int) -> settings:
    return settings(
        deadline=None,
        max_examples=examples * FULL,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@st.composite
def shapes(draw: st.DrawFn, most: int = 160) -> Shape:
    """A map and its windows; not too many elements, as four dtypes are compared in."""
    height, width, head_dim = draw(SIDES), draw(SIDES), draw(HEAD_DIMS)
    heads = draw(st.integers(1, max(1, min(3, most // head_dim))))
    window = (draw(WINDOWS), draw(WINDOWS))
    shift = tuple(draw(st.integers(1 - side, side - 1)) for side in window)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return Shape(draw(st.integers(0, 3)), height, width, heads, head_dim, window, shift)  # type: ignore[arg-type]


@st.composite
def strided(draw: st.DrawFn, map_: Tensor) -> Tensor:
    """The values of a map in memory with drawn strides, or expanded along drawn axes."""
    axes = range(map_.dim())
    order = draw(st.permutations(list(axes)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in axes]
    offset = draw(st.integers(0, 3))
    sizes = [map_.size(axis) * steps[axis] + offset for axis in order]
    memory = map_.new_full(sizes, torch.nan).permute([order.index(axis) for axis in axes])
    for axis in axes:
        memory = memory.narrow(axis, offset, map_.size(axis) * steps[axis])
    view = memory[tuple(slice(None, None, step) for step in steps)]
    view.copy_(map_)
    if draw(st.integers(0, 5)) == 0 and map_.numel():
        axis = draw(st.sampled_from(list(axes)))
        view = view.narrow(axis, 0, 1).expand_as(map_)
    return view


def settle(args: Args, names: tuple[str, ...], data: st.DataObject) -> Args:
    return {
        name: data.draw(strided(value)) if name in names and value is not None else value
        for name, value in args.items()
    }


def empty(args: Args) -> bool:
    first: Any = next(iter(args.values()))
    return first.numel() == 0


def check_empty(name: str, args: Args) -> None:
    """Nothing to compare: results of the right shape, gradients of zeros."""
    first: Tensor = next(iter(args.values()))
    if name == "ladder_block":
        assert run(name, args).shape == first.shape
        return
    results = all_results(name, args)
    assert results["result 0"].shape == first.shape
    for each, grad in results.items():
        if not each.startswith("result"):
            assert grad.shape == args[each].shape
            assert not grad.any()


@given(shapes(), DTYPE, st.booleans(), st.sampled_from([None, 0.25, -1.0]), st.data())
@drawn(150)
def test_window_attention(
    shape: Shape, dtype: torch.dtype, bias: bool, scale: float | None, data: st.DataObject
) -> None:
    kept = data.draw(st.booleans())
    args = attention_args(shape, dtype, bias, scale, kept)
    if empty(args):
        check_empty("window_attention", args)
        return
    args = settle(args, ("q", "k", "v", "bias_table"), data)
    check_result("window_attention", args, ANY)
    check_gradients("window_attention", asking(args), few=ANY)


@given(shapes(80), DTYPE, st.booleans(), st.booleans(), st.booleans(), st.data())
@drawn(100)
def test_ladder_attention(
    shape: Shape, dtype: torch.dtype, value: bool, scaled: bool, kept: bool, data: st.DataObject
) -> None:
    args = branch_args(shape, dtype, value, scaled, kept)
    if empty(args):
        check_empty("ladder_attention", args)
        return
    args = settle(args, ("x", "v", "w_in", "w_out", "bias_table", "b_in", "ln_w"), data)
    check_result("ladder_attention", args, ANY)
    check_gradients("ladder_attention", asking(args), few=ANY)


@given(
    st.integers(0, 3), SIDES, SIDES, WIDTHS, DTYPE, st.booleans(), st.booleans(), st.booleans(),
    st.data(),
)  # fmt: skip
@drawn(100)
def test_ladder_ffn(
    batch: int,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    training: bool,
    scaled: bool,
    kept: bool,
    data: st.DataObject,
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    # Few values less their mean, over their deviation, are rounding more than anything else.
    training = training and batch * height * width >= 6
    channels = max(channels, 3)
    args = ffn_args((batch, height, width, channels), dtype, training, scaled, kept)
    if empty(args):
        check_empty("ladder_ffn", args)
        return
    strided_names = ("w1", "w2", "dw_w", "bn_w", "bn_b", "running_mean", "b1")
    args["x"] = data.draw(strided(args["x"])) if not training else args["x"]
    args = settle(args, strided_names, data)
    check_result("ladder_ffn", args, ANY)
    check_gradients("ladder_ffn", asking(args), few=ANY)


@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 5, 9]), min_size=1, max_size=3),
    WIDTHS, st.sampled_from([0, 1, 4, 7, 16, 25, 40]), DTYPE, st.data(),
)  # fmt: skip
@drawn(100)
def test_pixel_adaptive_fusion(
    sizes: list[int], channels: int, hidden: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    args = fusion_args((*sizes, channels), hidden, dtype)
    if empty(args):
        check_empty("pixel_adaptive_fusion", args)
        return
    # Far from the kink of relu, whose two sides roundings would choose between.
    args["b1"] = torch.where(torch.arange(hidden) % 2 == 0, 9.0, -9.0).to(dtype)
    args = settle(args, ("x", "w1", "w2", "wp", "b2", "bp"), data)
    check_result("pixel_adaptive_fusion", args, ANY)
    check_gradients("pixel_adaptive_fusion", asking(args), few=ANY)


@given(shapes(48), DTYPE, st.data())
@drawn(50)
def test_ladder_block(shape: Shape, dtype: torch.dtype, data: st.DataObject) -> None:
    args = block_args(shape, dtype)
    if empty(args):
        check_empty("ladder_block", args)
        return
    args["x"] = data.draw(strided(args["x"]))
    turned = data.draw(st.sets(st.integers(0, 53), max_size=6))
    args["params"] = [
        data.draw(strided(each)) if at in turned else each for at, each in enumerate(args["params"])
    ]
    check_result("ladder_block", args, ANY)
