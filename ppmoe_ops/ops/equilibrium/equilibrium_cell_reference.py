"""`equilibrium_cell` in plain PyTorch: a batch of rows, each of which stops for itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ppmoe_ops.ops.equilibrium.mixing import DIVERGED, HISTORY, mixing_weights

HALVINGS = 8  # of a Newton step whose residual would grow
LEAKY_SLOPE = 0.01
# Added to the unit diagonal in Anderson's method. The kernel sums in float32, off by 1e-6 at most;
# on cells even 1e-5 costs no step.
RIDGE = {torch.float32: 4e-6, torch.float64: 1e-12}


def activate(x: Tensor, activation: str) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "tanh": torch.tanh,
        "relu": torch.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "sigmoid": torch.sigmoid,
    }
    if activation == "leaky_relu":
        return F.leaky_relu(x, LEAKY_SLOPE)
    return functions[activation](x)


def slope(x: Tensor, activation: str) -> Tensor:
    """The derivative of `activate`."""
    if activation == "tanh":
        return 1 - torch.tanh(x) ** 2
    if activation == "gelu":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
    if activation in ("relu", "leaky_relu"):
        below = 0.0 if activation == "relu" else LEAKY_SLOPE
        return torch.where(x <= 0, below, 1.0).to(x.dtype)  # 1 for NaN, as torch's own
    s = torch.sigmoid(x)
    return s * (1 - s) if activation == "sigmoid" else s * (1 + x * (1 - s))


def _norm(x: Tensor) -> Tensor:
    return x.double().square().sum(-1).sqrt()


class _Rows:
    """The rows of a solve: what was evaluated, and which of them still run."""

    def __init__(
        self, a: Tensor, c: Tensor, activation: str, atol: float, rtol: float, max_iter: int
    ) -> None:
        self.a, self.c, self.activation = a, c, activation
        self.atol, self.rtol, self.max_iter = atol, rtol, max_iter
        rows = c.size(0)
        self.best = torch.zeros_like(c)
        self.residual = torch.full((rows,), float("inf"), dtype=torch.float64, device=c.device)
        self.limit = torch.zeros_like(self.residual)
        self.steps = torch.zeros(rows, dtype=torch.int32, device=c.device)
        self.running = torch.ones(rows, dtype=torch.bool, device=c.device)
        self.evaluations = 0

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the activation is taken of, and f(z)."""
        pre = z @ self.a.T + self.c
        return pre, activate(pre, self.activation)

    def observe(self, z: Tensor, image: Tensor, trial: Tensor | None = None) -> Tensor:
        """Count an evaluation and stop the rows that it ends; the norms of the residuals.

        A row that only tries a point (`trial`) does not diverge there.
        """
        r, size = _norm(image - z), _norm(image)
        if self.evaluations == 0:
            self.limit = DIVERGED * (_norm(z) + size)
            self.best = image.clone()
        self.evaluations += 1
        self.steps += self.running
        better = self.running & (r < self.residual)
        self.best = torch.where(better[:, None], image, self.best)
        self.residual = torch.where(better, r, self.residual)
        diverged = ~(r.isfinite() & (r <= self.limit))
        if trial is not None:
            diverged &= ~trial
        self.residual = torch.where(self.running & diverged, float("inf"), self.residual)
        converged = r <= self.atol + self.rtol * size
        if self.evaluations == self.max_iter:
            converged |= True
        self.running &= ~(converged | diverged)
        return r


def _fixed_point(rows: _Rows, z: Tensor) -> None:
    while rows.running.any():
        _, image = rows.evaluate(z)
        rows.observe(z, image)
        z = image


def _anderson(rows: _Rows, z: Tensor) -> None:
    images: list[Tensor] = []  # differences of the last steps, the oldest first
    residuals: list[Tensor] = []
    used: list[Tensor] = []
    most = min(HISTORY, rows.c.size(1))  # more are never independent
    mixed = torch.zeros_like(rows.running)
    last: tuple[Tensor, Tensor, Tensor] | None = None
    while rows.running.any():
        _, image = rows.evaluate(z)
        g = image - z
        r = rows.observe(z, image)
        step = torch.zeros_like(image)
        if last is not None:
            restart = mixed & ~(r <= last[2])
            used = [*(each & ~restart for each in used), ~restart][-most:]
            images = [*images, image - last[0]][-most:]
            residuals = [*residuals, g - last[1]][-most:]
            mixed = ~restart
            past = torch.stack(residuals, 1).double()
            weights = mixing_weights(
                past @ past.mT,
                (past @ g.double()[:, :, None])[:, :, 0],
                torch.stack(used, 1),
                RIDGE[image.dtype],
            ).to(image.dtype)
            # Weights of zero: what they weigh may be another row's overflow.
            kept = torch.where(weights[:, :, None] == 0, 0, torch.stack(images, 1))
            step = (weights[:, :, None] * kept).sum(1)
        last = (image, g, r)
        z = image - step


def _newton(rows: _Rows, z: Tensor) -> None:
    eye = torch.eye(rows.a.size(0), dtype=z.dtype, device=z.device)
    base, base_image, direction = z, z, torch.zeros_like(z)
    base_r = torch.full((z.size(0),), float("inf"), dtype=torch.float64, device=z.device)
    halvings = torch.zeros(z.size(0), dtype=torch.int32, device=z.device)
    plain = torch.ones_like(rows.running)  # the first point, and steps after a failed search
    while rows.running.any():
        pre, image = rows.evaluate(z)
        r = rows.observe(z, image, ~plain)
        accept = plain | (r <= base_r)
        base = torch.where(accept[:, None], z, base)
        base_image = torch.where(accept[:, None], image, base_image)
        base_r = torch.where(accept, r, base_r)
        turn = slope(pre, rows.activation)[:, :, None]
        solved = torch.linalg.solve_ex(eye - turn * rows.a, (image - z)[:, :, None])[0][:, :, 0]
        direction = torch.where(accept[:, None], solved, direction)
        halvings = torch.where(accept, 0, halvings + 1)
        plain = (halvings > HALVINGS) | ~direction.isfinite().all(-1)
        scale = torch.ldexp(torch.ones_like(base_r), -halvings).to(z.dtype)
        z = torch.where(plain[:, None], base_image, base + scale[:, None] * direction)


_SOLVERS = {"fixed_point": _fixed_point, "anderson": _anderson, "newton": _newton}
SOLVERS = ("fixed_point", "anderson", "newton")


def solve(
    a: Tensor,
    c: Tensor,
    start: Tensor,
    activation: str,
    solver: str,
    atol: float,
    rtol: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, steps and residual of checked arguments in float32 or float64."""
    rows = _Rows(a, c, activation, atol, rtol, max_iter)
    if c.size(0):
        _SOLVERS[solver](rows, start)
    return rows.best, rows.steps, rows.residual.to(c.dtype)


def adjoint(
    grad: Tensor, a: Tensor, c: Tensor, x: Tensor, residual: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The gradients of a and c; every argument in float32 or float64."""
    turn = slope(x @ a.T + c, activation)
    eye = torch.eye(a.size(0), dtype=a.dtype, device=a.device)
    flagged = ~residual.isfinite()[:, None]
    turn = turn.masked_fill(flagged, 0)
    v = torch.linalg.solve_ex(eye - turn[:, :, None] * a.T, (turn * grad)[:, :, None])[0][:, :, 0]
    v = v.masked_fill(flagged, float("nan"))
    return v.T @ x, v
