"""The small solve of Anderson's method, for a batch of samples (in C++: csrc/cpu/equilibrium)."""

from __future__ import annotations

import torch
from torch import Tensor

HISTORY = 6  # differences that the fused solvers keep
DIVERGED = 1e4  # a residual beyond this multiple of |z0| + |f(z0)| ends a solve


def ridge(dtype: torch.dtype) -> float:
    """What is added to the unit diagonal, for states of `dtype`."""
    return 1e-12 if dtype == torch.float64 else 1e-8


def mixing_weights(gram: Tensor, projection: Tensor, used: Tensor, ridge: float) -> Tensor:
    """gamma = argmin |g - sum_j gamma_j dg_j|^2 for every sample, in float64.

    gram [B,m,m] = dg dg^T and projection [B,m] = dg g; `used` [B,m] says which of the m
    differences a sample has. Columns are scaled to unit norm before `ridge` is added to the
    diagonal, so that no result depends on the scale of the problem. A column whose norm is zero or
    not finite is left out; where no finite solution is left, every weight is zero: a plain step.
    """
    gram, projection = gram.double(), projection.double()
    square = gram.diagonal(dim1=-2, dim2=-1)
    usable = used & (square > 0) & (square < float("inf"))
    scale = torch.where(usable, square, 1).rsqrt() * usable
    both = usable[:, :, None] & usable[:, None, :]
    scaled = torch.where(both, gram * scale[:, :, None] * scale[:, None, :], 0)
    eye = torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    scaled = torch.where(eye.bool(), (1 + ridge) * eye, scaled)
    right = torch.where(usable, projection * scale, 0)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    weights = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0] * scale
    bad = (failed != 0) | ~weights.isfinite().all(-1)
    return torch.where(bad[:, None], 0, weights)
