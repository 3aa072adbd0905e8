"""The Triton launcher of `expert_index`: slots and offsets are exact or wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from ppmoe_ops.kernels.expert_slice import expert_index as kernels
from ppmoe_ops.testing import poison_memory

from .aids import Guarded, bad_calls, check, counted, refuses, turn_programs_around

ALONE, COUNT, PLACE = ["place_slots_kernel"], "count_ids_kernel", "place_slots_kernel"
# T, K, E, first, L and how many launches.
SHAPES = [
    (8, 1, 4, 0, 2, 1),
    (1, 1, 1, 0, 1, 1),
    (37, 3, 8, 2, 5, 1),
    (64, 2, 9, 0, 9, 1),
    (128, 8, 128, 0, 128, 1),
    (1025, 1, 3, 1, 1, 2),
    (300, 8, 128, 96, 32, 2),
    (513, 3, 128, 0, 128, 2),
    (300, 2, 1500, 100, 1300, 2),
    (550, 2, 1024, 0, 1024, 2),
    (5, 3, 6, 2, 0, 0),
    (0, 2, 4, 0, 4, 0),
    (4, 0, 4, 0, 4, 0),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poison_memory(0x7F):  # a -1 that was written is not one that was there
        yield


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "top_k", "experts", "first", "local", "launches"), SHAPES)
def test_slots_and_offsets(
    tokens: int, top_k: int, experts: int, first: int, local: int, launches: int, dtype: torch.dtype
) -> None:
    ids = torch.randint(-1, experts, (tokens, top_k), dtype=dtype)
    with counted(kernels) as names:
        check("expert_index", (ids, first, local))
    assert names == [[], ALONE, [COUNT, PLACE]][launches]


@pytest.mark.parametrize("tokens", [100, 600])
@pytest.mark.parametrize("expert", [3, 4, 6, 9])
def test_all_tokens_on_one_expert(tokens: int, expert: int) -> None:
    check("expert_index", (torch.full((tokens, 2), expert), 4, 3))


@pytest.mark.parametrize("tokens", [50, 700])
def test_strided_and_far_ids(tokens: int) -> None:
    ids = torch.randint(0, 9, (4, 2 * tokens), dtype=torch.int64).T[::2]
    ids[3] = torch.tensor([2**40, -(2**62), 2**31, -1])
    ids[7] = torch.tensor([-(2**63), 2**63 - 1, 2**32 + 3, 3])
    check("expert_index", (ids, 2, 6))
    check("expert_index", (torch.randint(0, 9, (tokens, 1)).expand(tokens, 3), 2, 6))


def test_a_first_expert_that_no_id_reaches() -> None:
    check("expert_index", (torch.randint(-1, 9, (40, 2)), 2**31 - 1, 5))
    check("expert_index", (torch.full((4, 2), 2**31 + 1), 2**31 - 1, 5))


@pytest.mark.parametrize("most", [1, 3])
def test_chunks_of_several_blocks(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(kernels, "MOST_CHUNKS", most)
    monkeypatch.setattr(kernels, "CHUNK", 64)
    ids = torch.randint(-1, 20, (700, 3), dtype=torch.int32)
    check("expert_index", (ids, 3, 15))


@pytest.mark.parametrize("local", [129, 256, 300])
def test_slices_of_the_experts(monkeypatch: pytest.MonkeyPatch, local: int) -> None:
    narrow = dataclasses.replace(kernels.INDEX, block_n=128, block_k=256)
    monkeypatch.setattr(kernels, "INDEX", narrow)
    monkeypatch.setattr(kernels, "CHUNK", 128)
    ids = torch.randint(-1, 310, (400, 2))
    check("expert_index", (ids[:5], 2, local))
    check("expert_index", (ids, 2, local))


def test_the_order_of_programs_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    turn_programs_around(monkeypatch)
    monkeypatch.setattr(kernels, "CHUNK", 128)
    check("expert_index", (torch.randint(-1, 20, (700, 2)), 3, 15))


def test_nothing_is_written_outside() -> None:
    for tokens in (9, 800):
        ids = torch.randint(-3, 12, (tokens, 3))
        ids[0, 0], ids[1, 1] = 2**62, -(2**63)
        guarded = Guarded()
        slots = guarded.of(torch.zeros(ids.numel(), dtype=torch.int32))
        offsets = guarded.of(torch.zeros(8, dtype=torch.int32))
        for launch in kernels.index_launches(ids, 2, 7, slots, offsets):
            launch.run(ids.device)
        guarded.check()


@pytest.mark.parametrize("row", bad_calls("expert_index"), ids=str)
def test_refuses_in_the_words_of_the_reference(row: object) -> None:
    refuses(row)
