"""The traps of the ladder block, one test each: who falls into one fails here."""

from __future__ import annotations

import pytest
import torch
from ladder import Args, Shape, plain_norm, rolled_attention, run
from ladder_problems import (
    attention_args,
    block_args,
    block_of,
    branch_args,
    ffn_args,
    fusion_args,
    unfolded_block,
)
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.kernel
STAGE_3 = Shape(1, 14, 14, 4, 24, (7, 7), (3, 3))


def learnt(args: Args, *others: str) -> int:
    left_out = {"x", "v", "running_mean", "running_var", "row_scale", *others}
    return sum(
        each.numel()
        for name, each in args.items()
        if isinstance(each, Tensor) and name not in left_out
    )


# Width of a branch, heads; parameters of branch 0, of branches 1 and 2, of gate and last linear.
COUNTS = {
    "tiny_stage_3": (64, 4, None, None, None, 146_636),
    "pslt_stage_3": (96, 4, 58_468, 49_156, (83_376, 83_232), 323_388),
    "pslt_stage_4": (192, 8, 227_528, 190_472, (332_640, 332_352), 1_273_464),
    "large_stage_3": (128, 4, None, None, None, 569_772),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_a_block(name: str) -> None:
    """Of what the operators take, as the authors' training log lists them."""
    g, heads, first, later, ends, total = COUNTS[name]
    shape = Shape(1, 1, 2, heads, g // heads, (7, 7))
    feed = ffn_args(shape.map)
    run("ladder_ffn", feed)
    branches = []
    for value in (False, True):
        args = branch_args(shape, value=value)
        run("ladder_attention", args)
        branches.append(learnt(args) + learnt(feed))
    fusion = fusion_args((2, 3 * g))
    run("pixel_adaptive_fusion", fusion)
    gate, last = learnt(fusion, "wp", "bp"), learnt(fusion, "w1", "b1", "w2", "b2")
    assert branches[0] == 6 * g**2 + 26 * g + 169 * heads
    assert branches[1] == 5 * g**2 + 25 * g + 169 * heads
    assert branches[0] + 2 * branches[1] + gate + last == total
    for came, wanted in zip((*branches, (gate, last)), (first, later, ends), strict=True):
        assert wanted is None or came == wanted


@pytest.mark.parametrize("sign", [0, 1, -1], ids=["branch_0", "branch_1", "branch_2"])
def test_the_ragged_form_is_roll_and_mask(sign: int) -> None:
    shape = Shape(1, 14, 14, 4, 24, (7, 7), (3 * sign, 3 * sign))
    args = branch_args(shape, torch.float64)
    normed = plain_norm(args["x"], args["ln_w"], args["ln_b"])
    q, k = F.linear(normed, args["w_in"], args["b_in"]).chunk(2, -1)
    mixed = rolled_attention(q, k, args["v"], args["bias_table"], 4, (7, 7), shape.shift)
    wanted = args["x"] + F.linear(mixed, args["w_out"], args["b_out"]) + normed
    came = run("ladder_attention", args)
    assert (came - wanted).abs().max().item() < 1e-13


def test_the_last_branch_is_shifted_the_other_way() -> None:
    args = attention_args(Shape(1, 14, 14, 2, 8, (7, 7), (-3, -3)), torch.float64)
    out = run("window_attention", args)
    other = run("window_attention", {**args, "shift": [3, 3]})
    assert (out - other).abs().max().item() > 0.1
    # Swin's mask on the map that is rolled the other way cuts in the wrong place.
    rolled = torch.roll(torch.arange(14), 3)
    pairs_apart = (rolled[:7, None] >= 11) != (rolled[None, :7] >= 11)
    assert pairs_apart.any()
    # Token 3 shares its rectangle, rows 0 to 3, with row 0 and not with row 4.
    moved = {**args, "k": args["k"].clone()}
    moved["k"][:, 4:] += 1
    changed = (run("window_attention", moved) - out).abs().amax((0, 2, 3)) > 0
    assert changed.tolist() == [False] * 4 + [True] * 10


def test_the_block_shifts_none_forth_and_back() -> None:
    branches, feeds, fusion = unfolded_block(Shape(1, 14, 14, 1, 8, (7, 7), (3, 3)))
    args = block_of(branches, feeds, fusion, Shape(1, 14, 14, 1, 8, (7, 7), (3, 3)))
    assert [each["shift"] for each in branches] == [[0, 0], [3, 3], [-3, -3]]
    value, outputs = None, []
    for part, branch, feed in zip(fusion["x"].chunk(3, -1), branches, feeds, strict=True):
        z = run("ladder_attention", {**branch, "x": part, "v": value})
        value = run("ladder_ffn", {**feed, "x": z})[0]
        outputs.append(value)
    wanted = run("pixel_adaptive_fusion", {**fusion, "x": torch.cat(outputs, -1)})
    torch.testing.assert_close(run("ladder_block", args), wanted, rtol=1e-11, atol=1e-11)
    for shift in ([0, 0], [-3, -3], [3, -3]):
        other = run("ladder_block", {**args, "shift": shift})
        assert (other - wanted).abs().max().item() > 1e-3


def silent(args: Args) -> Args:
    """An attention that adds nothing of its own."""
    quiet = {name: torch.zeros_like(args[name]) for name in ("w_out", "b_out")}
    return {**args, **quiet}


def test_the_inner_shortcut_is_there_where_a_value_is_given() -> None:
    own = silent(branch_args(STAGE_3, torch.float64, value=False))
    assert torch.equal(run("ladder_attention", own), own["x"])
    given = silent(branch_args(STAGE_3, torch.float64, value=True))
    wanted = given["x"] + plain_norm(given["x"], given["ln_w"], given["ln_b"])
    torch.testing.assert_close(run("ladder_attention", given), wanted, rtol=1e-13, atol=1e-13)


def test_the_inner_shortcut_is_inside_of_the_row_scale() -> None:
    args = silent(branch_args(STAGE_3, torch.float64))
    args["row_scale"] = torch.tensor([0.25]).double()
    normed = plain_norm(args["x"], args["ln_w"], args["ln_b"])
    wanted = args["x"] + 0.25 * normed
    torch.testing.assert_close(run("ladder_attention", args), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("value", [False, True], ids=["own_value", "given_value"])
def test_queries_come_before_keys(value: bool) -> None:
    args = branch_args(STAGE_3, torch.float64, value=value)
    out = run("ladder_attention", args)
    turned = dict(args)
    for name in ("w_in", "b_in"):
        q, k, *rest = args[name].split(96)
        turned[name] = torch.cat([k, q, *rest])
    assert (run("ladder_attention", turned) - out).abs().max().item() > 1e-2
    # A bias on the queries that every key answers alike changes no weight; on the keys it does.
    flat = {**args, "w_in": args["w_in"].clone(), "bias_table": torch.zeros(169, 4).double()}
    flat["w_in"][:96] = 0  # all queries are equal to their bias
    first = run("ladder_attention", flat)
    moved = {**flat, "b_in": args["b_in"].clone()}
    moved["b_in"][96:192] += 1  # one more on all keys: softmax does not see it
    torch.testing.assert_close(run("ladder_attention", moved), first, rtol=1e-9, atol=1e-9)
    moved = {**flat, "b_in": args["b_in"].clone()}
    moved["b_in"][:96] += 1
    assert (run("ladder_attention", moved) - first).abs().max().item() > 1e-2


def test_a_given_value_is_taken_raw() -> None:
    args = branch_args(STAGE_3, torch.float64)
    args["w_out"] = torch.eye(96).double()
    normed = plain_norm(args["x"], args["ln_w"], args["ln_b"])
    base = {**args, "v": torch.zeros_like(args["v"])}
    without = run("ladder_attention", base)
    # Neither a norm, which would take a constant away, nor a projection.
    same = {**args, "v": torch.full_like(args["v"], 7.0)}
    torch.testing.assert_close(
        run("ladder_attention", same) - without,
        torch.full_like(normed, 7.0),
        rtol=1e-12,
        atol=1e-12,
    )
    doubled = run("ladder_attention", {**args, "v": 2 * args["v"]}) - without
    once = run("ladder_attention", args) - without
    torch.testing.assert_close(doubled, 2 * once, rtol=1e-11, atol=1e-11)


def test_the_value_is_what_comes_out_of_the_branch_before() -> None:
    """Behind its FFN and both residuals: the FFN's last bias reaches the next branch."""
    shape = Shape(1, 7, 7, 1, 8, (7, 7))
    args = block_args(shape, torch.float64)
    out = run("ladder_block", args)
    changed = [each.clone() for each in args["params"]]
    changed[15] += 0.5  # f2_b of branch 0
    # The fusion is blind to branch 0.
    for params in (args["params"], changed):
        for at, axis in ((48, 1), (52, 1)):
            params[at] = params[at].clone()
            params[at].narrow(axis, 0, 8).zero_()
    before = run("ladder_block", args)
    after = run("ladder_block", {**args, "params": changed})
    assert (after[..., 8:] - before[..., 8:]).abs().max().item() > 1e-3
    assert (before - out).abs().max().item() > 1e-6


def test_a_map_of_one_window_is_not_shifted_at_stage_4() -> None:
    shape = Shape(2, 7, 7, 8, 24, (7, 7))
    args = attention_args(shape, torch.float64)
    tokens = [args[name].flatten(1, 2).unflatten(-1, (8, 24)).transpose(1, 2) for name in "qkv"]
    at = torch.arange(49)
    row, column = at // 7, at % 7
    index = (row[:, None] - row + 6) * 13 + column[:, None] - column + 6
    bias = args["bias_table"][index].permute(2, 0, 1)
    wanted = F.scaled_dot_product_attention(*tokens, attn_mask=bias)
    wanted = wanted.transpose(1, 2).reshape(shape.map)
    torch.testing.assert_close(run("window_attention", args), wanted, rtol=1e-11, atol=1e-11)
    shifted = run("window_attention", {**args, "shift": [3, 3]})
    assert (shifted - wanted).abs().max().item() > 1e-2
