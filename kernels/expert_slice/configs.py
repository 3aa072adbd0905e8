"""Every configuration of the Triton kernels of expert slicing, in one place."""

from __future__ import annotations

import triton
from torch import Tensor

from ppmoe_ops.kernels._launch import Config, Table, vectorizes

# By bytes per element. Out tiles are BLOCK_M x BLOCK_N; the loop runs over inputs by BLOCK_K.
LINEAR: Table = {
    2: {
        "few": Config(16, 64, 128, num_warps=4, num_stages=4),
        "some": Config(64, 128, 64, num_warps=4, num_stages=4),
        "many": Config(128, 256, 64, num_warps=8, num_stages=3),
        "unaligned": Config(32, 32, 32, num_warps=4, num_stages=2),
    },
    4: {
        "few": Config(16, 64, 32, num_warps=4, num_stages=3),
        "some": Config(64, 64, 32, num_warps=4, num_stages=3),
        "many": Config(128, 64, 32, num_warps=8, num_stages=3),
        "unaligned": Config(32, 32, 16, num_warps=4, num_stages=2),
    },
    8: {
        "few": Config(16, 32, 16, num_warps=4, num_stages=2),
        "some": Config(32, 32, 16, num_warps=4, num_stages=2),
        "many": Config(64, 32, 16, num_warps=8, num_stages=2),
        "unaligned": Config(16, 32, 16, num_warps=4, num_stages=2),
    },
}

# Gradient tiles are BLOCK_N x BLOCK_K; the loop runs over an expert's rows by BLOCK_M.
WEIGHT_GRADIENT: Table = {
    2: {
        "few": Config(16, 64, 128, num_warps=4, num_stages=3),
        "some": Config(32, 128, 128, num_warps=8, num_stages=3),
        "many": Config(64, 128, 256, num_warps=8, num_stages=3),
        "unaligned": Config(32, 32, 32, num_warps=4, num_stages=2),
    },
    4: {
        "few": Config(16, 64, 64, num_warps=4, num_stages=2),
        "some": Config(32, 64, 64, num_warps=4, num_stages=3),
        "many": Config(32, 128, 64, num_warps=8, num_stages=3),
        "unaligned": Config(16, 32, 32, num_warps=4, num_stages=2),
    },
    8: {
        "few": Config(16, 32, 16, num_warps=4, num_stages=2),
        "some": Config(16, 32, 16, num_warps=4, num_stages=2),
        "many": Config(16, 64, 32, num_warps=8, num_stages=2),
        "unaligned": Config(16, 16, 16, num_warps=4, num_stages=2),
    },
}

BIAS_GRADIENT = Config(32, 64, 0, num_warps=4, num_stages=2)

# The products of the expert layer. Rows of a tile are one expert's, so what a load shares is
# BLOCK_M: the height of the plan's tiles. An expert has rows // experts rows at most on average.
FFN_FEW, FFN_SOME = 16, 256

# Gathered tokens times w_in: BLOCK_N columns, with a gate of each half.
INTO: Table = {
    2: {
        "few": Config(16, 64, 128, num_warps=4, num_stages=3),
        "some": Config(64, 128, 64, num_warps=8, num_stages=4),
        "many": Config(128, 128, 64, num_warps=8, num_stages=3),
        "unaligned": Config(32, 32, 32, num_warps=4, num_stages=2),
    },
    4: {
        "few": Config(16, 32, 64, num_warps=4, num_stages=3),
        "some": Config(64, 32, 32, num_warps=4, num_stages=3),
        "many": Config(128, 32, 32, num_warps=8, num_stages=3),
        "unaligned": Config(32, 32, 16, num_warps=4, num_stages=2),
    },
    8: {
        "few": Config(16, 16, 16, num_warps=4, num_stages=2),
        "some": Config(32, 16, 16, num_warps=4, num_stages=2),
        "many": Config(64, 16, 16, num_warps=8, num_stages=2),
        "unaligned": Config(16, 16, 16, num_warps=4, num_stages=2),
    },
}

# Activations times w_out, and gradients of the pre-activation times w_in.
OUT_OF: Table = {
    2: {
        "few": Config(16, 64, 128, num_warps=4, num_stages=4),
        "some": Config(64, 256, 64, num_warps=8, num_stages=4),
        "many": Config(128, 256, 64, num_warps=8, num_stages=3),
        "unaligned": Config(32, 32, 32, num_warps=4, num_stages=2),
    },
    4: {
        "few": Config(16, 64, 32, num_warps=4, num_stages=3),
        "some": Config(64, 64, 32, num_warps=4, num_stages=3),
        "many": Config(128, 64, 32, num_warps=8, num_stages=3),
        "unaligned": Config(32, 32, 16, num_warps=4, num_stages=2),
    },
    8: {
        "few": Config(16, 32, 16, num_warps=4, num_stages=2),
        "some": Config(32, 32, 16, num_warps=4, num_stages=2),
        "many": Config(64, 32, 16, num_warps=8, num_stages=2),
        "unaligned": Config(16, 32, 16, num_warps=4, num_stages=2),
    },
}

# Gathered gradients times w_out, with the activation's derivative behind it.
ACTIVATION_GRADIENT: Table = {
    2: {
        "few": Config(16, 64, 128, num_warps=4, num_stages=3),
        "some": Config(64, 128, 64, num_warps=8, num_stages=4),
        "many": Config(128, 128, 64, num_warps=8, num_stages=4),
        "unaligned": Config(32, 32, 32, num_warps=4, num_stages=2),
    },
    4: {
        "few": Config(16, 32, 64, num_warps=4, num_stages=3),
        "some": Config(64, 32, 32, num_warps=4, num_stages=3),
        "many": Config(128, 32, 32, num_warps=8, num_stages=3),
        "unaligned": Config(32, 32, 16, num_warps=4, num_stages=2),
    },
    8: {
        "few": Config(16, 16, 16, num_warps=4, num_stages=2),
        "some": Config(32, 16, 16, num_warps=4, num_stages=2),
        "many": Config(64, 16, 16, num_warps=8, num_stages=2),
        "unaligned": Config(16, 16, 16, num_warps=4, num_stages=2),
    },
}

PLAN = Config(1024, 0, 0, num_warps=4, num_stages=1)
COMBINE = Config(1, 1024, 0, num_warps=4, num_stages=1)
DOTS = Config(0, 0, 128, num_warps=4, num_stages=2)
WEIGHT_SUMS = Config(256, 0, 0, num_warps=4, num_stages=1)


def ffn_load(rows: int, experts: int, *operands: Tensor) -> str:
    """The average load of an expert by name, known without reading a tensor; one for all tables."""
    if not all(map(vectorizes, operands)):
        return "unaligned"
    load = triton.cdiv(rows, max(experts, 1))
    return "few" if load <= FFN_FEW else "some" if load <= FFN_SOME else "many"
