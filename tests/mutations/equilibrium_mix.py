"""Bugs in anderson_mix and in the solvers around it."""

from __future__ import annotations

from mutations.mutation import Mutation

CPU = "csrc/cpu/equilibrium"
OPS = "ppmoe_ops/ops/equilibrium"


def mutations(file: str, tests: str, *changes: tuple[str, str, str]) -> tuple[Mutation, ...]:
    selection = " ".join(f"tests/equilibrium/{each}.py" for each in tests.split())
    return tuple(Mutation(file, old, new, note, selection) for old, new, note in changes)


EQUILIBRIUM_MIX = (
    *mutations(
        f"{CPU}/mix.cpp",
        "test_anderson_mix",
        ("ng += next * gv;", "ng += next * next;", "the new difference with itself, not with g"),
        ("v -= d * weight;", "v += d * weight;", "the new difference is added"),
        ("v -= g * left;", "v += g * left;", "damping moves away"),
        ("copy(b.best_z, b.z_next, b.count);", "copy(b.best_z, b.z, b.count);", "the worse point"),
        ("if (c.put_back) copy(b.z, b.best_z, b.count);", "", "a done sample keeps a bad point"),
    ),
    *mutations(
        f"{CPU}/mix_ops.cpp",
        "test_anderson_mix",
        ("age >= 1 && age <= old", "age >= 1 && age < old", "the oldest difference is lost"),
        ("counters[kHeldPairs] > 0 && r > before", "r > before", "a plain step counts as mixed"),
        (
            "choice.weights[j++] = gamma[i];",
            "choice.weights[j++] = gamma[0];",
            "one weight for all",
        ),
        ("if (diverged) values[kBest] = HUGE_VAL;", "", "divergence is not told"),
        (
            "std::min(s.width, (piece + 1) * kPiece)",
            "(piece + 1) * kPiece",
            "reads past the sample",
        ),
    ),
    *mutations(
        f"{CPU}/mixing.h",
        "test_anderson_mix",
        ("gamma[i] = y[i] * scale[i];", "gamma[i] = y[i];", "weights of the scaled columns"),
    ),
    *mutations(
        f"{OPS}/mixing.py",
        "test_anderson_mix",
        ("factor)[:, :, 0] * scale", "factor)[:, :, 0]", "weights of the scaled columns"),
    ),
    *mutations(
        f"{OPS}/anderson_mix.py",
        "test_anderson_mix",
        (
            "stop = diverged | converged | last",
            "stop = diverged | converged",
            "never the last step",
        ),
        (
            "converged = ~diverged & (r <= atol + rtol * size)",
            "converged = ~diverged & (r < atol + rtol * size)",
            "an exact fixed point runs on",
        ),
    ),
    *mutations(
        f"{OPS}/solution.py",
        "test_solvers test_solvers_ways",
        ("self.evaluations >= options.max_iter", "self.evaluations > options.max_iter", "one more"),
        ("if self.index is not None and 0 < count < self.count:", "if False:", "never compacted"),
        ("to(self.wide, copy=True)\n\n", "to(self.wide)\n\n", "a trace of one residual"),
        ("and z.is_inference() == torch.is_inference_mode_enabled()", "", "an inference tensor"),
        ("_KEPT.pop()", "_KEPT[-1]", "two solves in one work space"),
    ),
    *mutations(
        f"{OPS}/mixing.py",
        "test_anderson_mix",
        ("torch.where(usable, projection * scale, 0)", "projection", "columns of their own scale"),
    ),
    *mutations(
        f"{OPS}/solvers.py",
        "test_solvers test_solvers_ways",
        ('"newton_krylov": newton_krylov,', '"newton_krylov": broyden,', "another solver"),
    ),
    *mutations(
        f"{OPS}/anderson.py",
        "test_solvers test_solvers_ways",
        ("damping=damping", "damping=1.0", "damping is forgotten"),
    ),
    *mutations(
        f"{OPS}/broyden.py",
        "test_solvers test_solvers_ways",
        ("y = old - g", "y = g - old", "the secant of the other sign"),
        (
            "_dots(v, y).masked_fill(here_next, 0)",
            "_dots(v, y)",
            "the term to be overwritten counts",
        ),
        ("write = here_next & good[:, None]", "write = here_next", "terms of tiny denominators"),
    ),
    *mutations(
        f"{OPS}/newton_krylov.py",
        "test_solvers test_solvers_ways",
        ("w = v - product(at", "w = v + product(at", "the Jacobian of the other sign"),
        ("track.products += busy", "pass", "products are not counted"),
        (
            "track.evaluations - 1)",
            "track.evaluations)",
            "no evaluation is left for the new point",
        ),
        ("(NotImplementedError, RuntimeError)", "(KeyError,)", "forward mode or nothing"),
    ),
    *mutations(
        f"{OPS}/options.py",
        "test_solvers test_solvers_ways",
        ("if not 0 <= value < math.inf:", "if not 0 <= value <= math.inf:", "no tolerance at all"),
        ("if isinstance(value, bool) or not isinstance(value, int):", "if False:", "any kind"),
    ),
)
