"""Newton's method; its linear systems by GMRES, all samples at once, each with its own basis."""

from __future__ import annotations

import torch
from torch import Tensor

from ppmoe_ops.ops.equilibrium.solution import Solution, Track, among, proportionate, some

_HALVINGS = 8
_FORCING = 0.1  # a linear system is solved until its residual has fallen by this


def newton_krylov(track: Track) -> Solution:
    """z <- z + t d, (I - df/dz) d = f - z; t is halved while the residual would grow.

    d comes from at most `history` steps of GMRES, and those from Jacobian-vector products in
    forward mode; where f has none (an operator without such a formula), from differences of f.
    Every product counts as an evaluation of f. After eight halvings the plain step is taken.
    """
    options, wide = track.options, track.wide
    samples = track.z.size(0)
    track.products = torch.zeros(samples, dtype=torch.int32, device=track.z.device)
    base = base_f = track.z
    least = torch.full((samples,), torch.inf, dtype=wide, device=track.z.device)
    direction = torch.zeros_like(track.z, dtype=wide)
    halvings = torch.zeros(samples, dtype=torch.int64, device=track.z.device)
    product = _Product(track)
    while True:
        here = track.z
        came = track.evaluate()
        value = among(came, track.rows, here)
        if not track.judge(came):
            return track.solution()
        running, residual = track.running, track.residual
        taken = running & ((residual < least) | (halvings > _HALVINGS))
        base, base_f = (
            torch.where(taken[:, None], new, old) for new, old in ((here, base), (value, base_f))
        )
        least = torch.where(taken, residual, least)
        g = torch.where(taken[:, None], value.to(wide) - here.to(wide), 0)
        # One evaluation must be left for the point that the direction leads to.
        budget = min(options.history, options.max_iter - track.evaluations - 1)
        found = _gmres(track, product, g, base, base_f, budget)
        direction = torch.where(taken[:, None], options.damping * found, direction)
        halvings = torch.where(taken, 0, halvings + 1)
        share = torch.pow(0.5, halvings.to(wide))[:, None]
        plain = (halvings > _HALVINGS)[:, None]
        move = torch.where(plain, base_f.to(wide) - base.to(wide), share * direction)
        moved = base.to(wide) + move
        track.z = torch.where(running[:, None], moved.to(here.dtype), track.z)


class _Product:
    """v -> (df/dz) v at a point, for the samples that are still busy."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self.forward_mode = True

    def __call__(self, at: Tensor, value: Tensor, v: Tensor, busy: Tensor) -> Tensor:
        """`at`, `value` (f there) and `v` of all samples; the product likewise, in the dtype of v.

        With `compact`, f sees busy samples alone; the product of the others is zero.
        """
        track = self.track
        rows = None if track.index is None else busy.nonzero()[:, 0]
        point, tangent, at_point = (some(each, rows) for each in (at, v, value))
        rest = torch.zeros_like(v)
        if self.forward_mode:
            try:
                pair = torch.func.jvp(
                    lambda z: track.f(z, rows), (point,), (tangent.to(point.dtype),)
                )
                track.evaluations += 1
                return among(pair[1].to(v.dtype), rows, rest)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError):
                self.forward_mode = False
        here = at_point.to(v.dtype)
        size = torch.maximum(_norm(point.to(v.dtype)), _norm(here))
        step = torch.finfo(point.dtype).eps ** 0.5 * torch.where(size > 0, size, 1)[:, None]
        moved = (point.to(v.dtype) + step * tangent).to(point.dtype)
        return among((track.call(moved, rows).to(v.dtype) - here) / step, rows, rest)


def _gmres(
    track: Track, product: _Product, g: Tensor, at: Tensor, value: Tensor, most: int
) -> Tensor:
    """d with |g - (I - J) d| <= 0.1 |g| in at most `most` products; zeros where g is zero."""
    assert track.products is not None
    start = _norm(g)
    if most < 1:
        return g
    basis = [g / torch.where(start > 0, start, 1)[:, None]]
    columns: list[Tensor] = []
    right = torch.zeros(g.size(0), most + 1, dtype=torch.float64, device=g.device)
    right[:, 0] = start
    weights = torch.zeros(g.size(0), 0, dtype=torch.float64, device=g.device)
    busy = start > 0
    for k in range(most):
        v = basis[-1]
        w = v - product(at, value, v, busy)
        track.products += busy
        track.note()
        column = torch.zeros(g.size(0), most + 1, dtype=torch.float64, device=g.device)
        for _ in range(2):  # once more, for what rounding left
            vectors = torch.stack(basis, 1)
            shares = torch.bmm(vectors, w[:, :, None])
            w = w - torch.bmm(shares.transpose(1, 2), vectors)[:, 0]
            column[:, : k + 1] += shares[:, :, 0]
        rest = _norm(w)
        column[:, k + 1] = rest
        # A sample that is solved, or whose product is not finite, goes no further.
        finite = column.isfinite().all(1)
        live = busy & finite
        columns.append(torch.where(live[:, None], column, 0))
        weights, left = _least_squares(torch.stack(columns, 2), right)
        busy = live & (left > _FORCING * start) & (rest > 0)
        if not track.bounded and not bool(busy.any()):
            break
        basis.append(torch.where(busy[:, None], w / torch.where(busy, rest, 1)[:, None], 0))
    vectors = torch.stack(basis[: weights.size(1)], 1)
    found = torch.bmm(weights.to(g.dtype)[:, None], vectors)[:, 0]
    return proportionate(torch.where((weights != 0).any(1)[:, None], found, g), g)


def _least_squares(h: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """argmin |right - h y|, and that norm; columns of zeros get no weight."""
    gram = h.transpose(1, 2) @ h
    square = gram.diagonal(dim1=1, dim2=2)
    scale = torch.where(square > 0, square, 1).rsqrt()
    eye = torch.eye(h.size(2), dtype=h.dtype, device=h.device)
    scaled = gram * scale[:, :, None] * scale[:, None, :] + 1e-14 * eye
    scaled = torch.where((square > 0)[:, :, None] | (eye == 0), scaled, eye)
    factor, _ = torch.linalg.cholesky_ex(scaled)
    y = torch.cholesky_solve((h.transpose(1, 2) @ right[:, :, None]) * scale[:, :, None], factor)
    y = (y[:, :, 0] * scale).nan_to_num(0.0, 0.0, 0.0)
    return y, torch.linalg.vector_norm(right - (h @ y[:, :, None])[:, :, 0], dim=1)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)
