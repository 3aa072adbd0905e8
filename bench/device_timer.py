"""Device time of calls inside a CUDA graph, host synchronisations, peak memory and equal bits.

A graph holds many calls, each on the next of several sets of inputs, and is replayed many times
between two events: what is reported is elapsed time over calls, launch gaps between kernels
included and host time excluded. Sets of inputs are copied until their bytes exceed the L2 cache
several times, so that a call finds none of its inputs there; small ones stay in the cache even so,
as they do behind the kernel that wrote them, and the row says which it was.

On a CPU the same calls run in a loop under the host's clock: that is a rehearsal of the script.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .gate import outputs
from .timer import Call, CudaClock, Spread, spread

ROTATED_BYTES = 256 << 20  # several times an L2 cache of 50 to 60 MB
MOST_SETS = 32
GRAPH_SECONDS = 2e-3  # replays shorter than this would time the launch of the graph
MOST_CALLS = 256


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds a call, and how they were taken."""

    seconds: Spread
    how: str
    calls: int


def tensor_bytes(args: Sequence[Any]) -> int:
    """Bytes of the tensors among `args`, each storage once."""
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in args
        if isinstance(each, Tensor)
    }
    return sum(storages.values())


def copies(args: tuple[Any, ...], needed: int = ROTATED_BYTES) -> list[tuple[Any, ...]]:
    """`args` and as many copies as it takes to exceed `needed` bytes, at most `MOST_SETS`."""
    size = max(tensor_bytes(args), 1)
    count = min(MOST_SETS, -(-needed // size))
    made = [
        tuple(each.clone() if isinstance(each, Tensor) else each for each in args)
        for _ in range(count - 1)
    ]
    return [args, *made]


def rotation(sets: Sequence[tuple[Any, ...]]) -> str:
    """What the sets of inputs are, in words."""
    total = sum(map(tensor_bytes, sets))
    where = "" if total >= ROTATED_BYTES else ", in L2"
    return f"{len(sets)} x {total / len(sets) / (1 << 20):.4g} MiB{where}"


def synchronisations(call: Call, device: torch.device) -> int:
    """How often a call makes the host wait, as PyTorch counts it."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most that a call has allocated at once beyond what was there; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize()
    most: int = torch.cuda.max_memory_allocated(device)
    del result
    return most - before


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def same_bits(
    call: Call, device: torch.device, defined: Callable[[list[Tensor]], list[Tensor]] = list
) -> bool:
    """Whether a call returns the same bits again, in memory that held something else meanwhile."""
    first = [each.clone() for each in defined(outputs(call()))]
    for value in (torch.nan, 1e30):
        size = sum(each.nbytes for each in first) // 4 + 1
        torch.full((size,), value, device=device)
        again = defined(outputs(call()))
        if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, again, strict=True)):
            return False
    return True


def _capture(calls: Sequence[Call], count: int) -> torch.cuda.CUDAGraph:
    """A graph of `count` calls that take turns; what they return is dropped at once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(count):
            calls[turn % len(calls)]()
    return graph


def _warm(calls: Sequence[Call]) -> float:
    """Run every call on a side stream, as capturing asks for; seconds of the last."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (calls[0], calls[0], *calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


def _replay(graph: torch.cuda.CUDAGraph, seconds: float, least: int = 7) -> Iterator[float]:
    """Seconds of each replay, until the time is up."""
    ends = time.monotonic() + seconds
    done = 0
    while done < least or (time.monotonic() < ends and done < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        yield start.elapsed_time(end) / 1e3
        done += 1


def device_time(
    calls: Sequence[Call], device: torch.device, seconds: float = 0.4, waits: int = 0
) -> Timed:
    """Seconds of a call, the calls taking turns; without a graph where the host waits in one."""
    if device.type != "cuda":
        return _on_host(calls, seconds)
    one = _warm(calls)
    if waits:
        return _by_events(calls, seconds, f"{waits} host synchronisations a call")
    count = max(len(calls), min(MOST_CALLS, round(GRAPH_SECONDS / max(one, 1e-6))))
    count = -(-count // len(calls)) * len(calls)
    try:
        graph = _capture(calls, count)
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = str(error).splitlines()[0][:80]
        return _by_events(calls, seconds, f"not captured: {reason}")
    graph.replay()
    samples = [each / count for each in _replay(graph, seconds)]
    return Timed(spread(samples), "graph", count)


def copy_time(nbytes: int, device: torch.device, seconds: float) -> float:
    """Seconds of a copy that reads and writes `nbytes` together, inputs rotated as elsewhere."""
    source = torch.ones(max(nbytes // 2, 1), dtype=torch.uint8, device=device)
    sets = copies((source, torch.empty_like(source)))
    calls = [functools.partial(target.copy_, read) for read, target in sets]
    return device_time(calls, device, seconds).seconds.median


def _by_events(calls: Sequence[Call], seconds: float, why: str) -> Timed:
    """Events around each call behind a write that evicts L2; the host's gaps are in the time."""
    clock = CudaClock(max_repeats=10)
    samples: list[float] = []
    ends = time.monotonic() + seconds
    while len(samples) < 5 or (time.monotonic() < ends and len(samples) < 50):
        samples.append(clock.measure(calls[len(samples) % len(calls)], 2))
    return Timed(spread(samples), f"events ({why})", 1)


def _on_host(calls: Sequence[Call], seconds: float) -> Timed:
    samples: list[float] = []
    ends = time.monotonic() + seconds
    while len(samples) < 3 or (time.monotonic() < ends and len(samples) < 50):
        start = time.perf_counter()
        calls[len(samples) % len(calls)]()
        samples.append(time.perf_counter() - start)
    return Timed(spread(samples), "host clock, a rehearsal", 1)
