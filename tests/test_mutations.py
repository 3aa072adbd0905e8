"""The list of mutations fits the text as it is, and leaves no kernel out."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from mutations import MUTATIONS, Mutation

from ppmoe_ops._library import OPERATORS

ROOT = Path(__file__).resolve().parents[1]
sources: Any = import_module("sources")  # csrc/sources.py


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.note}")
def test_applies_once(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    assert mutation.note
    assert all((ROOT / each).exists() for each in mutation.tests.split() if each[0] != "-")


def test_no_two_are_the_same() -> None:
    applied = [(each.file, each.old, each.new) for each in MUTATIONS]
    assert len(set(applied)) == len(applied)


def test_every_source_of_kernels_and_operators_has_one() -> None:
    mutated = {each.file for each in MUTATIONS}
    # The table and the registration hold names alone.
    families = ("equilibrium", "expert_slice", "ladder_attention")
    names_alone = {
        "cpu/capability.cpp",
        *(f"cpu/{family}/table.cpp" for family in families),
        *(f"cpu/{family}.cpp" for family in families),
    }
    listed = {*sources.CPU_KERNELS, *sources.CPU_OPS, *sources.CUDA_SOURCES} - names_alone
    assert {f"csrc/{each}" for each in listed} <= mutated


def test_every_triton_file_has_one() -> None:
    mutated = {each.file for each in MUTATIONS}
    kernels = {path.name for path in (ROOT / "kernels/expert_slice").glob("*.py")}
    # Both hold names and numbers alone.
    kernels -= {"__init__.py", "configs.py"}
    assert kernels
    assert {f"kernels/expert_slice/{name}" for name in kernels} <= mutated


def test_every_kernel_has_one() -> None:
    """Of the functions in the table that operators call kernels through."""
    header = (ROOT / "csrc/cpu/expert_slice/kernels.h").read_text()
    table = header[header.index("struct Kernels {") :]
    kernels = re.findall(r"\(\*(\w+)\)\(", table[: table.index("};")])
    assert kernels
    covered = {kernel for each in MUTATIONS for kernel in each.kernels.split()}
    scratch = {name for name in kernels if name.endswith("_scratch")}
    assert set(kernels) - scratch <= covered
    assert covered <= set(kernels)


def test_every_contract_has_one() -> None:
    mutated = {each.file for each in MUTATIONS}
    families = {op.family for op in OPERATORS.values()}
    contracts = {
        str(path.relative_to(ROOT))
        for family in families
        for path in (ROOT / "ppmoe_ops" / "ops" / family).glob("*.py")
        if path.name != "__init__.py"
    }
    assert contracts <= mutated
