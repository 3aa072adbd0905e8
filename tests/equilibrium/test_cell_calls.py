"""Calls of `equilibrium_cell`: bad input, torch's transforms, and the layer it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cell_bad_input import BAD_CALLS, BadCall, good
from cell_problems import ACTIVATIONS, BACKWARD, FORWARD, assert_same, cell, solve
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ppmoe_ops
from ppmoe_ops._library import OPERATORS

pytestmark = pytest.mark.kernel


def moved(args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    return tuple(each.to(device) if isinstance(each, Tensor) else each for each in args)


@pytest.mark.parametrize("row", BAD_CALLS, ids=str)
def test_bad_input_is_refused_in_the_same_words(row: BadCall) -> None:
    op, words = OPERATORS[row.op], []
    with pytest.raises(ValueError, match=row.op) as kernel:
        op.overload(*row.args())
    words.append(str(kernel.value))
    with pytest.raises(ValueError, match=row.op) as reference:
        op.reference(*row.args())
    words.append(str(reference.value))
    with pytest.raises(ValueError, match=row.op) as meta:
        op.overload(*moved(row.args(), "meta"))
    words.append(str(meta.value))
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=row.op) as fake:
        op.overload(*(mode.from_tensor(e) if isinstance(e, Tensor) else e for e in row.args()))
    words.append(str(fake.value))
    assert words == [row.message] * 4


@pytest.mark.parametrize("op", ["equilibrium_cell", "equilibrium_cell_backward"])
def test_good_arguments_of_the_table_are_good(op: str) -> None:
    args = tuple(good(op).values())
    assert list(good(op)) == [each.name for each in OPERATORS[op].overload._schema.arguments]
    for each in OPERATORS[op].overload(*args):
        assert each.isfinite().all()
    shapes = [each.shape for each in OPERATORS[op].overload(*moved(args, "meta"))]
    assert shapes == [each.shape for each in OPERATORS[op].overload(*args)]


@pytest.mark.parametrize("op", [FORWARD, BACKWARD], ids=lambda op: str(op.name))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(op: Any, dtype: torch.dtype) -> None:
    for args, options in list(op.samples(torch.device("cpu"), dtype))[:3]:
        torch.library.opcheck(op.overload, args, options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_prompt_layer(activation: str) -> None:
    """The layer in d dimensions, iterated there, and its gradients."""
    torch.manual_seed(5)
    d, r, tokens = 24, 5, 12
    wide = {
        name: torch.randn(*shape, dtype=torch.float64) * scale
        for name, shape, scale in (
            ("w1", (r, d), 0.5 * d**-0.5), ("w2", (d, r), 0.5 * r**-0.5), ("p", (r, d), d**-0.5),
            ("b1", (r,), 0.5), ("b2", (d,), 0.5), ("u", (tokens, d), 1.0),
        )
    }  # fmt: skip
    leaves = {name: each.requires_grad_() for name, each in wide.items()}
    w1, w2, p, b1, b2, u = (leaves[name] for name in ("w1", "w2", "p", "b1", "b2", "u"))
    z = torch.zeros(tokens, d, dtype=torch.float64)
    for _ in range(120):
        z = ACTIVATIONS[activation](z @ w1.T + u @ p.T + b1) @ w2.T + b2
    c = u @ p.T + b1 + w1 @ b2
    x, _, _ = ppmoe_ops.equilibrium_cell(w1 @ w2, c, None, activation, "anderson", 0.0, 1e-14, 100)
    ours = x @ w2.T + b2
    torch.testing.assert_close(ours, z, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(z)
    for one, other in zip(
        torch.autograd.grad(ours, list(leaves.values()), grad),
        torch.autograd.grad(z, list(leaves.values()), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def each_alone(in_dims: tuple[int | None, ...], args: tuple[Tensor, ...], size: int) -> Any:
    results = [
        solve(*(e if at is None else e.select(at, n) for e, at in zip(args, in_dims, strict=True)))
        for n in range(size)
    ]
    return tuple(torch.stack(each) for each in zip(*results, strict=True))


@pytest.mark.parametrize(
    "dims", [(None, 0), (None, 2), (0, None), (2, 1), (None, 0, 1), (None, None, 0)]
)
def test_vmap(dims: tuple[int | None, ...]) -> None:
    a, c = cell(6, 5)
    many = [a, c, torch.randn(6, 5)][: len(dims)]
    args = tuple(
        each if at is None else torch.stack([each, each / 2, -each], at)
        for each, at in zip(many, dims, strict=True)
    )
    came = torch.vmap(solve, in_dims=dims)(*args)
    assert_same(tuple(each.contiguous() for each in came), each_alone(dims, args, 3))


def test_vmap_over_no_rows() -> None:
    x = torch.vmap(lambda c: ppmoe_ops.equilibrium_cell(torch.zeros(2, 2), c)[0])(
        torch.ones(3, 0, 2)
    )
    assert x.shape == (3, 0, 2)


def test_many_gradients_at_once() -> None:
    a, c = (each.requires_grad_() for each in cell(6, 4))
    x = ppmoe_ops.equilibrium_cell(a, c)[0]
    many = torch.randn(3, 6, 4)
    came = torch.autograd.grad(x, (a, c), many, is_grads_batched=True, retain_graph=True)
    for at in range(3):
        wanted = torch.autograd.grad(x, (a, c), many[at], retain_graph=True)
        assert_same(tuple(each[at] for each in came), wanted)


def test_autocast() -> None:
    a, c = cell(6, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        came = solve(a, c)
    assert came[0].dtype == torch.float32
    assert_same(came, solve(a.float(), c.float()))


def test_compiled_with_any_number_of_rows() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def layer(a: Tensor, c: Tensor) -> Tensor:
        return ppmoe_ops.equilibrium_cell(a, 2 * c, solver="newton")[0].sum(0)

    compilations = []
    for rows in (5, 7, 33, 2):
        a, c = (each.requires_grad_() for each in cell(rows, 6))
        came = torch.autograd.grad(layer(a, c).square().sum(), (a, c))
        x = ppmoe_ops.equilibrium_cell(a, 2 * c, solver="newton")[0].sum(0)
        assert_same(came, torch.autograd.grad(x.square().sum(), (a, c)))
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]
    torch._dynamo.reset()


def test_flops() -> None:
    a, c = (each.requires_grad_() for each in cell(9, 6))
    with FlopCounterMode(display=False) as counter:
        x = ppmoe_ops.equilibrium_cell(a, c, max_iter=7)[0]
    assert counter.get_total_flops() == 9 * 7 * 2 * 6 * 6
    with FlopCounterMode(display=False) as counter:
        x.sum().backward()
    assert counter.get_total_flops() == 9 * (2 * 6**3 // 3 + 6 * 6 * 6)
