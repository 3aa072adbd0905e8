"""The same bits from every run and for every number of threads, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from slicing import DTYPES, call, distinct_ids, dtype_name, wide
from torch import Tensor

Build = Callable[[torch.dtype], tuple[Any, ...]]


def _index(tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
    slots, offsets = call("expert_index", (distinct_ids(tokens, top_k, 16), 3, 9))
    return slots, offsets


def _logits(dtype: torch.dtype) -> Tensor:
    return torch.randn(1500, 72).to(dtype).requires_grad_()


def _merge(dtype: torch.dtype) -> tuple[Any, ...]:
    slots, _ = _index(3000, 2)
    rows = torch.randn(6000, 200).to(dtype).requires_grad_()
    return rows, slots, torch.rand(3000, 2, dtype=wide(dtype)).requires_grad_()


def _grouped(dtype: torch.dtype, offsets: Tensor) -> tuple[Any, ...]:
    local = offsets.numel() - 1
    weight = torch.randn(local, 210, 530).to(dtype).requires_grad_()
    bias = torch.randn(local, 210).to(dtype).requires_grad_()
    return torch.randn(1200, 530).to(dtype).requires_grad_(), offsets, weight, bias


def _ffn(dtype: torch.dtype, activation: str) -> tuple[Any, ...]:
    slots, offsets = _index(600, 2)
    inner = 180 if activation == "swiglu" else 90

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    weights = torch.rand(600, 2, dtype=wide(dtype)).requires_grad_()
    parameters = (tensor(9, inner, 140), tensor(9, inner), tensor(9, 140, 90), tensor(9, 140))
    return tensor(600, 140), slots, offsets, weights, *parameters, activation


# Enough work that every operator shares it between threads.
CALLS: dict[str, Build] = {
    "route": lambda dtype: (_logits(dtype), 8),
    "route softmax_raw": lambda dtype: (_logits(dtype), 6, "softmax", False),
    "route sigmoid": lambda dtype: (
        _logits(dtype), 12, "sigmoid", True, torch.randn(72), 8, 4, 2.5
    ),
    "router_losses": lambda dtype: (_logits(dtype), torch.randint(-1, 72, (1500, 8))),
    "expert_index": lambda dtype: (torch.randint(-1, 300, (9000, 8)), 40, 200),
    "slice_rows": lambda dtype: (
        torch.randn(3000, 200).to(dtype).requires_grad_(), _index(3000, 2)[0], 2
    ),
    "merge_rows": _merge,
    "grouped_linear": lambda dtype: _grouped(dtype, _index(600, 2)[1]),
    "grouped_linear one_expert": lambda dtype: _grouped(
        dtype, torch.tensor([0, 3, 1190], dtype=torch.int32)
    ),
    "expert_ffn": lambda dtype: _ffn(dtype, "gelu"),
    "expert_ffn gated": lambda dtype: _ffn(dtype, "swiglu"),
}  # fmt: skip


def results(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    """The outputs of a call, and the gradients of all inputs that ask for one."""
    out = call(name.split()[0], args)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    leaves = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
    if not leaves:
        return outputs
    roots = [each for each in outputs if each.requires_grad]
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(each.shape, generator=generator).to(each.dtype) for each in roots]
    return [*outputs, *torch.autograd.grad(roots, leaves, upstream)]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        same = a.contiguous().view(torch.uint8) if a.dim() else a.view(1).view(torch.uint8)
        bits = b.contiguous().view(torch.uint8) if b.dim() else b.view(1).view(torch.uint8)
        assert torch.equal(same, bits), f"result {number} differs"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", CALLS)
def test_threads_and_runs_do_not_change_a_bit(name: str, dtype: torch.dtype) -> None:
    args = CALLS[name](dtype)
    torch.set_num_threads(1)
    expected = results(name, args)
    assert_same_bits(results(name, args), expected)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(2):
            assert_same_bits(results(name, args), expected)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    # The first half of the tokens alone gives the bits that it gives among all of them.
    ids = distinct_ids(64, 2, 8)
    x, weights = torch.randn(64, 100), torch.rand(64, 2)

    def layer(count: int) -> list[Tensor]:
        slots, _ = call("expert_index", (ids[:count], 0, 5))
        rows = call("slice_rows", (x[:count], slots, 2))
        merged = call("merge_rows", (rows, slots, weights[:count]))
        return [merged, call("slice_rows_backward", (rows, slots, 2))]

    for half, whole in zip(layer(32), layer(64), strict=True):
        assert torch.equal(half, whole[:32])


@pytest.mark.parametrize("top_k", [1, 2, 8, 12])
def test_a_route_does_not_depend_on_its_neighbours(top_k: int) -> None:
    logits = torch.randn(300, 72)
    for options in ((), ("softmax", False), ("sigmoid",)):
        whole = call("route", (logits, top_k, *options))
        alone = call("route", (logits[123:124], top_k, *options))
        assert_same_bits([each[123:124] for each in whole], list(alone))
