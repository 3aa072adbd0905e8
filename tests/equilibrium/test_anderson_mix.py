"""`anderson_mix` against its reference, against least squares, and step by step."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mix_problems import NAMES, contraction, elementwise, exchanged, plain_anderson, start
from torch import Tensor

import ppmoe_ops
from ppmoe_ops._library import OPERATORS
from ppmoe_ops.ops.equilibrium.anderson_mix import BEST_AT, HELD, STATUS, STEPS

pytestmark = pytest.mark.kernel
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda each: str(each).split(".")[1])
OP = OPERATORS["anderson_mix"]


def mix(f: Tensor, state: list[Tensor], **options: Any) -> int:
    return int(OP.overload(f, *state, **{"rtol": 0.0, **options}))


def assert_same_bits(came: list[Tensor], wanted: list[Tensor]) -> None:
    for name, one, two in zip(NAMES, came, wanted, strict=True):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0)), name


@DTYPE
@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize(
    ("samples", "width", "history"),
    [(3, 20, 3), (2, 37, 1), (2, 33, 0), (1, 9001, 2), (2, 60, 16), (5, 1, 1)],
)
def test_a_step_is_the_reference_step(
    samples: int, width: int, history: int, damping: float, dtype: torch.dtype
) -> None:
    function = elementwise(samples, width, torch.float32 if dtype.itemsize == 2 else dtype)
    state = start(torch.zeros(samples, width, dtype=dtype), history)
    wide = state[4].dtype
    bound = {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 4 * torch.finfo(dtype).eps)
    for step in range(history + 4):
        f = function(state[0].to(wide)).to(dtype)
        mine, plain = ([each.clone() for each in state] for _ in range(2))
        options = {"damping": damping, "last": step == history + 3}
        running = mix(f, mine, **options)
        assert int(OP.reference(f, *plain, **{"rtol": 0.0, **options})) == running
        assert torch.equal(mine[8], plain[8])
        for name, one, two in zip(NAMES[:-1], mine, plain, strict=False):
            limit = bound * max(1.0, two.abs().max().item()) if two.numel() else 0
            assert (one - two).abs().max() <= limit if two.numel() else True, (name, step)
        for at in (2, 3):
            assert torch.equal(mine[at], plain[at]), NAMES[at]
        state = exchanged(mine)
        if running == 0:
            break


@pytest.mark.parametrize("damping", [1.0, 0.7])
@pytest.mark.parametrize("history", [1, 2, 5])
def test_points_are_those_of_least_squares(history: int, damping: float) -> None:
    function = contraction(3, 40, dtype=torch.float64)
    state = start(torch.zeros(3, 40, dtype=torch.float64), history)
    wanted = [
        plain_anderson(
            lambda z, at=at: function(z[None], torch.tensor([at]))[0],  # type: ignore[misc]
            torch.zeros(40, dtype=torch.float64), history, 9, damping,
        )
        for at in range(3)
    ]  # fmt: skip
    for step in range(9):
        assert mix(function(state[0]), state, damping=damping) == 3
        state = exchanged(state)
        for at in range(3):
            error = (state[0][at] - wanted[at][step + 1]).norm()
            assert error <= 1e-7 * wanted[at][step + 1].norm(), (step, at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("samples", "width"), [(3, 20000), (7, 300), (1, 70001)])
def test_bits_do_not_depend_on_threads_or_on_the_batch(
    samples: int, width: int, dtype: torch.dtype
) -> None:
    function = elementwise(samples, width, dtype)

    def run(rows: slice, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        index = torch.arange(samples)[rows]
        state = start(torch.zeros(len(index), width, dtype=dtype), 3)
        for _ in range(6):
            mix(function(state[0], index), state)
            state = exchanged(state)
        return state

    whole = run(slice(None), 1)
    for threads in (2, 3):
        assert_same_bits(run(slice(None), threads), whole)
    for at in range(samples):
        alone = run(slice(at, at + 1), 2)
        assert_same_bits(alone, [each[at : at + 1] for each in whole])


def test_rows_are_the_samples_that_f_was_given() -> None:
    function = elementwise(5, 30)
    state = start(torch.zeros(5, 30), 2)
    for _ in range(3):
        mix(function(state[0]), state)
        state = exchanged(state)
    whole, some = ([each.clone() for each in state] for _ in range(2))
    rows = torch.tensor([1, 2, 4])
    mix(function(whole[0]), whole)
    wider = torch.full((3, 61), torch.nan)[:, ::2]  # strides of its own
    wider[:, :30] = function(some[0][rows], rows)
    assert mix(wider[:, :30], some, rows=rows) == 5
    for name, before, one, two in zip(NAMES, state, some, whole, strict=True):
        assert torch.equal(one[rows], two[rows]), name
        assert torch.equal(one[[0, 3]], before[[0, 3]]), name


def test_a_sample_that_is_done_is_left_alone() -> None:
    state = start(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 2)
    f = torch.tensor([[1.0, 2.0], [torch.nan, 4.0], [6.0, 7.0]])
    assert mix(f, state) == 1
    assert state[8][:, STATUS].tolist() == [1, 2, 0]
    assert state[2][0].tolist() == state[3][0].tolist() == state[1][0].tolist() == [1.0, 2.0]
    before = [each.clone() for each in state]
    assert mix(torch.full((3, 2), 9.0), state) == 1
    assert_same_bits([each[:2] for each in state], [each[:2] for each in before])
    assert state[8][:, STEPS].tolist() == [1, 1, 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 3), st.booleans())
def test_the_best_point_is_the_first_with_the_smallest_residual(
    residuals: list[int], history: int, diverges: bool
) -> None:
    # f is made up so that the residuals are these, whatever point comes.
    state = start(torch.full((1, 2), 100.0), history)
    points, values = [], []
    for step, size in enumerate(residuals):
        last = step + 1 == len(residuals)
        points.append(state[0].clone())
        values.append(state[0] + torch.tensor([[0.0, float(size)]]))
        if last and diverges and step:
            values[-1] = torch.full((1, 2), torch.inf)
        mix(values[-1], state, last=last)
        state = exchanged(state)
    seen = residuals[:-1] if diverges and len(residuals) > 1 else residuals
    at = min(range(len(seen)), key=lambda each: seen[each])
    assert torch.equal(state[2], points[at])
    assert torch.equal(state[3], values[at])
    assert state[8][0, BEST_AT] == at + 1
    assert state[8][0, STEPS] == len(residuals)
    # Both buffers hold it, whichever f is given from now on.
    assert torch.equal(state[0], state[2])
    assert torch.equal(state[1], state[2])
    wanted = math.inf if len(seen) < len(residuals) else min(seen)
    assert state[7][0, 1] == pytest.approx(wanted, rel=1e-5)


def test_a_mixed_step_that_raised_the_residual_drops_the_history() -> None:
    state = start(torch.zeros(1, 3), 3)
    held = []
    for size in (4.0, 2.0, 1.0, 3.0, 3.5, 2.0):
        f = state[0] + size * torch.eye(3)[len(held) % 3]
        mix(f, state)
        held.append(int(state[8][0, HELD]))
        if held[-1] == 0:
            assert torch.equal(state[1], f)
        state = exchanged(state)
    # The plain step after a restart is no mixed one: the next pair is kept though it is worse.
    assert held == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("f", "status"),
    [(1.0, 1), (1.5, 0), (torch.nan, 2), (torch.inf, 2), (3e4, 0)],
)
def test_status_of_the_first_step(f: float, status: int) -> None:
    state = start(torch.ones(1, 4), 2)
    mix(torch.full((1, 4), f), state, rtol=1e-3)
    assert state[8][0, STATUS] == status


def test_divergence_is_told_by_the_first_step() -> None:
    for factor, status in ((0.9e4, 0), (1.1e4, 2)):
        state = start(torch.ones(1, 1), 0)
        mix(torch.full((1, 1), 2.0), state)
        state = exchanged(state)
        mix(state[0] + 3 * factor, state)
        assert state[8][0, STATUS] == status
        assert (state[7][0, 1] == math.inf) == (status == 2)


@pytest.mark.parametrize(("atol", "rtol", "done"), [
    (0.31, 0.0, 1), (0.29, 0.0, 0), (0.0, 0.031, 1), (0.0, 0.029, 0), (0.16, 0.016, 1),
    (0.15, 0.014, 0),
])  # fmt: skip
def test_both_tolerances(atol: float, rtol: float, done: int) -> None:
    state = start(torch.full((1, 1), 9.7), 2)
    mix(torch.full((1, 1), 10.0), state, atol=atol, rtol=rtol)
    assert state[8][0, STATUS] == done


def test_powers_of_two_do_not_change_a_decision() -> None:
    function = contraction(4, 50)
    results = []
    for scale in (1.0, 2.0**-20, 2.0**20):
        state = start(torch.zeros(4, 50), 4)
        for _ in range(12):
            mix(function(state[0] / scale) * scale, state, rtol=1e-4)
            state = exchanged(state)
        results.append((state[8], state[2] / scale))
    for counters, best in results[1:]:
        assert torch.equal(counters, results[0][0])
        assert torch.equal(best, results[0][1])


def test_degenerate_differences_are_left_out() -> None:
    # f = z + 1 has no fixed point: g never changes, so every difference of g is zero.
    state = start(torch.zeros(1, 3), 3)
    for step in range(6):
        assert torch.equal(state[0], torch.full((1, 3), float(step)))
        mix(state[0] + 1, state)
        state = exchanged(state)
    assert state[8][0, STATUS] == 0


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    state = start(torch.zeros(shape), 2)
    assert mix(torch.zeros(shape), state) == 0
    assert state[8][:, STATUS].tolist() == [1] * shape[0]


def test_opcheck() -> None:
    for args, options in list(OP.samples(torch.device("cpu"), torch.float32))[:3]:
        torch.library.opcheck(OP.overload, args, options)


def test_bytes_are_those_of_two_passes() -> None:
    state = start(torch.zeros(2, 10000), 6)
    args = (torch.zeros(2, 10000), *state)
    states = OP.nbytes(*args) / (2 * 10000 * 4)
    assert 2 * 6 + 5 <= states <= 2 * 6 + 5.1
    assert OP.flops(*args) == 2 * 10000 * (7 + 6 * 6)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "f axes": ({"f": torch.zeros(3)}, "f has 1 axes; expected 2: [A, d]"),
    "f dtype": ({"f": torch.zeros(2, 4, dtype=torch.int32)}, "f has dtype int32; allowed: float32"),
    "f rows": ({"f": torch.zeros(3, 4)}, "f has A = 3; expected 2 (as B of z, without rows)"),
    "z size": ({"z": torch.zeros(2, 5)}, "z has d = 5; expected 4 (as f)"),
    "z dtype": ({"z": torch.zeros(2, 4).half()}, "z has dtype float16; allowed: float32 (as f)"),
    "z_next": ({"z_next": torch.zeros(1, 4)}, "z_next has B = 1; expected 2 (as z)"),
    "best_z": ({"best_z": torch.zeros(4, 2).T}, "best_z is not contiguous"),
    "df rows": (
        {"df": torch.zeros(2, 18, 4)},
        "the number of rows R of df is 18; allowed: 1 to 17",
    ),
    "df dtype": ({"df": torch.zeros(2, 3, 4).double()}, "df has dtype float64; allowed: float32"),
    "dg rows": ({"dg": torch.zeros(2, 2, 4)}, "dg has R = 2; expected 3 (as df)"),
    "gram": ({"gram": torch.zeros(2, 3, 3)}, "gram has dtype float32; allowed: float64"),
    "values": ({"values": torch.zeros(2, 4).double()}, "values has N = 4; expected 3"),
    "counters": (
        {"counters": torch.zeros(2, 5).long()},
        "counters has dtype int64; allowed: int32",
    ),
    "rows dtype": ({"rows": torch.zeros(2).int()}, "rows has dtype int32; allowed: int64"),
    "rows size": ({"rows": torch.zeros(1).long()}, "rows has A = 1; expected 2 (as f)"),
    "rows order": ({"rows": torch.tensor([1, 1])}, "rows holds 1 after 1; allowed: rising rows"),
    "atol": ({"atol": -1.0}, "atol is -1; allowed: 0 or more, finite"),
    "rtol": ({"rtol": math.inf}, "rtol is inf; allowed: 0 or more, finite"),
    "damping": ({"damping": 0.0}, "damping is 0; allowed: above 0, at most 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    wrong, words = BAD[case]
    args = dict(zip(("f", *NAMES), (torch.zeros(2, 4), *start(torch.zeros(2, 4), 2)), strict=True))
    callers = [OP.overload, OP.reference, ppmoe_ops.anderson_mix]
    if case != "rows order":
        callers.append(OP.fake)
    for caller in callers:
        with pytest.raises(ValueError, match=re.escape(f"anderson_mix: {words}")):
            caller(**{**args, **wrong})


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_is_not_there(row: int) -> None:
    args = (torch.zeros(1, 4), *start(torch.zeros(2, 4), 2), torch.tensor([row]))
    for caller in (OP.overload, OP.reference):
        with pytest.raises(IndexError, match=f"anderson_mix: rows holds {row}; allowed: 0 to 1"):
            caller(*args)
