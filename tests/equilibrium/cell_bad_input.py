"""Calls of `equilibrium_cell` and its backward that must raise, and in which words."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

N, R = 3, 4


@dataclasses.dataclass(frozen=True)
class BadCall:
    """An operator, good arguments with some replaced, and what they must raise."""

    op: str
    changes: dict[str, Any]
    message: str

    def args(self) -> tuple[Any, ...]:
        return tuple({**good(self.op), **self.changes}.values())

    def __str__(self) -> str:
        return f"{self.op}: {self.message}"


def good(op: str) -> dict[str, Any]:
    cell = {"a": torch.zeros(R, R), "c": torch.ones(N, R)}
    if op == "equilibrium_cell":
        options = {"activation": "tanh", "solver": "anderson", "atol": 0.0, "rtol": 1e-4}
        return {**cell, "x0": torch.ones(N, R), **options, "max_iter": 5}
    rest = {"x": torch.ones(N, R), "residual": torch.zeros(N), "activation": "tanh"}
    return {"grad_x": torch.ones(N, R), **cell, **rest}


F = "float32, bfloat16, float16, float64"
ACTS = "tanh, relu, gelu, silu, sigmoid, leaky_relu"
CELL = (
    ({"a": torch.zeros(R)}, "a has 1 axes; expected 2: [r, r]"),
    ({"a": torch.zeros(R, R).long()}, f"a has dtype int64; allowed: {F}"),
    ({"a": torch.zeros(0, 0)}, "r is 0; allowed: 1 to 256"),
    ({"a": torch.zeros(257, 257)}, "r is 257; allowed: 1 to 256"),
    ({"a": torch.zeros(R, 5)}, "a has r = 5; expected 4 (a is square)"),
    ({"c": torch.ones(N, R, 1)}, "c has 3 axes; expected 2: [N, r]"),
    ({"c": torch.ones(N, R).double()}, "c has dtype float64; allowed: float32 (as a)"),
    ({"c": torch.ones(N, 5)}, "c has r = 5; expected 4 (as a)"),
    ({"activation": "softplus"}, f"activation is 'softplus'; allowed: {ACTS}"),
)
FORWARD = (
    ({"x0": torch.ones(N)}, "x0 has 1 axes; expected 2: [N, r]"),
    ({"x0": torch.ones(N, R).half()}, "x0 has dtype float16; allowed: float32 (as a)"),
    ({"x0": torch.ones(N, 3)}, "x0 has r = 3; expected 4 (as a)"),
    ({"x0": torch.ones(2, R)}, "x0 has N = 2; expected 3 (as c)"),
    ({"solver": "broyden"}, "solver is 'broyden'; allowed: fixed_point, anderson, newton"),
    ({"atol": -1.0}, "atol is -1; allowed: 0 or more, finite"),
    ({"atol": float("inf")}, "atol is inf; allowed: 0 or more, finite"),
    ({"rtol": -2.5e-7}, "rtol is -2.5e-07; allowed: 0 or more, finite"),
    ({"rtol": float("nan")}, "rtol is nan; allowed: 0 or more, finite"),
    ({"max_iter": 0}, "max_iter is 0; allowed: 1 to 2147483647"),
    ({"max_iter": 2**31}, "max_iter is 2147483648; allowed: 1 to 2147483647"),
)
BACKWARD = (
    ({"grad_x": torch.ones(N)}, "grad_x has 1 axes; expected 2: [N, r]"),
    ({"grad_x": torch.ones(N, R).half()}, "grad_x has dtype float16; allowed: float32 (as a)"),
    ({"grad_x": torch.ones(N, 3)}, "grad_x has r = 3; expected 4 (as a)"),
    ({"grad_x": torch.ones(4, R)}, "grad_x has N = 4; expected 3 (as c)"),
    ({"x": torch.ones(4, R)}, "x has N = 4; expected 3 (as c)"),
    ({"x": torch.ones(N, 5)}, "x has r = 5; expected 4 (as a)"),
    ({"residual": torch.ones(N, 1)}, "residual has 2 axes; expected 1: [N]"),
    ({"residual": torch.ones(N).double()}, "residual has dtype float64; allowed: float32 (wide)"),
    ({"residual": torch.ones(5)}, "residual has N = 5; expected 3 (as c)"),
)
BAD_CALLS = [
    BadCall(op, changes, f"{op}: {message}")
    for op, rows in (
        ("equilibrium_cell", (*CELL, *FORWARD)),
        ("equilibrium_cell_backward", (*CELL, *BACKWARD)),
    )
    for changes, message in rows
]
