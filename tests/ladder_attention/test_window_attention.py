"""`window_attention` against attention with pairs masked, and the authors' form."""

from __future__ import annotations

import pytest
import torch
from ladder import (
    DTYPES,
    Args,
    Shape,
    dense_attention,
    dtype_name,
    edges,
    groups,
    plain_attention,
    rolled_attention,
    run,
)
from ladder_problems import attention_args, layouts
from ladder_rule import (
    all_results,
    asking,
    assert_agree,
    assert_equal_bits,
    assert_same_bits,
    check_gradients,
    check_result,
    gradients,
    judge,
    upstream_of,
)
from torch import Tensor

import ppmoe_ops
from ppmoe_ops.testing import cast_sample

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

SHAPES: dict[str, Shape] = {
    "pslt_stage_3": Shape(1, 14, 14, 4, 24, (7, 7), (0, 0)),
    "pslt_branch_1": Shape(2, 14, 14, 4, 24, (7, 7), (3, 3)),
    "pslt_branch_2": Shape(1, 14, 14, 4, 24, (7, 7), (-3, -3)),
    "pslt_stage_4": Shape(2, 7, 7, 8, 16, (7, 7), (0, 0)),
    "small_map": Shape(2, 5, 4, 2, 32, (4, 4), (0, 0)),
    "swin_of_56": Shape(1, 21, 28, 3, 32, (7, 7), (3, 3)),
    "swin_window_12": Shape(1, 24, 13, 1, 32, (12, 12), (6, 6)),
    "odd_map": Shape(1, 17, 23, 2, 16, (7, 7), (3, -3)),
    "map_below_the_window": Shape(3, 3, 5, 2, 8, (7, 7), (3, 2)),
    "one_row": Shape(2, 1, 19, 2, 8, (7, 7), (-3, 3)),
    "one_column": Shape(2, 19, 1, 2, 8, (1, 7), (0, 5)),
    "one_token": Shape(3, 1, 1, 2, 16, (7, 7), (3, 3)),
    "one_token_windows": Shape(2, 6, 5, 2, 8, (1, 1), (0, 0)),
    "tall": Shape(1, 18, 9, 2, 24, (9, 2), (4, -1)),
    "broad": Shape(1, 6, 33, 2, 40, (2, 11), (-1, 10)),
    "largest_shift": Shape(1, 14, 14, 1, 32, (7, 7), (6, -6)),
    "one_row_windows": Shape(1, 4, 20, 1, 64, (1, 16), (0, 5)),
    "heads_of_48": Shape(1, 8, 10, 3, 48, (4, 5), (2, 2)),
    "heads_of_56": Shape(1, 9, 7, 2, 56, (4, 4), (1, 3)),
    "heads_of_64": Shape(1, 9, 8, 1, 64, (8, 8), (4, 4)),
    "heads_of_72": Shape(1, 7, 9, 2, 72, (3, 5), (1, -2)),
    "heads_of_128": Shape(1, 5, 6, 1, 128, (5, 3), (2, 1)),
    "heads_of_5": Shape(1, 6, 8, 3, 5, (3, 4), (1, 1)),
    "heads_of_1": Shape(1, 5, 5, 3, 1, (3, 2), (-1, 1)),
    "heads_of_20": Shape(1, 6, 7, 2, 20, (4, 7), (1, 1)),
    "many_heads": Shape(1, 5, 6, 12, 8, (3, 3), (1, 1)),
    "large_window": Shape(1, 16, 16, 1, 8, (16, 16), (0, 0)),
    "larger_window": Shape(1, 19, 18, 1, 16, (17, 18), (5, 3)),
    "many_images": Shape(9, 4, 4, 1, 8, (2, 3), (1, 1)),
}
DIVISIBLE = {
    name: shape
    for name, shape in SHAPES.items()
    if shape.height % shape.window[0] == 0 and shape.width % shape.window[1] == 0
}


@DTYPE
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_composition(shape: str, dtype: torch.dtype) -> None:
    for bias in (True, False):
        check_result("window_attention", attention_args(SHAPES[shape], dtype, bias))


@DTYPE
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: str, dtype: torch.dtype) -> None:
    check_gradients("window_attention", asking(attention_args(SHAPES[shape], dtype)))


@pytest.mark.parametrize("shape", DIVISIBLE)
def test_equals_roll_and_mask(shape: str) -> None:
    args = attention_args(DIVISIBLE[shape], torch.float64)
    torch.testing.assert_close(
        run("window_attention", args), rolled_attention(*args.values()), rtol=1e-12, atol=1e-12
    )
    args = asking(args)
    came, wanted = (
        gradients(function, args) for function in (ppmoe_ops.window_attention, rolled_attention)
    )
    for name, grad in came.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("size", [(14, 14), (28, 28), (21, 35)])
@pytest.mark.parametrize("shift", [(0, 0), (3, 3), (-3, -3)])
def test_equals_the_authors_form_on_their_maps(
    shift: tuple[int, int], size: tuple[int, int]
) -> None:
    shape = Shape(1, *size, 1, 8, (7, 7), shift)
    args = attention_args(shape, torch.float64)
    wanted = rolled_attention(*args.values())
    assert (run("window_attention", args) - wanted).abs().max().item() < 1e-14


@pytest.mark.parametrize("shape", SHAPES)
def test_the_compositions_agree(shape: str) -> None:
    args = asking(attention_args(SHAPES[shape], torch.float64))
    values = [function(*args.values()) for function in (plain_attention, dense_attention)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)


def test_the_compositions_cut_where_the_specification_says() -> None:
    assert edges(14, 7, 0) == [0, 7, 14]
    assert edges(14, 7, 3) == [0, 3, 10, 14]
    assert edges(14, 7, -3) == [0, 4, 11, 14]
    assert edges(21, 7, 3) == [0, 3, 10, 17, 21]
    assert edges(3, 7, 5) == [0, 3]
    for length, window, shift in ((14, 7, -3), (5, 7, 3), (10, 3, 2), (9, 1, 0), (6, 4, -3)):
        numbers = groups(length, window, shift).tolist()
        began = [at for at in range(length) if at == 0 or numbers[at] != numbers[at - 1]]
        assert [*began, length] == edges(length, window, shift)


@DTYPE
def test_a_table_in_float32_beside_narrower_data(dtype: torch.dtype) -> None:
    args = attention_args(SHAPES["pslt_branch_1"], dtype, kept=True)
    check_result("window_attention", args)
    check_gradients("window_attention", asking(args))


@DTYPE
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.5, 3.0, 1e-3])
def test_scale(scale: float, dtype: torch.dtype) -> None:
    args = attention_args(Shape(1, 9, 8, 2, 16, (4, 4), (1, 2)), dtype, scale=scale)
    check_result("window_attention", args)
    check_gradients("window_attention", asking(args))


def test_scale_is_that_of_the_head_dimension_by_default() -> None:
    args = attention_args(Shape(1, 6, 6, 2, 16, (3, 3), (1, 1)))
    assert_equal_bits(
        run("window_attention", args), run("window_attention", {**args, "scale": 16**-0.5})
    )


def test_one_number_stands_for_both_axes() -> None:
    args = attention_args(Shape(1, 6, 6, 2, 16, (3, 3), (-1, -1)))
    q, k, v, table = (args[name] for name in ("q", "k", "v", "bias_table"))
    came = ppmoe_ops.window_attention(q, k, v, table, 2, 3, -1)
    assert_equal_bits(came, run("window_attention", args))


def test_a_row_of_the_table_is_query_minus_key() -> None:
    # One large entry: a query takes the value one row above and two columns left of it.
    shape = Shape(1, 6, 8, 1, 8, (6, 8))
    args = attention_args(shape, torch.float64)
    args["q"] = torch.zeros(shape.map).double()
    table = torch.zeros(11 * 15, 1).double()
    table[(1 + 5) * 15 + (2 + 7)] = 200.0
    out = run("window_attention", {**args, "bias_table": table})
    torch.testing.assert_close(out[:, 1:, 2:], args["v"][:, :-1, :-2], rtol=0, atol=1e-12)
    mean = args["v"].mean((1, 2))
    torch.testing.assert_close(out[:, 0, 0], mean, rtol=0, atol=1e-12)


def test_heads_own_channels_one_after_the_other() -> None:
    shape = Shape(2, 6, 5, 3, 8, (4, 3), (1, 1))
    args = attention_args(shape)
    out = run("window_attention", args)
    for head in range(3):
        mine = slice(8 * head, 8 * head + 8)
        alone: Args = {
            **args, **{name: args[name][..., mine] for name in ("q", "k", "v")},
            "bias_table": args["bias_table"][:, head : head + 1], "num_heads": 1,
        }  # fmt: skip
        judge_close(run("window_attention", alone), out[..., mine])


def judge_close(came: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(came, wanted, rtol=1e-5, atol=1e-5)


LAID_OUT = {
    "shifted": Shape(2, 9, 8, 2, 24, (4, 3), (1, -1)),
    "pslt": Shape(2, 14, 14, 4, 24, (7, 7), (3, 3)),
    "one_row": Shape(2, 1, 5, 2, 8, (1, 4), (0, 1)),
}


@DTYPE
@pytest.mark.parametrize("shape", LAID_OUT)
def test_strides_do_not_change_a_bit(shape: str, dtype: torch.dtype) -> None:
    args = attention_args(LAID_OUT[shape], dtype)
    grad = upstream_of(args["q"])
    wanted = all_results("window_attention", args, grad)
    turned = {name: layouts(args[name]) for name in ("q", "k", "v")}
    names, grads = list(turned["q"]), layouts(grad)
    for at in range(len(names)):
        # The others in another layout each, so that no two share their strides.
        others = [names[(at + step) % len(names)] for step in (0, 1, 3)]
        maps = {each: turned[each][how] for each, how in zip("qkv", others, strict=True)}
        came = all_results("window_attention", {**args, **maps}, grads[names[(at + 2) % 9]])
        assert_agree("window_attention", came, wanted, f"{others}")


@DTYPE
def test_slices_of_one_projection(dtype: torch.dtype) -> None:
    shape = Shape(2, 7, 9, 2, 16, (3, 4), (2, -1))
    fused = torch.randn(2, 7, 9, 96).to(dtype)
    table = attention_args(shape, dtype)["bias_table"]
    rest = (table, 2, [3, 4], [2, -1])

    def attend(projection: Tensor) -> Tensor:
        return ppmoe_ops.window_attention(*projection.chunk(3, -1), *rest)

    leaf = fused.clone().requires_grad_()
    out = attend(leaf)
    (came,) = torch.autograd.grad(out, leaf, upstream_of(out))
    parts = [each.contiguous() for each in fused.chunk(3, -1)]
    args = {"q": parts[0], "k": parts[1], "v": parts[2], "bias_table": table, "num_heads": 2,
            "window": [3, 4], "shift": [2, -1], "scale": None}  # fmt: skip
    wanted = all_results("window_attention", args)
    joined = torch.cat([wanted[name] for name in "qkv"], -1)
    assert_agree(
        "window_attention",
        {"result": out, "projection": came},
        {"result": wanted["result 0"], "projection": joined},
    )


@DTYPE
def test_expanded_maps(dtype: torch.dtype) -> None:
    shape = Shape(3, 6, 7, 2, 8, (4, 4), (1, 1))
    args = attention_args(shape, dtype)
    expanded = {
        "q": args["q"][:1].expand(shape.map),
        "k": args["k"][:, :1].expand(shape.map),
        "v": args["v"][:, :, :1].expand(shape.map),
    }
    turned = {**args, **expanded, "bias_table": args["bias_table"][:, :1].expand(-1, 2)}
    closed = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in turned.items()
    }
    came = all_results("window_attention", turned)
    assert_agree("window_attention", came, all_results("window_attention", closed))


@DTYPE
def test_an_expanded_upstream_gradient(dtype: torch.dtype) -> None:
    args = asking(attention_args(Shape(2, 6, 5, 2, 8, (3, 3), (1, 1)), dtype))
    leaves = [args[name] for name in ("q", "k", "v", "bias_table")]
    out = run("window_attention", args)
    summed = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    closed = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for one, other in zip(summed, closed, strict=True):
        assert_equal_bits(one, other)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_strides_of_the_table_do_not_change_a_bit(name: str) -> None:
    args = attention_args(Shape(1, 6, 5, 3, 8, (3, 3), (1, 1)))
    table = args["bias_table"]
    spread = torch.full((2 * table.size(0), 7), torch.nan)[::2, 1::2]
    spread.copy_(table)
    wanted = all_results("window_attention", args)
    for turned in (spread, table.T.contiguous().T):
        came = all_results("window_attention", {**args, "bias_table": turned})
        assert_same_bits(came, wanted)
    # The same tensor in two places.
    other = "k" if name != "k" else "v"
    both = {**args, name: args[other]}
    apart = {**args, name: args[other].clone()}
    assert_equal_bits(run("window_attention", both), run("window_attention", apart))


@pytest.mark.parametrize("needs", [("q",), ("k",), ("v",), ("bias_table",), ("q", "v")])
def test_only_the_gradients_that_are_asked_for(needs: tuple[str, ...]) -> None:
    args = attention_args(Shape(2, 6, 7, 2, 8, (3, 4), (1, 2)))
    whole = all_results("window_attention", args)
    came = check_gradients("window_attention", asking(args, needs))
    assert set(came) == set(needs)
    for name in needs:
        assert_equal_bits(came[name], whole[name], name)


@pytest.mark.parametrize("size", [(0, 4, 5, 2), (2, 0, 5, 2), (2, 4, 0, 2), (0, 0, 0, 1)])
@DTYPE
def test_empty_maps(dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    shape = Shape(*size, 8, (3, 3), (1, -1))
    results = all_results("window_attention", attention_args(shape, dtype))
    for name in ("result 0", "q", "k", "v"):
        assert results[name].shape == shape.map
    assert torch.equal(results["bias_table"], torch.zeros(25, shape.heads, dtype=dtype))


def test_results_do_not_depend_on_neighbours() -> None:
    shape = Shape(5, 9, 8, 2, 24, (4, 4), (2, 1))
    args = attention_args(shape)
    whole = all_results("window_attention", args)
    grad = upstream_of(args["q"])
    for image in range(5):
        one = {name: args[name][image : image + 1] for name in ("q", "k", "v")}
        alone = all_results("window_attention", {**args, **one}, grad[image : image + 1])
        names = ("result 0", "q", "k", "v")
        assert_agree(
            "window_attention",
            {name: alone[name][0] for name in names},
            {name: whole[name][image] for name in names},
        )


@DTYPE
def test_the_tables_gradient_over_many_windows(dtype: torch.dtype) -> None:
    # Sums of 6000 windows: what is added up must not lose what each one adds.
    shape = Shape(6, 32, 32, 2, 8, (2, 2), (1, 0))
    args = asking(attention_args(shape, dtype, kept=True), ["bias_table"])
    grad = upstream_of(args["q"])
    (came,) = gradients(ppmoe_ops.window_attention, args, grad).values()
    exact_args = cast_sample(args, torch.float64)
    exact = torch.zeros_like(exact_args["bias_table"])
    plain = torch.zeros_like(exact)
    for image in range(6):
        one = {name: args[name][image : image + 1] for name in ("q", "k", "v")}
        part = gradients(plain_attention, {**args, **one}, grad[image : image + 1])
        plain += part["bias_table"].double()
        best = gradients(plain_attention, cast_sample({**args, **one}, torch.float64),
                         grad[image : image + 1])  # fmt: skip
        exact += best["bias_table"]
    judge(came, plain.to(came.dtype), exact, 3.0, "gradient of the table", lambda: 0.0)
