"""`equilibrium_conv_cell`: the fixed point of a convolutional bottleneck, image by image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops._library import Autocast, Operator, Sample, register
from ppmoe_ops.ops.equilibrium.equilibrium_conv_cell_backward import EQUILIBRIUM_CONV_CELL_BACKWARD
from ppmoe_ops.ops.equilibrium.equilibrium_conv_cell_reference import cell_of, solve, wide_dtype
from ppmoe_ops.ops.equilibrium.equilibrium_conv_cell_shared import (
    PARAMETERS,
    check_cell,
    check_solver,
    check_tensor,
    products,
    sample_tensors,
)


def equilibrium_conv_cell(
    u: Tensor,
    w_u: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    z0: Tensor | None = None,
    activation: str = "tanh",
    solver: str = "anderson",
    atol: float = 0.0,
    rtol: float = 1e-3,
    max_iter: int = 30,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve z = f(z) for every image, f being a bottleneck of 1x1, 3x3 and 1x1 convolutions.

    f(z) = w3 act(w2 * act(w1 z + w_u u + b1) + b2) + b3, where `*` is a 3x3 convolution of the r
    hidden maps, padded by zeros, and all other products are of the channels of one pixel. The input
    u is injected inside the first activation, at every evaluation.

    An image has converged when |f(z) - z|_2 <= atol + rtol |f(z)|_2 over all of its elements, and
    stops for itself: neither its result nor its steps depend on other images of the batch. Norms
    are taken in float32 or wider. An image of which the residual is not finite, or has grown beyond
    1e4 times |z0| + |f(z0)|, has diverged and stops at once.

    Args:
        u: [B, U, H, W] float32, bfloat16, float16 or float64; U at least 1, any strides.
        w_u: [r, U] in the dtype of `u`; r from 1 to 64, any strides, as all that follow.
        w1: [r, C] in the dtype of `u`; C at least 1.
        b1: [r] in the dtype of `u`.
        w2: [r, r, 3, 3] in the dtype of `u`, output channels first.
        b2: [r] in the dtype of `u`.
        w3: [C, r] in the dtype of `u`.
        b3: [C] in the dtype of `u`.
        z0: [B, C, H, W] in the dtype of `u`, where the solve starts (default: zeros). A solution of
            a problem nearby saves steps.
        activation: "tanh", "relu", "gelu" (of erf), "silu", "sigmoid" or "leaky_relu" (slope 0.01).
        solver: "anderson" (the last six differences are mixed; the history starts again after a
            mixed step that made the residual larger) or "fixed_point" (z <- f(z)).
        atol: absolute tolerance, finite and at least 0.
        rtol: relative tolerance, finite and at least 0.
        max_iter: evaluations of f that an image may take, at least 1.

    Returns:
        z [B, C, H, W] in the dtype of `u`, contiguous: f of the point with the smallest residual of
        all that were evaluated; steps [B] int32, the evaluations of f that the image took; residual
        [B] float32 (float64 for float64), |f(z) - z|_2 at that point, infinite where the solve
        diverged; z is then its best value so far. States are kept and f is evaluated in float32
        (float64 for float64).

    Raises:
        ValueError: a shape, dtype, activation, solver, tolerance or `max_iter` not as above.

    Gradient: to all arguments but `z0`, by the implicit function theorem at the returned z: the
        adjoint v = g + J^T v is solved image by image with Anderson's method (rtol 1e-6, in float64
        1e-12; at most 100 steps). It is NaN for images whose residual is infinite, and so then are
        gradients that are sums over images. `steps` and `residual` are not differentiable.
    Saved for backward: no bytes of its own; keeps the arguments but `b3` and `z0`, and the results
        z and residual alive. Memory does not depend on the number of steps.

    Source: LION (arXiv 2303.09992), the implicit layer in front of the backbone; the bottleneck is
        our choice where the paper leaves it open. Anderson's method, type II, as Walker and Ni
        (SIAM J. Numer. Anal. 49, 2011) state it.

    Example:
        >>> import torch, ppmoe_ops
        >>> u = torch.ones(1, 1, 2, 2)
        >>> one, zero, w2 = torch.ones(1, 1), torch.zeros(1), torch.zeros(1, 1, 3, 3)
        >>> w2[0, 0, 1, 1] = 0.5  # z = 0.5 (z + u) at every pixel, so z = u
        >>> z, steps, residual = ppmoe_ops.equilibrium_conv_cell(
        ...     u, one, one, zero, w2, zero, one, zero, activation="relu"
        ... )
        >>> z.flatten().tolist(), steps.tolist()
        ([1.0, 1.0, 1.0, 1.0], [3])
    """
    return EQUILIBRIUM_CONV_CELL.overload(
        u, w_u, w1, b1, w2, b2, w3, b3, z0, activation, solver, atol, rtol, max_iter
    )


def _check(
    u: Tensor, w_u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    z0: Tensor | None, *options: Any,
) -> None:  # fmt: skip
    op = "equilibrium_conv_cell"
    named = {"w_u": w_u, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "w3": w3, "b3": b3}
    sizes = check_cell(op, u, named)
    if z0 is not None:
        check_tensor(op, "z0", z0, "B, C, H, W", sizes, u)
    check_solver(op, *options)


def _reference(
    u: Tensor, w_u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    z0: Tensor | None = None, activation: str = "tanh", solver: str = "anderson",
    atol: float = 0.0, rtol: float = 1e-3, max_iter: int = 30,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(u, w_u, w1, b1, w2, b2, w3, b3, z0, activation, solver, atol, rtol, max_iter)
    z, steps, residual = _empty(u, w1)
    if z.numel() == 0:
        # A map without pixels is its own fixed point, as one evaluation shows.
        return z, steps.fill_(1), residual.zero_()
    cell = cell_of(activation, u, w_u, w1, b1, w2, b2, w3)
    bias = b3.to(wide_dtype(u.dtype))
    start = torch.zeros_like(z) if z0 is None else z0
    solution = solve(
        lambda z, images: cell(z, images, bias),
        start.to(bias.dtype).contiguous(), solver, atol, rtol, max_iter,
    )  # fmt: skip
    return solution.x.to(u.dtype), solution.steps, solution.residual


def _empty(u: Tensor, w1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, height, width = u.shape
    return (
        u.new_empty(batch, w1.size(1), height, width),
        u.new_empty(batch, dtype=torch.int32),
        u.new_empty(batch, dtype=wide_dtype(u.dtype)),
    )


def _fake(
    u: Tensor, w_u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    z0: Tensor | None = None, activation: str = "tanh", solver: str = "anderson",
    atol: float = 0.0, rtol: float = 1e-3, max_iter: int = 30,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(u, w_u, w1, b1, w2, b2, w3, b3, z0, activation, solver, atol, rtol, max_iter)
    return _empty(u, w1)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, steps, residual = output
    ctx.save_for_backward(*inputs[:7], z, residual)
    ctx.activation = inputs[9]
    ctx.mark_non_differentiable(steps, residual)


def _backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = EQUILIBRIUM_CONV_CELL_BACKWARD.overload(grad_z, *ctx.saved_tensors, ctx.activation)
    wanted = (
        each if need else None for each, need in zip(grads, ctx.needs_input_grad[:8], strict=True)
    )
    return (*wanted, None, None, None, None, None, None)


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    results = []
    for index in range(info.batch_size):
        each = (
            arg if at is None else arg.select(at, index)
            for arg, at in zip(args, in_dims, strict=True)
        )
        results.append(EQUILIBRIUM_CONV_CELL.overload(*each))
    return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0, 0, 0)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    cases: tuple[tuple[tuple[int, int, int, int], int, int, dict[str, Any]], ...] = (
        ((2, 3, 6, 7), 4, 3, {"activation": "silu"}),
        ((1, 2, 5, 1), 3, 1, {"activation": "gelu", "solver": "fixed_point", "rtol": 1e-2}),
        ((3, 1, 4, 18), 5, 2, {"activation": "relu", "atol": 1e-3, "max_iter": 4}),
        ((0, 2, 4, 4), 2, 2, {}),
        ((2, 2, 0, 4), 2, 3, {}),
    )
    for sizes, hidden, channels, chosen in cases:
        tensors = sample_tensors(device, dtype, sizes, hidden, channels)
        yield tuple(each.requires_grad_() for each in tensors), chosen
    u, *parameters = sample_tensors(device, dtype, (2, 3, 5, 4), 4, 2)
    u = u.to(memory_format=torch.channels_last)
    z0 = torch.randn(2, 2, 5, 4, device=device, dtype=dtype)
    yield (u, *parameters, z0, "silu"), {"max_iter": 1}


def _flops(u: Tensor, w_u: Tensor, w1: Tensor, *args: Any, max_iter: int = 30, **_: Any) -> int:
    # Nominal: every image takes all of the steps that it may.
    steps = args[10] if len(args) > 10 else max_iter
    return 2 * (u.numel() * w_u.size(0) + steps * products(u, w1))


def _nbytes(
    u: Tensor, w_u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    z0: Tensor | None = None, *options: Any, **more: Any,
) -> int:  # fmt: skip
    tensors = (u, w_u, w1, b1, w2, b2, w3, b3, *(() if z0 is None else (z0,)))
    read = sum(each.numel() for each in tensors)
    batch, _, height, width = u.shape
    out = batch * w1.size(1) * height * width
    return (read + out) * u.element_size() + batch * (4 + wide_dtype(u.dtype).itemsize)


EQUILIBRIUM_CONV_CELL = register(
    Operator(
        name="equilibrium_conv_cell",
        family="equilibrium",
        schema=f"({PARAMETERS}, Tensor b3, Tensor? z0=None, str activation='tanh', "
        "str solver='anderson', float atol=0., float rtol=1e-3, SymInt max_iter=30) "
        "-> (Tensor z, Tensor steps, Tensor residual)",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        saved_bytes=lambda *_, **__: 0,
        samples=_samples,
        setup_context=_setup_context,
        backward=_backward,
        autocast=Autocast("float32"),
        vmap=_vmap,
        sharding=lambda u, w_u, w1, b1, w2, b2, w3, b3, z0=None, *_, **__: (
            ("000", "0RRRRRRR" + ("-" if z0 is None else "0")),
        ),
        benchmark="bench_equilibrium",
    )
)
