"""Activations of the expert layer and their slopes, inside kernels; `x` is in the wide type."""

from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
NORMAL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
ROOT = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
CUBE = tl.constexpr(0.044715)


@triton.jit
def sigmoid(x):
    # tl.sigmoid takes no float64. exp of a large number is inf, and 1 / inf is right.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def pointwise(x, ACTIVATION: tl.constexpr):
    """The activation; of a gated one, the function on the gate."""
    if ACTIVATION == "gelu" or ACTIVATION == "geglu":
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(ROOT * (x + CUBE * x * x * x)))
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)  # NaN stays NaN
    else:
        return x * sigmoid(x)


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `pointwise`."""
    if ACTIVATION == "gelu" or ACTIVATION == "geglu":
        return 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * NORMAL * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        t = tanh(ROOT * (x + CUBE * x * x * x))
        inner = ROOT * (1.0 + 3.0 * CUBE * x * x)
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    else:
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
