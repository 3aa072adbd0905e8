"""Chooses, once at import, what serves each operator on each device, and says so.

CPU tensors go to the C++ library; CUDA tensors to the CUDA C++ library, else to Triton; everything
else to the plain-PyTorch reference. `PPMOE_OPS_BACKEND` forces one and then refuses what it cannot
serve.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from ppmoe_ops import _load
from ppmoe_ops._library import LIBRARY, OPERATORS, Operator

BACKENDS = ("reference", "cpp", "cuda", "triton")
VARIABLE = "PPMOE_OPS_BACKEND"
_LOG = logging.getLogger("ppmoe_ops")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What serves one operator on one device type, and why each other backend does not."""

    backend: str | None
    missing: dict[str, str]


_CHOICES: dict[str, dict[str, Choice]] = {}


def choices() -> dict[str, dict[str, Choice]]:
    """Operator name -> device type ("cpu", "cuda") -> what serves it."""
    return _CHOICES


def forced() -> str | None:
    """The backend that `PPMOE_OPS_BACKEND` forces, if any."""
    name = os.environ.get(VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{VARIABLE} is '{name}'; allowed: {', '.join(BACKENDS)}")
    return name


def interpreting() -> bool:
    """Whether Triton's CPU interpreter is on, so that its kernels take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def install() -> None:
    """Load the libraries and give every operator a kernel for every device."""
    only = forced()
    libraries = {
        backend: _load.load(backend) if only in (None, backend) else None
        for backend in _load.LIBRARIES
    }
    for op in OPERATORS.values():
        if op.composite:
            continue
        _CHOICES[op.name] = {
            device: _choose(op, device, only, libraries) for device in ("cpu", "cuda")
        }
        for device, choice in _CHOICES[op.name].items():
            if choice.backend == "triton":
                LIBRARY.impl(op.name, _triton_launcher(op), device.upper())
        rest = _reference(op) if only in (None, "reference") else _refusal(op, only)
        LIBRARY.impl(op.name, rest, "CompositeExplicitAutograd")


def _choose(
    op: Operator, device: str, only: str | None, libraries: dict[str, _load.Status | None]
) -> Choice:
    missing: dict[str, str] = {}
    order = {"cpu": ("cpp", "triton"), "cuda": ("cuda", "triton")}[device]
    for backend in order:
        reason = _why_missing(op, device, backend, only, libraries)
        if reason is None:
            return Choice(backend, missing)
        missing[backend] = reason
    if only in (None, "reference"):
        return Choice("reference", missing)
    return Choice(None, missing)


def _why_missing(
    op: Operator,
    device: str,
    backend: str,
    only: str | None,
    libraries: dict[str, _load.Status | None],
) -> str | None:
    if only is not None and only != backend:
        return f"{VARIABLE}={only}"
    if backend == "triton":
        if op.triton is None:
            return "no Triton kernel"
        if device == "cpu" and not (interpreting() and only == "triton"):
            return "Triton takes CPU tensors only when it is forced and TRITON_INTERPRET=1"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        return None
    status = libraries[backend]
    if status is None or not status.loaded:
        return status.reason if status else "not loaded"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op.qualname, device.upper()):
        return f"{status.path.name} has no kernel for it"
    return None


def _triton_launcher(op: Operator) -> Callable[..., Any]:
    assert op.triton is not None
    module_name, function = op.triton.split(":")

    def launch(*args: Any, **kwargs: Any) -> Any:
        # Imported at the first call: importing the package must not need Triton.
        return getattr(importlib.import_module(module_name), function)(*args, **kwargs)

    return launch


def _device_type(args: tuple[Any, ...]) -> str:
    for value in args:
        if isinstance(value, torch.Tensor):
            return value.device.type
    return "cpu"


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _reference(op: Operator) -> Callable[..., Any]:
    announced: set[str] = set()

    def reference(*args: Any, **kwargs: Any) -> Any:
        device = _device_type(args)
        if device not in announced and forced() is None:
            announced.add(device)
            choice = _CHOICES[op.name].get(device)
            why = "; ".join(f"{k}: {v}" for k, v in choice.missing.items()) if choice else ""
            _LOG.warning(
                "%s: the plain-PyTorch reference serves %s tensors (%s)",
                op.name,
                device,
                why or "no kernels for this device",
            )
        # Autocast has had its say before any backend; it must not cast inside the reference too.
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op.reference(*args, **kwargs)

    return reference


def _refusal(op: Operator, only: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        device = _device_type(args)
        choice = _CHOICES[op.name].get(device)
        why = choice.missing.get(only) if choice else None
        raise RuntimeError(
            f"{op.name}: {VARIABLE}={only} cannot serve {device} tensors "
            f"({why or 'it has no kernels for this device'})"
        )

    return refuse
