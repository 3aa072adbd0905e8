"""Broyden's good method with a bounded number of rank-one terms, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ppmoe_ops.ops.equilibrium.solution import Secant, Solution, Track, among

_TINY = 0.03  # a term whose denominator is a smaller share of its norms is left out
_LONGEST = 300.0  # a step, in units of the plain one
# A residual so many times the one before drops what was learnt: the first once the ring has
# overwritten terms, which the later ones were built on.
_WORSE, _FAR = 1.0, 100.0


def broyden(track: Track) -> Solution:
    """z <- z + H g, g = f - z, with H the secant inverse of I - df/dz.

    H = I + sum_j u_j v_j^T over the last `history` terms, a ring: memory does not grow with the
    number of steps.
    """
    options, wide = track.options, track.wide
    samples, width = track.z.shape
    terms = options.history
    u = track.z.new_zeros((samples, terms, width), dtype=wide)
    v = torch.zeros_like(u)
    held = torch.zeros(samples, dtype=torch.int64, device=u.device)  # terms ever made
    at = torch.arange(terms, device=u.device)
    step = old = before = None
    while True:
        here = track.z.to(wide)
        value = track.evaluate()
        g = among(value, track.rows, track.z).to(wide) - here
        more = track.judge(value)
        if not more:
            break
        running = track.running
        g = torch.where(running[:, None], g, 0)
        residual = track.residual
        if step is not None and old is not None and before is not None:
            y = old - g
            # The term that will be overwritten is gone before the new one is made, which then
            # meets the secant equation.
            here_next = at == (held % terms)[:, None]
            new_v = step + _weighted(_dots(u, step).masked_fill(here_next, 0), v)
            new_u = step - y - _weighted(_dots(v, y).masked_fill(here_next, 0), u)
            below = (new_v * y).sum(1)
            least = _TINY * _norm(new_v) * _norm(y)
            worse = running & (residual > torch.where(held < terms, _FAR, _WORSE) * before)
            good = running & ~worse & (below.abs() > least) & below.isfinite()
            new_u = new_u / torch.where(good, below, 1)[:, None]
            good = good & new_u.isfinite().all(1) & new_v.isfinite().all(1)
            write = here_next & good[:, None]
            keep = ~worse[:, None, None]
            u = torch.where(write[:, :, None], new_u[:, None], torch.where(keep, u, 0))
            v = torch.where(write[:, :, None], new_v[:, None], torch.where(keep, v, 0))
            held = torch.where(worse, 0, held + good)
        direction = g + _weighted(_dots(v, g), u)
        # What overflows is replaced by a plain step, and what is out of all proportion is cut.
        direction = torch.where(direction.isfinite().all(1)[:, None], direction, g)
        cut = _LONGEST * _norm(g) / _norm(direction).clamp_min(torch.finfo(wide).tiny)
        direction = direction * cut.clamp_max(1)[:, None]
        moved = (here + options.damping * direction).to(track.z.dtype)
        track.z = torch.where(running[:, None], moved, track.z)
        step, old, before = track.z.to(wide) - here, g, residual
    return track.solution(Secant(u, v))


def _dots(terms: Tensor, x: Tensor) -> Tensor:
    """[B, L]: the product of every term with x."""
    return torch.bmm(terms, x[:, :, None])[:, :, 0]


def _weighted(weights: Tensor, terms: Tensor) -> Tensor:
    """[B, d]: the terms summed by weight."""
    return torch.bmm(weights[:, None], terms)[:, 0]


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)
