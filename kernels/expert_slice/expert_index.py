"""`expert_index` in Triton: a stable counting sort of the flat slots by local expert.

Two launches at any size: one counts ids by chunk and expert, the other turns the counts into
positions and writes the slots. Few ids are sorted by one program in one launch, as a launch costs
more than the work. Every program sums the count matrix for itself: a few KB from the L2 cache
instead of a third launch.

The rank of an id among the equal ids before it comes from comparing a block of ids with itself.
That costs BLOCK**2 comparisons for any number of experts, where a cumulative sum over one-hot rows
costs BLOCK * L: the same at 128 experts, eight times as much at a thousand. Only integers are
added, and no two programs write the same element.

Experts beyond BLOCK_L are cut into slices, each with programs of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppmoe_ops.kernels._launch import Launch
from ppmoe_ops.kernels.expert_slice.configs import INDEX, INDEX_COUNT
from ppmoe_ops.ops.expert_slice.expert_index import check_forward

ALONE = 1024  # up to here one program sorts, in one launch
FEWEST_BINS = 128  # narrower histograms cost the same
CHUNK = 512  # fewest ids of a program, where there are several
MOST_CHUNKS = 256  # bounds the rows of the count matrix, ...
MOST_COUNTS = 2**24  # ... and its elements


@triton.jit
def _places(ids, at, end, low, width):
    """For the ids at `at`: which of the `width` experts from id `low` on, or -1 for none."""
    place = tl.load(ids + at, mask=at < end, other=0).to(tl.int64) - low
    ours = (place >= 0) & (place < width) & (at < end)
    return tl.where(ours, place, -1).to(tl.int32)


@triton.jit(do_not_specialize=["count", "chunk", "first", "experts"])
def _count_ids_kernel(
    ids, counts, count, chunk, first, experts, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr
):
    """counts[c, e] = ids of expert `first` + e in chunk c. Fewest bytes: T*K ids read."""
    slices = tl.cdiv(experts, BLOCK_L)
    part = (tl.program_id(0) // slices).to(tl.int64)
    low = (tl.program_id(0) % slices).to(tl.int64) * BLOCK_L
    width = tl.minimum(experts - low, BLOCK_L)
    total = tl.zeros((BLOCK_L,), dtype=tl.int32)
    end = tl.minimum((part + 1) * chunk, count)
    for at in range(part * chunk, end, BLOCK):
        place = _places(ids, at + tl.arange(0, BLOCK), end, first + low, width)
        total += tl.histogram(place, BLOCK_L, mask=place >= 0)
    at_l = tl.arange(0, BLOCK_L)
    tl.store(counts + (part * experts + low + at_l), total, mask=at_l < width)


@triton.jit
def _sum_counts(
    counts, part, parts, low, width, experts, ROWS: tl.constexpr, BLOCK_L: tl.constexpr
):
    """Counts of the experts from `low` on, of all chunks and of those before `part`."""
    at_r, at_l = tl.arange(0, ROWS), tl.arange(0, BLOCK_L)
    total = tl.zeros((ROWS, BLOCK_L), dtype=tl.int32)
    ahead = tl.zeros((ROWS, BLOCK_L), dtype=tl.int32)
    for row in range(0, parts, ROWS):
        chunk = (row + at_r).to(tl.int64)
        inside = (chunk < parts)[:, None] & (at_l < width)[None, :]
        of = counts + chunk[:, None] * experts + (low + at_l)[None, :]
        here = tl.load(of, mask=inside, other=0)
        total += here
        ahead += tl.where((chunk < part)[:, None], here, 0)
    return tl.sum(total, axis=0), tl.sum(ahead, axis=0)


@triton.jit(do_not_specialize=["count", "chunk", "first", "experts"])
def _place_slots_kernel(
    ids,
    counts,
    slots,
    offsets,
    count,
    chunk,
    first,
    experts,
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
    ROWS: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Write the slots of a chunk to their positions, the tail, and the offsets.

    ALONE: the only program, which counts for itself. Fewest bytes: T*K ids read, T*K + L + 1 int32
    written.
    """
    slices = tl.cdiv(experts, BLOCK_L)
    parts = tl.num_programs(0) // slices
    part = (tl.program_id(0) // slices).to(tl.int64)
    low = (tl.program_id(0) % slices).to(tl.int64) * BLOCK_L
    width = tl.minimum(experts - low, BLOCK_L)
    begin, end = part * chunk, tl.minimum((part + 1) * chunk, count)
    at_b, at_l = tl.arange(0, BLOCK), tl.arange(0, BLOCK_L)
    below = tl.zeros((), dtype=tl.int32)
    total = tl.zeros((BLOCK_L,), dtype=tl.int32)
    ahead = tl.zeros((BLOCK_L,), dtype=tl.int32)
    if ALONE:
        for at in range(begin, end, BLOCK):
            place = _places(ids, at + at_b, end, first + low, width)
            total += tl.histogram(place, BLOCK_L, mask=place >= 0)
    else:
        total, ahead = _sum_counts(counts, part, parts, low, width, experts, ROWS, BLOCK_L)
        for before in range(0, low, BLOCK_L):
            sums, _ = _sum_counts(counts, part, parts, before, BLOCK_L, experts, ROWS, BLOCK_L)
            below += tl.sum(sums, axis=0)

    start = below + tl.cumsum(total, axis=0) - total
    local = below + tl.sum(total, axis=0)
    last = low + width == experts
    if part == 0:
        tl.store(offsets + (low + at_l), start, mask=at_l < width)
        tl.store(offsets + (low + width), local, mask=last)

    cursor = start + ahead
    place = _places(ids, begin + at_b, end, first + low, width)
    for at in range(begin, end, BLOCK):
        following = _places(ids, at + BLOCK + at_b, end, first + low, width)
        # key[j] - place[i] * BLOCK is in [0, i) where j < i has the same place, and nowhere else.
        key = place * BLOCK + at_b
        distance = (key[None, :] - (place * BLOCK)[:, None]).to(tl.uint32)
        rank = tl.sum((distance < at_b.to(tl.uint32)[:, None]).to(tl.int32), axis=1)
        to = tl.gather(cursor, tl.maximum(place, 0), axis=0) + rank
        tl.store(slots + to.to(tl.int64), (at + at_b).to(tl.int32), mask=place >= 0)
        cursor += tl.histogram(place, BLOCK_L, mask=place >= 0)
        place = following
    if last:
        for at in range(begin, end, BLOCK):
            of = at + at_b
            tl.store(slots + of, -1, mask=(of >= local) & (of < end))


def index_launches(
    ids: Tensor, first_expert: int, num_local: int, slots: Tensor, offsets: Tensor
) -> list[Launch]:
    """The calls that fill `slots` and `offsets` from contiguous `ids`, neither of them empty."""
    count = ids.numel()
    wide = min(max(triton.next_power_of_2(num_local), FEWEST_BINS), INDEX.block_n)
    slices = triton.cdiv(num_local, wide)
    alone = count <= ALONE and slices == 1
    most = max(1, min(MOST_COUNTS // num_local, MOST_CHUNKS))
    chunk = count if alone else max(CHUNK, triton.cdiv(count, most))
    chunk = triton.cdiv(chunk, INDEX.block_m) * INDEX.block_m
    parts = triton.cdiv(count, chunk)
    counts = None if alone else ids.new_empty((parts, num_local), dtype=torch.int32)
    shared = {
        "ids": ids,
        "counts": counts,
        "count": count,
        "chunk": chunk,
        "first": first_expert,
        "experts": num_local,
        "BLOCK": INDEX.block_m,
        "BLOCK_L": wide,
    }
    place = {**shared, "slots": slots, "offsets": offsets, "ROWS": INDEX.block_k // wide}
    launches = [Launch(_place_slots_kernel, parts * slices, {**place, "ALONE": alone}, INDEX)]
    if not alone:
        shared["BLOCK"] = INDEX_COUNT.block_m
        launches.insert(0, Launch(_count_ids_kernel, parts * slices, shared, INDEX_COUNT))
    return launches


def expert_index(experts: Tensor, first_expert: int, num_local: int) -> tuple[Tensor, Tensor]:
    """Launch `expert_index`; arguments and results as in `ppmoe_ops.expert_index`."""
    check_forward(experts, first_expert, num_local)
    slots = experts.new_empty((experts.numel(),), dtype=torch.int32)
    offsets = experts.new_empty((num_local + 1,), dtype=torch.int32)
    if experts.numel() == 0 or num_local == 0:
        return slots.fill_(-1), offsets.zero_()
    ids = experts.contiguous()
    for launch in index_launches(ids, first_expert, num_local, slots, offsets):
        launch.run(experts.device)
    return slots, offsets
