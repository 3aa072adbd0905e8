"""Operators under torch's transforms: export, vmap, DTensor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils._pytree import tree_map_only

import ppmoe_ops
from ppmoe_ops._library import OPERATORS

HERE = Path(__file__).resolve().parent


class ExpertLayer(nn.Module):
    """Every operator of the family, one after the other."""

    def __init__(self, hidden: int = 8, width: int = 12, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts)
        self.w_in = nn.Parameter(torch.randn(experts, width, hidden))
        self.w_out = nn.Parameter(torch.randn(experts, hidden, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.router(x)
        weights, experts = ppmoe_ops.route(logits, 2)
        balance, z = ppmoe_ops.router_losses(logits, experts)
        slots, offsets = ppmoe_ops.expert_index(experts, 0, self.w_in.size(0))
        rows = ppmoe_ops.slice_rows(x, slots, 2)
        rows = gelu(ppmoe_ops.grouped_linear(rows, offsets, self.w_in))
        rows = ppmoe_ops.grouped_linear(rows, offsets, self.w_out)
        return ppmoe_ops.merge_rows(rows, slots, weights), balance, z


def test_export_with_a_dynamic_number_of_tokens() -> None:
    layer = ExpertLayer()
    x = torch.randn(10, 8)
    program = torch.export.export(
        layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=4096)},)
    )
    targets = {str(node.target) for node in program.graph.nodes}
    for name in ("route", "router_losses_forward", "expert_index", "slice_rows", "merge_rows"):
        assert f"ppmoe_ops.{name}.default" in targets
    for tokens in (2, 10, 33):
        x = torch.randn(tokens, 8)
        for came, wanted in zip(program.module()(x), layer(x), strict=True):
            torch.testing.assert_close(came, wanted)


class FusedLayer(ExpertLayer):
    """The same layer by `moe_ffn`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.router(x)
        out = ppmoe_ops.moe_ffn(x, logits, self.w_in, None, self.w_out, None, top_k=2)
        return out, *ppmoe_ops.router_losses(logits, ppmoe_ops.route(logits, 2)[1])


@pytest.mark.parametrize("gradients", [True, False])
def test_export_of_the_fused_layer(gradients: bool) -> None:
    layer = FusedLayer().requires_grad_(gradients)
    dynamic = ({0: torch.export.Dim("tokens", min=2, max=4096)},)
    program = torch.export.export(layer, (torch.randn(10, 8),), dynamic_shapes=dynamic)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"ppmoe_ops.expert_ffn_forward.default", "ppmoe_ops.expert_ffn.default"} & targets
    whole = ExpertLayer()
    whole.load_state_dict(layer.state_dict())
    for tokens in (2, 10, 33):
        x = torch.randn(tokens, 8)
        for came, again, wanted in zip(program.module()(x), layer(x), whole(x), strict=True):
            torch.testing.assert_close(came, again)
            torch.testing.assert_close(came, wanted)


@pytest.mark.parametrize("kind", [ExpertLayer, FusedLayer])
def test_exported_program_survives_saving(tmp_path: Path, kind: type[ExpertLayer]) -> None:
    layer, x = kind(), torch.randn(6, 8)
    path = tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(layer, (x,)), path)
    loaded = torch.export.load(path).module()
    for came, wanted in zip(loaded(x), layer(x), strict=True):
        torch.testing.assert_close(came, wanted)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_vmap_of_route_is_a_loop(dim: int, score: str) -> None:
    logits = torch.randn(3, 5, 8).movedim(0, dim)
    weights, experts = torch.vmap(lambda x: ppmoe_ops.route(x, 2, score), in_dims=dim)(logits)
    for index, each in enumerate(logits.unbind(dim)):
        wanted = ppmoe_ops.route(each, 2, score)
        assert torch.equal(weights[index], wanted[0])
        assert torch.equal(experts[index], wanted[1])


def test_vmap_of_route_with_a_shared_bias_and_gradients() -> None:
    logits, bias = torch.randn(3, 5, 8, requires_grad=True), torch.randn(8)
    weights, _ = torch.vmap(lambda x: ppmoe_ops.route(x, 3, "sigmoid", True, bias))(logits)
    (grad,) = torch.autograd.grad(weights.square().sum(), logits)
    again = torch.stack([ppmoe_ops.route(x, 3, "sigmoid", True, bias)[0] for x in logits])
    (wanted,) = torch.autograd.grad(again.square().sum(), logits)
    assert torch.equal(grad, wanted)


def test_vmap_over_the_bias_is_refused() -> None:
    logits, bias = torch.randn(3, 5, 8), torch.randn(3, 8)
    with pytest.raises(ValueError, match="route: vmap over selection_bias; allowed: over logits"):
        torch.vmap(lambda x, b: ppmoe_ops.route(x, 2, "sigmoid", True, b))(logits, bias)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """A mesh of this one process."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    ppmoe_ops.enable_dtensor()
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_enable_dtensor_may_be_called_twice() -> None:
    ppmoe_ops.enable_dtensor()
    ppmoe_ops.enable_dtensor()


@pytest.mark.parametrize("name", [op.name for op in OPERATORS.values() if not op.composite])
def test_dtensor_on_one_process(name: str, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    op = OPERATORS[name]
    for args, options in list(op.samples(torch.device("cpu"), torch.float32))[:4]:
        plain = tree_map_only(Tensor, torch.Tensor.detach, list(args))
        spread, shared = tree_map_only(
            Tensor, lambda each: distribute_tensor(each, mesh, [Replicate()]), (plain, options)
        )
        came, wanted = op.overload(*spread, **shared), op.overload(*plain, **options)
        pairs = [(came, wanted)] if isinstance(wanted, Tensor) else zip(came, wanted, strict=True)
        for one, other in pairs:
            assert isinstance(one, DTensor)
            assert torch.equal(one.full_tensor(), other)


def test_dtensor_on_two_processes() -> None:
    """Sharded inputs stay sharded where the rule says so, and results are those of one process."""
    run = subprocess.run(
        [sys.executable, str(HERE / "two_processes.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
