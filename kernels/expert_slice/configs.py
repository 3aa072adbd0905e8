"""Every configuration of the Triton kernels of expert slicing, in one place."""

from __future__ import annotations

from ppmoe_ops.kernels._launch import Config, Table

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
