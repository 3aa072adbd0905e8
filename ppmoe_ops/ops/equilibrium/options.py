"""Options of a solver, checked when they are made: one record for forward and backward solves."""

from __future__ import annotations

import dataclasses
import math

from ppmoe_ops import _checks as check

SOLVERS = ("fixed_point", "anderson", "broyden", "newton_krylov")
MOST_ANDERSON_HISTORY = 16  # what the fused small solve holds
OP = "equilibrium"


@dataclasses.dataclass(frozen=True)
class SolverOptions:
    """How a fixed point z = f(z) is looked for; forward and backward solves take the same options.

    Attributes:
        solver: `"fixed_point"`, `"anderson"`, `"broyden"` or `"newton_krylov"`, whose products with
            the Jacobian are of forward mode, or differences of f where f has no forward mode.
        atol, rtol: a sample has converged when |f(z) - z|_2 <= atol + rtol |f(z)|_2.
        max_iter: the most evaluations of f, 1 or more.
        history: what a solver remembers, and so its memory: differences (`anderson`, at most 16),
            rank-one terms (`broyden`), Krylov vectors (`newton_krylov`); 1 or more. `fixed_point`
            remembers nothing.
        damping: the share of the new value in a step, in (0, 1].

    Raises:
        ValueError: a value that is not as above.
    """

    solver: str = "anderson"
    atol: float = 0.0
    rtol: float = 1e-3
    max_iter: int = 50
    history: int = 6
    damping: float = 1.0

    def __post_init__(self) -> None:
        check.choice(OP, "solver", self.solver, SOLVERS)
        for name in ("atol", "rtol"):
            value = _number(name, getattr(self, name))
            if not 0 <= value < math.inf:
                raise ValueError(f"{OP}: {name} is {value}; allowed: 0 or more, finite")
        for name in ("max_iter", "history"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{OP}: {name} is {value!r}; allowed: a whole number")
            if value < 1:
                raise ValueError(f"{OP}: {name} is {value}; allowed: 1 or more")
        if self.solver == "anderson":
            check.between(OP, "history", self.history, 1, MOST_ANDERSON_HISTORY, "for anderson")
        damping = _number("damping", self.damping)
        if not 0 < damping <= 1:
            raise ValueError(f"{OP}: damping is {damping}; allowed: above 0, at most 1")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{OP}: {name} is {value!r}; allowed: a number")
    return float(value)
