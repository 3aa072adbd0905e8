"""The support matrix: what each public operator has, from the registry and the kernel sources.

It tells what the source tree contains, not what one machine has built, so that every machine
generates the same text; `python -m ppmoe_ops.info` tells what serves an operator here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ppmoe_ops._checks import FLOATS
from ppmoe_ops._library import OPERATORS, Operator

CSRC = Path(__file__).resolve().parent.parent / "csrc"
HEADER = (
    "operator",
    "CPU, C++",
    "CUDA C++",
    "Triton",
    "dtypes",
    "gradient to",
    "under autocast",
    "compile, export",
    "vmap",
    "DTensor",
)
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SHORT |= {torch.float64: "fp64", torch.int32: "int32", torch.int64: "int64"}


def registered(folder: str) -> frozenset[str]:
    """Operators that the sources in csrc/`folder` register a kernel for."""
    if not CSRC.is_dir():
        raise FileNotFoundError(
            f"the support matrix is made from the sources: there is no {CSRC}. "
            "Run it in a source tree, or read the matrix in README.md."
        )
    sources = (path for path in (CSRC / folder).rglob("*") if path.suffix in (".cpp", ".cu"))
    return frozenset(
        name for path in sources for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())
    )


def public_operators() -> list[Operator]:
    """The operators that people call: neither the `_forward` nor the `_backward` of another one."""
    return [
        op
        for op in OPERATORS.values()
        if not any(
            op.name == f"{other}{suffix}"
            for other in OPERATORS
            for suffix in ("_forward", "_backward")
        )
    ]


def markdown() -> str:
    """The support matrix as a Markdown table."""
    compiled = {folder: registered(folder) for folder in ("cpu", "cuda")}
    triton = frozenset(op.name for op in OPERATORS.values() if op.triton is not None)
    rows = [HEADER, ("---",) * len(HEADER)]
    for op in public_operators():
        rows.append(
            (
                f"`{op.name}`",
                _kernels(op, compiled["cpu"]),
                _kernels(op, compiled["cuda"]),
                _kernels(op, triton),
                ", ".join(_SHORT[dtype] for dtype in dtypes(op)),
                ", ".join(gradients(op)) or "none",
                _autocast(op),
                "yes",
                _vmap(op),
                "sharded" if op.sharding is not None else "replicated",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _kernels(op: Operator, having: frozenset[str]) -> str:
    forward = f"{op.name}_forward" if op.composite else op.name
    directions = [("forward", forward), ("backward", f"{op.name}_backward")]
    return ", ".join(word for word, name in directions if name in having) or "-"


def _tensors(op: Operator, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor among the operator's samples in `dtype`."""
    names = [argument.name for argument in op.overload._schema.arguments]
    for args, kwargs in op.samples(torch.device("cpu"), dtype):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        yield from ((k, v) for k, v in given.items() if isinstance(v, torch.Tensor))


def dtypes(op: Operator) -> list[torch.dtype]:
    """Dtypes of the data that the operator's samples, which the tests call it with, cover."""
    floats = [
        dtype for dtype in FLOATS if any(value.dtype == dtype for _, value in _tensors(op, dtype))
    ]
    if floats:
        return floats
    found = {value.dtype for _, value in _tensors(op, torch.float32)}
    return [dtype for dtype in _SHORT if dtype in found]


def gradients(op: Operator) -> list[str]:
    """Arguments that the operator is differentiable in."""
    asked = {name for name, value in _tensors(op, torch.float32) if value.requires_grad}
    return [f"`{each.name}`" for each in op.overload._schema.arguments if each.name in asked]


def _vmap(op: Operator) -> str:
    if op.overload._schema.is_mutable:
        return "-"
    return "batched" if op.vmap is not None else "loop"


def _autocast(op: Operator) -> str:
    if op.autocast is None:
        return "unchanged"
    to = "float32" if op.autocast.to == "float32" else "its dtype"
    names = dict.fromkeys(name.partition("[")[0] for name in op.autocast.keep)
    some = {name.partition("[")[0] for name in op.autocast.keep if "[" in name}
    kept = ", ".join(f"some of `{name}`" if name in some else f"`{name}`" for name in names)
    return f"{to}, but {kept}" if kept else to
