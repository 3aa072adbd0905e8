"""Bugs in `equilibrium`: states, options, what is reported, the backward modes."""

from __future__ import annotations

from mutations.mutation import Mutation

OPS = "ppmoe_ops/ops/equilibrium"


def mutations(file: str, tests: str, *changes: tuple[str, str, str]) -> tuple[Mutation, ...]:
    selection = f"tests/equilibrium/{tests}.py"
    return tuple(Mutation(f"{OPS}/{file}", *change, selection) for change in changes)


EQUILIBRIUM_SOLVE = (
    *mutations(
        "equilibrium.py",
        "test_equilibrium",
        ("torch.promote_types(self.dtype, each)", "self.dtype", "the first tensor's dtype"),
        (
            "self.f(state, index)",
            "self.f(state, torch.arange(flat.size(0)))",
            "samples of a compacted state get the inputs of others",
        ),
        ("if warn and not bounded:", "if warn and bounded:", "warns the wrong way round"),
    ),
    *mutations(
        "equilibrium.py",
        "test_equilibrium_transforms",
        (
            "with torch.autocast(device.type, dtype=dtype):",
            "with torch.autocast(device.type, enabled=False):",
            "f without its autocast",
        ),
    ),
    *mutations(
        "equilibrium_info.py",
        "test_equilibrium",
        ("int((~info.converged).sum())", "int(info.converged.sum())", "counts the good ones"),
        ("float(info.residual[~info.converged].max())", "float(info.residual.min())",
         "the best residual for the worst"),
        ("frame.f_back, levels + 1", "frame.f_back, levels", "a line of the package's own"),
    ),
    *mutations(
        "gradients.py",
        "test_equilibrium_gradients",
        ("right.clone() if turned is None else right + turned",
         "right.clone() if turned is None else right - turned", "sign of the adjoint"),
        ("z = z + damping * (f(z) - z)", "z = z + (f(z) - z)", "phantom steps without damping"),
        ('"bld,bd->bl", secant.u, grad', '"bld,bd->bl", secant.v, grad',
         "the inverse is not turned"),
        ("z + options.damping * (x - z)", "x", "unroll without damping"),
        ("lost = (lost | torch.isinf(solution.residual)) & ~idle",
         "lost = torch.isinf(solution.residual) & ~idle", "a gradient for a lost sample"),
        ("self.info.backward = found", "self.info.backward = None", "the backward is not told"),
    ),
    *mutations(
        "gradients.py",
        "test_equilibrium_traps",
        ("return _apply(_Refused, solve(grad.detach()), y)", "return solve(grad.detach())",
         "a second derivative that is wrong"),
        ("if not _same(again, y):", "if False:", "another f goes unnoticed"),
        ("solution.z + (y - y.detach())", "y.detach().requires_grad_()",
         "the solution is taken for a constant"),
    ),
    *mutations(
        "gradients.py",
        "test_equilibrium_transforms",
        ("if top is not None and top(False) is None:", "if True:",
         "a checkpoint runs for every step of the backward"),
    ),
    *mutations(
        "recording.py",
        "test_equilibrium_traps",
        ("node._sequence_nr() < self.start", "node._sequence_nr() < 0 * self.start",
         "inputs with a history are not seen"),
        ("            kept[k] if k in edges", "            -kept[k] if k in edges",
         "sign of an exchanged gradient"),
        ("        kept = came[number]\n", "        kept = None\n", "no exchange"),
    ),
    *mutations(
        "recording.py",
        "test_equilibrium_transforms",
        ("queue_callback(self.forget)", "queue_callback(lambda: None)", "an exchange stays"),
    ),
)  # fmt: skip
