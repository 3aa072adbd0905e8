"""Results of the expert layer on a GPU, against a plain loop over the experts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ppmoe_ops._backends import choices
from ppmoe_ops.ops.expert_slice.activations import ACTIVATIONS
from ppmoe_ops.testing import poison_memory

from .ffn import (
    CUDA,
    call,
    check,
    check_backward,
    everything,
    plain_forward,
    problem,
    replaced,
)

pytest.importorskip("triton")

from ppmoe_ops.kernels._launch import gpu_of
from ppmoe_ops.kernels.expert_slice import configs, tiles
from ppmoe_ops.kernels.expert_slice import expert_ffn as forward
from ppmoe_ops.kernels.expert_slice import expert_ffn_backward as backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# T, H, F, K, E, the first local expert and L, by the load that they make.
SHAPES = {
    "few": (40, 80, 144, 2, 8, 2, 6),
    "some": (300, 144, 80, 4, 12, 3, 9),
    "many": (700, 80, 96, 2, 5, 1, 4),
    "unaligned": (130, 71, 43, 3, 9, 0, 9),
}


def test_the_kernels_are_there() -> None:
    for name in ("expert_ffn_forward", "expert_ffn_backward"):
        assert choices()[name]["cuda"].backend == "triton", choices()[name]["cuda"].missing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("load", SHAPES)
def test_loads(load: str, dtype: torch.dtype) -> None:
    args = problem(SHAPES[load], dtype)
    rows = args[3].size(0) * min(args[3].size(1), args[6].size(0))
    found = configs.ffn_load(gpu_of(args[0].device), rows, args[6].size(0), args[0], *args[4:7:2])
    assert found.replace("plain", "many") == load
    check(args)


@pytest.mark.parametrize("load", ["few", "some", "many", "plain", "unaligned"])
def test_every_configuration(load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "ffn_load", lambda *_: load)
    # No tile is short of columns or of terms.
    check(problem((290, 256, 512, 2, 4, 0, 4)))


def test_warps_that_load_and_warps_that_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "ffn_load", lambda *_: "many")
        table = {2: {"many": configs.OUT_OF_SPECIALIZED}}
        monkeypatch.setattr(module, "OUT_OF", table)
    check(problem((290, 256, 512, 2, 4, 0, 4)))


@pytest.mark.parametrize("biases", list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(activation: str, biases: tuple[bool, bool]) -> None:
    for dtype in (torch.float32, torch.bfloat16) if all(biases) else (torch.bfloat16,):
        check(problem((90, 96, 64, 3, 7, 1, 5), dtype, activation, biases))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_every_subset_of_gradients(activation: str) -> None:
    args = problem((90, 96, 64, 3, 7, 1, 5), activation=activation)
    subsets = list(itertools.product((True, False), repeat=6))
    check_backward(args, plain_forward(*args)[1], subsets=subsets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_who_gets_rows(dtype: torch.dtype) -> None:
    """All tokens on the same experts, some on none, experts without rows, one expert alone."""
    shape = (150, 80, 64, 2, 8, 0, 8)
    same = torch.tensor([5, 2], device=CUDA).expand(150, 2)
    dropped = torch.rand(150, 8, device=CUDA).argsort(-1)[:, :2]
    dropped = torch.where(torch.rand(150, 2, device=CUDA) < 0.5, -1, dropped)
    odd = 2 * (dropped // 2) + 1
    odd[:, 1] = -1
    for ids in (same, dropped, odd, odd.int()):
        check(problem(shape, dtype, ids=ids))
    check(problem((150, 80, 64, 2, 8, 3, 1), dtype))


def test_slots_by_one_program_and_by_many() -> None:
    for tokens in (tiles.ONE_PROGRAM // 2, tiles.ONE_PROGRAM // 2 + 1):
        for local in (6, 8):
            check(problem((tokens, 32, 48, 2, 8, 1, min(local, 7)), torch.float32, "silu"))


def test_no_rows() -> None:
    nobody = torch.full((70, 2), -1, device=CUDA)
    for args in (
        problem((70, 32, 16, 2, 4, 0, 4), ids=nobody),
        problem((70, 32, 16, 2, 4, 0, 0)),
        problem((0, 32, 16, 2, 4, 0, 4)),
        problem((70, 32, 16, 0, 4, 0, 4)),
    ):
        with poison_memory():
            results = everything(args)
        assert [each.shape for each in results[1:]] == [
            each.shape for each in (args[0], args[3], *args[4:8])
        ]
        assert all(bool((each == 0).all()) for each in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    args = problem((200, 96, 64, 2, 6, 1, 4), dtype)
    x, w_in, b_in, w_out, b_out = args[0], *args[4:8]

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    def spread(tensor: Tensor) -> Tensor:
        wider = tensor.new_full((*tensor.shape[:-1], 2 * tensor.size(-1) + 1), torch.nan)
        wider[..., 1::2] = tensor
        return wider[..., 1::2]

    check(replaced(args, w_in=turned(w_in), w_out=turned(w_out)), turned(torch.randn_like(x)))
    check(replaced(args, x=turned(x), weights=turned(args[3])), spread(torch.randn_like(x)))
    check(replaced(args, x=spread(x), w_in=spread(w_in), b_out=spread(b_out)), x[:1].expand_as(x))
    one = (each[:1].expand_as(each) for each in (w_in, b_in, w_out, b_out))
    check(replaced(args, **dict(zip(("w_in", "b_in", "w_out", "b_out"), one, strict=True))))
    check(replaced(args, x=x[:1].expand_as(x), w_in=w_in.flip(0)[::1]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_token_that_is_not_finite_stays_alone(activation: str) -> None:
    args = problem((60, 32, 48, 2, 4, 0, 4), torch.float32, activation)
    args[0][7] = torch.nan
    out = call("expert_ffn_forward", *args, False)[0]
    assert out[7].isnan().all()
    assert torch.cat((out[:7], out[8:])).isfinite().all()
