"""Seeded tensors for the builders of inputs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Seeded(Protocol):
    """What a workload says of its tensors."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def seed(self) -> int: ...


class Source:
    """Seeded tensors on one device: the same device and seed give the same values.

    On the device `meta` they are shapes without values, which costs are counted from.
    """

    def __init__(self, workload: Seeded, device: torch.device, stream: int = 0) -> None:
        self.workload = workload
        self.device = device
        # Gradients come from a stream of their own: they must not repeat the inputs.
        self._generator: torch.Generator | None = None
        if device.type != "meta":
            self._generator = torch.Generator(device).manual_seed(2 * workload.seed + stream)

    def randn(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch.randn(*shape, generator=self._generator, device=self.device, dtype=wide)
        return (values * scale if scale != 1.0 else values).to(dtype or self.workload.dtype)

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(*shape, generator=self._generator, device=self.device, dtype=dtype)
