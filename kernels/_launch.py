"""What every Triton launcher shares: configurations, prepared launches, interpreter quirks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton reads this variable when a kernel is defined, so it is read here at the same time.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes, by what the kernel calls them, and the compiler's knobs.

    `specialize` splits a loop over tiles between warps that load and warps that multiply: on
    Hopper, for four warps, where the copy engine (TMA) loads every operand. `programs` is how many
    programs of a persistent grid share a multiprocessor; 0: as many as a rule says. `registers`: at
    most so many for a thread; 0: as many as the compiler likes.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    specialize: bool = False
    programs: int = 0
    registers: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


# Configurations by bytes per element, then by the rows that an expert has on average: up to FEW, up
# to SOME, "many". "unaligned" is for operands that only narrow loads read, which take registers;
# "little" for more than a few rows on devices with less shared memory than LITTLE.
Table = dict[int, dict[str, Config]]
FEW, SOME = 16, 64
LITTLE = 160 * 1024


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a launch depends on of the device that it is for."""

    multiprocessors: int
    tma: bool  # the tensor memory accelerator of Hopper and later
    shared: int = 227 * 1024  # bytes of shared memory that one program may have


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The device of a tensor; the interpreter gets few programs, so that each has several tiles."""
    if device.type != "cuda":
        return Gpu(3, False)
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.multi_processor_count, found.major >= 9, found.shared_memory_per_block_optin)


def described(tensor: Tensor, axis: int, block: list[int]) -> TensorDescriptor | None:
    """A descriptor for the copy engine, `axis` being the contiguous one; None if it cannot be."""
    size = tensor.element_size()
    if tensor.numel() == 0 or tensor.data_ptr() % 16 or tensor.stride(axis) != 1:
        return None
    rest = [stride for at, stride in enumerate(tensor.stride()) if at != axis % tensor.dim()]
    if any(stride <= 0 or stride * size % 16 for stride in rest) or block[-1] * size < 16:
        return None
    return TensorDescriptor.from_tensor(tensor.movedim(axis, -1), block)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel call that has been prepared but not made: tests compile it for absent devices."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    config: Config

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of `device`."""
        if self.programs == 0:
            return
        other = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if other else contextlib.nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.config.options)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type in which sums of `dtype` are kept."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def check_devices(op: str, like: Tensor, **others: Tensor | None) -> None:
    """Raise unless every tensor is where `like` is."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {like.device}")


def vectorizes(tensor: Tensor) -> bool:
    """Whether Triton may load 16 bytes at once: it knows a stride of 1 and multiples of 16."""
    strides = sorted(tensor.stride())
    rest = strides[strides.index(1) + 1 :] if 1 in strides else [1]
    return tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in rest)


def load_of(experts: int, *operands: Tensor) -> str:
    """The average load of an expert by name, known without reading a tensor; rows come first."""
    if not all(map(vectorizes, operands)):
        return "unaligned"
    load = triton.cdiv(operands[0].size(0), max(experts, 1))
    if load > FEW and gpu_of(operands[0].device).shared < LITTLE:
        return "little"
    return "few" if load <= FEW else "some" if load <= SOME else "many"


def column(table: Table, size: int, load: str) -> Config:
    """The configuration of a load for elements of `size` bytes; "many" stands for absent ones."""
    columns = table[size]
    return columns[load] if load in columns else columns["many"]


def choose(table: Table, experts: int, *operands: Tensor) -> Config:
    """The configuration of a table for an average load; see `load_of`."""
    return column(table, operands[0].dtype.itemsize, load_of(experts, *operands))


def upcasts(dtype: torch.dtype) -> bool:
    """Whether operands of a product are widened first: the interpreter cannot multiply bfloat16."""
    return INTERPRETING and dtype == torch.bfloat16


def _accept_numpy_scalars() -> None:
    """Let loops of the interpreter run to a loaded bound, which numpy 2.4 and Triton 3.6 do not."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


if INTERPRETING and triton.__version__.startswith("3.6."):
    _accept_numpy_scalars()
