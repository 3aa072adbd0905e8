"""Non-finite, large and subnormal values in the layers of a ladder block."""

from __future__ import annotations

import pytest
import torch
from ladder import DTYPES, Shape, dtype_name, plain_ffn, run
from ladder_problems import block_args, branch_args, ffn_args, fusion_args
from ladder_rule import (
    all_results,
    asking,
    assert_equal_bits,
    check_gradients,
    check_result,
    exactly,
    outputs_of,
    upstream_of,
)
from torch import Tensor

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
NON_FINITE = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
SHAPE = Shape(2, 9, 8, 2, 8, (4, 4), (1, -1))


@DTYPE
@NON_FINITE
def test_a_non_finite_token_of_a_branch_stays_in_its_rectangle(
    dtype: torch.dtype, value: float
) -> None:
    for given in (False, True):
        args = branch_args(SHAPE, dtype, given)
        clean = all_results("ladder_attention", args)
        args["x"][1, 3, 4, 11] = value
        came = all_results("ladder_attention", args)
        inside = torch.zeros(2, 9, 8, dtype=torch.bool)
        inside[1, 1:5, 3:7] = True  # rows are cut at 1, 5, columns at 3, 7
        for name in ("result 0", "x", *(["v"] if given else [])):
            assert_equal_bits(came[name][~inside], clean[name][~inside], name)
        # The norm spreads it over the token's channels, its key over the rectangle.
        assert came["result 0"][inside].isnan().all()
        assert not came["x"][inside].isfinite().any()


@DTYPE
@NON_FINITE
def test_a_non_finite_value_stays_in_its_rectangle(dtype: torch.dtype, value: float) -> None:
    args = branch_args(SHAPE, dtype)
    clean = all_results("ladder_attention", args)
    args["v"][0, 8, 0, 2] = value
    came = all_results("ladder_attention", args)
    inside = torch.zeros(2, 9, 8, dtype=torch.bool)
    inside[0, 5:9, 0:3] = True
    for name in ("result 0", "x", "v"):
        assert_equal_bits(came[name][~inside], clean[name][~inside], name)
    assert not came["result 0"][inside].isfinite().any()


@DTYPE
@NON_FINITE
def test_a_non_finite_gradient_of_a_branch_stays_in_its_rectangle(
    dtype: torch.dtype, value: float
) -> None:
    args = branch_args(SHAPE, dtype)
    grad = upstream_of(args["x"])
    clean = all_results("ladder_attention", args, grad)
    grad[1, 3, 4, 11] = value
    came = all_results("ladder_attention", args, grad)
    inside = torch.zeros(2, 9, 8, dtype=torch.bool)
    inside[1, 1:5, 3:7] = True
    for name in ("x", "v"):
        assert_equal_bits(came[name][~inside], clean[name][~inside], name)
        assert not came[name][inside].isfinite().any()
    for name in ("w_in", "w_out", "bias_table"):
        assert not came[name].isfinite().all()


@DTYPE
@NON_FINITE
@pytest.mark.parametrize("place", [(0, 0), (2, 5), (5, 6), (3, 3)], ids=str)
def test_a_non_finite_pixel_of_the_ffn_stays_with_its_neighbours(
    dtype: torch.dtype, place: tuple[int, int], value: float
) -> None:
    args = ffn_args((2, 6, 7, 16), dtype)
    grad = upstream_of(args["x"])
    clean = all_results("ladder_ffn", args, grad)
    args["x"][1, place[0], place[1], 3] = value
    came = all_results("ladder_ffn", args, grad)
    near, far = (torch.zeros(2, 6, 7, dtype=torch.bool) for _ in range(2))
    for reach, mask in ((1, near), (2, far)):
        rows, columns = (slice(max(each - reach, 0), each + reach + 1) for each in place)
        mask[1, rows, columns] = True
    assert came["result 0"][near].isnan().all()
    assert_equal_bits(came["result 0"][~near], clean["result 0"][~near])
    # Its gradient reaches those that share a neighbour with it.
    assert_equal_bits(came["x"][~far], clean["x"][~far])
    assert came["x"][near].isnan().all()


@DTYPE
@NON_FINITE
def test_a_non_finite_pixel_is_everywhere_in_training(dtype: torch.dtype, value: float) -> None:
    args = ffn_args((2, 4, 5, 16), dtype, training=True)
    args["x"][1, 2, 2, 3] = value
    results = all_results("ladder_ffn", args)
    assert results["result 0"].isnan().all()
    assert results["result 1"].isnan().all()
    assert results["result 2"].isnan().all()
    for name in ("x", "w1", "w2", "dw_w"):
        assert results[name].isnan().all(), name


@DTYPE
@NON_FINITE
def test_a_non_finite_pixel_stays_one_in_the_fusion(dtype: torch.dtype, value: float) -> None:
    args = fusion_args((30, 24), dtype=dtype)
    clean = all_results("pixel_adaptive_fusion", args)
    args["x"][17, 5] = value
    came = all_results("pixel_adaptive_fusion", args)
    others = torch.arange(30) != 17
    for name in ("result 0", "x"):
        assert_equal_bits(came[name][others], clean[name][others], name)
    assert not came["result 0"][17].isfinite().any()
    assert not came["wp"].isfinite().all()


@DTYPE
@NON_FINITE
def test_a_non_finite_gradient_stays_in_its_pixel_in_the_fusion(
    dtype: torch.dtype, value: float
) -> None:
    args = fusion_args((30, 24), dtype=dtype)
    grad = upstream_of(args["x"])
    clean = all_results("pixel_adaptive_fusion", args, grad)
    grad[4, 20] = value
    came = all_results("pixel_adaptive_fusion", args, grad)
    others = torch.arange(30) != 4
    assert_equal_bits(came["x"][others], clean["x"][others])
    assert not came["x"][4].isfinite().any()
    assert not came["bp"][20].isfinite()
    assert came["bp"][torch.arange(24) != 20].isfinite().all()
    assert not came["wp"][20].isfinite().any()


@DTYPE
@NON_FINITE
def test_a_non_finite_pixel_of_a_block_stays_in_its_image(dtype: torch.dtype, value: float) -> None:
    args = block_args(Shape(3, 8, 8, 1, 8, (4, 4), (2, 2)), dtype)
    clean = run("ladder_block", args)
    # In branch 2: its rectangle, rows and columns 2 to 5, and their neighbours behind the FFN.
    args["x"][1, 3, 4, 20] = value
    out = run("ladder_block", args)
    near = torch.zeros(3, 8, 8, dtype=torch.bool)
    near[1, 1:7, 1:7] = True
    assert_equal_bits(out[~near], clean[~near])
    assert out[near].isnan().all()


@DTYPE
def test_constant_tokens_have_no_variance(dtype: torch.dtype) -> None:
    """A variance taken as a difference of squares may be less than zero."""
    args = branch_args(SHAPE, dtype)
    args["x"][:, ::2] = 1000.0
    check_result("ladder_attention", args)
    feed = ffn_args((2, 5, 6, 16), dtype)
    feed["x"][0] = 3000.0
    check_result("ladder_ffn", feed)
    assert all_results("ladder_ffn", feed)["x"].isfinite().all()


@DTYPE
def test_a_large_mean_beside_a_small_deviation(dtype: torch.dtype) -> None:
    if dtype in (torch.bfloat16, torch.float16):
        return  # which do not hold both
    args = branch_args(SHAPE, dtype)
    args["x"] = args["x"] * 0.25 + 512.0
    check_result("ladder_attention", args)
    feed = ffn_args((2, 5, 6, 16), dtype)
    feed["x"] = feed["x"] * 0.25 + 512.0
    check_result("ladder_ffn", feed)
    check_gradients("ladder_ffn", asking(feed))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@DTYPE
def test_gelu_over_its_whole_range(dtype: torch.dtype, training: bool) -> None:
    # Hidden values from -30 to 30 and beyond, where erf is flat.
    args = ffn_args((1, 20, 20, 16), dtype, training)
    args["ln_w"] = args["ln_w"] * 8
    check_result("ladder_ffn", args)
    args["w1"] = args["w1"] * 8
    results = all_results("ladder_ffn", args)
    assert all(each.isfinite().all() for each in results.values())


def test_float16_overflows_where_torch_does() -> None:
    args = fusion_args((4, 8), dtype=torch.float16)
    args["x"][2] = 60000.0
    args["wp"] = torch.eye(8).half()
    args["b2"].fill_(50.0)
    args["w2"].zero_()
    out = run("pixel_adaptive_fusion", args)
    assert out[2].isinf().all()
    assert out[[0, 1, 3]].isfinite().all()


# Not bfloat16: the dot-product instruction takes subnormal numbers as zero, whatever is set.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=dtype_name)
def test_subnormal_values(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    args = fusion_args((9, 24), dtype=dtype)
    args["x"] = (torch.randn(9, 24, dtype=torch.float64) * tiny).to(dtype)
    args["bp"].zero_()
    assert_near(run("pixel_adaptive_fusion", args), fused(args), tiny)
    feed = ffn_args((2, 5, 6, 16), dtype)
    feed["x"] = (feed["x"].double() * tiny).to(dtype)
    came, exact = run("ladder_ffn", feed)[0], plain_ffn(*exactly(feed).values())[0]
    assert (came.double() - exact).abs().max() <= 64 * torch.finfo(dtype).eps * exact.abs().max()


def fused(args: dict[str, Tensor]) -> Tensor:
    from ladder import plain_fusion

    return plain_fusion(*exactly(args).values())


def assert_near(came: Tensor, exact: Tensor, tiny: float) -> None:
    eps = torch.finfo(came.dtype).eps
    assert came.any()
    allowed = 64 * tiny * eps + 16 * eps * exact.abs().max().item()
    assert (came.double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("name", ["ladder_attention", "ladder_ffn", "pixel_adaptive_fusion"])
def test_inputs_are_left_alone(name: str) -> None:
    args = {
        "ladder_attention": branch_args(SHAPE, scaled=True),
        "ladder_ffn": ffn_args((2, 5, 6, 16), training=True, scaled=True),
        "pixel_adaptive_fusion": fusion_args((2, 5, 6, 24)),
    }[name]
    kept = {key: each.clone() for key, each in args.items() if isinstance(each, Tensor)}
    grad = upstream_of(args["x"])
    again = grad.clone()
    all_results(name, args, grad)
    assert torch.equal(grad, again)
    for key, before in kept.items():
        assert torch.equal(args[key], before), key


def test_results_are_fresh_memory() -> None:
    for name, args in (
        ("ladder_attention", branch_args(SHAPE)), ("ladder_ffn", ffn_args((2, 5, 6, 16))),
        ("pixel_adaptive_fusion", fusion_args((2, 5, 6, 24))),
    ):  # fmt: skip
        given = {each.data_ptr() for each in args.values() if isinstance(each, Tensor)}
        assert given.isdisjoint(each.data_ptr() for each in outputs_of(run(name, args)))
