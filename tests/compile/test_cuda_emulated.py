"""The CUDA kernels of expert slicing, run on the CPU from their own source (see `emulate.py`).

This checks what a GPU-less machine can check of them: index arithmetic, barriers, tails, launch
shapes, bad slots. It says nothing about speed or about the hardware's memory model.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppmoe_ops._library import OPERATORS

pytestmark = pytest.mark.kernel
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference(name: str, *args: Any) -> Any:
    return OPERATORS[name].reference(*args)


def slots_of(tokens: int, top_k: int, experts: int, local: int) -> Tensor:
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k]
    return reference("expert_index", ids, 0, local)[0]


def close(name: str, got: Tensor, args: tuple[Any, ...], index: int | None = None) -> None:
    """Same shape and dtype, and as near to float64 as the reference but for a few roundings."""

    def run(convert: Callable[[Tensor], Tensor]) -> Tensor:
        floats = (isinstance(each, Tensor) and each.is_floating_point() for each in args)
        given = (convert(each) if f else each for each, f in zip(args, floats, strict=True))
        out = reference(name, *given)
        return out if index is None else out[index]

    expected = run(lambda tensor: tensor)
    exact = run(lambda tensor: tensor.double())
    magnitude = run(lambda tensor: tensor.double().abs())
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if got.numel():
        error = (got.double() - exact).abs().max()
        allowed = 2 * (expected.double() - exact).abs().max()
        allowed += torch.finfo(got.dtype).eps * exact.abs().max()
        allowed += 4 * torch.finfo(wide(got.dtype)).eps * magnitude.nan_to_num().max()
        assert error <= allowed


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "first", "local"),
    [
        (8, 1, 4, 0, 2),
        (0, 2, 4, 0, 4),
        (5, 3, 6, 2, 0),
        (1, 1, 1, 0, 1),
        (37, 3, 8, 2, 5),
        (512, 8, 128, 0, 128),
        (512, 8, 128, 96, 32),
        (513, 8, 128, 0, 128),
        (2048, 8, 64, 16, 16),
        (6001, 1, 3, 0, 3),
        (300, 2, 1500, 100, 1300),
        (3000, 2, 1024, 0, 1024),
        (4096, 2, 2, 1, 1),
    ],
)
def test_expert_index(
    ops: Any, dtype: torch.dtype, tokens: int, top_k: int, experts: int, first: int, local: int
) -> None:
    for _ in range(5):  # each time in another order of threads
        ids = torch.randint(-1, experts, (tokens, top_k), dtype=dtype)
        slots, offsets = ops.expert_index(ids, first, local)
        expected = reference("expert_index", ids, first, local)
        assert torch.equal(slots, expected[0])
        assert torch.equal(offsets, expected[1])


def test_expert_index_with_all_tokens_on_one_expert(ops: Any) -> None:
    ids = torch.full((3000, 2), 5)
    slots, offsets = ops.expert_index(ids, 4, 3)
    assert torch.equal(slots, torch.arange(6000, dtype=torch.int32))
    assert offsets.tolist() == [0, 0, 6000, 6000]


def test_expert_index_takes_strided_and_far_ids(ops: Any) -> None:
    ids = torch.randint(0, 9, (4, 50), dtype=torch.int64).T
    ids[3] = torch.tensor([2**40, -(2**62), 2**31, -1])
    slots, offsets = ops.expert_index(ids, 2, 6)
    expected = reference("expert_index", ids, 2, 6)
    assert torch.equal(slots, expected[0])
    assert torch.equal(offsets, expected[1])


def test_expert_index_with_more_ids_than_the_grid_has_chunks(ops: Any) -> None:
    ids = torch.randint(0, 128, (40000, 8), dtype=torch.int32)
    slots, offsets = ops.expert_index(ids, 0, 100)
    expected = reference("expert_index", ids, 0, 100)
    assert torch.equal(slots, expected[0])
    assert torch.equal(offsets, expected[1])


ROWS = [(6, 2, 8, 3, 19), (5, 3, 8, 8, 64), (4, 2, 8, 0, 8), (33, 5, 8, 4, 300), (2, 1, 8, 8, 2080)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "experts", "local", "hidden"), ROWS)
def test_rows(
    ops: Any, dtype: torch.dtype, tokens: int, top_k: int, experts: int, local: int, hidden: int
) -> None:
    slots = slots_of(tokens, top_k, experts, local)
    x = torch.randn(tokens, hidden, dtype=dtype)
    assert torch.equal(ops.slice_rows(x, slots, top_k), reference("slice_rows", x, slots, top_k))
    rows = torch.randn(tokens * top_k, hidden, dtype=dtype)
    close("slice_rows_backward", ops.slice_rows_backward(rows, slots, top_k), (rows, slots, top_k))
    # The tail must not be read: whatever it holds would reach a token.
    rows[slots < 0] = torch.nan
    weights = torch.rand(tokens, top_k, dtype=wide(dtype))
    merged = ops.merge_rows(rows, slots, weights)
    close("merge_rows", merged, (rows, slots, weights))
    grad = torch.randn(tokens, hidden, dtype=dtype)
    args = (grad, rows, slots, weights)
    for index, got in enumerate(ops.merge_rows_backward(*args)):
        close("merge_rows_backward", got, args, index)


def test_many_slots_are_inverted_by_many_blocks(ops: Any) -> None:
    slots = slots_of(5000, 2, 4, 3)
    rows, weights = torch.randn(10000, 1), torch.rand(5000, 2)
    close("merge_rows", ops.merge_rows(rows, slots, weights), (rows, slots, weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(ops: Any, dtype: torch.dtype) -> None:
    slots = slots_of(7, 3, 8, 5)
    for x in (
        torch.randn(7, 40, dtype=dtype)[:, 3:20],
        torch.randn(7, 48, dtype=dtype)[:, 8:40],
        torch.randn(21, 7, dtype=dtype).T,
        torch.randn(1, 24, dtype=dtype).expand(7, 24),
    ):
        assert torch.equal(ops.slice_rows(x, slots, 3), reference("slice_rows", x, slots, 3))
    rows = torch.randn(16, 21, dtype=dtype).T
    weights = torch.rand(3, 7, dtype=wide(dtype)).T
    args = (torch.ones((), dtype=dtype).expand(7, 16), rows, slots, weights)
    close("merge_rows", ops.merge_rows(*args[1:]), args[1:])
    for index, got in enumerate(ops.merge_rows_backward(*args)):
        close("merge_rows_backward", got, args, index)


@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(0, 2, 8), (4, 0, 8), (4, 2, 0)])
def test_empty_inputs(ops: Any, tokens: int, top_k: int, hidden: int) -> None:
    slots = torch.full((tokens * top_k,), -1, dtype=torch.int32)
    x, rows = torch.randn(tokens, hidden), torch.randn(tokens * top_k, hidden)
    weights = torch.rand(tokens, top_k)
    if top_k:
        assert ops.slice_rows(x, slots, top_k).shape == rows.shape
        assert ops.slice_rows_backward(rows, slots, top_k).shape == x.shape
    assert torch.equal(ops.merge_rows(rows, slots, weights), torch.zeros(tokens, hidden))
    grad_rows, grad_weights = ops.merge_rows_backward(x, rows, slots, weights)
    assert grad_rows.shape == rows.shape
    assert torch.equal(grad_weights, torch.zeros(tokens, top_k))


def test_bad_slots_act_as_minus_one(ops: Any) -> None:
    slots = slots_of(6, 2, 8, 8)
    bad, good = slots.clone(), slots.clone()
    bad[2], bad[7], bad[8] = 12, -7, 2**31 - 1
    good[2] = good[7] = good[8] = -1
    x, rows, weights = torch.randn(6, 16), torch.randn(12, 16), torch.rand(6, 2)
    assert torch.equal(ops.slice_rows(x, bad, 2), ops.slice_rows(x, good, 2))
    assert torch.equal(
        ops.slice_rows_backward(rows, bad, 2), ops.slice_rows_backward(rows, good, 2)
    )
    assert torch.equal(ops.merge_rows(rows, bad, weights), ops.merge_rows(rows, good, weights))
    for one, other in zip(
        ops.merge_rows_backward(x, rows, bad, weights),
        ops.merge_rows_backward(x, rows, good, weights),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_slot_listed_twice_leaves_no_row_unwritten(ops: Any) -> None:
    slots = torch.tensor([3, 3, 0, -1], dtype=torch.int32)
    grad, rows, weights = torch.randn(2, 5), torch.randn(4, 5), torch.rand(2, 2)
    grad_rows, grad_weights = ops.merge_rows_backward(grad, rows, slots, weights)
    expected = weights.flatten()[[3, 3, 0]].unsqueeze(-1) * grad[[1, 1, 0]]
    torch.testing.assert_close(grad_rows, torch.cat([expected, torch.zeros(1, 5)]))
    torch.testing.assert_close(grad_weights[1, 1], rows[1] @ grad[1])


def bad_calls() -> list[tuple[str, tuple[Any, ...]]]:
    ids, x, rows = torch.zeros(3, 2, dtype=torch.int64), torch.randn(3, 4), torch.randn(6, 4)
    slots, weights = torch.arange(6, dtype=torch.int32), torch.rand(3, 2)
    return [
        ("expert_index", (ids.flatten(), 0, 2)),
        ("expert_index", (ids.float(), 0, 2)),
        ("expert_index", (ids, -1, 2)),
        ("expert_index", (ids, 0, -1)),
        ("slice_rows", (x[0], slots, 2)),
        ("slice_rows", (x.int(), slots, 2)),
        ("slice_rows", (x, slots.long(), 2)),
        ("slice_rows", (x, slots, 3)),
        ("slice_rows", (x, slots, 0)),
        ("slice_rows_backward", (rows, slots[:5], 2)),
        ("slice_rows_backward", (rows, slots, 4)),
        ("merge_rows", (rows, slots, weights.double())),
        ("merge_rows", (rows.double(), slots, weights)),
        ("merge_rows", (rows, slots, weights[:2])),
        ("merge_rows", (rows, slots.view(3, 2), weights)),
        ("merge_rows_backward", (x.half(), rows, slots, weights)),
        ("merge_rows_backward", (x[:2], rows, slots, weights)),
        ("merge_rows_backward", (x[:, :3], rows, slots, weights)),
    ]


@pytest.mark.parametrize(("name", "args"), bad_calls())
def test_bad_arguments_raise_in_the_words_of_the_reference(
    ops: Any, name: str, args: tuple[Any, ...]
) -> None:
    with pytest.raises(ValueError) as expected:  # noqa: PT011
        reference(name, *args)
    with pytest.raises(ValueError) as got:  # noqa: PT011
        getattr(ops, name)(*args)
    assert str(got.value) == str(expected.value)


SYNCHRONISING_CHECK = """
import sys
from pathlib import Path
import torch, emulate
library = emulate.load(Path(sys.argv[1]))
x, rows, weights = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 2)
for slots in ([0, 4, -1, -1], [0, -2, -1, -1], [1, 1, -1, -1]):
    slots = torch.tensor(slots, dtype=torch.int32)
    for call in (
        lambda: torch.ops.ppmoe_emulated.slice_rows(x, slots, 2),
        lambda: torch.ops.ppmoe_emulated.merge_rows(rows, slots, weights),
    ):
        try:
            call()
            print("none")
        except (IndexError, ValueError) as error:
            print(type(error).__name__, error)
"""


def test_the_synchronising_check_raises(emulated_library: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SYNCHRONISING_CHECK, emulated_library],
        env={**os.environ, "PPMOE_OPS_CHECK": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == [
        "IndexError slice_rows: slots holds 4; allowed: -1 to 3",
        "IndexError merge_rows: slots holds 4; allowed: -1 to 3",
        "IndexError slice_rows: slots holds -2; allowed: -1 to 3",
        "IndexError merge_rows: slots holds -2; allowed: -1 to 3",
        "none",
        "ValueError merge_rows: slots holds 1 twice; allowed: each slot once",
    ]
