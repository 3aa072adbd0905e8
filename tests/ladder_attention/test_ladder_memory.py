"""What a training step keeps for its backward, and what a call takes beside its results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ladder import DTYPES, PLAIN, Args, Shape, dtype_name, rolled_attention
from ladder_problems import attention_args, branch_args, ffn_args, fusion_args
from ladder_rule import asking, outputs_of
from test_registry import measured_saved_bytes
from torch import Tensor

import ppmoe_ops
from ppmoe_ops._library import OPERATORS

HERE = Path(__file__).resolve().parent
PSLT = Shape(2, 14, 14, 4, 24, (7, 7), (3, 3))


def problems(dtype: torch.dtype) -> list[tuple[str, Args]]:
    return [
        ("window_attention", attention_args(PSLT, dtype)),
        ("window_attention", attention_args(Shape(1, 24, 24, 1, 8, (12, 12), (6, 6)), dtype)),
        ("ladder_attention", branch_args(PSLT, dtype, value=False)),
        ("ladder_attention", branch_args(PSLT, dtype)),
        ("ladder_ffn", ffn_args((2, 14, 14, 96), dtype, training=True)),
        ("ladder_ffn", ffn_args((2, 14, 14, 96), dtype)),
        ("pixel_adaptive_fusion", fusion_args((2, 14, 14, 288), dtype=dtype)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_nothing_is_saved_beyond_inputs_and_outputs(dtype: torch.dtype) -> None:
    for op, args in problems(dtype):
        values = list(asking(args).values())
        assert measured_saved_bytes(OPERATORS[op], values, {}) == 0
        formula = OPERATORS[op].saved_bytes
        assert formula is not None
        assert formula(*values) == 0


def kept_alive(function: Any, args: Args) -> int:
    """Bytes of all storages that the graph holds, but for parameters and the first argument."""
    args = asking(args)
    given = {
        each.untyped_storage().data_ptr() for each in args.values() if isinstance(each, Tensor)
    }
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*args.values())
    return sum(size for pointer, size in kept.items() if pointer not in given)


def test_a_block_saves_a_tenth_of_what_a_composition_does() -> None:
    """Three branches and their fusion at 14x14, of what lies between the operators too."""
    ours = theirs = 0
    calls = [
        ("ladder_attention", branch_args(PSLT, value=False)),
        ("ladder_ffn", ffn_args(PSLT.map, training=True)),
        ("ladder_attention", branch_args(PSLT)), ("ladder_ffn", ffn_args(PSLT.map, training=True)),
        ("ladder_attention", branch_args(PSLT)), ("ladder_ffn", ffn_args(PSLT.map, training=True)),
        ("pixel_adaptive_fusion", fusion_args((2, 14, 14, 288))),
    ]  # fmt: skip
    for op, args in calls:
        # Each operator's input is kept alive by it, and its result by the next one.
        first = next(iter(args.values()))
        ours += kept_alive(OPERATORS[op].overload, args) + first.nbytes
        theirs += kept_alive(PLAIN[op], args) + first.nbytes
    assert ours * 5 < theirs
    assert ours < 6 * PSLT.batch * 196 * 288 * 4


def test_no_matrix_of_pairs_is_saved() -> None:
    args = attention_args(Shape(2, 28, 28, 2, 8, (14, 14), (7, 7)))
    pairs = 2 * 2 * 4 * 196 * 196 * 4
    assert kept_alive(rolled_attention, args) > pairs
    out_bytes = args["q"].nbytes
    assert kept_alive(OPERATORS["window_attention"].overload, args) <= out_bytes


def test_saved_tensors_are_the_inputs_themselves() -> None:
    """Views of a fused projection are kept as views, not copied."""
    fused = torch.randn(2, 14, 14, 3 * 48, requires_grad=True)
    q, k, v = fused.chunk(3, -1)
    out = ppmoe_ops.window_attention(q, k, v, None, 2, 7, 3)
    node = out.grad_fn
    assert node is not None
    saved = [each for each in node.saved_tensors if each is not None]
    assert {each.data_ptr() for each in saved} == {each.data_ptr() for each in (q, k, v)}
    assert {each.untyped_storage().data_ptr() for each in saved} == {fused.data_ptr()}


def test_the_ffn_keeps_its_statistics_and_not_the_running_ones() -> None:
    args = asking(ffn_args((2, 5, 6, 16)))
    y, mean, var = outputs_of(OPERATORS["ladder_ffn"].overload(*args.values()))
    node: Any = y.grad_fn
    saved = {each.data_ptr() for each in node.saved_tensors if each is not None}
    assert {mean.data_ptr(), var.data_ptr()} <= saved
    assert args["running_mean"].data_ptr() not in saved
    assert args["running_var"].data_ptr() not in saved


def test_no_map_is_copied() -> None:
    run = subprocess.run(
        [sys.executable, str(HERE / "ladder_peak_memory.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 7
    beyond = [line for line in lines if int(line[1]) > int(line[2])]
    assert not beyond, run.stdout
