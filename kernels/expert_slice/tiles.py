"""The plan of an expert layer: which rows make a tile, and at which row a slot ended up.

One small launch reads `offsets` and writes a table of row tiles, so that the products that follow
run a persistent grid over exactly the tiles there are: the host reads nothing, foreign slots and
experts without rows make no tile, and an expert's last tile is short instead of padded.
"""

from __future__ import annotations

import dataclasses
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import Config, Launch
from ppmoe_ops.kernels.expert_slice.configs import PLAN
from ppmoe_ops.ops.expert_slice.expert_ffn import read_groups

BAND = 8  # row tiles that share a weight tile through the L2 cache
ONE_PROGRAM = 8192  # slots up to which one program inverts them all, which saves a launch


@triton.jit
def clamped(offsets, index, inside, rows):
    """offsets[index], kept within the rows that there are, so that no bad one leaves a tensor."""
    bound = tl.load(offsets + index, mask=inside, other=0)
    return tl.minimum(tl.maximum(bound, 0), rows)


@triton.jit(do_not_specialize=["count", "rows", "experts", "capacity"])
def _plan_kernel(
    slots,
    offsets,
    inverse,
    tiles,
    count,
    rows,
    experts,
    capacity,
    FILL: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tiles[0:3] = expert, first row and end of every tile, tiles[3] their number; inverse slots.

    Fewest bytes: offsets and slots read, one int32 per slot and three per tile written.
    """
    program = tl.program_id(0)
    if program < experts:
        low = clamped(offsets, program, program < experts, rows)
        high = clamped(offsets, program + 1, program < experts, rows)
        # Bad offsets may ask for more tiles than int32 counts.
        first_tile = tl.full((), 0, tl.int64)
        for start in range(0, program, BLOCK_L):
            at = start + tl.arange(0, BLOCK_L)
            begin = clamped(offsets, at, at < program, rows)
            end = clamped(offsets, at + 1, at < program, rows)
            first_tile += tl.sum(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M).to(tl.int64))
        number = tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)
        for start in range(0, number, BLOCK_L):
            at = start + tl.arange(0, BLOCK_L)
            inside = (at < number) & (first_tile + at < capacity)
            to = tiles + first_tile + at
            first = low + at * BLOCK_M
            tl.store(to, tl.zeros((BLOCK_L,), tl.int32) + program, mask=inside)
            tl.store(to + capacity, first, mask=inside)
            tl.store(to + 2 * capacity, tl.minimum(first + BLOCK_M, high), mask=inside)
        if program == experts - 1:
            tl.store(tiles + 3 * capacity, tl.minimum(first_tile + number, capacity).to(tl.int32))
        return

    low = clamped(offsets, 0, experts > 0, rows)
    high = clamped(offsets, experts, experts > 0, rows)
    begin = (program - experts) * BLOCK
    end = begin + tl.minimum(high - begin, BLOCK)
    if FILL:
        begin, end = 0, high
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(inverse + at, tl.full((BLOCK,), -1, tl.int32), mask=at < count)
        tl.debug_barrier()
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        slot = tl.load(slots + row, mask=(row >= low) & (row < end), other=-1)
        tl.store(inverse + slot, row, mask=(slot >= 0) & (slot < count))


@triton.jit
def tile_at(tiles, index, columns, number, capacity, BAND: tl.constexpr):
    """Expert, first row, end and column of a tile: down a band of rows, then the next column."""
    band = index // (BAND * columns)
    inside = index % (BAND * columns)
    height = tl.minimum(number - band * BAND, BAND)
    tile = band * BAND + inside % height
    expert = tl.load(tiles + tile)
    first = tl.load(tiles + capacity + tile)
    end = tl.load(tiles + 2 * capacity + tile)
    return expert, first, end, inside // height


@dataclasses.dataclass(frozen=True)
class Plan:
    """`inverse` [T*K]: the row of a slot, -1 without one; `tiles`: see the kernel; `slots`."""

    slots: Tensor
    offsets: Tensor
    inverse: Tensor
    tiles: Tensor
    capacity: int
    rows: int
    block_m: int

    @property
    def experts(self) -> int:
        return self.offsets.numel() - 1


def empty_plan(slots: Tensor, offsets: Tensor, rows: int, block_m: int) -> Plan:
    """Room for the plan of `rows` rows at most, in tiles of `block_m`."""
    capacity = rows // block_m + offsets.numel() - 1
    inverse = torch.empty_like(slots)
    tiles = slots.new_empty(3 * capacity + 1)
    return Plan(slots, offsets, inverse, tiles, capacity, rows, block_m)


def plan_launch(plan: Plan) -> Launch:
    """The call that fills `plan`; beyond ONE_PROGRAM slots `inverse` must hold -1 before."""
    count, experts = plan.slots.numel(), plan.experts
    fill = count <= ONE_PROGRAM
    arguments = {
        "slots": plan.slots,
        "offsets": plan.offsets,
        "inverse": plan.inverse,
        "tiles": plan.tiles,
        "count": count,
        "rows": plan.rows,
        "experts": experts,
        "capacity": plan.capacity,
        "FILL": fill,
        "BLOCK_L": min(1024, triton.next_power_of_2(max(experts, 16))),
        "BLOCK_M": plan.block_m,
        "BLOCK": PLAN.block_m,
    }
    programs = experts + (1 if fill else triton.cdiv(plan.rows, PLAN.block_m))
    return Launch(_plan_kernel, programs, arguments, PLAN)


def make_plan(slots: Tensor, offsets: Tensor, rows: int, config: Config) -> Plan:
    """Plan the rows of `slots` in tiles of the configuration's height: one or two launches."""
    plan = empty_plan(slots, offsets, rows, config.block_m)
    if slots.numel() > ONE_PROGRAM:
        plan.inverse.fill_(-1)
    plan_launch(plan).run(slots.device)
    return plan


def prepare(
    op: str, x: Tensor, slots: Tensor, offsets: Tensor, rows: int, **others: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Slots and offsets as kernels read them; refuses tensors of several devices."""
    for name, tensor in {"slots": slots, "offsets": offsets, **others}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {x.device}")
    if os.environ.get("PPMOE_OPS_CHECK") == "1":
        read_groups(op, slots, offsets, rows)
    return slots.contiguous(), offsets.contiguous()
