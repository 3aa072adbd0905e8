"""Cells of `equilibrium_conv_cell` with a known contraction, and f in plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ppmoe_ops._library import OPERATORS

OP = OPERATORS["equilibrium_conv_cell"]
BACKWARD = OPERATORS["equilibrium_conv_cell_backward"]
NAMES = ("u", "w_u", "w1", "b1", "w2", "b2", "w3", "b3")
ACTIVATIONS = ("tanh", "relu", "gelu", "silu", "sigmoid", "leaky_relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMOOTH = ("tanh", "gelu", "silu", "sigmoid")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cell(
    sizes: tuple[int, int, int, int],
    hidden: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    gain: float = 0.8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """u and parameters; `gain` bounds the product of the layers' norms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def of_norm(weight: Tensor, norm: float) -> Tensor:
        matrix = weight.flatten(1)
        return weight * (norm / torch.linalg.matrix_norm(matrix, 2)).item()

    w2 = of_norm(normal(hidden, hidden, 3, 3), gain)
    args = {
        "u": normal(*sizes), "w_u": of_norm(normal(hidden, sizes[1]), 1.0),
        "w1": of_norm(normal(hidden, channels), 1.0), "b1": 0.3 * normal(hidden), "w2": w2,
        "b2": 0.3 * normal(hidden), "w3": of_norm(normal(channels, hidden), 1.0),
        "b3": 0.3 * normal(channels),
    }  # fmt: skip
    return {name: value.to(dtype) for name, value in args.items()}


def plain_f(z: Tensor, activation: str, **args: Tensor) -> Tensor:
    """f by torch's convolutions, in the dtype that comes."""
    act = getattr(F, activation) if activation not in ("tanh", "sigmoid") else None
    act = act or getattr(torch, activation)

    def pointwise(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, args[name][:, :, None, None])

    def column(name: str) -> Tensor:
        return args[name][:, None, None]

    hidden = act(pointwise(z, "w1") + pointwise(args["u"], "w_u") + column("b1"))
    hidden = act(F.conv2d(hidden, args["w2"], padding=1) + column("b2"))
    return pointwise(hidden, "w3") + column("b3")


def unrolled(args: dict[str, Tensor], activation: str, steps: int = 400) -> Tensor:
    """The fixed point by plain iteration, through which autograd goes."""
    batch, _, height, width = args["u"].shape
    z = args["u"].new_zeros(batch, args["w1"].size(1), height, width)
    for _ in range(steps):
        z = plain_f(z, activation, **args)
    return z


def solve(args: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = OP.overload(*args.values(), **options)
    return result


def norm(x: Tensor) -> Tensor:
    return x.double().flatten(1).norm(dim=1)


def same_bits(came: Tensor, wanted: Tensor) -> bool:
    return torch.equal(came.isnan(), wanted.isnan()) and torch.equal(
        came.nan_to_num(math.pi), wanted.nan_to_num(math.pi)
    )
