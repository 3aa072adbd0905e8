"""`expert_index` on compiled kernels: every slot where a loop over the ids puts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from slicing import call, distinct_ids, dtype_name, index_of

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import poison_memory

pytestmark = pytest.mark.kernel
IDS = (torch.int32, torch.int64)


@pytest.fixture(autouse=True)
def integer_poison() -> Iterator[None]:
    """A fill that is not the -1 that `slots` ends with."""
    with poison_memory(0x7F):
        yield


def check(ids: torch.Tensor, first: int, local: int) -> tuple[torch.Tensor, torch.Tensor]:
    slots, offsets = call("expert_index", (ids, first, local))
    expected_slots, expected_offsets = index_of(ids, first, local)
    assert slots.dtype == offsets.dtype == torch.int32
    assert torch.equal(offsets, expected_offsets)
    assert torch.equal(slots, expected_slots)
    reference = OPERATORS["expert_index"].reference(ids, first, local)
    assert torch.equal(reference[0], expected_slots)
    assert torch.equal(reference[1], expected_offsets)
    return slots, offsets


def test_the_papers_figure_4() -> None:
    order = torch.tensor([2, 3, 1, 2, 0, 3, 2, 0]).view(8, 1)
    slots, offsets = check(order, 0, 2)
    assert slots.tolist() == [4, 7, 2, -1, -1, -1, -1, -1]
    assert offsets.tolist() == [0, 2, 3]
    slots, offsets = check(order, 2, 2)
    assert slots.tolist() == [0, 3, 6, 1, 5, -1, -1, -1]
    assert offsets.tolist() == [0, 3, 5]


@pytest.mark.parametrize("dtype", IDS, ids=dtype_name)
def test_any_range_of_local_experts(dtype: torch.dtype) -> None:
    for tokens, top_k, experts in ((1, 1, 1), (7, 2, 8), (33, 3, 5), (64, 8, 128), (129, 6, 64)):
        ids = distinct_ids(tokens, min(top_k, experts), experts).to(dtype)
        for first, local in ((0, experts), (0, 0), (experts // 2, experts), (1, 3), (experts, 2)):
            check(ids, first, local)


@pytest.mark.parametrize("dtype", IDS, ids=dtype_name)
def test_ids_that_are_nobodys(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    far = [-1, -2, info.min, info.max, info.min + 5, info.max - 5, 3, 4, 5, 2]
    if dtype == torch.int64:
        # These look local once cut to 32 bits.
        far += [2**32 + 3, -(2**32) + 3, 2**31 + 3, 2**40 + 4, 2**63 - 2**32 + 3, -(2**63) + 4]
    ids = torch.tensor(far, dtype=dtype).repeat(3)[torch.randperm(3 * len(far))].unsqueeze(-1)
    for first, local in ((0, 6), (3, 2), (4, 1), (0, 0), (2**31 - 8, 8), (2**31 - 1, 1)):
        check(ids, first, local)


@pytest.mark.parametrize("dtype", IDS, ids=dtype_name)
def test_a_range_that_ends_beyond_int32(dtype: torch.dtype) -> None:
    info = torch.iinfo(torch.int32)
    ids = torch.tensor([[info.max, info.min], [info.min + 1, 0], [-1, info.max - 1]], dtype=dtype)
    slots, _ = check(ids, 2**31 - 2, 16)
    assert slots.tolist() == [5, 0, -1, -1, -1, -1]


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    slots, offsets = check(torch.empty(shape, dtype=torch.int64), 0, 3)
    assert slots.shape == (0,)
    assert offsets.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", IDS, ids=dtype_name)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_ids_in_several_chunks(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    for count in (16383, 16384, 16385, 40961):
        ids = torch.randint(-1, 40, (count, 1), dtype=dtype)
        check(ids, 8, 24)
        check(ids, 0, 40)
    check(torch.full((20000, 2), 7, dtype=dtype), 0, 16)
    check(torch.full((20000, 2), 7, dtype=dtype), 8, 16)


@pytest.mark.parametrize("dtype", IDS, ids=dtype_name)
@pytest.mark.parametrize("spread", [0, 1, 3])
@pytest.mark.parametrize("foreign", [0, 700])
def test_slots_of_experts_a_round_number_of_bytes_apart(
    spread: int, foreign: int, dtype: torch.dtype
) -> None:
    # 1024 slots are 4 KiB: the experts' slots begin in the same few sets of the first-level cache.
    counts = 1024 + torch.randint(-spread, spread + 1, (40,))
    ids = torch.repeat_interleave(torch.arange(40), counts)
    ids = torch.cat([ids + 3, torch.full((foreign,), -1)])
    ids = ids[torch.randperm(ids.numel())].to(dtype).unsqueeze(-1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        check(ids, 3, 40)
        check(ids, 20, 30)
        check(ids[5:], 3, 40)


def test_strided_and_expanded_ids() -> None:
    big = torch.randint(0, 16, (60, 12))
    for ids in (big[:, 1:9:2], big[::3], big.t(), big[:1].expand(20, 12), big.int()[:, 3:]):
        check(ids, 3, 9)


def test_more_local_experts_than_ids() -> None:
    check(torch.tensor([[70000], [3], [99999]]), 0, 100000)


def test_nothing_is_shared_with_the_input() -> None:
    ids = torch.randint(0, 4, (50, 2))
    before = ids.clone()
    call("expert_index", (ids, 0, 4))
    assert torch.equal(ids, before)


def test_rejects_more_slots_than_int32_without_reading_them() -> None:
    ids = torch.zeros(1, 1, dtype=torch.int32).expand(2**16, 2**15)
    with pytest.raises(ValueError, match=r"T\*K is 2147483648; allowed: 0 to 2147483647"):
        call("expert_index", (ids, 0, 4))
