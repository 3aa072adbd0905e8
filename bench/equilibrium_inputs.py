"""What equilibrium operators are called with: cells that contract, and seeded states.

The linear part of every cell has the 2-norm that spectral normalisation with a clip leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .seeded import Source

Arguments = tuple[Any, ...]
Solver = Literal["fixed_point", "anderson", "newton"]


@dataclasses.dataclass(frozen=True)
class Rows:
    """One call's worth of rows of a cell.

    Attributes:
        rows, width: N and r.
        dtype: of the data and the weights.
        solver, activation, rtol: as the operators take them.
        norm: the 2-norm of the linear part.
        max_iter: steps that a row may take.
        seed: of everything random in it.
    """

    rows: int
    width: int
    dtype: torch.dtype = torch.float32
    solver: Solver = "anderson"
    activation: str = "tanh"
    rtol: float = 1e-4
    norm: float = 0.95
    max_iter: int = 50
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt layer z = W2 act(W1 z + P u + b1) + b2 on tokens: bottleneck `width` of `dim`.

    mild: matrices of normal draws. Otherwise W1 W2 is symmetric, as where evaluations are counted,
    and its 2-norm decides how fast plain iteration is.
    """

    tokens: int
    mild: bool = False
    dim: int = 768
    width: int = 16
    dtype: torch.dtype = torch.float32
    rtol: float = 1e-4
    norm: float = 0.95
    max_iter: int = 100
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Images:
    """One call's worth of images of a convolutional cell: 1x1, 3x3, 1x1 of `width` channels.

    mild: kernels of normal draws, and an injection of unit variance, which saturates. Otherwise
    the last layer is the first one's transpose, the middle one seven tenths of the identity, and
    the injection a tenth, so that plain iteration is as slow as the norm allows.
    """

    batch: int
    side: int
    width: int = 8
    mild: bool = False
    channels: int = 3
    dtype: torch.dtype = torch.float32
    solver: Solver = "anderson"
    activation: str = "tanh"
    rtol: float = 1e-3
    norm: float = 0.95
    max_iter: int = 30
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class States:
    """Flat states of a batch, and how many differences are kept of each."""

    batch: int
    size: int
    dtype: torch.dtype = torch.float32
    history: int = 6
    seed: int = 0


Work = Rows | Prompt | Images | States


def scaled(weight: Tensor, norm: float) -> Tensor:
    """A matrix with its 2-norm made `norm`."""
    wide = weight.double()
    return (wide * (norm / torch.linalg.matrix_norm(wide, 2))).to(weight.dtype)


def _cell(work: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    source = Source(work, device)
    a = scaled(source.randn(work.width, work.width), work.norm)
    return a, source.randn(work.rows, work.width)


def _equilibrium_cell(work: Rows, device: torch.device) -> Arguments:
    a, c = _cell(work, device)
    return (a, c, None, work.activation, work.solver, 0.0, work.rtol, work.max_iter)


def _equilibrium_cell_backward(work: Rows, device: torch.device) -> Arguments:
    a, c, *rest = _equilibrium_cell(work, device)
    x, _, residual = torch.ops.ppmoe_ops.equilibrium_cell(a, c, *rest)
    grad = Source(work, device, stream=1).randn(*x.shape)
    return grad, a, c, x, residual, work.activation


def prompt(work: Prompt, device: torch.device) -> tuple[Tensor, ...]:
    """u, P, W1, b1, W2 and b2; the 2-norm of W1 W2 is `norm`, which W2 is made for."""
    source, d, r = Source(work, device), work.dim, work.width
    u = source.randn(work.tokens, d)
    p, w1 = (source.randn(r, d, scale=d**-0.5) for _ in range(2))
    b1, b2 = source.randn(r, scale=0.1), source.randn(d, scale=0.1)
    if work.mild:
        w2 = source.randn(d, r, scale=r**-0.5)
        size = torch.linalg.matrix_norm(w1.double() @ w2.double(), 2).item()
        return u, p, w1, b1, w2 * (work.norm / size), b2
    square = source.randn(r, r).double()
    wanted = scaled(square + square.T, work.norm)
    w2 = torch.linalg.pinv(w1.double()) @ wanted
    return u, p, w1, b1, w2.to(w1.dtype), b2


def images(work: Images, device: torch.device) -> tuple[Tensor, ...]:
    """u, w_u, w1, b1, w2, b2, w3 and b3; w3 is scaled for the norm of all three layers together.

    That norm is the one on maps without a border: the largest over frequencies.
    """
    source, r, c = Source(work, device), work.width, work.channels
    inject = 1.0 if work.mild else 0.1
    u = source.randn(work.batch, c, work.side, work.side)
    w_u, w1 = source.randn(r, c, scale=inject * c**-0.5), source.randn(r, c, scale=c**-0.5)
    w2, w3 = source.randn(r, r, 3, 3, scale=(9 * r) ** -0.5), source.randn(c, r, scale=r**-0.5)
    b1, b2, b3 = (source.randn(size, scale=0.1 * inject) for size in (r, r, c))
    if not work.mild:
        w1 = torch.linalg.qr(w1.double())[0].to(w1.dtype)
        w3 = w1.T.contiguous()
        w2 = 0.3 * w2
        w2[:, :, 1, 1] += 0.7 * torch.eye(r, dtype=w2.dtype, device=device)
    taps = torch.fft.fft2(w2.double(), (16, 16)).permute(2, 3, 0, 1)
    whole = w3.double().to(taps.dtype) @ taps @ w1.double().to(taps.dtype)
    size = torch.linalg.matrix_norm(whole, 2).max().item()
    return u, w_u, w1, b1, w2, b2, w3 * (work.norm / size), b3


def _equilibrium_conv_cell(work: Images, device: torch.device) -> Arguments:
    tail = (None, work.activation, work.solver, 0.0, work.rtol, work.max_iter)
    return (*images(work, device), *tail)


def _equilibrium_conv_cell_backward(work: Images, device: torch.device) -> Arguments:
    args = _equilibrium_conv_cell(work, device)
    z, _, residual = torch.ops.ppmoe_ops.equilibrium_conv_cell(*args)
    grad = Source(work, device, stream=1).randn(*z.shape)
    return grad, *args[:7], z, residual, work.activation


def _anderson_mix(work: States, device: torch.device) -> Arguments:
    """The step after those that fill the history, of a linear f that no sample solves."""
    source = Source(work, device)
    batch, size, kept = work.batch, work.size, work.history + 1
    slope = source.rand(size).mul_(1.6).sub_(0.8).to(work.dtype)
    shift = source.randn(batch, size)
    wide = torch.float64 if work.dtype == torch.float64 else torch.float32
    z, z_next, best_z, best_f = (torch.zeros_like(shift) for _ in range(4))
    dg, df = (shift.new_zeros(batch, kept, size, dtype=wide) for _ in range(2))
    gram = shift.new_zeros(batch, kept, kept, dtype=torch.float64)
    values = shift.new_zeros(batch, 3, dtype=torch.float64)
    counters = shift.new_zeros(batch, 5, dtype=torch.int32)
    tail = (None, 0.0, 0.0, 1.0, False)
    for _ in range(kept):
        held = (best_z, best_f, dg, df, gram, values, counters)
        torch.ops.ppmoe_ops.anderson_mix(torch.addcmul(shift, z, slope), z, z_next, *held, *tail)
        z, z_next = z_next, z
    held = (best_z, best_f, dg, df, gram, values, counters)
    return (torch.addcmul(shift, z, slope), z, z_next, *held, *tail)


BUILDERS: dict[str, Callable[[Any, torch.device], Arguments]] = {
    "equilibrium_cell": _equilibrium_cell,
    "equilibrium_cell_backward": _equilibrium_cell_backward,
    "equilibrium_conv_cell": _equilibrium_conv_cell,
    "equilibrium_conv_cell_backward": _equilibrium_conv_cell_backward,
    "anderson_mix": _anderson_mix,
}
