"""Bugs in equilibrium_conv_cell: its passes, its solver, its sums, its contract."""

from __future__ import annotations

from mutations.mutation import Mutation

CPU = "csrc/cpu/equilibrium"
OPS = "ppmoe_ops/ops/equilibrium"


def mutations(file: str, tests: str, *changes: tuple[str, str, str]) -> tuple[Mutation, ...]:
    selection = f"tests/equilibrium/{tests}.py"
    return tuple(Mutation(file, old, new, note, selection) for old, new, note in changes)


EQUILIBRIUM_CONV_CELL = (
    *mutations(
        f"{CPU}/conv.h",
        "test_conv_cell",
        (
            "if (x + j + lanes > s.width) v = first_lanes(v, s.width - x - j);",
            "",
            "hidden values past the end of a row",
        ),
        (
            "for (int64_t x = kPad + width; x < pitch; ++x) rows[x] = 0;",
            "",
            "what lies behind a row as its padding",
        ),
        ("acc[2 + D + j] += d * g;", "acc[2 + D + j] += d * whole;", "a projection of the value"),
        ("z -= weights[j] * (newer - older);", "z += weights[j] * (newer - older);", "mixed away"),
    ),
    *mutations(
        f"{CPU}/conv_f.cpp",
        "test_conv_cell_gradients",
        (
            "store(static_cast<S*>(to.second_slope) + offset, slope);",
            "store(static_cast<S*>(to.second_slope) + offset, value);",
            "the second activation for its derivative",
        ),
        (
            "for (int64_t x = 0; x < pitch && y == 0; ++x) here[x - pitch] = 0;",
            "",
            "no row of zeros above the map",
        ),
    ),
    *mutations(
        f"{CPU}/conv_adjoint.cpp",
        "test_conv_cell_gradients",
        (
            "return x * load<V>(slope_second + offset);",
            "return x;",
            "an adjoint without the first slope",
        ),
    ),
    *mutations(
        f"{CPU}/conv_adjoint.cpp",
        "test_conv_cell",
        ("for (; x < pitch; ++x) to[x] = 0;", "", "planes that do not end in zeros"),
    ),
    *mutations(
        f"{CPU}/conv_gradients.cpp",
        "test_conv_cell_gradients",
        ("for (int64_t x = 0; x < pitch; ++x) to.ones[x] = 1;", "", "biases without gradients"),
        ("first + dy) * padded", "first + 1) * padded", "taps of one row alone"),
    ),
    *mutations(
        f"{CPU}/conv_kernels.h",
        "test_conv_cell_gradients",
        ("{ return height * pitch(); }", "{ return (height - 1) * pitch(); }", "planes overlap"),
    ),
    *mutations(
        f"{CPU}/conv_solve.cpp",
        "test_conv_cell_solver",
        ("if (size < least_) {", "if (true) {", "the last iterate for the best"),
        ("!std::isfinite(size) || size > limit_", "false", "no end of a diverging solve"),
        (
            "gram_[i][j] = gram_[i - 1][j - 1];",
            "gram_[i][j] = gram_[i][j];",
            "products of older differences",
        ),
    ),
    *mutations(
        f"{CPU}/conv_solve.h",
        "test_conv_cell_solver",
        ("p.mixed = count_;", "p.mixed = count_ > 0;", "one difference is mixed"),
    ),
    *mutations(
        f"{CPU}/conv_ops.h",
        "test_conv_cell_solver",
        (
            "for (int64_t at = task * together; at < past; ++at) {",
            "for (int64_t at = task * together; at < past - (past == images); ++at) {",
            "no last image",
        ),
    ),
    *mutations(
        f"{CPU}/conv_ops.cpp",
        "test_conv_cell",
        (
            "return i < c ? w1[o * c + i] : w_u[o * u + i - c];",
            "return i < c ? w1[o * c + i] : 0;",
            "an input that is not injected",
        ),
        (
            "case Phase::kInject: image.pass.injected = image.memory + injected_; break;",
            "case Phase::kInject: break;",
            "a wide input that is not injected",
        ),
        (
            "return w2[(i / 9 * r + o) * 9 + 8 - i % 9];",
            "return w2[(i / 9 * r + o) * 9 + i % 9];",
            "taps that are not turned",
        ),
    ),
    *mutations(
        f"{CPU}/conv_backward_ops.cpp",
        "test_conv_cell_gradients",
        (
            "if (!std::isfinite(image.solve.residual())) return give_up(image);",
            "",
            "numbers from an adjoint that diverged",
        ),
        (
            "write(s, from, of_first, i + c, grad_b1);",
            "write(s, from, of_first, i, grad_b1);",
            "another sum for b1",
        ),
    ),
    *mutations(
        f"{OPS}/equilibrium_conv_cell.py",
        "test_conv_cell_inputs",
        ('autocast=Autocast("float32"),', 'autocast=Autocast("region"),', "a solve in bfloat16"),
    ),
    *mutations(
        f"{OPS}/equilibrium_conv_cell_backward.py",
        "test_conv_cell_inputs",
        ('check.size(_OP, "residual", "B"', 'check.size(_OP, "z", "B"', "an error's subject"),
    ),
    *mutations(
        f"{OPS}/equilibrium_conv_cell_reference.py",
        "test_conv_cell_solver",
        (
            "diverged = ~size.isfinite() | (size > limit)",
            "diverged = ~size.isfinite()",
            "a reference that goes on",
        ),
    ),
    *mutations(
        f"{OPS}/equilibrium_conv_cell_shared.py",
        "test_conv_cell_inputs",
        ("MOST_HIDDEN = 64", "MOST_HIDDEN = 65", "one hidden map too many"),
    ),
)
