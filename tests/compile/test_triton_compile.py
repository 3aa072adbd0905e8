"""Every configuration of the Triton kernels compiled to machine code for GPUs that are not here.

What is launched and what is compiled come from the same `Launch`, for the shapes of a real model.
Three shapes: whole tiles, tiles that need every mask, and rows that only narrow loads can read.
PPMOE_OPS_FULL=1 takes the second for all configurations and targets, not for a sample.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_aids import MATRIX_INSTRUCTIONS, TARGETS, compile_launch, usage_of

from ppmoe_ops.kernels._launch import Launch
from ppmoe_ops.kernels.expert_slice import grouped_linear as kernels

FULL = os.environ.get("PPMOE_OPS_FULL") == "1"
ROOT = Path(__file__).resolve().parents[2]
EXPERTS = 128
EVEN, MASKED, UNALIGNED = (768, 2048), (784, 2064), (771, 2050)
# Spilt bytes: none in whole tiles; where every mask is needed, a few words that are set once.
STACK_LIMITS = {EVEN: 0, MASKED: 64, UNALIGNED: 0}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LOADS = {"few": 8, "some": 60, "many": 512}
KINDS = ("forward", "rows gradient", "weight gradient", "bias gradient")


def launch_of(kind: str, dtype: torch.dtype, load: str, widths: tuple[int, int]) -> Launch:
    """The launch for EXPERTS experts with an average load, on tensors without memory."""
    count, (width_out, width_in) = EXPERTS * LOADS[load], widths

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    rows, grad = empty(count, width_in), empty(count, width_out)
    weight, offsets = empty(EXPERTS, width_out, width_in), empty(EXPERTS + 1, of=torch.int32)
    bias = empty(EXPERTS, width_out)
    if kind == "forward":
        return kernels.linear_launch(rows, offsets, weight, bias, grad)
    if kind == "rows gradient":
        return kernels.linear_launch(grad, offsets, weight.transpose(1, 2), None, rows)
    if kind == "weight gradient":
        return kernels.weight_gradient_launch(grad, rows, offsets, weight)
    return kernels.bias_gradient_launch(grad, offsets, bias)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """One line for each kernel; printed and kept under reports/ at the end."""
    lines = [
        f"{'kernel':16} {'dtype':8} {'load':5} {'N, K_in':12} {'target':6} "
        f"{'regs':>4} {'shared':>7} {'stack':>5}  instruction"
    ]
    yield lines
    text = "\n".join(lines)
    print(text)
    reports = ROOT / "reports"
    reports.mkdir(exist_ok=True)
    (reports / "triton_resources.txt").write_text(text + "\n")


def cases() -> Iterator[tuple[str, torch.dtype, str, tuple[int, int], int]]:
    for capability in TARGETS:
        for kind in KINDS:
            for dtype in DTYPES:
                # The bias gradient has one configuration for all loads.
                for load in LOADS if kind != "bias gradient" else ("many",):
                    yield kind, dtype, load, EVEN, capability
                    if FULL or (capability == 90 and dtype == torch.bfloat16):
                        yield kind, dtype, load, MASKED, capability
                yield kind, dtype, "many", UNALIGNED, capability


@pytest.mark.parametrize(("kind", "dtype", "load", "widths", "capability"), list(cases()))
def test_compiles_within_limits(
    kind: str,
    dtype: torch.dtype,
    load: str,
    widths: tuple[int, int],
    capability: int,
    table: list[str],
    tmp_path: Path,
) -> None:
    compiled = compile_launch(launch_of(kind, dtype, load, widths), capability)
    usage = usage_of(compiled, tmp_path)
    found = MATRIX_INSTRUCTIONS.search(compiled.asm["ptx"])
    name = str(dtype).removeprefix("torch.")
    table.append(
        f"{kind:16} {name:8} {load:5} {widths!s:12} sm_{capability:<3} {usage.registers:4} "
        f"{usage.shared:7} {usage.stack:5}  {found.group(1) if found else '-'}"
    )
    assert usage.shared <= TARGETS[capability]
    assert usage.stack <= STACK_LIMITS[widths]
    if dtype.itemsize == 2 and kind != "bias gradient":
        assert found is not None
        if capability == 90 and load != "few" and widths != UNALIGNED:
            assert found.group(1) == "wgmma.mma_async"


def test_float32_products_are_not_rounded_to_tf32() -> None:
    compiled = compile_launch(launch_of("forward", torch.float32, "many", EVEN), 90)
    assert "tf32" not in compiled.asm["ptx"]


def test_addresses_are_64_bit() -> None:
    for kind in KINDS:
        compiled = compile_launch(launch_of(kind, torch.bfloat16, "many", EVEN), 90)
        operands = r"tt\.addptr %\S+, %\S+ : \S*!tt\.ptr<(\w+)>+, (?:tensor<[\dx]+)?(\w+)"
        steps = re.findall(operands, compiled.asm["ttir"])
        assert len(steps) == compiled.asm["ttir"].count("tt.addptr")
        # Only `offsets`, of int32, is indexed by 32 bits: it has at most 2**31 elements.
        assert {index for element, index in steps if element != "i32"} == {"i64"}, kind
