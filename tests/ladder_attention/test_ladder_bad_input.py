"""Bad arguments raise the same from kernel, reference and fake, before memory is touched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ladder_bad_input import BAD_CALLS, GOOD, BadCall
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ppmoe_ops._library import OPERATORS

pytestmark = pytest.mark.kernel
HERE = Path(__file__).resolve().parent
FAMILY = {op.name for op in OPERATORS.values() if op.family == "ladder_attention"}


def on_fake_tensors(name: str, args: tuple[Any, ...]) -> Any:
    with FakeTensorMode() as mode:

        def fake(value: Any) -> Any:
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                return [fake(each) for each in value]
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        return OPERATORS[name].overload(*(fake(each) for each in args))


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for each in args:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, list):
            found += [tensor for tensor in each if isinstance(tensor, Tensor)]
    return found


@pytest.mark.parametrize("row", BAD_CALLS, ids=str)
def test_kernel_reference_and_fake_refuse_in_the_same_words(row: BadCall) -> None:
    args = row.args()
    before = [each.clone() for each in tensors_of(args)]
    with pytest.raises(row.error, match=re.escape(row.message)) as kernel:
        OPERATORS[row.op].overload(*args)
    with pytest.raises(row.error) as reference:
        OPERATORS[row.op].reference(*args)
    with pytest.raises(row.error) as fake:
        on_fake_tensors(row.op, args)
    assert type(kernel.value) is type(reference.value) is type(fake.value) is row.error
    assert str(kernel.value) == str(reference.value) == str(fake.value)
    for one, other in zip(before, tensors_of(args), strict=True):
        assert torch.equal(one, other)


def test_the_table_has_every_operator_and_its_good_arguments_are_good() -> None:
    assert {row.op for row in BAD_CALLS} == FAMILY == set(GOOD)
    for name, good in GOOD.items():
        args = tuple(good().values())
        assert list(good()) == [each.name for each in OPERATORS[name].overload._schema.arguments]
        OPERATORS[name].overload(*args)
        OPERATORS[name].reference(*args)
        on_fake_tensors(name, args)


def test_every_argument_that_can_be_wrong_is_in_the_table() -> None:
    free = {"scale", "eps", "training", "need_bias", "need_maps", "need_parameters"}
    for name, good in GOOD.items():
        changed = {each for row in BAD_CALLS if row.op == name for each in row.changes}
        assert set(good()) - changed - free == set(), name


def test_no_floating_point_memory_is_touched_before_an_error() -> None:
    """Every call again with floating-point arguments in memory that cannot be read or written."""
    run = subprocess.run(
        [sys.executable, str(HERE / "ladder_protected.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"exit {run.returncode} after:\n{run.stdout[-600:]}{run.stderr}"
    assert run.stdout.splitlines()[-1] == f"{len(BAD_CALLS)} calls refused"


def _changed(value: Any, draw: st.DrawFn) -> Any:
    """One argument made wrong in a drawn way, or only different."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from([-1, 0, 1, 2, 3, 4, 6, 2**31]))
    if isinstance(value, list) and isinstance(value[0], Tensor):
        at = draw(st.integers(0, len(value) - 1))
        return [_changed(each, draw) if index == at else each for index, each in enumerate(value)]
    if isinstance(value, list):
        sides = st.sampled_from([-3, -2, -1, 0, 1, 2, 3, 4, 7, 2**15])
        return draw(st.lists(sides, min_size=1, max_size=3))
    if not isinstance(value, Tensor):
        return value
    how = draw(st.sampled_from(["dtype", "narrower", "shorter", "flat", "deeper", "empty", "none"]))
    if how == "dtype":
        kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32]
        return value.to(draw(st.sampled_from([*kinds, torch.bool, torch.int64])))
    if how == "flat":
        return value.flatten()
    if how == "deeper":
        return value.unsqueeze(0)
    if how == "none" or value.dim() == 0:
        return value
    axis = 0 if how in ("shorter", "empty") else -1
    return value.narrow(axis, 0, 0 if how == "empty" else max(value.size(axis) - 1, 0))


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, tuple[Any, ...]]:
    name = draw(st.sampled_from(sorted(FAMILY)))
    good = GOOD[name]()
    wrong = draw(st.sets(st.sampled_from(sorted(good)), min_size=1, max_size=3))
    args = {key: _changed(value, draw) if key in wrong else value for key, value in good.items()}
    for optional in ("v", "bias_table", "row_scale", "running_mean"):
        types = {each.name: str(each.type) for each in OPERATORS[name].overload._schema.arguments}
        if types.get(optional, "").startswith("Optional") and draw(st.integers(0, 7)) == 0:
            args[optional] = None
    return name, tuple(args.values())


def outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What a call raised, or the shapes and dtypes of its results."""
    try:
        result = function(*args)
    except (ValueError, IndexError) as error:
        return type(error), str(error)
    results = [result] if isinstance(result, Tensor) else result
    return [(tuple(each.shape), each.dtype) for each in results]


@given(calls())
@settings(
    deadline=None,
    max_examples=6000 if os.environ.get("PPMOE_OPS_FULL") == "1" else 500,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_several_errors_at_once_are_found_in_the_same_order(drawn: tuple[str, Any]) -> None:
    name, args = drawn
    kernel = outcome(OPERATORS[name].overload, args)
    assert outcome(OPERATORS[name].reference, args) == kernel
    assert outcome(lambda *args: on_fake_tensors(name, args), args) == kernel
