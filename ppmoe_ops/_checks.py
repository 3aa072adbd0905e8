"""Argument errors, in the words that the compiled kernels use too (`csrc/include/ppmoe/check.h`).

Every message names the operator, the argument, what came and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int32, torch.int64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dim(op: str, argument: str, tensor: torch.Tensor, axes: str) -> None:
    """Raise unless `tensor` has as many axes as `axes` names (`"T, E"`)."""
    expected = axes.count(",") + 1
    if tensor.dim() != expected:
        raise ValueError(f"{op}: {argument} has {tensor.dim()} axes; expected {expected}: [{axes}]")


def size(op: str, argument: str, axis: str, came: int, allowed: int, why: str) -> None:
    """Raise unless the axis of `argument` that is called `axis` has `allowed` elements."""
    if came != allowed:
        raise ValueError(f"{op}: {argument} has {axis} = {came}; expected {allowed} ({why})")


def dtype(
    op: str, argument: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype], why: str = ""
) -> None:
    """Raise unless the dtype of `tensor` is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = ", ".join(_name(each) for each in allowed)
        reason = f" ({why})" if why else ""
        raise ValueError(
            f"{op}: {argument} has dtype {_name(tensor.dtype)}; allowed: {names}{reason}"
        )


def result_dtype(op: str, came: torch.dtype, allowed: Sequence[torch.dtype], why: str) -> None:
    """Raise unless the dtype asked for the result is one of `allowed`."""
    if came not in allowed:
        names = ", ".join(_name(each) for each in allowed)
        raise ValueError(f"{op}: the result has dtype {_name(came)}; allowed: {names} ({why})")


def between(op: str, argument: str, came: int, low: int, high: int, why: str = "") -> None:
    """Raise unless low <= came <= high."""
    if not low <= came <= high:
        reason = f" ({why})" if why else ""
        raise ValueError(f"{op}: {argument} is {came}; allowed: {low} to {high}{reason}")


def choice(op: str, argument: str, came: str, allowed: Sequence[str]) -> None:
    """Raise unless `came` is one of `allowed`."""
    if came not in allowed:
        raise ValueError(f"{op}: {argument} is '{came}'; allowed: {', '.join(allowed)}")


def tolerance(op: str, argument: str, came: float) -> None:
    """Raise unless `came` is finite and at least 0."""
    if not 0 <= came < math.inf:
        raise ValueError(f"{op}: {argument} is {came:g}; allowed: 0 or more, finite")
