"""Activations and slopes inside kernels, at values that random inputs do not meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from ppmoe_ops.kernels.expert_slice.activations import pointwise, slope
from ppmoe_ops.ops.expert_slice.activations import ACTIVATIONS, GATED, activate, activate_backward

COUNT = 64
VALUES = (-1e4, -100.0, -20.0, -1e-3, -0.0, 0.0, 1e-3, 20.0, 100.0, 1e4, float("nan"))


@triton.jit
def _apply_kernel(x, value, derivative, ACTIVATION: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    given = tl.load(x + at)
    tl.store(value + at, pointwise(given, ACTIVATION))
    tl.store(derivative + at, slope(given, ACTIVATION))


def plain(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Value and slope of a gated activation's gate are those beside a one."""
    ones = torch.ones_like(x)
    if activation not in GATED:
        return activate(x, activation), activate_backward(ones, x, activation)
    both = torch.cat((x, ones))
    return activate(both, activation), activate_backward(ones, both, activation)[: x.numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_slopes(activation: str, dtype: torch.dtype) -> None:
    x = torch.cat((torch.tensor(VALUES), torch.linspace(-6, 6, COUNT - len(VALUES)))).to(dtype)
    got = torch.empty(2, COUNT, dtype=dtype)
    _apply_kernel[(1,)](x, got[0], got[1], ACTIVATION=activation, COUNT=COUNT)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for ours, exact in zip(got, plain(x.double(), activation), strict=True):
        torch.testing.assert_close(
            ours.double(), exact, rtol=tolerance, atol=tolerance, equal_nan=True
        )
