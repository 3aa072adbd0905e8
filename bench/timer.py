"""Times callables in turns, and measures the machine's ceilings in the same way.

Two callables that are timed one after the other see different machines: clocks, neighbours and
memory drift within seconds. Here every round times every candidate, in an order of its own, and a
ratio is formed within the round; what is reported is the median over rounds and its quartiles.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], object]
MAX_REPEATS = 10_000
READ_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float
    best: float

    @property
    def relative(self) -> float:
        """The interquartile range as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def spread(values: Sequence[float]) -> Spread:
    """Summarise samples; `best` is the smallest."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, min(values))


class Clock(Protocol):
    """Measures seconds a call, averaged over `repeats` calls."""

    def measure(self, call: Call, repeats: int) -> float: ...


class HostClock:
    """Wall time on the host; with a CUDA device, until the device is done."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"

    def measure(self, call: Call, repeats: int) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if self._cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats


class CudaClock:
    """Device time by events, each call after a write that evicts the L2 cache.

    The write also lies ahead of the call in the queue, so that the host's launches are hidden
    behind it. Repeats are limited: the host must not run out of queue.
    """

    def __init__(self, evict_bytes: int = 256 << 20, max_repeats: int = 50) -> None:
        self._evict = torch.empty(evict_bytes, dtype=torch.int8, device="cuda")
        self._max_repeats = max_repeats

    def measure(self, call: Call, repeats: int) -> float:
        repeats = min(repeats, self._max_repeats)
        pairs: list[tuple[Any, Any]] = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._evict.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        milliseconds: list[float] = [start.elapsed_time(end) for start, end in pairs]
        return sum(milliseconds) / repeats / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock that times work of `device`."""
    return CudaClock() if device.type == "cuda" else HostClock(device)


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """Per candidate, one time in seconds for every round; index i is the same round for all."""

    rounds: dict[str, list[float]]

    def timing(self, name: str) -> Spread:
        """Seconds of one call of `name`."""
        return spread(self.rounds[name])

    def speedup(self, name: str, over: str) -> Spread:
        """How many times faster `name` is than `over`, formed in each round."""
        ours, theirs = self.rounds[name], self.rounds[over]
        return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def calibrate(call: Call, clock: Clock, sample_seconds: float) -> tuple[int, float]:
    """Warm `call` up; return the repeats that make a sample last, and seconds a call."""
    clock.measure(call, 1)
    repeats, seconds = 1, clock.measure(call, 1)
    # A single call overstates fast ones, so approach the sample in steps.
    while seconds * repeats < 0.3 * sample_seconds and repeats < MAX_REPEATS:
        wanted = sample_seconds / max(seconds, 1e-9)
        repeats = min(max(repeats + 1, math.ceil(wanted / 2)), MAX_REPEATS)
        seconds = clock.measure(call, repeats)
    return max(1, min(round(sample_seconds / max(seconds, 1e-9)), MAX_REPEATS)), seconds


def interleave(
    candidates: Mapping[str, Call],
    *,
    clock: Clock,
    seconds: float = 3.0,
    min_rounds: int = 5,
    max_rounds: int = 40,
    sample_seconds: float = 0.01,
    seed: int = 0,
) -> Interleaved:
    """Time `candidates` in turns for about `seconds`, at least `min_rounds` rounds.

    A round passes over all candidates three times where the budget allows it, once otherwise,
    each pass in an order of its own; a candidate's time in the round is the median of its passes.
    """
    names = list(candidates)
    plans = {name: calibrate(candidates[name], clock, sample_seconds) for name in names}
    one_pass = sum(repeats * each for repeats, each in plans.values())
    passes = 3 if 3 * one_pass * min_rounds <= seconds else 1
    shuffle = random.Random(seed).shuffle
    rounds: dict[str, list[float]] = {name: [] for name in names}
    spent, done = 0.0, 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while done < min_rounds or (spent < seconds and done < max_rounds):
            samples: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(passes):
                order = list(names)
                shuffle(order)
                for name in order:
                    repeats = plans[name][0]
                    sample = clock.measure(candidates[name], repeats)
                    samples[name].append(sample)
                    spent += sample * repeats
            for name in names:
                rounds[name].append(statistics.median(samples[name]))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return Interleaved(rounds)


def recycle_memory(reserve: int = 1 << 30) -> str:
    """Make glibc keep freed memory in the process; return what was done, in words.

    By default glibc gives a big block back to the kernel at every free, and a fresh output then
    costs more in page faults than in copying: 64 MB clone at a fifth of the rate of a copy into
    memory that is there. A training process with a caching allocator does not pay that. `reserve`
    bytes are touched once, so that blocks are carved from resident memory.
    """
    trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return "the C library's own policy for freed memory (it has no mallopt)"
    largest = 2**31 - 1
    settings = ((mmap_threshold, 1 << 30), (mmap_max, 0), (trim_threshold, largest), (top_pad, 0))
    if not all(mallopt(option, value) == 1 for option, value in settings):
        return "the C library's own policy for freed memory (mallopt refused)"
    torch.zeros(reserve, dtype=torch.uint8).fill_(1)
    return "freed memory is kept for reuse (mallopt: no mmap, no trimming)"


@dataclasses.dataclass(frozen=True)
class CopyRate:
    """Bytes moved by one copy (read and written together) and the best rate seen."""

    nbytes: int
    bytes_per_second: float
    how: str


@dataclasses.dataclass(frozen=True)
class ReadRate:
    """The rate of reading alone, and the reduction that reached it."""

    bytes_per_second: float
    how: str


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the machine reaches with plain copies and dense products."""

    copies: list[CopyRate]
    gemm: dict[str, float]
    """FLOP/s by dtype name."""
    read: ReadRate | None = None
    """Where a row was compared with it."""

    @property
    def memory(self) -> CopyRate:
        """The copy of the largest size, which no cache holds."""
        return max(self.copies, key=lambda copy: copy.nbytes)


def copy_candidates(nbytes: int, device: torch.device) -> dict[str, Call]:
    """Two ways to move `nbytes` (half read, half written): into new and into existing memory."""
    source = torch.ones(max(nbytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"clone()": source.clone, "copy_()": lambda: target.copy_(source)}


def read_candidates(device: torch.device) -> dict[str, Call]:
    """Reductions over `READ_BYTES`, which no cache holds: reading with next to no writing."""
    source = torch.ones(READ_BYTES // 4, device=device)
    return {
        "sum() of int64": source.view(torch.int64).sum,
        "amax() of int32": source.view(torch.int32).amax,
        "sum() of float32": source.sum,
    }


def fastest(result: Interleaved, names: Sequence[str]) -> str:
    """The candidate with the smallest median."""
    return min(names, key=lambda name: result.timing(name).median)


def measure_copies(device: torch.device, clock: Clock, seconds: float = 0.4) -> list[CopyRate]:
    """The best copy rate of each size, from cache-sized to memory-sized."""
    largest = 30 if device.type == "cuda" else 27
    rates = []
    for exponent in range(17, largest + 1, 2):
        nbytes = 1 << exponent
        candidates = copy_candidates(nbytes, device)
        result = interleave(candidates, clock=clock, seconds=seconds)
        best = fastest(result, list(candidates))
        rates.append(CopyRate(nbytes, nbytes / result.timing(best).best, best))
    return rates


def _products(size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return {"a @ b": lambda: torch.mm(a, b), "a @ b.T": lambda: torch.mm(a, b.T)}


def measure_gemm(
    dtype: torch.dtype, device: torch.device, clock: Clock, seconds: float = 0.6
) -> float:
    """The best FLOP/s of a dense n x n x n product, stored both ways round."""
    size, largest, patience = 256, 8192, 0.15
    while size < largest:
        calls = _products(size, dtype, device).values()
        estimate = min(clock.measure(call, 1) for call in [*calls] * 4)
        # Rates rise with the size and time with its cube: stop at the first that takes long.
        if 8 * estimate > patience:
            break
        size *= 2
    result = interleave(_products(size, dtype, device), clock=clock, seconds=seconds)
    best = min(result.timing(name).best for name in result.rounds)
    return 2 * size**3 / best


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype], clock: Clock) -> Ceilings:
    """Copy and dense-product ceilings of `device`, a few seconds."""
    gemm = {
        str(dtype).removeprefix("torch."): measure_gemm(dtype, device, clock) for dtype in dtypes
    }
    return Ceilings(measure_copies(device, clock), gemm)
