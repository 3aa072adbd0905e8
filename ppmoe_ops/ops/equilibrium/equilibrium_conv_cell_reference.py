"""`equilibrium_conv_cell` in plain PyTorch: the cell, its transposed passes, and the solvers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ppmoe_ops.ops.equilibrium.equilibrium_cell_reference import activate, slope
from ppmoe_ops.ops.equilibrium.mixing import DIVERGED, HISTORY, mixing_weights, ridge

ACTIVATIONS = ("tanh", "relu", "gelu", "silu", "sigmoid", "leaky_relu")
SOLVERS = ("fixed_point", "anderson")

# f on the images of which the indices are given.
Function = Callable[[Tensor, Tensor], Tensor]


class Solution(NamedTuple):
    """What a solver returns for every image; `x` is f where |f(z) - z| was smallest."""

    x: Tensor
    steps: Tensor
    residual: Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None], bias)


@dataclasses.dataclass(frozen=True)
class Cell:
    """f(z) = w3 act(w2 * act(w1 z + w_u u + b1) + b2) + b3, all in one wide dtype."""

    u: Tensor
    w_u: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    activation: str

    def hidden(self, z: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first activation and what both activations are taken of."""
        p = _pointwise(z, self.w1) + _pointwise(self.u[images], self.w_u, self.b1)
        h1 = activate(p, self.activation)
        return p, h1, F.conv2d(h1, self.w2, self.b2, padding=1)

    def __call__(self, z: Tensor, images: Tensor, b3: Tensor) -> Tensor:
        h2 = activate(self.hidden(z, images)[2], self.activation)
        return _pointwise(h2, self.w3, b3)

    def slopes(self, z: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Derivatives of both activations at `z`, and both activations."""
        act = self.activation
        p, h1, q = self.hidden(z, images)
        return slope(p, act), slope(q, act), h1, activate(q, act)

    def transposed(self, v: Tensor, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """J^T v, and the gradients of what both activations are taken of."""
        t2 = d2 * _pointwise(v, self.w3.T)
        t1 = d1 * F.conv_transpose2d(t2, self.w2, padding=1)
        return _pointwise(t1, self.w1.T), t1, t2


def cell_of(activation: str, *tensors: Tensor) -> Cell:
    """The cell of u, w_u, w1, b1, w2, b2 and w3, in what these are summed in."""
    wide = wide_dtype(tensors[0].dtype)
    u, w_u, w1, b1, w2, b2, w3 = (each.to(wide) for each in tensors)
    return Cell(u, w_u, w1, b1, w2, b2, w3, activation)


def _norm(x: Tensor) -> Tensor:
    # In float32 lanes for float32 states, so that what overflows there counts as diverged.
    return x.square().sum(1, dtype=torch.float64).sqrt()


def solve(
    f: Function, z0: Tensor, solver: str, atol: float, rtol: float, max_iter: int
) -> Solution:
    """Solve z = f(z) for each image by itself.

    z0 is [B,C,H,W] in float32 or float64. Anderson's method keeps differences of residuals and of
    values; after a mixed step that made the residual larger it starts its history again.
    """
    batch, shape = z0.size(0), z0.shape[1:]
    z = z0.flatten(1)
    history = HISTORY if solver == "anderson" else 0
    best = z.clone()
    least = torch.full((batch,), torch.inf, dtype=torch.float64, device=z.device)
    residual = least.clone()
    steps = torch.zeros(batch, dtype=torch.int32, device=z.device)
    # Of the active images alone, in the order of `active`.
    active = torch.arange(batch, device=z.device)
    limit = before = least.clone()
    count = torch.zeros(batch, dtype=torch.int64, device=z.device)
    last_f = last_g = z
    differences: list[tuple[Tensor, Tensor]] = []  # of g and of f, the newest first
    for step in range(1, max_iter + 1):
        value = f(z.view(-1, *shape), active).flatten(1)
        g = value - z
        size, total = _norm(g), _norm(value)
        steps[active] = step
        if step == 1:
            limit = DIVERGED * (_norm(z) + total)
        diverged = ~size.isfinite() | (size > limit)
        better = ~diverged & (size < least[active])
        # A value that is not finite is returned only where there never was another.
        none = diverged & least[active].isinf()
        take = better | none
        best[active[take]] = value[take]
        least[active[better]] = size[better]
        residual[active] = torch.where(diverged, torch.inf, least[active])
        keep = ~diverged & ~(size <= atol + rtol * total)
        if not keep.any():
            break
        restart = (count > 0) & (size > before)
        if history and step > 1:
            differences.insert(0, (g - last_g, value - last_f))
            del differences[history:]
        count = torch.where(restart, 0, (count + 1).clamp(max=len(differences)))
        active, count, limit, before = active[keep], count[keep], limit[keep], size[keep]
        last_f, last_g = value[keep], g[keep]
        differences = [(dg[keep], df[keep]) for dg, df in differences]
        z = last_f
        if differences:
            newest = torch.arange(len(differences), device=z.device)
            used = newest < count[:, None]
            dg = torch.stack([each for each, _ in differences], 1).double()
            gram, projection = dg @ dg.mT, (dg @ last_g.double()[:, :, None])[:, :, 0]
            weights = mixing_weights(gram, projection, used, ridge(z.dtype))
            for at, (_, df) in enumerate(differences):
                z = z - weights[:, at : at + 1].to(z.dtype) * df
    return Solution(best.view(z0.shape), steps, residual.to(z0.dtype))
