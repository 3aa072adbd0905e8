"""What the compile tier shares: a launch compiled for a GPU that is not here, and what it takes."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ppmoe_ops.kernels._launch import Launch

# Compute capability -> bytes of shared memory that one block may have.
TARGETS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_INSTRUCTIONS = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes of a multiprocessor."""

    registers: int
    stack: int
    shared: int


def compile_launch(launch: Launch, capability: int) -> triton.compiler.CompiledKernel:
    """Compile as a launch would: ones are constants, multiples of 16 are known to be such."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        known = not parameter.do_not_specialize
        if isinstance(value, TensorDescriptor):
            element = POINTERS[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{element}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (known and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if known and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {
        **launch.config.options,
        "enable_fp_fusion": True,  # as at run time; other tests pin it off
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage_of(compiled: triton.compiler.CompiledKernel, folder: Path) -> Usage:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    run = subprocess.run(
        [tool, "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    )
    found = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", run.stdout)}
    return Usage(found["REG"], found["STACK"], compiled.metadata.shared)
