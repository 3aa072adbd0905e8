"""`equilibrium_conv_cell`: strides, bad inputs, and torch's transforms."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from conv_cell_problems import BACKWARD, NAMES, OP, cell, solve
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import ppmoe_ops

pytestmark = pytest.mark.kernel
CPU = torch.device("cpu")


def all_results(args: dict[str, Tensor], grad: Tensor) -> list[Tensor]:
    leaves = {name: each.detach().requires_grad_() for name, each in args.items()}
    z, steps, residual = solve(leaves)
    return [z, steps, residual, *torch.autograd.grad(z, list(leaves.values()), grad)]


def layouts(x: Tensor) -> dict[str, Tensor]:
    wide = torch.full((*x.shape[:-1], 2 * x.size(-1) + 1), math.nan, dtype=x.dtype)
    wide[..., 1::2] = x
    result = {"slice": wide[..., 1::2], "turned": x.transpose(0, -1).contiguous().transpose(0, -1)}
    if x.dim() == 4:
        result["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    return result


def test_strides_do_not_change_a_bit() -> None:
    args = cell((2, 3, 5, 18), 4, 2)
    grad = torch.randn(2, 2, 5, 18)
    wanted = all_results(args, grad)
    for name in NAMES:
        for layout, turned in layouts(args[name]).items():
            for came, one in zip(all_results({**args, name: turned}, grad), wanted, strict=True):
                assert torch.equal(came, one), f"{name} {layout}"
    for layout, turned in layouts(grad).items():
        for came, one in zip(all_results(args, turned), wanted, strict=True):
            assert torch.equal(came, one), f"grad {layout}"
    z0 = torch.randn(2, 2, 5, 18)
    started = solve(args, z0=z0)
    for turned in layouts(z0).values():
        assert torch.equal(solve(args, z0=turned)[0], started[0])


def test_expanded_arguments() -> None:
    args = cell((3, 2, 4, 5), 4, 2)
    args["u"] = args["u"][:1, :, :, :1].expand(3, 2, 4, 5)
    args["b1"] = args["b1"][:1].expand(4)
    closed = {name: each.clone() for name, each in args.items()}
    grad = torch.ones(1).expand(3, 2, 4, 5)
    for came, one in zip(all_results(args, grad), all_results(closed, grad.clone()), strict=True):
        assert torch.equal(came, one)


def bad_inputs() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "u_axes": ({"u": torch.zeros(2, 3, 4)}, "u has 3 axes; expected 4: [B, U, H, W]"),
        "u_dtype": (
            {"u": torch.zeros(2, 3, 4, 5, dtype=torch.int32)},
            "u has dtype int32; allowed: float32, bfloat16, float16, float64",
        ),
        "w_u_size": ({"w_u": torch.zeros(4, 2)}, "w_u has U = 2; expected 3 (as u)"),
        "w_u_hidden": ({"w_u": torch.zeros(5, 3)}, "w_u has r = 5; expected 4 (as w1)"),
        "w1_axes": ({"w1": torch.zeros(4)}, "w1 has 1 axes; expected 2: [r, C]"),
        "no_channels": ({"w1": torch.zeros(4, 0)}, "C is 0; allowed: at least 1"),
        "no_inputs": ({"u": torch.zeros(2, 0, 4, 5)}, "U is 0; allowed: at least 1"),
        "no_hidden": ({"w1": torch.zeros(0, 2)}, "r is 0; allowed: 1 to 64"),
        "too_many_hidden": ({"w1": torch.zeros(65, 2)}, "r is 65; allowed: 1 to 64"),
        "w1_dtype": (
            {"w1": torch.zeros(4, 2).double()}, "w1 has dtype float64; allowed: float32 (as u)",
        ),
        "b1": ({"b1": torch.zeros(3)}, "b1 has r = 3; expected 4 (as w1)"),
        "w2_taps": (
            {"w2": torch.zeros(4, 4, 5, 3)},
            "w2 has 3 = 5; expected 3 (a 3x3 convolution)",
        ),
        "w2_out": ({"w2": torch.zeros(3, 4, 3, 3)}, "w2 has r = 3; expected 4 (as w1)"),
        "b2_axes": ({"b2": torch.zeros(4, 1)}, "b2 has 2 axes; expected 1: [r]"),
        "w3": ({"w3": torch.zeros(3, 4)}, "w3 has C = 3; expected 2 (as w1)"),
        "b3": ({"b3": torch.zeros(3)}, "b3 has C = 3; expected 2 (as w1)"),
        "z0_batch": ({"z0": torch.zeros(1, 2, 4, 5)}, "z0 has B = 1; expected 2 (as u)"),
        "z0_map": ({"z0": torch.zeros(2, 2, 4, 6)}, "z0 has W = 6; expected 5 (as u)"),
        "z0_dtype": (
            {"z0": torch.zeros(2, 2, 4, 5).half()},
            "z0 has dtype float16; allowed: float32 (as u)",
        ),
        "activation": (
            {"activation": "elu"},
            "activation is 'elu'; allowed: tanh, relu, gelu, silu, sigmoid, leaky_relu",
        ),
        "solver": ({"solver": "newton"}, "solver is 'newton'; allowed: fixed_point, anderson"),
        "atol": ({"atol": -1.5}, "atol is -1.5; allowed: 0 or more, finite"),
        "rtol": ({"rtol": math.inf}, "rtol is inf; allowed: 0 or more, finite"),
        "rtol_nan": ({"rtol": -math.nan}, "rtol is nan; allowed: 0 or more, finite"),
        "max_iter": ({"max_iter": 0}, "max_iter is 0; allowed: at least 1"),
    }  # fmt: skip


def backward_inputs() -> dict[str, tuple[dict[str, Any], str]]:
    shared = {
        name: case for name, case in bad_inputs().items() if not name.startswith(("z0", "b3"))
    }
    return shared | {
        "grad_z": ({"grad_z": torch.zeros(2, 3, 4, 5)}, "grad_z has C = 3; expected 2 (as w1)"),
        "z": ({"z": torch.zeros(2, 2, 3, 5)}, "z has H = 3; expected 4 (as u)"),
        "residual": ({"residual": torch.zeros(3)}, "residual has B = 3; expected 2 (as u)"),
        "residual_dtype": (
            {"residual": torch.zeros(2).double()},
            "residual has dtype float64; allowed: float32 (what u is summed in)",
        ),
    }


def refuses(op: Any, arguments: dict[str, Any], message: str) -> None:
    names = [each.name for each in op.overload._schema.arguments]
    arguments = {name: arguments[name] for name in names if name in arguments}
    words = f"^{re.escape(f'{op.name}: {message}')}$"
    for call in (op.overload, op.reference):
        with pytest.raises(ValueError, match=words):
            call(**arguments)
    with FakeTensorMode() as mode:
        fake = tree_map_only(Tensor, mode.from_tensor, arguments)
        with pytest.raises(ValueError, match=words):
            op.overload(**fake)


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_inputs(name: str) -> None:
    change, message = bad_inputs()[name]
    refuses(OP, {**cell((2, 3, 4, 5), 4, 2), **change}, message)


@pytest.mark.parametrize("name", backward_inputs())
def test_bad_inputs_of_the_backward(name: str) -> None:
    change, message = backward_inputs()[name]
    z = torch.zeros(2, 2, 4, 5)
    given = {
        "grad_z": z, "z": z, "residual": torch.zeros(2), "activation": "tanh",
        **cell((2, 3, 4, 5), 4, 2), **change,
    }  # fmt: skip
    refuses(BACKWARD, given, message)


@pytest.mark.parametrize("op", [OP, BACKWARD], ids=lambda op: op.name)
def test_opcheck(op: Any) -> None:
    # tests/test_registry.py goes through all samples and all checks.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for args, options in op.samples(CPU, torch.float64):
        torch.library.opcheck(op.overload, args, options, test_utils=checks)


def test_autocast_keeps_float32() -> None:
    args = cell((2, 3, 4, 5), 4, 2)
    wanted = solve(args)
    with torch.autocast("cpu", torch.bfloat16):
        came = solve({name: each.bfloat16() for name, each in args.items()})
        same = solve(args)
    assert came[0].dtype == torch.float32
    assert torch.equal(same[0], wanted[0])
    rounded = {name: each.bfloat16().float() for name, each in args.items()}
    assert torch.equal(came[0], solve(rounded)[0])


def test_compiles_to_one_graph() -> None:
    def layer(args: dict[str, Tensor], scale: float) -> Tensor:
        z, steps, _ = ppmoe_ops.equilibrium_conv_cell(**args, activation="silu")
        return (z * scale).sin() + steps[:, None, None, None]

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((2, 3, 4, 5), (3, 3, 6, 5)):
        ours = {n: e.requires_grad_() for n, e in cell(sizes, 4, 2).items()}
        came, wanted = compiled(ours, 0.5), layer(ours, 0.5)
        assert torch.equal(came, wanted)
        inputs = list(ours.values())
        for one, other in zip(
            torch.autograd.grad(came.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(one, other)


def test_vmap() -> None:
    args = cell((2, 3, 4, 5), 4, 2)
    weights = torch.stack([args["w2"], 0.5 * args["w2"]])
    z, steps, residual = torch.vmap(lambda w2: solve({**args, "w2": w2}))(weights)
    for at in range(2):
        wanted = solve({**args, "w2": weights[at]})
        for came, one in zip((z[at], steps[at], residual[at]), wanted, strict=True):
            assert torch.equal(came, one)


def test_flops_count_the_steps_that_are_allowed() -> None:
    args = tuple(cell((2, 3, 4, 5), 4, 2).values())
    one, two = (OP.flops(*args, max_iter=n) for n in (1, 2))
    assert two - one == 2 * 2 * 20 * 4 * (9 * 4 + 2 * 2)
    assert OP.flops(*args) == one + 29 * (two - one)
