"""Every configuration of the Triton kernels of expert slicing, in one place."""

from __future__ import annotations

import triton
from torch import Tensor

from ppmoe_ops.kernels._launch import LITTLE, Config, Gpu, Table, vectorizes
from ppmoe_ops.kernels._tune import Candidates

# By bytes per element. Out tiles are BLOCK_M x BLOCK_N; the loop runs over inputs by BLOCK_K.
LINEAR: Table = {
    2: {
        "few": Config(16, 64, 128, num_warps=4, num_stages=4),
        "some": Config(64, 128, 64, num_warps=4, num_stages=4),
        "many": Config(128, 256, 64, num_warps=8, num_stages=3),
        "little": Config(64, 128, 64, num_warps=4, num_stages=3),
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
        "plain": Config(128, 64, 64, num_warps=8, num_stages=3),
        "little": Config(64, 64, 64, num_warps=4, num_stages=3),
        "unaligned": Config(32, 32, 32, num_warps=4, num_stages=2),
    },
    4: {
        "few": Config(16, 32, 32, num_warps=4, num_stages=3),
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
        "little": Config(64, 128, 64, num_warps=4, num_stages=3),
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

# Loading and multiplying by warps of their own: not yet run on a GPU, so only the tuner tries it.
OUT_OF_SPECIALIZED = Config(128, 256, 64, num_warps=4, num_stages=3, specialize=True)

# Gathered gradients times w_out, with the activation's derivative behind it.
ACTIVATION_GRADIENT: Table = {
    2: {
        "few": Config(16, 64, 128, num_warps=4, num_stages=3),
        "some": Config(64, 128, 64, num_warps=8, num_stages=4),
        "many": Config(128, 128, 64, num_warps=8, num_stages=4),
        "plain": Config(128, 128, 64, num_warps=8, num_stages=3),
        "little": Config(64, 64, 64, num_warps=4, num_stages=3),
        "unaligned": Config(32, 32, 32, num_warps=4, num_stages=2),
    },
    4: {
        "few": Config(16, 32, 32, num_warps=4, num_stages=3),
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

# What the tuner tries beside a table's entry, where it is switched on (see kernels/_tune.py). All
# have the entry's BLOCK_M, the height of the plan's tiles, and for ACTIVATION_GRADIENT its BLOCK_N,
# by which the routing weights' dots are laid out.
CANDIDATES: dict[str, Candidates] = {
    "into": {
        2: {
            "few": (
                Config(16, 128, 64, num_warps=4, num_stages=4),
                Config(16, 64, 128, num_warps=4, num_stages=2),
            ),
            "some": (
                Config(64, 64, 64, num_warps=4, num_stages=4),
                Config(64, 128, 64, num_warps=8, num_stages=3),
            ),
            "many": (
                Config(128, 64, 64, num_warps=8, num_stages=3, programs=2, registers=128),
                Config(128, 128, 64, num_warps=8, num_stages=4),
            ),
            "plain": (Config(128, 64, 32, num_warps=8, num_stages=4),),
        },
        4: {"many": (Config(128, 32, 16, num_warps=8, num_stages=3),)},
    },
    "out of": {
        2: {
            "few": (
                Config(16, 128, 64, num_warps=4, num_stages=4),
                Config(16, 64, 128, num_warps=4, num_stages=3),
            ),
            "some": (
                Config(64, 128, 64, num_warps=4, num_stages=4),
                Config(64, 128, 64, num_warps=8, num_stages=4),
            ),
            "many": (
                OUT_OF_SPECIALIZED,
                Config(128, 128, 64, num_warps=8, num_stages=3, programs=2),
                Config(128, 256, 64, num_warps=8, num_stages=4),
            ),
            "plain": (Config(128, 128, 64, num_warps=8, num_stages=3),),
        },
        4: {"many": (Config(128, 64, 16, num_warps=8, num_stages=3),)},
    },
    "activation gradient": {
        2: {
            "few": (Config(16, 64, 64, num_warps=4, num_stages=4),),
            "some": (Config(64, 128, 64, num_warps=8, num_stages=3),),
            "many": (
                Config(128, 128, 64, num_warps=8, num_stages=3),
                Config(128, 128, 32, num_warps=8, num_stages=4),
            ),
            "plain": (Config(128, 128, 32, num_warps=8, num_stages=4),),
        },
        4: {"many": (Config(128, 32, 16, num_warps=8, num_stages=3),)},
    },
    "weight gradient": {
        2: {
            "few": (Config(16, 128, 128, num_warps=8, num_stages=3),),
            "some": (Config(32, 128, 128, num_warps=8, num_stages=4),),
            "many": (
                Config(64, 128, 128, num_warps=8, num_stages=3),
                Config(64, 256, 128, num_warps=8, num_stages=3),
            ),
            "plain": (Config(64, 128, 128, num_warps=8, num_stages=3),),
        },
        4: {"many": (Config(32, 64, 64, num_warps=4, num_stages=3),)},
    },
    "linear": {
        2: {
            "few": (Config(16, 128, 64, num_warps=4, num_stages=4),),
            "some": (Config(64, 64, 64, num_warps=4, num_stages=4),),
            "many": (
                Config(128, 128, 64, num_warps=8, num_stages=3),
                Config(128, 128, 64, num_warps=4, num_stages=4),
            ),
        },
        4: {"many": (Config(128, 64, 16, num_warps=8, num_stages=3),)},
    },
}

# Weight gradients of the expert layer: WEIGHT_GRADIENT's tiles. Reading slots before rows takes two
# stages of the pipeline, so that three buffers of rows need five.
FFN_WEIGHT_GRADIENT: Table = {
    2: {
        "few": Config(16, 64, 128, num_warps=4, num_stages=5),
        "some": Config(32, 128, 128, num_warps=8, num_stages=5),
        "many": Config(64, 128, 256, num_warps=8, num_stages=5),
        "plain": Config(64, 128, 256, num_warps=8, num_stages=3),
        "little": Config(64, 128, 128, num_warps=8, num_stages=3),
        "unaligned": Config(32, 32, 32, num_warps=4, num_stages=2),
    },
    4: WEIGHT_GRADIENT[4],
    8: WEIGHT_GRADIENT[8],
}

PLAN = Config(1024, 0, 0, num_warps=4, num_stages=1)
COMBINE = Config(1, 1024, 0, num_warps=4, num_stages=1)
DOTS = Config(0, 0, 32, num_warps=4, num_stages=2)
WEIGHT_SUMS = Config(256, 0, 0, num_warps=4, num_stages=1)


def ffn_load(gpu: Gpu, rows: int, experts: int, *operands: Tensor) -> str:
    """The average load of an expert by name, known without reading a tensor; one for all tables.

    "plain" is "many" where no copy engine saves the registers that addresses take.
    """
    if not all(map(vectorizes, operands)):
        return "unaligned"
    load = triton.cdiv(rows, max(experts, 1))
    if load > FFN_FEW and gpu.shared < LITTLE:
        return "little"
    many = "many" if gpu.tma else "plain"
    return "few" if load <= FFN_FEW else "some" if load <= FFN_SOME else many


# Memory-bound operators: what BLOCK_M, BLOCK_N and BLOCK_K stand for is said beside each.

# Ids ranked at once, most experts of a program, elements of the count matrix read at once.
INDEX = Config(64, 1024, 4096, num_warps=8, num_stages=1)
# Ids counted at once.
INDEX_COUNT = Config(512, 0, 0, num_warps=4, num_stages=1)

# By bytes per element: rows and columns of a tile; narrow rows trade columns for more rows. A
# thread has a few 16-byte loads in flight: all of them in SLICE, one a gathered row in MERGE.
SLICE = {
    2: Config(4, 1024, 0, num_warps=4, num_stages=1),
    4: Config(4, 512, 0, num_warps=4, num_stages=1),
    8: Config(4, 256, 0, num_warps=4, num_stages=1),
}
MERGE = {
    2: Config(1, 1024, 0, num_warps=4, num_stages=1),
    4: Config(1, 512, 0, num_warps=4, num_stages=1),
    8: Config(1, 256, 0, num_warps=4, num_stages=1),
}
MERGE_BACKWARD = {
    2: Config(4, 512, 0, num_warps=4, num_stages=1),
    4: Config(4, 256, 0, num_warps=4, num_stages=1),
    8: Config(2, 128, 0, num_warps=4, num_stages=1),
}

# Slots of a program that inverts some of them, and of one that inverts them all.
INVERT = Config(256, 0, 0, num_warps=4, num_stages=1)
INVERT_ALONE = Config(1024, 0, 0, num_warps=8, num_stages=1)

# Routers hold whole rows: most tokens of a program, and elements of a tile. A row that is wider
# than the tile gets warps in proportion, at most MOST_WARPS.
ROUTER = {
    "few": Config(64, 0, 512, num_warps=4, num_stages=1),
    "many": Config(128, 0, 2048, num_warps=4, num_stages=1),
}
MOST_WARPS = 16
# The same for the losses, and most programs: as many partial sums are added up by one.
LOSSES = Config(256, 0, 4096, num_warps=8, num_stages=1)
LOSSES_PROGRAMS = 256
# Elements of the partial sums, and most columns, read at once.
LOSSES_FINISH = Config(0, 512, 2048, num_warps=8, num_stages=1)
