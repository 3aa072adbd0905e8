"""One planted bug, and a short way to write many."""

from __future__ import annotations

import dataclasses

CPU = "csrc/cpu/expert_slice"
SHARED = "csrc/cpu/shared"
INCLUDE = "csrc/include/ppmoe"
OPS = "ppmoe_ops/ops/expert_slice"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One planted bug.

    Attributes:
        file: where, from the root of the tree.
        old: text that occurs there exactly once.
        new: what it becomes.
        note: what is wrong then.
        tests: the pytest arguments that should catch it; where they do not, all kernel tests run.
        kernels: members of the kernel table that it changes.
    """

    file: str
    old: str
    new: str
    note: str
    tests: str
    kernels: str = ""


def mutations(
    file: str, tests: str, kernels: str, *changes: tuple[str, str, str]
) -> tuple[Mutation, ...]:
    selection = f"tests/expert_slice/{tests}.py"
    return tuple(Mutation(file, old, new, note, selection, kernels) for old, new, note in changes)
