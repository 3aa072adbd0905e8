"""`equilibrium_cell`: x = act(a x + c) for many rows c, each solved on its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Autocast, Operator, Sample, register
from ppmoe_ops.ops.equilibrium.equilibrium_cell_reference import SOLVERS, adjoint, solve

_BACKWARD = "equilibrium_cell_backward"
ACTIVATIONS = ("tanh", "relu", "gelu", "silu", "sigmoid", "leaky_relu")
LARGEST = 256


def equilibrium_cell(
    a: Tensor,
    c: Tensor,
    x0: Tensor | None = None,
    activation: str = "tanh",
    solver: str = "anderson",
    atol: float = 0.0,
    rtol: float = 1e-4,
    max_iter: int = 30,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve x = f(x), f(x) = act(a @ x + c), for every row of `c`, row by row.

    A row evaluates f until |f(z) - z| <= atol + rtol |f(z)| (2-norms) or `max_iter` times, and
    then stops, whatever the other rows do. Its result is f(z) of the evaluated z with the smallest
    residual |f(z) - z|, so one evaluation is enough where `x0` is near enough. A row whose residual
    is not finite, or is beyond 1e4 (|x0| + |f(x0)|), stops at once and is flagged by a residual of
    inf.

    A prompt layer z = w2 act(w1 z + p u + b1) + b2 with z in d dimensions is this cell in as many
    as act has. Let x be what act returns, so that z = w2 x + b2. Put into the argument of act, that
    gives x = act(w1 w2 x + p u + b1 + w1 b2): the cell with a = w1 w2 and c = p u + b1 + w1 b2. The
    other way round, let x solve that cell and z = w2 x + b2. Then w1 z + p u + b1 = a x + c, so act
    of it is x, and z solves the layer. Fixed points of the two correspond one to one, and no
    product in the loop has a side of d.

    Args:
        a: [r, r] float32, bfloat16, float16 or float64, 1 <= r <= 256; any strides.
        c: [N, r] in the dtype of `a`; any strides.
        x0: [N, r] in the dtype of `a`, where the rows start; None: at zero. It gets no gradient.
        activation: tanh, relu, gelu (by erf), silu, sigmoid or leaky_relu (slope 0.01).
        solver: `fixed_point`: z <- f(z). `anderson`: mixes the last 6 differences (r where that is
            less), as `equilibrium` does. `newton`: solves (I - act' a) d = f(z) - z by LU with
            partial pivoting and takes z + t d, with t halved while the residual would grow (at most
            8 times, each an evaluation), else z <- f(z).
        atol: of the stopping rule, finite and at least 0.
        rtol: of the stopping rule, finite and at least 0.
        max_iter: the most evaluations of f that a row may take, at least 1.

    Returns:
        x [N, r] in the dtype of `a`, contiguous; steps [N] int32, the evaluations of f that a row
        took; residual [N] float32 (float64 for float64), its smallest |f(z) - z|, inf where the row
        diverged. The arithmetic is float32 (float64 for float64) and only x is rounded. A row has
        the same bits whatever rows are beside it.

    Raises:
        ValueError: a shape, dtype, name or number that is not as above.

    Gradient: to `a` and `c`, by the implicit function theorem at x: v = act' (a^T v + grad) is
        solved for every row, grad_c = v, grad_a = sum over rows of v x^T. NaN for flagged rows, so
        `grad_a` is NaN if there is one. `steps` and `residual` are not differentiable.
    Saved for backward: no bytes of its own; keeps `a`, `c`, `x` and `residual` alive.

    Source: LION (arXiv 2303.09992), the implicit layer on the representation; deep equilibrium
        models.

    Example:
        >>> import torch, ppmoe_ops
        >>> a, c = torch.tensor([[0.5]]), torch.tensor([[1.0], [-3.0]])
        >>> x, steps, residual = ppmoe_ops.equilibrium_cell(a, c, activation="relu", rtol=1e-5)
        >>> [round(each, 4) for each in x.flatten().tolist()], steps.tolist()
        ([2.0, 0.0], [3, 1])
    """
    return EQUILIBRIUM_CELL.overload(a, c, x0, activation, solver, atol, rtol, max_iter)


def _check(op: str, a: Tensor, c: Tensor) -> None:
    check.dim(op, "a", a, "r, r")
    check.dtype(op, "a", a, check.FLOATS)
    check.between(op, "r", a.size(0), 1, LARGEST)
    check.size(op, "a", "r", a.size(1), a.size(0), "a is square")
    _check_rows(op, "c", c, a)


def _check_rows(op: str, name: str, rows: Tensor, a: Tensor, like: Tensor | None = None) -> None:
    check.dim(op, name, rows, "N, r")
    check.dtype(op, name, rows, (a.dtype,), "as a")
    check.size(op, name, "r", rows.size(1), a.size(0), "as a")
    if like is not None:
        check.size(op, name, "N", rows.size(0), like.size(0), "as c")


def _check_forward(
    a: Tensor,
    c: Tensor,
    x0: Tensor | None,
    activation: str,
    solver: str,
    atol: float,
    rtol: float,
    max_iter: int,
) -> None:
    op = "equilibrium_cell"
    _check(op, a, c)
    if x0 is not None:
        _check_rows(op, "x0", x0, a, c)
    check.choice(op, "activation", activation, ACTIVATIONS)
    check.choice(op, "solver", solver, SOLVERS)
    check.tolerance(op, "atol", atol)
    check.tolerance(op, "rtol", rtol)
    check.between(op, "max_iter", max_iter, 1, 2**31 - 1)


def _check_backward(
    grad_x: Tensor, a: Tensor, c: Tensor, x: Tensor, residual: Tensor, activation: str
) -> None:
    _check(_BACKWARD, a, c)
    _check_rows(_BACKWARD, "grad_x", grad_x, a, c)
    _check_rows(_BACKWARD, "x", x, a, c)
    check.dim(_BACKWARD, "residual", residual, "N")
    check.dtype(_BACKWARD, "residual", residual, (_wide_dtype(a),), "wide")
    check.size(_BACKWARD, "residual", "N", residual.size(0), c.size(0), "as c")
    check.choice(_BACKWARD, "activation", activation, ACTIVATIONS)


def _wide_dtype(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))


def _reference(
    a: Tensor,
    c: Tensor,
    x0: Tensor | None = None,
    activation: str = "tanh",
    solver: str = "anderson",
    atol: float = 0.0,
    rtol: float = 1e-4,
    max_iter: int = 30,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_forward(a, c, x0, activation, solver, atol, rtol, max_iter)
    start = torch.zeros_like(_wide(c)) if x0 is None else _wide(x0)
    x, steps, residual = solve(_wide(a), _wide(c), start, activation, solver, atol, rtol, max_iter)
    return x.to(a.dtype).contiguous(), steps, residual


def _fake(
    a: Tensor,
    c: Tensor,
    x0: Tensor | None = None,
    activation: str = "tanh",
    solver: str = "anderson",
    atol: float = 0.0,
    rtol: float = 1e-4,
    max_iter: int = 30,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_forward(a, c, x0, activation, solver, atol, rtol, max_iter)
    rows = c.size(0)
    return (
        c.new_empty(c.shape),
        c.new_empty(rows, dtype=torch.int32),
        c.new_empty(rows, dtype=_wide_dtype(a)),
    )


def _reference_backward(
    grad_x: Tensor, a: Tensor, c: Tensor, x: Tensor, residual: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    _check_backward(grad_x, a, c, x, residual, activation)
    grads = adjoint(_wide(grad_x), _wide(a), _wide(c), _wide(x), residual, activation)
    return grads[0].to(a.dtype).contiguous(), grads[1].to(a.dtype).contiguous()


def _fake_backward(
    grad_x: Tensor, a: Tensor, c: Tensor, x: Tensor, residual: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    _check_backward(grad_x, a, c, x, residual, activation)
    return a.new_empty(a.shape), c.new_empty(c.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    a, c, _, activation, *_ = inputs
    x, steps, residual = output
    ctx.mark_non_differentiable(steps, residual)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, c, x, residual)
    ctx.activation = activation


def _backward(ctx: Any, grad_x: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_x is None:
        return (None,) * 8
    grads = EQUILIBRIUM_CELL_BACKWARD.overload(grad_x, *ctx.saved_tensors, ctx.activation)
    wanted = (
        each if need else None for each, need in zip(grads, ctx.needs_input_grad, strict=False)
    )
    return (*wanted, *(None,) * 6)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    size = info.batch_size
    if in_dims[0] is not None:
        return _one_by_one(EQUILIBRIUM_CELL, size, in_dims, args)

    def flat(rows: Tensor | None, at: int | None) -> Tensor | None:
        if rows is None:
            return None
        rows = rows.expand(size, *rows.shape) if at is None else rows.movedim(at, 0)
        return rows.flatten(0, 1)

    rows = [flat(each, at) for each, at in zip(args[1:3], in_dims[1:3], strict=True)]
    results = EQUILIBRIUM_CELL.overload(args[0], *rows, *args[3:])
    return tuple(each.view(size, each.size(0) // size, *each.shape[1:]) for each in results), (
        0,
        0,
        0,
    )


def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    return _one_by_one(EQUILIBRIUM_CELL_BACKWARD, info.batch_size, in_dims, args)


def _one_by_one(op: Operator, size: int, in_dims: tuple[int | None, ...], args: Any) -> Any:
    results = [
        op.overload(
            *(
                arg if at is None else arg.select(at, index)
                for arg, at in zip(args, in_dims, strict=True)
            )
        )
        for index in range(size)
    ]
    stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def matrix(r: int) -> Tensor:
        return tensor(r, r) * (0.4 / math.sqrt(r))

    yield (matrix(16).requires_grad_(), tensor(7, 16).requires_grad_()), {}
    for solver, activation, r, rows in (
        ("newton", "gelu", 5, 3),
        ("fixed_point", "silu", 3, 18),
        ("anderson", "sigmoid", 1, 4),
        ("newton", "leaky_relu", 8, 17),
        ("anderson", "relu", 33, 2),
    ):
        a, c, start = matrix(r).T, tensor(rows, 2 * r)[:, ::2], tensor(rows, r)
        yield (
            (a.detach().requires_grad_(), c.detach().requires_grad_(), start, activation, solver),
            {"rtol": 1e-3, "max_iter": 20},
        )
    yield (matrix(4).requires_grad_(), tensor(0, 4).requires_grad_()), {}
    yield (matrix(6), tensor(5, 6).requires_grad_(), None, "tanh", "anderson", 1e-3, 0.0, 1), {}


def _samples_backward(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for args, options in _samples(device, dtype):
        a, c = (each.detach() for each in args[:2])
        activation = args[3] if len(args) > 3 else "tanh"
        x, _, residual = _reference(a, c, *args[2:], **options)
        yield (torch.randn_like(c), a, c, x, residual, activation), {}


def _flops(
    a: Tensor,
    c: Tensor,
    x0: Tensor | None = None,
    activation: str = "tanh",
    solver: str = "anderson",
    atol: float = 0.0,
    rtol: float = 1e-4,
    max_iter: int = 30,
) -> int:
    # Of the products, as if every row took all its evaluations: how many it takes is in the data.
    r = a.size(0)
    solve = 2 * r**3 // 3 + 2 * r * r if solver == "newton" else 0
    return c.size(0) * (max_iter * 2 * r * r + (max_iter - 1) * solve)


def _flops_backward(grad_x: Tensor, a: Tensor, c: Tensor, *_: Any, **__: Any) -> int:
    r = a.size(0)
    return c.size(0) * (2 * r**3 // 3 + 6 * r * r)


def _rows_bytes(c: Tensor) -> int:
    return c.size(0) * (8 if c.dtype == torch.float64 else 4)


def _nbytes(a: Tensor, c: Tensor, x0: Tensor | None = None, *_: Any, **__: Any) -> int:
    elements = a.numel() + (2 if x0 is None else 3) * c.numel()
    return elements * a.element_size() + _rows_bytes(c) + 4 * c.size(0)


def _nbytes_backward(grad_x: Tensor, a: Tensor, c: Tensor, *_: Any, **__: Any) -> int:
    return (2 * a.numel() + 4 * c.numel()) * a.element_size() + _rows_bytes(c)


EQUILIBRIUM_CELL = register(
    Operator(
        name="equilibrium_cell",
        family="equilibrium",
        schema='(Tensor a, Tensor c, Tensor? x0=None, str activation="tanh", '
        'str solver="anderson", float atol=0., float rtol=1e-4, SymInt max_iter=30) -> '
        "(Tensor x, Tensor steps, Tensor residual)",
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
        sharding=lambda *_, **__: (("000", "R00"),),
        benchmark="bench_equilibrium",
    )
)

EQUILIBRIUM_CELL_BACKWARD = register(
    Operator(
        name=_BACKWARD,
        family="equilibrium",
        schema="(Tensor grad_x, Tensor a, Tensor c, Tensor x, Tensor residual, str activation) -> "
        "(Tensor grad_a, Tensor grad_c)",
        reference=_reference_backward,
        fake=_fake_backward,
        flops=_flops_backward,
        nbytes=_nbytes_backward,
        samples=_samples_backward,
        no_derivative="equilibrium_cell has no second derivative; allowed: first derivatives",
        vmap=_vmap_backward,
        sharding=lambda *_, **__: (("P0", "0R000"),),
        benchmark="bench_equilibrium",
    )
)
