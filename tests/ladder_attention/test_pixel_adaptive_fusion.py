"""`pixel_adaptive_fusion` against linear layers of torch."""

from __future__ import annotations

import pytest
import torch
from ladder import DTYPES, dtype_name, plain_fusion, run
from ladder_problems import fusion_args, layouts
from ladder_rule import (
    all_results,
    asking,
    assert_agree,
    assert_equal_bits,
    assert_same_bits,
    check_gradients,
    check_result,
    differentiable,
    upstream_of,
)
from torch import Tensor

import ppmoe_ops

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
NAMES = ("x", "w1", "b1", "w2", "b2", "wp", "bp")

# Sizes of x, and D.
SIZES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "tiny_stage_3": ((1, 14, 14, 192), None),
    "pslt_stage_3": ((1, 9, 14, 288), None),
    "tokens": ((2, 49, 96), None),
    "rows": ((23, 40), 20),
    "one_pixel": ((1, 24), 12),
    "few_pixels": ((2, 3, 48), 24),
    "five_axes": ((2, 1, 3, 2, 12), 6),
    "one_channel": ((7, 1), 1),
    "one_hidden": ((9, 17), 1),
    "no_hidden": ((5, 8), 0),
    "more_hidden_than_channels": ((3, 5, 16), 45),
    "odd": ((2, 7, 5, 33), 19),
    "many_pixels": ((1, 23, 29, 16), 8),
}


@DTYPE
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_the_composition(sizes: str, dtype: torch.dtype) -> None:
    check_result("pixel_adaptive_fusion", fusion_args(*SIZES[sizes], dtype))


@DTYPE
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients(sizes: str, dtype: torch.dtype) -> None:
    check_gradients("pixel_adaptive_fusion", asking(away_from_the_kink(sizes, dtype)))


def away_from_the_kink(sizes: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments whose hidden values do not change their sign by a rounding."""
    args = fusion_args(*SIZES[sizes], dtype)
    for _ in range(20):
        exact = {name: value.double() for name, value in args.items()}
        hidden = torch.nn.functional.linear(exact["x"], exact["w1"], exact["b1"])
        if hidden.numel() == 0 or hidden.abs().min() > 32 * torch.finfo(dtype).eps:
            return args
        args["x"] = torch.where(
            (hidden.abs() <= 64 * torch.finfo(dtype).eps).any(-1, keepdim=True),
            torch.randn(args["x"].shape).to(dtype), args["x"],
        )  # fmt: skip
    return args


@DTYPE
def test_a_map_and_its_tokens_are_the_same(dtype: torch.dtype) -> None:
    args = fusion_args((2, 5, 7, 24), dtype=dtype)
    wanted = all_results("pixel_adaptive_fusion", args)
    grad = upstream_of(args["x"])
    for shape in ((2, 35, 24), (70, 24), (1, 2, 5, 7, 24)):
        came = all_results(
            "pixel_adaptive_fusion", {**args, "x": args["x"].view(shape)}, grad.view(shape)
        )
        came = {
            name: each.view(2, 5, 7, 24) if name in ("x", "result 0") else each
            for name, each in came.items()
        }
        assert_same_bits(came, wanted, str(shape))


@DTYPE
def test_strides_of_the_map_do_not_change_a_bit(dtype: torch.dtype) -> None:
    args = fusion_args((2, 5, 7, 24), dtype=dtype)
    grad = upstream_of(args["x"])
    wanted = all_results("pixel_adaptive_fusion", args, grad)
    maps, grads = layouts(args["x"]), layouts(grad)
    names = list(maps)
    for at, name in enumerate(names):
        turned = {**args, "x": maps[name]}
        came = all_results("pixel_adaptive_fusion", turned, grads[names[at - 2]])
        assert_agree("pixel_adaptive_fusion", came, wanted, name)


@DTYPE
def test_strides_of_parameters(dtype: torch.dtype) -> None:
    args = fusion_args((2, 5, 7, 24), dtype=dtype)
    for name in ("w1", "w2", "wp"):
        wider = torch.full((args[name].size(0), 2 * args[name].size(1)), torch.nan, dtype=dtype)
        wider[:, ::2] = args[name]
        for turned in (args[name].T.contiguous().T, wider[:, ::2]):
            check_result("pixel_adaptive_fusion", {**args, name: turned})
    vectors = {}
    for name in ("b1", "b2", "bp"):
        spread = torch.full((2 * args[name].numel(),), torch.nan, dtype=dtype)[::2]
        vectors[name] = spread.copy_(args[name])
    came = all_results("pixel_adaptive_fusion", {**args, **vectors})
    assert_same_bits(came, all_results("pixel_adaptive_fusion", args))


def test_expanded_arguments() -> None:
    args = fusion_args((3, 6, 20))
    turned = {name: args[name][:1].expand_as(args[name]) for name in NAMES}
    turned["bp"] = args["bp"][:1].expand(20)
    closed = {name: value.clone() for name, value in turned.items()}
    came = all_results("pixel_adaptive_fusion", turned)
    assert_agree("pixel_adaptive_fusion", came, all_results("pixel_adaptive_fusion", closed))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradient_that_is_asked_for(name: str) -> None:
    args = fusion_args((2, 5, 4, 12))
    whole = all_results("pixel_adaptive_fusion", args)
    came = check_gradients("pixel_adaptive_fusion", asking(args, [name]))
    assert set(came) == {name}
    assert_equal_bits(came[name], whole[name], name)


@pytest.mark.parametrize("sizes", [(0, 4, 5, 12), (2, 0, 5, 12), (0, 12), (3, 0, 12)])
@DTYPE
def test_empty_maps(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    args = fusion_args(sizes, dtype=dtype)
    results = all_results("pixel_adaptive_fusion", args)
    assert results["result 0"].shape == sizes
    for name in differentiable(args):
        assert torch.equal(results[name], torch.zeros_like(args[name])), name


def test_no_channels() -> None:
    args = fusion_args((4, 0), 3)
    results = all_results("pixel_adaptive_fusion", args)
    for name in NAMES:
        assert torch.equal(results[name], torch.zeros_like(args[name])), name


def test_a_closed_gate_leaves_the_offset() -> None:
    args = fusion_args((2, 3, 12))
    args["w2"].zero_()
    args["b2"].fill_(-torch.inf)
    assert torch.equal(run("pixel_adaptive_fusion", args), args["bp"].expand(2, 3, 12))


def test_an_open_gate_leaves_the_map() -> None:
    args = fusion_args((2, 3, 12), dtype=torch.float64)
    args["w2"].zero_()
    args["b2"].fill_(100.0)
    wanted = torch.nn.functional.linear(args["x"], args["wp"], args["bp"]) + args["x"]
    came = run("pixel_adaptive_fusion", args)
    torch.testing.assert_close(came, wanted, rtol=1e-13, atol=1e-13)


@DTYPE
@pytest.mark.parametrize("size", [3.0, 30.0, 1e4])
def test_far_out_the_gate_is_its_limit(size: float, dtype: torch.dtype) -> None:
    # The gate is the sigmoid of b2 here, of values far beyond where exp overflows.
    args = fusion_args((1, 16), 4, dtype)
    args["w2"].zero_()
    args["b2"] = (torch.linspace(-1, 1, 16).double() * size).to(dtype)
    args["wp"].zero_()
    args["bp"].zero_()
    came = run("pixel_adaptive_fusion", args)
    wanted = args["x"].double() * torch.sigmoid(args["b2"].double())
    assert came.isfinite().all()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(came.double(), wanted, rtol=4 * eps, atol=torch.finfo(dtype).tiny)


def test_relu_has_no_slope_at_zero() -> None:
    args = fusion_args((3, 8), 4)
    args["w1"].zero_()
    args["b1"].zero_()
    came = all_results("pixel_adaptive_fusion", args)
    assert not came["w1"].any()
    assert not came["b1"].any()


def test_pixels_do_not_see_each_other() -> None:
    args = fusion_args((40, 24))
    whole = all_results("pixel_adaptive_fusion", args)
    other = {**args, "x": args["x"].clone()}
    other["x"][7] += 1
    came = run("pixel_adaptive_fusion", other)
    keep = torch.arange(40) != 7
    assert_equal_bits(came[keep], whole["result 0"][keep])
    assert (came[7] != whole["result 0"][7]).all()


def test_the_public_function() -> None:
    args = fusion_args((2, 5, 12), dtype=torch.float64)
    came = ppmoe_ops.pixel_adaptive_fusion(**args)
    torch.testing.assert_close(came, plain_fusion(**args), rtol=1e-13, atol=1e-13)
