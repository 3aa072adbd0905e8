"""Activations of `expert_ffn`, and their derivatives, in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GATED = ("swiglu", "geglu")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", *GATED)


def _pointwise(x: Tensor, activation: str) -> Tensor:
    if activation in ("gelu", "geglu"):
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return torch.relu(x) if activation == "relu" else F.silu(x)


def _slope(x: Tensor, activation: str) -> Tensor:
    if activation in ("gelu", "geglu"):
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
    if activation == "gelu_tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner
    if activation == "relu":
        return (~(x <= 0)).to(x.dtype)  # 1 for NaN, as torch's own
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def activate(pre: Tensor, activation: str) -> Tensor:
    """[..., F] from the pre-activation: [..., F], or [..., 2F] where there is a gate."""
    if activation not in GATED:
        return _pointwise(pre, activation)
    gate, up = pre.chunk(2, -1)
    return _pointwise(gate, activation) * up


def activate_backward(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    """The gradient to the pre-activation, in its shape."""
    if activation not in GATED:
        return grad * _slope(pre, activation)
    gate, up = pre.chunk(2, -1)
    return torch.cat(
        (grad * up * _slope(gate, activation), grad * _pointwise(gate, activation)), -1
    )
