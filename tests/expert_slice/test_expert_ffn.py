"""`expert_ffn` against a dense composition: outputs and all six gradients, shapes and dtypes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from ffn import (
    ACTIVATIONS,
    BIASES,
    FLOAT_ARGUMENTS,
    GATED,
    Shape,
    asking,
    check_ffn,
    check_ffn_gradients,
    problem,
    replaced,
    run,
)
from slicing import DTYPES, call, dtype_name
from torch import Tensor
from torch.autograd import gradcheck

import ppmoe_ops

pytestmark = pytest.mark.kernel

SHAPES: dict[str, Shape] = {
    "small": Shape(9, 5, 7),
    "one_of_everything": Shape(1, 1, 1, 1, 1),
    "one_expert": Shape(21, 19, 11, 1, 1),
    "one_local_of_several": Shape(23, 17, 13, 3, 6, 2, 1),
    "every_expert_chosen": Shape(11, 13, 7, 5, 5),
    "one_choice": Shape(29, 31, 23, 1, 5),
    "primes": Shape(37, 41, 43, 3, 7, 2, 5),
    "no_tokens": Shape(0, 6, 5),
    "no_choices": Shape(5, 4, 3, 0, 4),
    "no_local_experts": Shape(7, 5, 4, 2, 8, 3, 0),
    "no_local_slots": Shape(7, 5, 4, 2, 4, 4, 3),
    "every_slot_dropped": Shape(6, 7, 8, 2, 4, routing="absent"),
    "some_slots_dropped": Shape(45, 20, 18, 3, 6, 1, 4, routing="dropped"),
    "experts_beyond_the_last": Shape(19, 8, 10, 2, 4, 2, 9),
    "no_hidden": Shape(5, 0, 4),
    "no_width": Shape(5, 4, 0),
    "one_hidden": Shape(33, 1, 29, 2, 3),
    "one_width": Shape(33, 29, 1, 2, 3),
    "all_on_one_expert": Shape(61, 24, 20, 1, 8, 0, 8, "one"),
    "all_on_the_same_experts": Shape(40, 33, 17, 3, 9, 1, 8, "one"),
    "one_to_eighteen_rows": Shape(171, 35, 27, 1, 18, 0, 18, "stairs"),
    "few_rows_wide": Shape(36, 97, 131, 1, 8, 0, 8, "stairs"),
    "few_rows_deep": Shape(10, 513, 301, 1, 4, 0, 4, "stairs"),
    "one_row_deep": Shape(1, 1029, 515, 1, 1),
    "row_panels": Shape(25, 15, 12, 1, 1),
    "row_block_less_one": Shape(383, 10, 9, 1, 1),
    "row_block": Shape(384, 9, 10, 1, 1),
    "row_block_and_one": Shape(385, 12, 11, 1, 1),
    "several_row_blocks": Shape(1170, 7, 6, 1, 2, 0, 2, "one"),
    "slab_edges": Shape(30, 64, 192, 2, 3),
    "beyond_slab_edges": Shape(30, 65, 193, 2, 3),
    "columns": Shape(24, 33, 31, 2, 3),
    "two_slabs": Shape(26, 384, 383, 2, 2),
    "beyond_two_slabs": Shape(26, 385, 385, 2, 2),
    "half_depth": Shape(26, 511, 34, 2, 2),
    "depth_slab": Shape(26, 34, 512, 2, 2),
    "hidden_beyond_a_depth_slab": Shape(26, 513, 33, 2, 2),
    "width_beyond_a_depth_slab": Shape(26, 33, 513, 2, 2),
    "three_depth_slabs": Shape(20, 1029, 1027, 1, 1),
    "token_chunk": Shape(2048, 2, 3, 2, 3),
    "beyond_a_token_chunk": Shape(2049, 3, 2, 1, 2),
    "two_token_chunks": Shape(4099, 3, 1, 2, 4, 1, 2),
    "many_token_chunks": Shape(9001, 2, 2, 1, 3, 0, 3, "one"),
    "rows_columns_and_depth": Shape(420, 140, 200, 2, 4, 1, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_composition(shape: str, dtype: torch.dtype) -> None:
    # Neighbouring cases have other activations and biases; all combinations have a test below.
    turn = list(SHAPES).index(shape) + DTYPES.index(dtype)
    args = asking(
        problem(SHAPES[shape], dtype, ACTIVATIONS[turn % len(ACTIVATIONS)], BIASES[turn % 4])
    )
    out = check_ffn(args)
    check_ffn_gradients(args)
    slots, top_k = args[1][: int(args[2][-1])].long(), max(SHAPES[shape].top_k, 1)
    foreign = torch.ones(out.size(0), dtype=torch.bool)
    foreign[slots // top_k] = False
    assert torch.equal(out[foreign], torch.zeros_like(out[foreign]))


@pytest.mark.parametrize("biases", BIASES, ids=lambda b: "_".join(("no", "yes")[i] for i in b))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_activation_and_bias(
    dtype: torch.dtype, activation: str, biases: tuple[bool, bool]
) -> None:
    # Expert 0 has few rows, and the second panel of expert 1 is not full.
    shape = Shape(31, 37, 45, 2, 6, 1, 4)
    args = problem(shape, dtype, activation, biases)
    check_ffn(args)
    check_ffn_gradients(asking(args))
    few = problem(Shape(7, 22, 35, 2, 5, 0, 5), dtype, activation, biases)
    check_ffn(few)
    check_ffn_gradients(asking(few))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("width", [1, 2, 3, 15, 16, 17, 31, 33, 63, 65])
def test_every_vector_length(width: int, activation: str, dtype: torch.dtype) -> None:
    for hidden in (width, width + 6):
        args = asking(problem(Shape(43, hidden, width, 2, 3), dtype, activation))
        check_ffn(args)
        check_ffn_gradients(args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 12, 15, 16, 17, 18, 24])
def test_every_number_of_rows(tokens: int, activation: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = asking(problem(Shape(tokens, 50, 39, 1, 1), dtype, activation))
        check_ffn(args)
        check_ffn_gradients(args)


@pytest.mark.parametrize("biases", BIASES, ids=lambda b: "_".join(("no", "yes")[i] for i in b))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_finite_differences(activation: str, biases: tuple[bool, bool]) -> None:
    shapes = (Shape(4, 3, 2, 2, 4, 1, 2), Shape(3, 2, 3, 1, 2, routing="dropped"), Shape(2, 1, 1))
    for shape in shapes:
        args = asking(problem(shape, torch.float64, activation, biases))
        leaves = [args[at] for at in FLOAT_ARGUMENTS if args[at] is not None]

        def function(*values: Tensor, args: tuple[Any, ...] = args) -> Tensor:
            given = iter(values)
            return run(
                [
                    next(given) if at in FLOAT_ARGUMENTS and args[at] is not None else args[at]
                    for at in range(len(args))
                ]
            )

        assert gradcheck(function, leaves)


@pytest.mark.parametrize("shift", [1, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_offsets_above_zero(dtype: torch.dtype, shift: int) -> None:
    # What lies before the first and after the last offset is not a slot, whatever it is.
    args = problem(Shape(30, 14, 19, 2, 8, 3, 3), dtype, "swiglu")
    slots, offsets = args[1:3]
    count = int(offsets[-1])
    moved = torch.full_like(slots, 2**30)
    moved[:shift] = -(2**30)
    moved[shift : shift + count] = slots[:count]
    assert shift + count <= slots.numel()
    shifted = replaced(args, slots=moved, offsets=offsets + shift)
    out = check_ffn(shifted)
    assert torch.equal(out, run(args))
    check_ffn_gradients(asking(shifted))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_slots_of_an_expert_in_any_order(order: str, dtype: torch.dtype) -> None:
    args = problem(Shape(70, 18, 22, 3, 6, 1, 4), dtype, "gelu_tanh")
    slots, bounds = args[1].clone(), args[2].tolist()
    for low, high in pairwise(bounds):
        part = slots[low:high].clone()
        turned = part.flip(0) if order == "reversed" else part[torch.randperm(high - low)]
        slots[low:high] = turned
    mixed = replaced(args, slots=slots)
    check_ffn(mixed)
    check_ffn_gradients(asking(mixed))


def test_a_token_in_a_later_chunk_before_one_in_an_earlier() -> None:
    # An expert's slots reversed, over more tokens than are worked on at a time.
    args = problem(Shape(5003, 2, 3, 2, 3, 0, 2), torch.float32, "relu")
    slots, bounds = args[1].clone(), args[2].tolist()
    for low, high in pairwise(bounds):
        slots[low:high] = slots[low:high].flip(0)
    mixed = asking(replaced(args, slots=slots))
    check_ffn(mixed)
    check_ffn_gradients(mixed)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_name)
def test_sums_are_kept_in_float32(dtype: torch.dtype) -> None:
    # 4096 ones and a last one: a half-precision sum would stop growing long before.
    x = torch.ones(20, 4097, dtype=dtype)
    w_in, w_out = torch.ones(1, 1, 4097, dtype=dtype), torch.ones(1, 4097, 1, dtype=dtype)
    slots, offsets = call("expert_index", (torch.zeros(20, 1).long(), 0, 1))
    for rows in (1, 20):
        listed = torch.tensor([0, rows], dtype=torch.int32)
        args = (x, slots, listed, torch.ones(20, 1), w_in, None, w_out, None, "relu")
        out = run(args)
        assert torch.equal(out[:rows], torch.full_like(out[:rows], 4097.0))
        # The other way round: 4097 terms in the second product.
        turned = (
            x[:, :1].contiguous(), slots, listed, torch.ones(20, 1), w_out, None, w_in, None,
            "relu",
        )  # fmt: skip
        out = run(turned)
        assert torch.equal(out[:rows], torch.full_like(out[:rows], 4097.0))
    assert int(offsets[-1]) == 20


def test_choices_are_added_in_wide_precision() -> None:
    # 1 + 2^-9 + 2^-9 is not 1 in bfloat16, but 1 + 2^-9 is.
    w_in, w_out = torch.ones(3, 1, 1).bfloat16(), torch.ones(3, 1, 1).bfloat16()
    slots, offsets = call("expert_index", (torch.tensor([[0, 1, 2]]), 0, 3))
    weights = torch.tensor([[1.0, 2**-8, 2**-8]])
    x = torch.ones(1, 1).bfloat16()
    out = run((x, slots, offsets, weights, w_in, None, w_out, None, "relu"))
    assert out.item() == 1 + 2**-7


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_default_activation_and_names(activation: str) -> None:
    args = problem(SHAPES["small"], torch.float32, activation)
    assert torch.equal(ppmoe_ops.expert_ffn(*args), run(args))
    if activation == "gelu":
        assert torch.equal(ppmoe_ops.expert_ffn(*args[:-1]), run(args))
    assert (args[4].size(1) == 2 * args[6].size(2)) == (activation in GATED)
