"""The sum of each token's rows, in the order of its choices."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import Launch, accumulator
from ppmoe_ops.kernels.expert_slice.configs import COMBINE
from ppmoe_ops.kernels.expert_slice.tiles import Plan


@triton.jit(do_not_specialize=["tokens", "count_rows"])
def _combine_kernel(
    rows,
    inverse,
    out,
    tokens,
    count_rows,
    width,
    TOP_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[t] = sum over k of rows[inverse[t, k]], in the order of k; zero for a token without rows.

    Fewest bytes: local rows read, T*H elements written.
    """
    columns = tl.cdiv(width, BLOCK_N)
    token = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    n = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    in_m, in_n = token < tokens, n < width
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
    for k in tl.range(0, TOP_K, loop_unroll_factor=4):
        row = tl.load(inverse + token * TOP_K + k, mask=in_m, other=-1)
        local = (row >= 0) & (row < count_rows)
        at = rows + row.to(tl.int64)[:, None] * width + n[None, :]
        total += tl.load(at, mask=local[:, None] & in_n[None, :], other=0.0).to(WIDE)
    to = out + token[:, None] * width + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def combine_launch(plan: Plan, rows: Tensor, out: Tensor, top_k: int) -> Launch:
    """The call that fills `out` [T, H] with the sums of its tokens' `rows` [R, H]."""
    arguments = {
        "rows": rows,
        "inverse": plan.inverse,
        "out": out,
        "tokens": out.size(0),
        "count_rows": plan.rows,
        "width": out.size(1),
        "TOP_K": top_k,
        "WIDE": accumulator(out.dtype),
        "BLOCK_M": COMBINE.block_m,
        "BLOCK_N": COMBINE.block_n,
    }
    programs = triton.cdiv(out.size(0), COMBINE.block_m) * triton.cdiv(out.size(1), COMBINE.block_n)
    return Launch(_combine_kernel, programs, arguments, COMBINE)
