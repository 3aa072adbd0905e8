"""Calls every row of the bad-input table on memory that cannot be touched; run by its test.

A kernel that reads or writes a floating-point argument before it has checked all of them ends this
process with a segmentation fault.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from bad_input import BAD_CALLS
from torch import Tensor

from ppmoe_ops._library import OPERATORS

_KEPT: list[mmap.mmap] = []


def forbidden(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype over a page without any access."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        return tensor
    page = mmap.mmap(-1, -(-extent * tensor.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE)
    _KEPT.append(page)
    base = torch.frombuffer(page, dtype=tensor.dtype, count=extent)
    libc = ctypes.CDLL(None, use_errno=True)
    no_access = 0
    address = ctypes.c_void_p(base.data_ptr())
    assert libc.mprotect(address, ctypes.c_size_t(len(page)), no_access) == 0
    return base.as_strided(tensor.shape, tensor.stride())


def main() -> None:
    for row in BAD_CALLS:
        print(row, flush=True)
        args: list[Any] = [
            forbidden(each) if isinstance(each, Tensor) and each.is_floating_point() else each
            for each in row.args()
        ]
        try:
            OPERATORS[row.op].overload(*args)
        except row.error:
            continue
        raise SystemExit("was not refused")
    print(f"{len(BAD_CALLS)} calls refused")


if __name__ == "__main__":
    main()
