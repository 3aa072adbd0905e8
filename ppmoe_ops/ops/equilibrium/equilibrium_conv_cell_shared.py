"""What `equilibrium_conv_cell` and its backward share: checks, samples, counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops.ops.equilibrium.equilibrium_conv_cell_reference import ACTIVATIONS, SOLVERS

MOST_HIDDEN = 64
PARAMETERS = "Tensor u, Tensor w_u, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3"
_AXES = {
    "w_u": "r, U", "w1": "r, C", "b1": "r", "w2": "r, r, 3, 3", "b2": "r", "w3": "C, r", "b3": "C",
}  # fmt: skip


def check_tensor(
    op: str, name: str, tensor: Tensor, axes: str, sizes: dict[str, tuple[int, str]], u: Tensor
) -> None:
    """Raise unless `tensor` has the dtype of `u` and the sizes that belong to its axes."""
    check.dim(op, name, tensor, axes)
    check.dtype(op, name, tensor, (u.dtype,), "as u")
    for axis, letter in enumerate(axes.split(", ")):
        size, why = (3, "a 3x3 convolution") if letter == "3" else sizes[letter]
        check.size(op, name, letter, tensor.size(axis), size, why)


def check_cell(op: str, u: Tensor, named: dict[str, Tensor]) -> dict[str, tuple[int, str]]:
    """Check the map and the parameters; the sizes of all axes, and which argument says so."""
    check.dim(op, "u", u, "B, U, H, W")
    check.dtype(op, "u", u, check.FLOATS)
    check.dim(op, "w1", named["w1"], "r, C")
    hidden, channels = named["w1"].shape
    check.between(op, "r", hidden, 1, MOST_HIDDEN)
    for name, size in (("C", channels), ("U", u.size(1))):
        if size < 1:
            raise ValueError(f"{op}: {name} is {size}; allowed: at least 1")
    sizes = {letter: (u.size(axis), "as u") for axis, letter in enumerate("BUHW")}
    sizes |= {"r": (hidden, "as w1"), "C": (channels, "as w1")}
    for name, tensor in named.items():
        check_tensor(op, name, tensor, _AXES[name], sizes, u)
    return sizes


def check_solver(
    op: str, activation: str, solver: str, atol: float, rtol: float, max_iter: int
) -> None:
    """Raise unless these are options of a solve."""
    check.choice(op, "activation", activation, ACTIVATIONS)
    check.choice(op, "solver", solver, SOLVERS)
    check.tolerance(op, "atol", atol)
    check.tolerance(op, "rtol", rtol)
    if max_iter < 1:
        raise ValueError(f"{op}: max_iter is {max_iter}; allowed: at least 1")


def sample_tensors(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int], hidden: int, c: int
) -> list[Tensor]:
    """u and parameters of a cell that contracts."""

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype) * scale

    inner = sizes[1]
    return [
        tensor(*sizes), tensor(hidden, inner, scale=0.3), tensor(hidden, c, scale=0.4 * c**-0.5),
        tensor(hidden, scale=0.3), tensor(hidden, hidden, 3, 3, scale=0.25 * hidden**-0.5),
        tensor(hidden, scale=0.3), tensor(c, hidden, scale=0.5 * hidden**-0.5),
        tensor(c, scale=0.3),
    ]  # fmt: skip


def products(u: Tensor, w1: Tensor) -> int:
    """Multiply-adds of one evaluation of f on all images, the injection apart."""
    batch, _, height, width = u.shape
    hidden, channels = w1.shape
    return batch * height * width * hidden * (9 * hidden + 2 * channels)
