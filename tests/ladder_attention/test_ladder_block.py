"""`ladder_block` against its composition, folded and unfolded, and against the public operators."""

from __future__ import annotations

import pytest
import torch
from ladder import DTYPES, Args, Shape, dtype_name, plain_block, plain_branch, plain_ffn, run
from ladder import plain_fusion as fuse
from ladder_problems import block_args, block_of, layouts, unfolded_block
from ladder_rule import assert_agree, assert_equal_bits, check_result
from torch import Tensor

from ppmoe_ops._library import OPERATORS

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

# Of a branch: the block's maps are three times as wide.
SHAPES: dict[str, Shape] = {
    "tiny_stage_3": Shape(1, 14, 14, 4, 16, (7, 7), (3, 3)),
    "pslt_stage_3": Shape(2, 7, 14, 4, 24, (7, 7), (3, 3)),
    "pslt_stage_4": Shape(1, 7, 7, 8, 24, (7, 7), (0, 0)),
    "small_map": Shape(2, 4, 3, 2, 16, (3, 3), (0, 0)),
    "odd_map": Shape(2, 9, 11, 2, 8, (4, 3), (-1, 2)),
    "one_token": Shape(2, 1, 1, 1, 8, (7, 7), (3, 3)),
    "one_row": Shape(1, 1, 9, 1, 24, (4, 4), (2, 2)),
    "one_column": Shape(1, 9, 1, 3, 8, (4, 4), (1, -1)),
    "two_rows": Shape(1, 2, 2, 1, 40, (2, 2), (1, 1)),
    "odd_channels": Shape(1, 5, 6, 1, 13, (3, 3), (1, 1)),
    "swin_direction": Shape(1, 8, 8, 1, 16, (4, 4), (-2, -2)),
}


@DTYPE
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_folded_composition(shape: str, dtype: torch.dtype) -> None:
    check_result("ladder_block", block_args(SHAPES[shape], dtype))


def unfolded(
    branches: list[Args], feeds: list[Args], fusion: Args, table: dict[str, object]
) -> Tensor:
    """The block by operators of its parts, `table` naming them."""
    value, outputs = None, []
    for part, branch, feed in zip(fusion["x"].chunk(3, -1), branches, feeds, strict=True):
        z = call(table["branch"], {**branch, "x": part, "v": value})
        value = call(table["feed"], {**feed, "x": z})[0]
        outputs.append(value)
    out: Tensor = call(table["fusion"], {**fusion, "x": torch.cat(outputs, -1)})
    return out


def call(function: object, args: Args) -> Tensor:
    assert callable(function)
    result: Tensor = function(*args.values())
    return result


PLAIN = {"branch": plain_branch, "feed": plain_ffn, "fusion": fuse}


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_unfolded_parts(shape: str) -> None:
    """Borders included: batch norms by torch's own, not folded into anything."""
    parts = unfolded_block(SHAPES[shape])
    wanted = unfolded(*parts, PLAIN)
    args = block_of(*parts, SHAPES[shape])
    near = 1e-12 * (1 + wanted.abs().max().item())
    for came in (plain_block(*args.values()), run("ladder_block", args)):
        assert (came - wanted).abs().max().item() <= near
    table = {
        "branch": OPERATORS["ladder_attention"].overload,
        "feed": OPERATORS["ladder_ffn"].overload,
        "fusion": OPERATORS["pixel_adaptive_fusion"].overload,
    }
    assert (unfolded(*parts, table) - wanted).abs().max().item() <= near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_norm_parameters_in_float32_beside_narrower_data(dtype: torch.dtype) -> None:
    args = block_args(SHAPES["odd_map"], torch.float64)
    narrow = [each.to(dtype) for each in args["params"]]
    for branch in range(3):
        for at in (0, 1, 4, 7, 8):
            narrow[16 * branch + at] = args["params"][16 * branch + at].float()
    check_result("ladder_block", {**args, "x": args["x"].to(dtype), "params": narrow})


@pytest.mark.parametrize("hidden", [1, 5, 24, 61])
def test_any_width_of_the_gate(hidden: int) -> None:
    args = block_args(SHAPES["odd_map"])
    wide, channels = torch.randn(hidden, 48) / 7, 48
    gate = [wide, torch.randn(hidden), torch.randn(channels, hidden) / hidden**0.5]
    check_result(
        "ladder_block", {**args, "params": [*args["params"][:48], *gate, *args["params"][51:]]}
    )


@DTYPE
def test_strides_of_the_map_do_not_change_a_bit(dtype: torch.dtype) -> None:
    args = block_args(SHAPES["odd_map"], dtype)
    wanted = run("ladder_block", args)
    for name, turned in layouts(args["x"]).items():
        came = run("ladder_block", {**args, "x": turned})
        assert_agree("ladder_block", {"result": came}, {"result": wanted}, name)


@DTYPE
def test_strides_of_parameters(dtype: torch.dtype) -> None:
    args = block_args(SHAPES["odd_map"], dtype)
    turned = []
    for each in args["params"]:
        wider = each.new_full((*each.shape[:-1], 2 * each.size(-1)), torch.nan)
        wider[..., ::2] = each
        turned.append(wider[..., ::2])
    check_result("ladder_block", {**args, "params": turned})
    last_first = [each.movedim(-1, 0).contiguous().movedim(0, -1) for each in args["params"]]
    check_result("ladder_block", {**args, "params": last_first})


def test_expanded_arguments() -> None:
    args = block_args(SHAPES["odd_map"])
    turned = {
        **args, "x": args["x"][:1].expand_as(args["x"]),
        "params": [each[:1].expand_as(each) for each in args["params"]],
    }  # fmt: skip
    closed = {**turned, "x": turned["x"].clone(), "params": [p.clone() for p in turned["params"]]}
    came, wanted = run("ladder_block", turned), run("ladder_block", closed)
    assert_agree("ladder_block", {"result": came}, {"result": wanted})


@pytest.mark.parametrize("size", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
@DTYPE
def test_empty_maps(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    args = block_args(Shape(*size, 2, 8, (3, 3), (1, 1)), dtype)
    assert run("ladder_block", args).shape == (*size, 48)


def test_its_derivative_raises_and_names_what_has_one() -> None:
    args = block_args(SHAPES["small_map"])
    for leaf in (args["x"], args["params"][3], args["params"][53]):
        leaf.requires_grad_()
        out = run("ladder_block", args)
        with pytest.raises(RuntimeError, match="ladder_block: ") as error:
            out.sum().backward()
        for name in ("ladder_attention", "ladder_ffn", "pixel_adaptive_fusion"):
            assert name in str(error.value)
        leaf.requires_grad_(False)
    args["x"].requires_grad_()
    with torch.no_grad():
        assert not run("ladder_block", args).requires_grad


def test_the_offset_counts_inside_of_the_map_alone() -> None:
    shape = Shape(1, 5, 6, 1, 8, (5, 6))
    args = block_args(shape, torch.float64)
    params = list(args["params"])
    # Branch 2 alone, of which the hidden map is one offset: gelu of the number of taps inside.
    params[32 + 11] = torch.zeros(8, 3, 3).double()
    params[32 + 12] = torch.zeros(8).double()
    params[32 + 13] = torch.ones(8, 3, 3).double()
    bare = [*params[:32], *params[32:46], torch.zeros(8, 8).double(), params[47], *params[48:]]
    params[32 + 14] = torch.eye(8).double()
    # The fusion passes the map on: an open gate and no mixing.
    rest = [torch.zeros(12, 24), torch.zeros(12), torch.zeros(24, 12), torch.full((24,), 99.0),
            torch.zeros(24, 24), torch.zeros(24)]  # fmt: skip
    tail = [each.double() for each in rest]
    came = run("ladder_block", {**args, "params": [*params[:48], *tail]})
    without = run("ladder_block", {**args, "params": [*bare[:48], *tail]})
    taps = torch.full((5, 6), 9.0).double()
    taps[0], taps[-1], taps[:, 0], taps[:, -1] = 6, 6, 6, 6
    taps[::4, ::5] = 4
    wanted = torch.nn.functional.gelu(taps).unsqueeze(-1).expand(5, 6, 8)
    torch.testing.assert_close((came - without)[0, ..., 16:], wanted, rtol=1e-10, atol=1e-10)
    assert_equal_bits(came[..., :16], without[..., :16])


def test_results_do_not_depend_on_neighbours() -> None:
    args = block_args(Shape(4, 9, 8, 2, 8, (4, 4), (2, 1)), torch.float32)
    whole = run("ladder_block", args)
    for image in range(4):
        alone = run("ladder_block", {**args, "x": args["x"][image : image + 1]})
        assert_agree("ladder_block", {"one": alone[0]}, {"one": whole[image]})
