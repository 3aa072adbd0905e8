"""The same bits from every run and for every number of threads, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ladder import DTYPES, Args, Shape, dtype_name, run
from ladder_problems import attention_args, block_args, branch_args, ffn_args, fusion_args
from ladder_rule import all_results, assert_equal_bits, assert_same_bits, outputs_of
from torch import Tensor

pytestmark = pytest.mark.kernel
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

# Enough work that every operator shares it between threads; odd sizes, so that no cut is even.
CALLS: dict[str, Callable[[torch.dtype], tuple[str, Args]]] = {
    "window_attention": lambda dtype: (
        "window_attention", attention_args(Shape(3, 19, 17, 3, 24, (7, 7), (3, -2)), dtype)
    ),
    "window_attention one_image": lambda dtype: (
        "window_attention", attention_args(Shape(1, 14, 14, 4, 24, (7, 7), (3, 3)), dtype)
    ),
    "window_attention one_window": lambda dtype: (
        "window_attention", attention_args(Shape(1, 12, 12, 5, 32, (12, 12)), dtype)
    ),
    "window_attention small_windows": lambda dtype: (
        "window_attention", attention_args(Shape(2, 61, 59, 1, 8, (2, 3), (1, 1)), dtype)
    ),
    "ladder_attention own_value": lambda dtype: (
        "ladder_attention", branch_args(Shape(3, 13, 11, 4, 24, (7, 7), (3, 3)), dtype, False, True)
    ),
    "ladder_attention given_value": lambda dtype: (
        "ladder_attention", branch_args(Shape(2, 15, 14, 3, 40, (7, 5), (-3, 2)), dtype)
    ),
    "ladder_ffn evaluation": lambda dtype: ("ladder_ffn", ffn_args((3, 15, 13, 72), dtype)),
    "ladder_ffn training": lambda dtype: (
        "ladder_ffn", ffn_args((3, 15, 13, 72), dtype, True, True)
    ),
    "ladder_ffn one_large_image": lambda dtype: (
        "ladder_ffn", ffn_args((1, 45, 47, 24), dtype, True)
    ),
    "ladder_ffn few_pixels": lambda dtype: ("ladder_ffn", ffn_args((1, 7, 7, 192), dtype, True)),
    "pixel_adaptive_fusion": lambda dtype: (
        "pixel_adaptive_fusion", fusion_args((3, 14, 13, 96), dtype=dtype)
    ),
    "pixel_adaptive_fusion few_rows": lambda dtype: (
        "pixel_adaptive_fusion", fusion_args((29, 384), dtype=dtype)
    ),
    "ladder_block": lambda dtype: (
        "ladder_block", block_args(Shape(2, 14, 14, 2, 24, (7, 7), (3, 3)), dtype)
    ),
    "ladder_block one_window": lambda dtype: (
        "ladder_block", block_args(Shape(1, 7, 7, 4, 24, (7, 7)), dtype)
    ),
    "ladder_block many_images": lambda dtype: (
        "ladder_block", block_args(Shape(13, 5, 6, 2, 24, (3, 3), (1, 1)), dtype)
    ),
}  # fmt: skip


def results(name: str, args: Args) -> dict[str, Tensor]:
    if name == "ladder_block":
        return {"result": run(name, args)}
    return all_results(name, args)


@DTYPE
@pytest.mark.parametrize("name", CALLS)
def test_threads_and_runs_do_not_change_a_bit(name: str, dtype: torch.dtype) -> None:
    op, args = CALLS[name](dtype)
    torch.set_num_threads(1)
    expected = results(op, args)
    assert_same_bits(results(op, args), expected)
    for threads in (2, 3, 2, 5):
        torch.set_num_threads(threads)
        assert_same_bits(results(op, args), expected, f"{threads} threads")


@DTYPE
@pytest.mark.parametrize("name", CALLS)
def test_identical_images_give_identical_results(name: str, dtype: torch.dtype) -> None:
    op, args = CALLS[name](dtype)
    if args.get("row_scale") is not None:
        args["row_scale"] = None
    per_image = [each for each in ("q", "k", "v", "x") if args.get(each) is not None]
    first = args[per_image[0]]
    count = 5
    same = {each: args[each][:1].expand(count, *args[each].shape[1:]) for each in per_image}
    grad = torch.randn(first[:1].shape).to(dtype).expand_as(same[per_image[0]])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        if op == "ladder_block":
            came = {"result 0": run(op, {**args, **same})}
        else:
            came = all_results(op, {**args, **same}, grad)
        for each in ("result 0", *per_image):
            if each in came:
                for image in came[each][1:]:
                    assert_equal_bits(image, came[each][0], each)


@pytest.mark.parametrize("name", CALLS)
def test_no_bit_depends_on_what_memory_held(name: str) -> None:
    from ppmoe_ops.testing import poison_memory

    op, args = CALLS[name](torch.bfloat16)
    found = []
    for byte in (0xFF, 0x00, 0x7F, 0x3C):
        with poison_memory(byte):
            found.append(results(op, args))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("name", CALLS)
def test_gradients_do_not_change_the_result(name: str) -> None:
    op, args = CALLS[name](torch.float32)
    if op == "ladder_block":
        return
    wanted = all_results(op, args)
    for at, each in enumerate(outputs_of(run(op, args))):
        assert_equal_bits(each, wanted[f"result {at}"])
