"""`equilibrium_conv_cell_backward`: the adjoint solve, image by image, and one transposed pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Operator, Sample, register
from ppmoe_ops.ops.equilibrium.equilibrium_conv_cell_reference import cell_of, solve, wide_dtype
from ppmoe_ops.ops.equilibrium.equilibrium_conv_cell_shared import (
    PARAMETERS,
    check_cell,
    check_solver,
    check_tensor,
    products,
    sample_tensors,
)

_OP = "equilibrium_conv_cell_backward"


def adjoint_tolerance(dtype: torch.dtype) -> float:
    """The relative tolerance of the adjoint solve, where none is given."""
    return 1e-12 if dtype == torch.float64 else 1e-6


def _check(
    grad_z: Tensor, u: Tensor, w_u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    w3: Tensor, z: Tensor, residual: Tensor, activation: str, solver: str, atol: float,
    rtol: float | None, max_iter: int,
) -> None:  # fmt: skip
    named = {"w_u": w_u, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "w3": w3}
    sizes = check_cell(_OP, u, named)
    check_tensor(_OP, "grad_z", grad_z, "B, C, H, W", sizes, u)
    check_tensor(_OP, "z", z, "B, C, H, W", sizes, u)
    check.dim(_OP, "residual", residual, "B")
    check.dtype(_OP, "residual", residual, (wide_dtype(u.dtype),), "what u is summed in")
    check.size(_OP, "residual", "B", residual.size(0), u.size(0), "as u")
    tolerance = adjoint_tolerance(u.dtype) if rtol is None else rtol
    check_solver(_OP, activation, solver, atol, tolerance, max_iter)


def _empty(u: Tensor, w_u: Tensor, w1: Tensor) -> tuple[Tensor, ...]:
    hidden, channels = w1.shape
    shapes = (
        u.shape, w_u.shape, w1.shape, (hidden,), (hidden, hidden, 3, 3), (hidden,),
        (channels, hidden), (channels,),
    )  # fmt: skip
    return tuple(u.new_empty(shape) for shape in shapes)


def _reference(
    grad_z: Tensor, u: Tensor, w_u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    w3: Tensor, z: Tensor, residual: Tensor, activation: str, solver: str = "anderson",
    atol: float = 0.0, rtol: float | None = None, max_iter: int = 100,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check(
        grad_z, u, w_u, w1, b1, w2, b2, w3, z, residual, activation, solver, atol, rtol, max_iter
    )
    empty = _empty(u, w_u, w1)
    if z.numel() == 0:
        return tuple(each.zero_() for each in empty)
    cell = cell_of(activation, u, w_u, w1, b1, w2, b2, w3)
    wide = wide_dtype(u.dtype)
    grad, z = grad_z.to(wide).contiguous(), z.to(wide)
    d1, d2, h1, h2 = cell.slopes(z, torch.arange(u.size(0), device=u.device))

    def f(v: Tensor, images: Tensor) -> Tensor:
        return grad[images] + cell.transposed(v, d1[images], d2[images])[0]

    tolerance = adjoint_tolerance(u.dtype) if rtol is None else rtol
    solution = solve(f, grad, solver, atol, tolerance, max_iter)
    bad = ~residual.isfinite() | ~solution.residual.isfinite()
    v = torch.where(bad[:, None, None, None], torch.nan, solution.x)
    _, t1, t2 = cell.transposed(v, d1, d2)
    grads = (
        torch.einsum("bkhw,ki->bihw", t1, cell.w_u), torch.einsum("bkhw,bihw->ki", t1, cell.u),
        torch.einsum("bkhw,bchw->kc", t1, z), t1.sum((0, 2, 3)),
        conv2d_weight(h1, w2.shape, t2, padding=1), t2.sum((0, 2, 3)),
        torch.einsum("bchw,bkhw->ck", v, h2), v.sum((0, 2, 3)),
    )  # fmt: skip
    return tuple(each.to(u.dtype).contiguous() for each in grads)


def _fake(
    grad_z: Tensor, u: Tensor, w_u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    w3: Tensor, z: Tensor, residual: Tensor, activation: str, solver: str = "anderson",
    atol: float = 0.0, rtol: float | None = None, max_iter: int = 100,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check(
        grad_z, u, w_u, w1, b1, w2, b2, w3, z, residual, activation, solver, atol, rtol, max_iter
    )
    return _empty(u, w_u, w1)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for sizes, hidden, channels, activation in (
        ((2, 3, 6, 7), 4, 3, "silu"),
        ((1, 1, 3, 19), 5, 2, "gelu"),
        ((0, 2, 3, 4), 2, 1, "relu"),
    ):
        u, *parameters, _ = sample_tensors(device, dtype, sizes, hidden, channels)
        z, grad = torch.randn(2, sizes[0], channels, *sizes[2:], device=device, dtype=dtype)
        residual = torch.zeros(sizes[0], device=device, dtype=wide_dtype(dtype))
        yield (grad, u, *parameters, z, residual, activation), {}


def _flops(
    grad_z: Tensor, u: Tensor, w_u: Tensor, w1: Tensor, *args: Any, max_iter: int = 100, **_: Any
) -> int:
    # Nominal: f with its slopes, all the adjoint steps that there may be, and two products for
    # each of f's.
    steps = args[10] if len(args) > 10 else max_iter
    return 2 * (3 * u.numel() * w_u.size(0) + (steps + 3) * products(u, w1))


def _nbytes(
    grad_z: Tensor, u: Tensor, w_u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    w3: Tensor, z: Tensor, residual: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    parameters = sum(each.numel() for each in (w_u, w1, b1, w2, b2, w3))
    numbers = 2 * u.numel() + grad_z.numel() + z.numel() + 2 * parameters + w1.size(1)
    return numbers * u.element_size() + residual.numel() * residual.element_size()


EQUILIBRIUM_CONV_CELL_BACKWARD = register(
    Operator(
        name=_OP,
        family="equilibrium",
        schema=f"(Tensor grad_z, {PARAMETERS}, Tensor z, Tensor residual, str activation, "
        "str solver='anderson', float atol=0., float? rtol=None, SymInt max_iter=100) -> "
        "(Tensor grad_u, Tensor grad_w_u, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, "
        "Tensor grad_b2, Tensor grad_w3, Tensor grad_b3)",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        samples=_samples,
        no_derivative="equilibrium_conv_cell has no second derivative; allowed: first derivatives",
        sharding=lambda *_, **__: (("0PPPPPPP", "00RRRRRR00"),),
        benchmark="bench_equilibrium",
    )
)
