"""The one `torch.library` object of the package, and `register`: from contract to operator.

A contract is an `Operator`: everything that a caller, a compiler or a benchmark may ask about one
operator, kept in one file under `ops/`. Compiled kernels only ever add `IMPL` registrations to the
schemas that are defined here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "ppmoe_ops"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Sample = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Autocast:
    """What autocast does to an operator's floating-point tensors.

    `to` is `"float32"`, or `"region"` for the dtype of the autocast region; arguments named in
    `keep`, or items of a list as `params[3]`, are passed on as they came.
    """

    to: Literal["float32", "region"]
    keep: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator:
    """The contract of one operator.

    Attributes:
        name: the name under `torch.ops.ppmoe_ops`.
        family: the name its files carry in every folder (`expert_slice`, ...).
        schema: arguments and returns, as `(Tensor x, SymInt k) -> Tensor`.
        reference: the operator in plain PyTorch, for any device and dtype. It checks its arguments.
        fake: shapes and dtypes alone; raises what `reference` raises as far as shapes tell.
        flops: floating-point operations of a call, from its arguments (index work counts nothing).
        nbytes: the fewest bytes that any implementation of the call must move.
        samples: inputs for opcheck and parity tests, on a device, in a dtype.
        saved_bytes: bytes that a differentiable call keeps for its backward beyond its own inputs
            and outputs.
        reserved_bytes: the address space that holds them, where it is more.
        setup_context, backward: the autograd formula (`None` where there is nothing to derive).
        no_derivative: for a backward operator: its own derivative raises, in these words.
        composite: set where the operator is a composition over its `_forward` operator; it then has
            no kernels of its own.
        autocast: what autocast does; `None` leaves the arguments alone.
        vmap: a batching rule as `torch.library.register_vmap` takes it.
        sharding: a rule as `torch.distributed.tensor.experimental.register_sharding` takes it.
        triton: `module:function` of its Triton launcher, if there is one.
        benchmark: the benchmark that times it, `bench/<benchmark>.py`.
    """

    name: str
    family: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    flops: Callable[..., int]
    nbytes: Callable[..., int]
    samples: Callable[[torch.device, torch.dtype], Iterator[Sample]]
    saved_bytes: Callable[..., int] | None = None
    reserved_bytes: Callable[..., int] | None = None
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    no_derivative: str | None = None
    composite: bool = False
    autocast: Autocast | None = None
    vmap: Callable[..., Any] | None = None
    sharding: Callable[..., Any] | None = None
    triton: str | None = None
    benchmark: str = ""

    @property
    def qualname(self) -> str:
        return f"{NAMESPACE}::{self.name}"

    @property
    def overload(self) -> Any:
        """The callable `torch.ops.ppmoe_ops.<name>.default`."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


OPERATORS: dict[str, Operator] = {}


def register(op: Operator) -> Operator:
    """Define `op` and register all of its contract but the kernels (see `_backends.install`)."""
    if op.name in OPERATORS:
        raise ValueError(f"{op.name} is registered twice")
    LIBRARY.define(f"{op.name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    OPERATORS[op.name] = op

    if op.composite:
        LIBRARY.impl(op.name, op.reference, "CompositeImplicitAutograd")
    else:
        torch.library.register_fake(op.qualname, op.fake, lib=LIBRARY)
        if op.backward is not None:
            torch.library.register_autograd(
                op.qualname, op.backward, setup_context=op.setup_context, lib=LIBRARY
            )
        elif op.no_derivative is not None:
            _forbid_derivative(op)
        if op.vmap is not None:
            torch.library.register_vmap(op.qualname, op.vmap, lib=LIBRARY)
        packet = getattr(getattr(torch.ops, NAMESPACE), op.name)
        register_flop_formula(packet, get_raw=True)(_flop_formula(op))
    if op.autocast is not None:
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(op.name, _autocast_kernel(op, op.autocast, device), f"Autocast{device}")
    return op


def _flop_formula(op: Operator) -> Callable[..., int]:
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return op.flops(*args, **kwargs)

    return formula


def _forbid_derivative(op: Operator) -> None:
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{op.name}: {op.no_derivative}")

    torch.library.register_autograd(op.qualname, backward, setup_context=setup_context, lib=LIBRARY)


def _autocast_kernel(op: Operator, rule: Autocast, device: str) -> Callable[..., Any]:
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))
    device_type = device.lower()
    names = [argument.name for argument in op.overload._schema.arguments]

    def cast(name: str, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return [cast(f"{name}[{at}]", each, dtype) for at, each in enumerate(value)]
        if name in rule.keep or not isinstance(value, torch.Tensor):
            return value
        # float64 is left alone, as torch's own autocast does.
        if not value.is_floating_point() or value.dtype == torch.float64:
            return value
        return value.to(dtype)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        region = torch.get_autocast_dtype(device_type)
        dtype = torch.float32 if rule.to == "float32" else region
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op.overload(
                *(cast(name, value, dtype) for name, value in zip(names, args, strict=False)),
                **{name: cast(name, value, dtype) for name, value in kwargs.items()},
            )

    return kernel
