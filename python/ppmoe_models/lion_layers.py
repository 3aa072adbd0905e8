"""The implicit layers of LION: prompts that are fixed points, and what makes them contractions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppmoe_ops

# Largest slope of each activation: of GELU at sqrt(2), of SiLU at 2.3994.
SLOPES = {
    "tanh": 1.0, "relu": 1.0, "gelu": 1.12891, "silu": 1.09984, "sigmoid": 0.25, "leaky_relu": 1.0,
}  # fmt: skip
CONTRACTION = 0.95
_GRID = 12  # frequencies along each axis at which a convolution's norm is measured


class Solve(NamedTuple):
    """What a solver reports of one forward call: one value a row or image.

    Attributes:
        steps: [N] int32, evaluations of f.
        residual: [N], |f(z) - z| at the state that is returned; inf where it diverged.
        relative: [N], that over the size of the state.
        converged: [N] bool.
    """

    steps: Tensor
    residual: Tensor
    relative: Tensor
    converged: Tensor


def _solve(state: Tensor, steps: Tensor, residual: Tensor, rtol: float) -> Solve:
    with torch.no_grad():
        # Solvers measure f(z) before it is rounded to the dtype that they return.
        rounding = 4 * torch.finfo(state.dtype).eps
        size = state.detach().flatten(1).to(residual.dtype).norm(dim=1)
        relative = residual / size.clamp(min=torch.finfo(size.dtype).tiny)
        return Solve(steps, residual, relative, residual <= (rtol + rounding) * size)


def matrix_norm(matrix: Tensor) -> Tensor:
    """The spectral norm, exact, in float32 or float64.

    Example:
        >>> matrix_norm(torch.diag(torch.tensor([3.0, -4.0]))).item()
        4.0
    """
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    norm: Tensor = torch.linalg.matrix_norm(wide, 2)
    return norm


def conv_norm_bound(weight: Tensor) -> Tensor:
    """An upper bound of the spectral norm of a 3x3 convolution, for images of every size.

    A convolution with zero padding is a part of one without borders, whose norm is the largest that
    its symbol, the matrix sum_k w_k exp(-i <k, frequency>), has at any frequency. That is measured
    on a grid of 12 x 12. For all vectors u and v, u* symbol v is a trigonometric polynomial of
    degree 1 in each variable; on n even points such a polynomial reaches cos(pi / n) of its maximum
    at least (Ehlich and Zeller), so that dividing by cos(pi / 12)^2 bounds it: by 7% too high at
    most.

    Args:
        weight: [r, r, 3, 3].

    Returns:
        A scalar in float32 or float64. Its gradient is that of the norm at the frequency where it
        is largest.

    Example:
        >>> centre = torch.zeros(1, 1, 3, 3)
        >>> centre[0, 0, 1, 1] = 2.0
        >>> round(conv_norm_bound(centre).item(), 3)
        2.144
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    with torch.no_grad():
        # Real weights have conjugate symbols at opposite frequencies: half of an axis is enough.
        angles = torch.arange(_GRID, device=wide.device, dtype=wide.dtype) * (2 * math.pi / _GRID)
        places = torch.arange(-1, 2, device=wide.device, dtype=wide.dtype)
        turns = torch.polar(torch.ones((), device=wide.device, dtype=wide.dtype),
                            -angles[:, None] * places)  # fmt: skip
        half = turns[: _GRID // 2 + 1]
        phases = torch.einsum("ax,by->abxy", turns, half).flatten(2).flatten(0, 1)
        symbols = torch.einsum("ijk,fk->fij", wide.flatten(2).to(phases.dtype), phases)
        at = torch.linalg.matrix_norm(symbols, 2).argmax(0, keepdim=True)
        u, _, vh = torch.linalg.svd(symbols.index_select(0, at)[0])
        # The norm is Re(u* symbol v), and u and v do not count in its first derivative.
        rank_one = torch.outer(u[:, 0], vh[0]).conj()
        share = (rank_one[:, :, None] * phases.index_select(0, at)).real
    norm = (wide.flatten(2) * share).sum()
    return norm / math.cos(math.pi / _GRID) ** 2


def contraction_scale(lipschitz: Tensor, limit: float) -> Tensor:
    """What a map has to be multiplied by so that its Lipschitz constant is `limit` at most.

    Example:
        >>> contraction_scale(torch.tensor([1.9, 0.5]), 0.95).tolist()
        [0.5, 1.0]
    """
    return limit / lipschitz.clamp(min=limit)


def _uniform(parameter: Tensor, fan_in: int) -> None:
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound)


def _check(name: str, width: int, most: int, activation: str, contraction: float | None) -> None:
    if not 1 <= width <= most:
        raise ValueError(f"LION: {name} is {width}; allowed: 1 to {most}")
    if activation not in SLOPES:
        raise ValueError(f"LION: activation is '{activation}'; allowed: {', '.join(SLOPES)}")
    if contraction is not None and not 0 < contraction < 1:
        raise ValueError(f"LION: contraction is {contraction}; allowed: None, or above 0, below 1")


class ImplicitMLP(nn.Module):
    """z = W2 act(W1 z + P u + b1) + b2 for each row of u, solved in the width of the bottleneck.

    With a = W1 W2 and c = P u + b1 + W1 b2 this is x = act(a x + c), z = W2 x + b2, the identity of
    `ppmoe_ops.equilibrium_cell`. Before, W1 is multiplied by what makes the spectral norm of a,
    times the activation's largest slope, `contraction` at most; P u keeps its size.

    Args:
        dim: d, of z.
        injected: of u. Rows of u are normalised (mean 0, variance 1) first.
        width: r.
        activation: tanh, relu, gelu, silu, sigmoid or leaky_relu.
        contraction: the limit, or None for none.
        solver: of `equilibrium_cell`: fixed_point, anderson or newton.
        rtol, max_iter: where the solver stops.

    Shapes:
        u [N, injected] to z [N, d] and a `Solve` of N rows. 2dr + r + d parameters, and
        r * injected for P.

    Example:
        >>> layer = ImplicitMLP(dim=12, injected=12, width=4)
        >>> z, solve = layer(torch.randn(3, 12))
        >>> z.shape, bool(solve.converged.all()), sum(each.numel() for each in layer.parameters())
        (torch.Size([3, 12]), True, 160)
    """

    def __init__(
        self,
        dim: int,
        injected: int,
        width: int = 16,
        *,
        activation: str = "tanh",
        contraction: float | None = CONTRACTION,
        solver: str = "anderson",
        rtol: float = 1e-4,
        max_iter: int = 30,
    ) -> None:
        super().__init__()
        _check("representation_width", width, 256, activation, contraction)
        self.activation, self.contraction = activation, contraction
        self.solver, self.rtol, self.max_iter = solver, rtol, max_iter
        self.inject = nn.Parameter(torch.empty(width, injected))
        self.w1, self.b1 = nn.Parameter(torch.empty(width, dim)), nn.Parameter(torch.empty(width))
        self.w2, self.b2 = nn.Parameter(torch.empty(dim, width)), nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again, uniform as `nn.Linear`'s."""
        for parameter, fan_in in (
            (self.inject, self.inject.size(1)), (self.w1, self.w1.size(1)),
            (self.b1, self.w1.size(1)), (self.w2, self.w2.size(1)), (self.b2, self.w2.size(1)),
        ):  # fmt: skip
            _uniform(parameter, fan_in)

    def cell(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """a [r, r] and c [N, r] of the cell, a being a contraction."""
        u = F.layer_norm(u, u.shape[-1:])
        w1: Tensor = self.w1
        if self.contraction is not None:
            norm = SLOPES[self.activation] * matrix_norm(w1 @ self.w2)
            w1 = w1 * contraction_scale(norm, self.contraction).to(w1.dtype)
        return w1 @ self.w2, F.linear(u, self.inject, self.b1 + w1 @ self.b2)

    def forward(self, u: Tensor) -> tuple[Tensor, Solve]:
        with torch.autocast(u.device.type, enabled=False):
            a, c = self.cell(u.to(self.w1.dtype))
            x, steps, residual = ppmoe_ops.equilibrium_cell(
                a, c, activation=self.activation, solver=self.solver, rtol=self.rtol,
                max_iter=self.max_iter,
            )  # fmt: skip
            return F.linear(x, self.w2, self.b2), _solve(x, steps, residual, self.rtol)


class ImplicitConv(nn.Module):
    """z = w3 act(w2 * act(w1 z + w_u u + b1) + b2) + b3, a convolutional bottleneck over an image.

    `*` is a 3x3 convolution with zero padding, the others are 1x1. f's Lipschitz constant is at
    most the product of the norms of w1, w2 and w3 and of the activation's largest slope, squared;
    w1 is multiplied by what makes that `contraction` at most, and w_u u keeps its size. The norms
    of w1 and w3 are exact, that of w2 is `conv_norm_bound`.

    Args:
        channels: C, of the image and of z.
        width: r.
        others: as `ImplicitMLP`'s; solvers are fixed_point and anderson.

    Shapes:
        u [B, C, H, W] to z of that shape and a `Solve` of B images. 9r^2 + 2Cr + 2r + C parameters
        (9r^2 + 8r + 3 for colours), and rC for w_u.

    Example:
        >>> layer = ImplicitConv(3, width=8)
        >>> z, solve = layer(torch.randn(2, 3, 16, 16))
        >>> z.shape, bool(solve.converged.all()), sum(each.numel() for each in layer.parameters())
        (torch.Size([2, 3, 16, 16]), True, 667)
    """

    def __init__(
        self,
        channels: int,
        width: int = 8,
        *,
        activation: str = "tanh",
        contraction: float | None = CONTRACTION,
        solver: str = "anderson",
        rtol: float = 1e-3,
        max_iter: int = 30,
    ) -> None:
        super().__init__()
        _check("input_width", width, 64, activation, contraction)
        self.activation, self.contraction = activation, contraction
        self.solver, self.rtol, self.max_iter = solver, rtol, max_iter
        self.inject = nn.Parameter(torch.empty(width, channels))
        self.w1 = nn.Parameter(torch.empty(width, channels))
        self.b1 = nn.Parameter(torch.empty(width))
        self.w2 = nn.Parameter(torch.empty(width, width, 3, 3))
        self.b2 = nn.Parameter(torch.empty(width))
        self.w3 = nn.Parameter(torch.empty(channels, width))
        self.b3 = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again, uniform as `nn.Conv2d`'s."""
        width, channels = self.w1.shape
        for parameter, fan_in in (
            (self.inject, channels), (self.w1, channels), (self.b1, channels),
            (self.w2, 9 * width), (self.b2, 9 * width), (self.w3, width), (self.b3, width),
        ):  # fmt: skip
            _uniform(parameter, fan_in)

    def lipschitz_bound(self) -> Tensor:
        """Of f, before anything is scaled."""
        norms = matrix_norm(self.w1) * conv_norm_bound(self.w2) * matrix_norm(self.w3)
        return SLOPES[self.activation] ** 2 * norms

    def contracted_w1(self) -> Tensor:
        """w1, multiplied so that f is a contraction."""
        if self.contraction is None:
            return self.w1
        scale = contraction_scale(self.lipschitz_bound(), self.contraction)
        return self.w1 * scale.to(self.w1.dtype)

    def forward(self, u: Tensor) -> tuple[Tensor, Solve]:
        with torch.autocast(u.device.type, enabled=False):
            z, steps, residual = ppmoe_ops.equilibrium_conv_cell(
                u.to(self.w1.dtype), self.inject, self.contracted_w1(), self.b1, self.w2, self.b2,
                self.w3, self.b3, activation=self.activation, solver=self.solver, rtol=self.rtol,
                max_iter=self.max_iter,
            )  # fmt: skip
            return z, _solve(z, steps, residual, self.rtol)
