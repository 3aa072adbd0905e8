"""What the interpret tier shares: launchers by operator, counted launches, guarded memory."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import assert_error_rule, cast_sample

FAMILY = str(Path(__file__).resolve().parents[1] / "expert_slice")
if FAMILY not in sys.path:
    sys.path.append(FAMILY)

import slicing as slicing  # noqa: E402
from bad_input import BAD_CALLS, BadCall  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GUARD = 4096


def call(name: str, args: Sequence[Any], options: dict[str, Any] | None = None) -> Any:
    """The launcher that the operator's contract names."""
    module, function = str(OPERATORS[name].triton).split(":")
    return getattr(importlib.import_module(module), function)(*args, **(options or {}))


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def check(name: str, args: Sequence[Any], factor: float | None = None) -> tuple[Tensor, ...]:
    """A launcher against the reference: integers exactly, the others by the error rule."""
    args = tuple(each.detach() if isinstance(each, Tensor) else each for each in args)
    factor = factor or (3.0 if name.endswith("_backward") else 2.0)
    got = outputs(call(name, args))
    plain = outputs(OPERATORS[name].reference(*args))
    exact = outputs(OPERATORS[name].reference(*cast_sample(args, torch.float64)))
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        if ours.is_floating_point():
            assert_error_rule(ours, theirs, truth, factor, name)
        else:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), name
    return got


def kernels_of(module: ModuleType) -> dict[str, Any]:
    return {name: each for name, each in vars(module).items() if name.endswith("_kernel")}


@contextlib.contextmanager
def counted(module: ModuleType) -> Iterator[list[str]]:
    """Names of the module's kernels in the order of their launches."""
    names: list[str] = []
    hooks = []
    for name, kernel in kernels_of(module).items():
        hooks.append((kernel, lambda *_, _name=name, **__: names.append(_name.strip("_"))))
        kernel.add_pre_run_hook(hooks[-1][1])
    try:
        yield names
    finally:
        for kernel, hook in hooks:
            kernel.pre_run_hooks.remove(hook)


def turn_programs_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last program of every launch run first."""
    from triton.runtime.interpreter import interpreter_builder

    forwards = interpreter_builder.set_grid_idx

    def backwards(x: int, y: int, z: int) -> None:
        forwards(interpreter_builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)


class Guarded:
    """Tensors between guards: the interpreter reads and writes real memory."""

    def __init__(self) -> None:
        self.arenas: list[Tensor] = []

    def of(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in an arena of sevens."""
        arena = torch.full((tensor.numel() + 2 * GUARD,), 7, dtype=tensor.dtype)
        self.arenas.append(arena)
        inside = arena[GUARD:-GUARD].view(tensor.shape)
        return inside.copy_(tensor)

    def check(self) -> None:
        for arena in self.arenas:
            assert bool((arena[:GUARD] == 7).all())
            assert bool((arena[-GUARD:] == 7).all())


def bad_calls(*names: str) -> list[BadCall]:
    """The rows of the family's table that need no synchronising check."""
    return [row for row in BAD_CALLS if row.op in names and row.by_shape]


def bad_values(*names: str) -> list[BadCall]:
    """Those that only the synchronising check finds."""
    return [row for row in BAD_CALLS if row.op in names and not row.by_shape]


def refuses(row: BadCall) -> None:
    """The launcher refuses in the words of the reference."""
    with pytest.raises(row.error) as expected:
        OPERATORS[row.op].reference(*row.args())
    with pytest.raises(row.error) as got:
        call(row.op, row.args())
    assert type(got.value) is type(expected.value)
    assert str(got.value) == str(expected.value)
    assert row.message in str(got.value)
