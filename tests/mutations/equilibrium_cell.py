"""Bugs in `equilibrium_cell`: solvers, rows, factors, gradients, contract."""

from __future__ import annotations

from mutations.mutation import INCLUDE, Mutation

CPU = "csrc/cpu/equilibrium"
OPS = "ppmoe_ops/ops/equilibrium"


def mutations(file: str, tests: str, *changes: tuple[str, str, str]) -> tuple[Mutation, ...]:
    selection = f"tests/equilibrium/{tests}.py"
    return tuple(Mutation(file, old, new, note, selection) for old, new, note in changes)


EQUILIBRIUM_CELL = (
    *mutations(
        f"{CPU}/cell.cpp",
        "test_cell",
        ("z -= weights[j] * images[j][i];", "z += weights[j] * images[j][i];", "sign of mixing"),
    ),
    *mutations(
        f"{CPU}/cell.h",
        "test_cell",
        (
            "best_norm = better ? norm : best_norm;",
            "best_norm = run ? norm : best_norm;",
            "the last residual, not the best",
        ),
        (
            "if (some(rescaled)) measure",
            "if (false) measure",
            "norms that vanish beside a far start",
        ),
    ),
    *mutations(
        f"{CPU}/cell_newton.cpp",
        "test_cell",
        ("length * S(0.5)", "length * S(1)", "steps that are never halved"),
    ),
    *mutations(
        f"{CPU}/cell_lu.h",
        "test_cell_gradients",
        ("most * S(0.5)", "most * S(0)", "no pivoting"),
    ),
    *mutations(
        f"{CPU}/cell_backward.cpp",
        "test_cell_gradients",
        ("flagged[lane] = each - each;", "flagged[lane] = 0;", "gradients of flagged rows"),
        ("sum += parts[", "sum = parts[", "the last part of the sum alone"),
    ),
    *mutations(
        f"{CPU}/cell_ops.cpp",
        "test_cell_calls",
        (
            "if (value >= 0 && std::isfinite(value)) return;",
            "if (value >= 0) return;",
            "rtol of inf",
        ),
    ),
    *mutations(
        f"{INCLUDE}/activation.h",
        "test_cell",
        (
            "constexpr scalar kBelow = scalar(0.01);",
            "constexpr scalar kBelow = scalar(0.02);",
            "slope",
        ),
        ("p = p * s + 1.337977264e-01f;", "p = p * s + 1.347977264e-01f;", "tanh's third term"),
    ),
    *mutations(
        f"{OPS}/equilibrium_cell.py",
        "test_cell_calls",
        ("(max_iter * 2 * r * r", "(2 * r * r", "FLOPs of one evaluation"),
        ('check.tolerance(op, "rtol", rtol)', "", "any rtol"),
    ),
    *mutations(
        f"{OPS}/equilibrium_cell.py",
        "test_cell_gradients",
        ("ctx.mark_non_differentiable(steps, residual)", "", "a residual with a gradient"),
    ),
    *mutations(
        f"{OPS}/equilibrium_cell_reference.py",
        "test_cell",
        ("halvings + 1)", "halvings + 9)", "a reference that never halves"),
        ("image - step", "image + step", "sign of mixing in the reference"),
    ),
)
