"""`ladder_ffn` against convolutions and batch norms of torch, in both modes."""

from __future__ import annotations

import pytest
import torch
from ladder import DTYPES, dtype_name, plain_ffn, run, wide
from ladder_problems import ffn_args, layouts
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

from ppmoe_ops._library import OPERATORS

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])

Sizes = tuple[int, int, int, int]
SIZES: dict[str, Sizes] = {
    "tiny_stage_3": (1, 14, 14, 64),
    "pslt_stage_3": (1, 14, 14, 96),
    "pslt_stage_4": (1, 7, 7, 192),
    "odd_map": (2, 9, 5, 24),
    "odd_channels": (2, 4, 7, 13),
    "two_channels": (3, 5, 4, 2),
    "one_row": (2, 1, 17, 16),
    "one_column": (2, 17, 1, 8),
    "two_rows": (1, 2, 3, 40),
    "one_token_images": (6, 1, 1, 24),
    "two_pixels": (2, 1, 1, 8),
    "past_a_vector": (1, 5, 6, 17),
    "past_two_vectors": (1, 5, 6, 33),
    "many_pixels": (3, 23, 21, 8),
    "wide": (1, 4, 4, 260),
}


@DTYPE
@TRAINING
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_the_composition(sizes: str, training: bool, dtype: torch.dtype) -> None:
    scaled = training == (dtype == torch.float32)
    args = ffn_args(SIZES[sizes], dtype, training, scaled)
    y, mean, var = check_result("ladder_ffn", args)
    assert y.dtype == dtype
    assert mean.dtype == var.dtype == wide(dtype)
    assert mean.shape == var.shape == (3, SIZES[sizes][3])


@DTYPE
@TRAINING
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients(sizes: str, training: bool, dtype: torch.dtype) -> None:
    if sizes == "two_pixels" and training:
        return  # two values less their mean, over their deviation: the sign of their difference
    scaled = training == (dtype == torch.float32)
    check_gradients("ladder_ffn", asking(ffn_args(SIZES[sizes], dtype, training, scaled)))


@DTYPE
@TRAINING
def test_norm_parameters_in_float32_beside_narrower_data(
    training: bool, dtype: torch.dtype
) -> None:
    args = ffn_args(SIZES["odd_map"], dtype, training, scaled=True, kept=True)
    check_result("ladder_ffn", args)
    check_gradients("ladder_ffn", asking(args))


@DTYPE
@TRAINING
@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0])
def test_eps(eps: float, training: bool, dtype: torch.dtype) -> None:
    args = ffn_args(SIZES["odd_map"], dtype, training, eps=eps)
    args["x"] = args["x"] * 2.0**-5
    check_result("ladder_ffn", args)
    check_gradients("ladder_ffn", asking(args))


def test_running_statistics_are_what_comes_back_in_evaluation() -> None:
    args = ffn_args(SIZES["odd_map"])
    _, mean, var = run("ladder_ffn", args)
    assert_equal_bits(mean, args["running_mean"])
    assert_equal_bits(var, args["running_var"])
    # Fresh tensors: writing to them changes nothing else.
    mean.zero_()
    var.zero_()
    assert args["running_mean"].any()
    assert (args["running_var"] > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_narrow_running_statistics_come_back_in_float32(dtype: torch.dtype) -> None:
    args = ffn_args(SIZES["odd_map"], dtype)
    _, mean, var = run("ladder_ffn", args)
    assert_equal_bits(mean, args["running_mean"].float())
    assert_equal_bits(var, args["running_var"].float())


@DTYPE
def test_running_statistics_are_not_read_in_training(dtype: torch.dtype) -> None:
    args = ffn_args(SIZES["odd_map"], dtype, training=True)
    wanted = all_results("ladder_ffn", {**args, "running_mean": None, "running_var": None})
    args["running_mean"].fill_(torch.nan)
    args["running_var"].fill_(torch.nan)
    assert_same_bits(all_results("ladder_ffn", args), wanted)
    assert args["running_mean"].isnan().all()


def test_statistics_are_those_that_a_module_keeps() -> None:
    """The running statistics of BatchNorm2d, from the returned ones by its rule."""
    args = ffn_args((3, 5, 6, 16), torch.float64, training=True)
    _, mean, var = run("ladder_ffn", args)
    pixels, momentum = 3 * 5 * 6, 0.1
    maps = args["x"].permute(0, 3, 1, 2)
    norm = torch.nn.BatchNorm2d(16, dtype=torch.float64)
    # The first norm of the three sees gelu(w1 LN(x) + b1).
    normed = torch.nn.functional.layer_norm(args["x"], (16,), args["ln_w"], args["ln_b"])
    hidden = torch.nn.functional.linear(normed, args["w1"], args["b1"])
    norm(torch.nn.functional.gelu(hidden).permute(0, 3, 1, 2))
    assert maps.shape == (3, 16, 5, 6)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, momentum * mean[0])
    unbiased = var[0] * pixels / (pixels - 1)
    torch.testing.assert_close(norm.running_var, (1 - momentum) + momentum * unbiased)


def test_training_equals_evaluation_with_the_batchs_own_statistics() -> None:
    args = ffn_args(SIZES["odd_map"], torch.float64, training=True)
    y, mean, var = run("ladder_ffn", args)
    given = {**args, "running_mean": mean, "running_var": var, "training": False}
    torch.testing.assert_close(run("ladder_ffn", given)[0], y, rtol=1e-12, atol=1e-12)


def test_a_constant_channel_has_no_variance() -> None:
    # A variance that is a difference of large squares may come out negative.
    args = ffn_args((2, 12, 12, 8), training=True)
    args["w1"].zero_()
    args["b1"].fill_(1000.3)
    y, mean, var = check_result("ladder_ffn", args)
    assert (var[0] >= 0).all()
    assert (var[0] < 1e-3).all()
    assert ((mean[0] - 1000.3).abs() < 1e-3).all()
    assert y.isfinite().all()


@DTYPE
def test_variance_beside_a_large_mean(dtype: torch.dtype) -> None:
    # b1 moves the values far from zero, where their squares hide the variance.
    args = ffn_args((2, 13, 11, 16), dtype, training=True)
    args["b1"] = args["b1"] + 60.0
    check_result("ladder_ffn", args)


@DTYPE
@TRAINING
def test_gradients_beside_large_means(training: bool, dtype: torch.dtype) -> None:
    # Biases move what each norm takes far from zero: sums of uncentred products cancel there.
    args = ffn_args((2, 13, 11, 16), dtype, training)
    args["b1"], args["dw_b"], args["b2"] = (args[name] + 40.0 for name in ("b1", "dw_b", "b2"))
    args["running_mean"] = args["running_mean"] + 40.0
    check_gradients("ladder_ffn", asking(args))


def test_zeros_surround_the_map_after_the_first_norm() -> None:
    # Kernels of one tap beside the centre: at that border the map gets the bias alone.
    args = ffn_args((1, 4, 5, 8), torch.float64)
    for tap, border in (((0, 1), (0, slice(None))), ((1, 2), (slice(None), 4)),
                        ((2, 0), (slice(None), 0))):  # fmt: skip
        weight = torch.zeros(8, 3, 3).double()
        weight[:, tap[0], tap[1]] = 2.0
        one = {**args, "dw_w": weight}
        nothing = {**args, "dw_w": torch.zeros(8, 3, 3).double()}
        came, bare = run("ladder_ffn", one)[0][0], run("ladder_ffn", nothing)[0][0]
        torch.testing.assert_close(came[border], bare[border], rtol=1e-12, atol=1e-12)
        assert (came[1:3, 1:4] - bare[1:3, 1:4]).abs().min() > 1e-9


def test_gelu_is_the_exact_one() -> None:
    args = ffn_args((1, 16, 16, 1), torch.float64)
    args["w1"], args["b1"] = torch.zeros(1, 1).double(), torch.tensor([0.7]).double()
    args["running_mean"].zero_()
    args["running_var"].fill_(1 - args["eps"])
    args["bn_w"].fill_(1)
    args["bn_b"].zero_()
    args["dw_w"].zero_()
    args["dw_w"][:, 1, 1] = 1
    args["dw_b"].zero_()
    args["w2"].fill_(1)
    args["b2"].zero_()
    first = torch.nn.functional.gelu(torch.tensor(0.7).double())
    second = torch.nn.functional.gelu(first)
    out = run("ladder_ffn", args)[0] - args["x"]
    torch.testing.assert_close(out, second.expand_as(out), rtol=1e-12, atol=1e-12)


@DTYPE
@TRAINING
def test_no_residual_where_the_row_scale_is_zero(training: bool, dtype: torch.dtype) -> None:
    args = ffn_args((4, 5, 6, 16), dtype, training, scaled=True)
    assert args["row_scale"].tolist() == [1.25, 0.0, 1.25, 0.0]
    results = all_results("ladder_ffn", args)
    assert_equal_bits(results["result 0"][1::2], args["x"][1::2])
    if not training:
        assert_equal_bits(results["x"][1::2], upstream_of(args["x"])[1::2])


@TRAINING
def test_row_scales_of_one_are_none_at_all(training: bool) -> None:
    args = ffn_args(SIZES["odd_map"], training=training)
    scaled = all_results("ladder_ffn", {**args, "row_scale": torch.ones(2)})
    assert_same_bits(scaled, all_results("ladder_ffn", args))


@pytest.mark.parametrize("name", ["row_scale", "running_mean", "running_var"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_gradient_to_what_has_none_is_refused(alone: bool, name: str) -> None:
    args = ffn_args(SIZES["odd_map"], scaled=True)
    args = asking(args, [name, *(() if alone else differentiable(args))])
    with pytest.raises(ValueError, match=f"ladder_ffn: {name} requires a gradient"):
        run("ladder_ffn", args)
    with torch.no_grad():
        run("ladder_ffn", args)


@TRAINING
def test_statistics_have_no_gradient(training: bool) -> None:
    y, mean, var = run("ladder_ffn", asking(ffn_args(SIZES["odd_map"], training=training)))
    assert y.requires_grad
    assert not mean.requires_grad
    assert not var.requires_grad


@DTYPE
@TRAINING
def test_strides_of_maps_do_not_change_a_bit(training: bool, dtype: torch.dtype) -> None:
    args = ffn_args((2, 5, 7, 24), dtype, training, scaled=True)
    grad = upstream_of(args["x"])
    wanted = all_results("ladder_ffn", args, grad)
    maps, grads = layouts(args["x"]), layouts(grad)
    names = list(maps)
    for at, name in enumerate(names):
        came = all_results("ladder_ffn", {**args, "x": maps[name]}, grads[names[at - 2]])
        assert_agree("ladder_ffn", came, wanted, name)


@DTYPE
@TRAINING
def test_strides_of_parameters(training: bool, dtype: torch.dtype) -> None:
    args = ffn_args((2, 5, 7, 24), dtype, training, scaled=True)
    for name in ("w1", "w2"):
        for turned in (args[name].T.contiguous().T, spread(args[name])):
            check_result("ladder_ffn", {**args, name: turned})
            check_gradients("ladder_ffn", asking({**args, name: turned}))
    names = ("ln_w", "ln_b", "b1", "dw_b", "b2", "bn_w", "bn_b", "running_mean", "running_var",
             "row_scale")  # fmt: skip
    turned = {name: spread(args[name]) for name in names}
    turned["dw_w"] = args["dw_w"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    turned["bn_w"] = args["bn_w"].T.contiguous().T
    came = all_results("ladder_ffn", {**args, **turned})
    assert_agree("ladder_ffn", came, all_results("ladder_ffn", args))


def spread(tensor: Tensor) -> Tensor:
    """The same values in every third place of memory that is NaN else."""
    wider = tensor.new_full((*tensor.shape[:-1], 3 * tensor.size(-1)), torch.nan)
    view = wider[..., 1::3]
    view.copy_(tensor)
    return view


@TRAINING
def test_expanded_arguments(training: bool) -> None:
    args = ffn_args((2, 5, 7, 24), training=training, scaled=True)
    one = torch.full((1,), 0.75)
    turned = {name: one.expand(24) for name in ("ln_w", "ln_b", "b1", "dw_b", "b2")}
    turned |= {name: one.expand(3, 24) for name in ("bn_w", "bn_b", "running_mean", "running_var")}
    turned |= {"row_scale": one.expand(2), "dw_w": one.expand(24, 3, 3)}
    turned["x"] = args["x"][:1].expand_as(args["x"])
    closed = {name: value.clone() for name, value in turned.items()}
    came = all_results("ladder_ffn", {**args, **turned})
    assert_agree("ladder_ffn", came, all_results("ladder_ffn", {**args, **closed}))


@pytest.mark.parametrize(
    "needs",
    [("x",), ("ln_w", "ln_b"), ("w1",), ("b1", "dw_w"), ("dw_b",), ("w2", "b2"), ("bn_w",),
     ("bn_b", "x"), ("w1", "w2", "dw_w")],
    ids=lambda names: "-".join(names),
)  # fmt: skip
@TRAINING
def test_only_the_gradients_that_are_asked_for(training: bool, needs: tuple[str, ...]) -> None:
    args = ffn_args((2, 5, 4, 8), training=training)
    whole = all_results("ladder_ffn", args)
    came = check_gradients("ladder_ffn", asking(args, needs))
    assert set(came) == set(needs)
    for name in needs:
        assert_equal_bits(came[name], whole[name], name)


@pytest.mark.parametrize("sizes", [(0, 4, 5, 8), (2, 0, 5, 8), (2, 4, 0, 8)])
@DTYPE
def test_empty_maps_in_evaluation(dtype: torch.dtype, sizes: Sizes) -> None:
    args = ffn_args(sizes, dtype, scaled=True)
    results = all_results("ladder_ffn", args)
    assert results["result 0"].shape == sizes
    for name in differentiable(args):
        assert torch.equal(results[name], torch.zeros_like(args[name])), name


@pytest.mark.parametrize("sizes", [(0, 4, 5, 8), (2, 0, 5, 8), (1, 1, 1, 8)])
def test_training_needs_two_pixels(sizes: Sizes) -> None:
    pixels = sizes[0] * sizes[1] * sizes[2]
    words = rf"ladder_ffn: x has B \* H \* W = {pixels}; allowed in training: 2 or more"
    for function in (OPERATORS["ladder_ffn"].overload, OPERATORS["ladder_ffn"].reference):
        with pytest.raises(ValueError, match=words):
            function(*ffn_args(sizes, training=True).values())
    if pixels:
        check_result("ladder_ffn", ffn_args(sizes))


def test_the_composition_is_torchs_own_modules() -> None:
    """plain_ffn once more, by modules with the layout of the authors' checkpoints."""
    args = ffn_args((2, 6, 5, 12), torch.float64)
    nn = torch.nn
    mlp = nn.Sequential(
        nn.Conv2d(12, 12, 1), nn.GELU(), nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.GELU(), nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12),
    ).double().eval()  # fmt: skip
    norm = nn.LayerNorm(12).double()
    state = {"0.weight": args["w1"][..., None, None], "0.bias": args["b1"],
             "3.weight": args["dw_w"][:, None], "3.bias": args["dw_b"],
             "6.weight": args["w2"][..., None, None], "6.bias": args["b2"]}  # fmt: skip
    for row, at in enumerate((2, 5, 7)):
        state |= {f"{at}.weight": args["bn_w"][row], f"{at}.bias": args["bn_b"][row],
                  f"{at}.running_mean": args["running_mean"][row],
                  f"{at}.running_var": args["running_var"][row],
                  f"{at}.num_batches_tracked": torch.tensor(0)}  # fmt: skip
    mlp.load_state_dict(state)
    norm.load_state_dict({"weight": args["ln_w"], "bias": args["ln_b"]})
    wanted = args["x"] + mlp(norm(args["x"]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(plain_ffn(*args.values())[0], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run("ladder_ffn", args)[0], wanted, rtol=1e-12, atol=1e-12)
