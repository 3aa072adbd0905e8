"""`ladder_attention` against its composition: norm, projections, attention, both residuals."""

from __future__ import annotations

import pytest
import torch
from ladder import DTYPES, Args, Shape, dtype_name, plain_branch, plain_norm, run
from ladder_problems import branch_args, layouts
from ladder_rule import (
    all_results,
    asking,
    assert_agree,
    assert_equal_bits,
    assert_same_bits,
    check_gradients,
    check_result,
    differentiable,
    gradients,
    upstream_of,
)
from torch import Tensor

from ppmoe_ops._library import OPERATORS

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
VALUE = pytest.mark.parametrize("value", [False, True], ids=["own_value", "given_value"])

SHAPES: dict[str, Shape] = {
    "tiny_stage_3": Shape(1, 14, 14, 4, 16, (7, 7), (3, 3)),
    "pslt_stage_3": Shape(1, 14, 14, 4, 24, (7, 7), (-3, -3)),
    "pslt_stage_4": Shape(1, 7, 7, 8, 24, (7, 7), (0, 0)),
    "large_stage_4": Shape(1, 7, 7, 8, 32, (7, 7), (0, 0)),
    "odd_map": Shape(2, 9, 11, 2, 24, (4, 3), (1, -2)),
    "small_map": Shape(3, 3, 4, 1, 8, (7, 7), (3, 3)),
    "one_token": Shape(2, 1, 1, 2, 8, (1, 1), (0, 0)),
    "one_channel": Shape(1, 4, 5, 1, 1, (2, 3), (1, 1)),
    "odd_channels": Shape(1, 5, 6, 3, 7, (3, 3), (1, 2)),
    "wide": Shape(1, 5, 4, 3, 72, (5, 4), (0, 0)),
    "many_tokens": Shape(1, 16, 17, 1, 16, (5, 6), (2, 3)),
}


@DTYPE
@VALUE
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_composition(shape: str, value: bool, dtype: torch.dtype) -> None:
    scaled = value == (dtype == torch.float32)
    check_result("ladder_attention", branch_args(SHAPES[shape], dtype, value, scaled))


@DTYPE
@VALUE
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: str, value: bool, dtype: torch.dtype) -> None:
    if shape == "one_channel":
        return  # which its own norm makes a constant: all of its gradient is rounding
    scaled = value == (dtype == torch.float32)
    check_gradients("ladder_attention", asking(branch_args(SHAPES[shape], dtype, value, scaled)))


@DTYPE
@VALUE
def test_norm_parameters_in_float32_beside_narrower_data(value: bool, dtype: torch.dtype) -> None:
    args = branch_args(SHAPES["odd_map"], dtype, value, scaled=True, kept=True)
    check_result("ladder_attention", args)
    check_gradients("ladder_attention", asking(args))


@DTYPE
@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0])
def test_eps(eps: float, dtype: torch.dtype) -> None:
    args = branch_args(SHAPES["odd_map"], dtype, eps=eps)
    # Small inputs, so that it matters.
    args["x"] = args["x"] * 2.0**-5
    check_result("ladder_attention", args)
    check_gradients("ladder_attention", asking(args))


def test_eps_is_that_of_layer_norm_by_default() -> None:
    args = branch_args(SHAPES["odd_map"])
    short = {name: value for name, value in args.items() if name != "eps"}
    assert_equal_bits(run("ladder_attention", short), run("ladder_attention", args))


@DTYPE
@VALUE
def test_no_residual_where_the_row_scale_is_zero(value: bool, dtype: torch.dtype) -> None:
    args = branch_args(Shape(4, 5, 6, 2, 8, (3, 3), (1, 1)), dtype, value, scaled=True)
    assert args["row_scale"].tolist() == [1.25, 0.0, 1.25, 0.0]
    results = all_results("ladder_attention", args)
    assert_equal_bits(results["result 0"][1::2], args["x"][1::2])
    assert_equal_bits(results["x"][1::2], upstream_of(args["x"])[1::2])
    if value:
        assert not results["v"][1::2].any()
    kept = {
        name: each[::2] if isinstance(each, Tensor) and name in ("x", "v", "row_scale") else each
        for name, each in args.items()
    }
    half = {"half": run("ladder_attention", kept)}
    assert_agree("ladder_attention", half, {"half": results["result 0"][::2]})


def test_row_scales_of_one_are_none_at_all() -> None:
    args = branch_args(SHAPES["odd_map"], scaled=True)
    ones = torch.ones(args["x"].size(0))
    scaled = all_results("ladder_attention", {**args, "row_scale": ones})
    assert_same_bits(scaled, all_results("ladder_attention", {**args, "row_scale": None}))


@pytest.mark.parametrize("scaled", ["row_scale", "all"])
def test_a_row_scale_with_a_gradient_is_refused(scaled: str) -> None:
    args = branch_args(SHAPES["odd_map"], scaled=True)
    args = asking(args, ["row_scale", *(differentiable(args) if scaled == "all" else ())])
    with pytest.raises(ValueError, match="ladder_attention: row_scale requires a gradient"):
        run("ladder_attention", args)
    with torch.no_grad():
        run("ladder_attention", args)


LAID_OUT = Shape(2, 8, 7, 2, 24, (4, 3), (1, -1))


@DTYPE
@VALUE
def test_strides_of_maps_do_not_change_a_bit(value: bool, dtype: torch.dtype) -> None:
    args = branch_args(LAID_OUT, dtype, value, scaled=True)
    grad = upstream_of(args["x"])
    wanted = all_results("ladder_attention", args, grad)
    maps, values, grads = layouts(args["x"]), layouts(args["v"] if value else grad), layouts(grad)
    names = list(maps)
    for at, name in enumerate(names):
        turned = {"x": maps[name], "v": values[names[at - 1]] if value else None}
        came = all_results("ladder_attention", {**args, **turned}, grads[names[at - 2]])
        assert_agree("ladder_attention", came, wanted, name)


@DTYPE
def test_strides_of_parameters(dtype: torch.dtype) -> None:
    args = branch_args(LAID_OUT, dtype, value=False)
    # float16 has no room for sums of few products; others may be summed in another order.
    for name in ("w_in", "w_out"):
        weight = args[name]
        wider = torch.full((weight.size(0), 3 * weight.size(1)), torch.nan, dtype=dtype)
        for turned in (weight.T.contiguous().T, wider[:, 1::3][:, : weight.size(1)]):
            turned.copy_(weight)
            check_result("ladder_attention", {**args, name: turned})
            check_gradients("ladder_attention", asking({**args, name: turned}))
    vectors: Args = {}
    for name in ("ln_w", "ln_b", "b_in", "b_out"):
        spread = torch.full((2 * args[name].numel(),), torch.nan, dtype=dtype)[::2]
        vectors[name] = spread.copy_(args[name])
    table = args["bias_table"]
    vectors["bias_table"] = table.T.contiguous().T
    came = all_results("ladder_attention", {**args, **vectors})
    assert_agree("ladder_attention", came, all_results("ladder_attention", args))


def test_expanded_parameters_and_row_scale() -> None:
    args = branch_args(LAID_OUT, scaled=True)
    one = torch.full((1,), 0.75)
    turned = {
        "ln_w": one.expand(48), "ln_b": one.expand(48), "b_out": one.expand(48),
        "b_in": one.expand(96), "row_scale": one.expand(2),
        "x": args["x"][:1].expand_as(args["x"]), "v": args["v"][:, :1].expand_as(args["v"]),
    }  # fmt: skip
    closed = {name: value.clone() for name, value in turned.items()}
    came = all_results("ladder_attention", {**args, **turned})
    assert_agree("ladder_attention", came, all_results("ladder_attention", {**args, **closed}))


@pytest.mark.parametrize(
    "needs",
    [("x",), ("v",), ("ln_w",), ("b_out",), ("w_in", "b_in"), ("bias_table",), ("x", "w_out"),
     ("ln_b", "bias_table"), ("v", "ln_w", "ln_b", "b_in", "w_out")],
    ids=lambda names: "-".join(names),
)  # fmt: skip
def test_only_the_gradients_that_are_asked_for(needs: tuple[str, ...]) -> None:
    args = branch_args(Shape(2, 6, 7, 2, 8, (3, 4), (1, 2)))
    whole = all_results("ladder_attention", args)
    came = check_gradients("ladder_attention", asking(args, needs))
    assert set(came) == set(needs)
    for name in needs:
        assert_equal_bits(came[name], whole[name], name)


@pytest.mark.parametrize("size", [(0, 4, 5), (2, 0, 5), (2, 4, 0), (0, 0, 0)])
@DTYPE
@VALUE
def test_empty_maps(value: bool, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    args = branch_args(Shape(*size, 2, 8, (3, 3), (1, -1)), dtype, value, scaled=True)
    results = all_results("ladder_attention", args)
    assert results["result 0"].shape == args["x"].shape
    for name in differentiable(args):
        assert torch.equal(results[name], torch.zeros_like(args[name])), name


def test_many_rows_sum_up_exactly_enough() -> None:
    # Gradients of parameters over 5000 tokens, in the narrow dtypes too.
    shape = Shape(2, 50, 50, 1, 8, (5, 5), (2, 2))
    for dtype in DTYPES[:3]:
        args = branch_args(shape, dtype, kept=True)
        check_gradients("ladder_attention", asking(args))


def test_the_operator_is_its_parts() -> None:
    """In float64 the same as the public operators one after the other."""
    args = branch_args(Shape(2, 9, 8, 2, 16, (4, 4), (-1, 2)), torch.float64, scaled=True)
    normed = plain_norm(args["x"], args["ln_w"], args["ln_b"])
    q, k = torch.nn.functional.linear(normed, args["w_in"], args["b_in"]).chunk(2, -1)
    mixed = OPERATORS["window_attention"].overload(
        q, k, args["v"], args["bias_table"], 2, [4, 4], [-1, 2]
    )
    inner = torch.nn.functional.linear(mixed, args["w_out"], args["b_out"]) + normed
    wanted = args["x"] + args["row_scale"].view(-1, 1, 1, 1) * inner
    torch.testing.assert_close(run("ladder_attention", args), wanted, rtol=1e-12, atol=1e-12)


def test_backward_is_independent_of_which_maps_ask() -> None:
    args = branch_args(Shape(2, 6, 7, 2, 8, (3, 4), (1, 2)), torch.float64)
    whole = gradients(plain_branch, asking(args))
    for needs in (("x",), ("w_out",), ("v", "b_in")):
        for name, grad in gradients(
            OPERATORS["ladder_attention"].overload, asking(args, needs)
        ).items():
            torch.testing.assert_close(grad, whole[name], rtol=1e-9, atol=1e-10)
