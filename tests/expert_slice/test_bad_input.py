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
from bad_input import BAD_CALLS, GOOD, BadCall
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ppmoe_ops._library import OPERATORS

pytestmark = pytest.mark.kernel
HERE = Path(__file__).resolve().parent

FAMILY = {name: op for name, op in OPERATORS.items() if op.family == "expert_slice"}


def reference_of(name: str) -> Callable[..., Any]:
    """A composite's own reference would call the kernel."""
    if name == "expert_ffn":
        return lambda *args: OPERATORS["expert_ffn_forward"].reference(*args, False)[0]
    forward = f"{name}_forward" if OPERATORS[name].composite else name
    return OPERATORS[forward].reference


def on_fake_tensors(name: str, args: tuple[Any, ...]) -> Any:
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in args]
        return OPERATORS[name].overload(*fake)


@pytest.mark.parametrize("row", BAD_CALLS, ids=str)
def test_kernel_and_reference_refuse_in_the_same_words(row: BadCall) -> None:
    with pytest.raises(row.error, match=re.escape(row.message)) as kernel:
        OPERATORS[row.op].overload(*row.args())
    with pytest.raises(row.error, match=re.escape(row.message)) as reference:
        reference_of(row.op)(*row.args())
    assert type(kernel.value) is type(reference.value) is row.error
    assert str(kernel.value) == str(reference.value)
    base = row.op.removesuffix("_forward")
    assert str(kernel.value).startswith(f"{base}: ")


@pytest.mark.parametrize("row", BAD_CALLS, ids=str)
def test_fake_refuses_what_shapes_show(row: BadCall) -> None:
    if row.by_shape:
        with pytest.raises(row.error) as kernel:
            OPERATORS[row.op].overload(*row.args())
        with pytest.raises(row.error) as fake:
            on_fake_tensors(row.op, row.args())
        assert str(fake.value) == str(kernel.value)
    else:
        on_fake_tensors(row.op, row.args())


def test_the_table_has_every_operator_and_its_good_arguments_are_good() -> None:
    assert {row.op for row in BAD_CALLS} == set(FAMILY) == set(GOOD)
    for name, good in GOOD.items():
        args = tuple(good().values())
        assert list(good()) == [each.name for each in OPERATORS[name].overload._schema.arguments]
        OPERATORS[name].overload(*args)
        reference_of(name)(*args)
        on_fake_tensors(name, args)


def test_no_floating_point_memory_is_touched_before_an_error() -> None:
    """Every call again with floating-point arguments in memory that cannot be read or written."""
    run = subprocess.run(
        [sys.executable, str(HERE / "protected.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"exit {run.returncode} after:\n{run.stdout[-600:]}{run.stderr}"
    assert run.stdout.splitlines()[-1] == f"{len(BAD_CALLS)} calls refused"


def test_inputs_are_left_alone_by_a_refused_call() -> None:
    for row in BAD_CALLS:
        args = row.args()
        kept = [each.clone() if isinstance(each, Tensor) and each.numel() < 1000 else None
                for each in args]  # fmt: skip
        with pytest.raises(row.error):
            OPERATORS[row.op].overload(*args)
        for before, after in zip(kept, args, strict=True):
            assert before is None or torch.equal(before, after)


def _changed(value: Any, draw: st.DrawFn) -> Any:
    """One argument made wrong in a drawn way, or only different."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from([-1, 0, 1, 2, 3, 8, 9, 2**31 - 1, 2**31]))
    if isinstance(value, torch.dtype):
        return draw(st.sampled_from([torch.float64, torch.bfloat16, torch.int32]))
    if isinstance(value, str):
        return draw(st.sampled_from(["softmax", "sigmoid", "Softmax", "relu", "swiglu"]))
    if not isinstance(value, Tensor):
        return value
    how = draw(
        st.sampled_from(["dtype", "narrower", "shorter", "flat", "deeper", "empty", "values"])
    )
    if how == "dtype":
        kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32]
        return value.to(draw(st.sampled_from([*kinds, torch.int64, torch.bool, torch.int16])))
    if how == "values" and not value.is_floating_point():
        return value + draw(st.sampled_from([-1, 1, 5]))
    if how == "flat":
        return value.flatten()
    if how == "deeper":
        return value.unsqueeze(0)
    if value.dim() == 0:
        return value
    axis = 0 if how in ("shorter", "empty") else -1
    return value.narrow(axis, 0, 0 if how == "empty" else max(value.size(axis) - 1, 0))


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, tuple[Any, ...]]:
    name = draw(st.sampled_from([op.name for op in FAMILY.values() if not op.composite]))
    good = GOOD[name]()
    wrong = draw(st.sets(st.sampled_from(sorted(good)), min_size=1, max_size=3))
    args = {key: _changed(value, draw) if key in wrong else value for key, value in good.items()}
    for name_of_size in ("num_local", "num_experts"):
        # As many experts are allowed, and then ask for that much memory.
        if args.get(name_of_size, 0) >= 2**31 - 1:
            args[name_of_size] = -(2**31)
    if args.get("top_k", 0) == 2**31 - 1:
        args["top_k"] = 2**31  # the reference of an empty call would take that many steps
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
    max_examples=6000 if os.environ.get("PPMOE_OPS_FULL") == "1" else 600,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_several_errors_at_once_are_found_in_the_same_order(drawn: tuple[str, Any]) -> None:
    name, args = drawn
    kernel = outcome(OPERATORS[name].overload, args)
    assert outcome(reference_of(name), args) == kernel
    if not (isinstance(kernel, tuple) and re.search(r" holds ", kernel[1])):
        assert outcome(lambda *args: on_fake_tensors(name, args), args) == kernel
