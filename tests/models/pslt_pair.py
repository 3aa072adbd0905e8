"""A plain PSLT and the package's with the same parameters, none of which is trivial."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ppmoe_ops.bench as door
from ppmoe_models import PSLT

door.benchmarks()
plain_pslt = importlib.import_module(f"{door.PACKAGE}.plain_pslt")

# 224 rows give maps of 14 and 7; 136 x 240 gives 9 x 15, where all need padding, and 5 x 8.
SIZES = ((224, 224), (136, 240), (97, 61))


def unsettle(model: nn.Module) -> None:
    """Random statistics, norms, biases and tables, in place."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, PSLT]:
    """Plain and ours, small, in training mode."""
    shared = {"num_classes": 5, "depths": (2, 1), **options}
    given = {name: value for name, value in shared.items() if name != "padding"}
    plain = plain_pslt.PlainPSLT(dim=12, **given)
    unsettle(plain)
    ours = PSLT(12, **shared)
    ours.load_state_dict(plain.state_dict())
    return plain.to(dtype), ours.to(dtype)


def ladder_blocks(dim: int, heads: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """One ladder block, plain and ours, in float64 and inference mode."""
    from ppmoe_models.pslt_blocks import LadderBlock

    plain = plain_pslt.LadderBlock(dim, heads).double().eval()
    unsettle(plain)
    ours = LadderBlock(dim, heads, **options).double().eval()
    state = {k: v for k, v in plain.state_dict().items() if "relative_position_index" not in k}
    ours.load_state_dict(state)
    return plain, ours


def images(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, dtype=dtype)


class Calls(TorchDispatchMode):
    """Notes the arguments of every operator of the package that is called inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "ppmoe_ops":
            self.seen.append((func._schema.name.removeprefix("ppmoe_ops::"), args))
        return func(*args, **(kwargs or {}))


@contextmanager
def calls() -> Iterator[Calls]:
    with Calls() as mode:
        yield mode
