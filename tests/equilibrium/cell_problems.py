"""Cells for the tests of `equilibrium_cell`, and its plain composition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppmoe_ops._backends import choices
from ppmoe_ops._library import OPERATORS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}
SOLVERS = ("fixed_point", "anderson", "newton")
NEWTON_OR_MIXING = ("anderson", "newton")

FORWARD = OPERATORS["equilibrium_cell"]
BACKWARD = OPERATORS["equilibrium_cell_backward"]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cell(
    rows: int, r: int, norm: float = 0.7, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """a with the 2-norm `norm`, and c."""
    draw = torch.Generator().manual_seed(100 * r + rows + seed)
    a = torch.randn(r, r, generator=draw, dtype=torch.float64)
    a = a * (norm / torch.linalg.matrix_norm(a, 2))
    c = 0.7 * torch.randn(rows, r, generator=draw, dtype=torch.float64)
    return a.to(dtype), c.to(dtype)


def plain(a: Tensor, c: Tensor, activation: str = "tanh", steps: int = 200) -> Tensor:
    """Plain iteration from zero."""
    x = torch.zeros_like(c)
    for _ in range(steps):
        x = ACTIVATIONS[activation](x @ a.T + c)
    return x


def image(a: Tensor, c: Tensor, x: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](x @ a.T + c)


def solve(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = FORWARD.overload(*args, **options)
    return found


def compiled() -> bool:
    """Whether the kernels serve here, and not the reference."""
    return choices()[FORWARD.name]["cpu"].backend == "cpp"


def same(one: Tensor, other: Tensor) -> bool:
    """The same bits from a kernel; the reference's products may sum in another order."""
    if compiled() or not one.is_floating_point():
        return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    near = 1e-3 if one.dtype in (torch.float32, torch.float64) else 0.05
    return torch.allclose(one, other, rtol=near, atol=near, equal_nan=True)


def assert_same(came: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(came, wanted, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert same(one, other)
