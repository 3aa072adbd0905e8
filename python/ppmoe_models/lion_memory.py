"""The peak of memory that a piece of a program allocates."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that torch allocated at once while `run` ran, beyond what was allocated before.

    On a GPU it is the caching allocator's own figure. On the CPU torch's profiler notes each
    allocation and release of torch's allocator, and this is the peak of their sum; what an operator
    takes from elsewhere is not in it.

    Example:
        >>> import torch
        >>> peak_bytes(lambda: torch.ones(1000), torch.device("cpu"))
        4000
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with (
        _without_messages(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler,
    ):
        kept = run()
    del kept
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = [each for each in results.events() if each.name() == "[memory]"]
    total = peak = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        total += each.nbytes()
        peak = max(peak, total)
    return peak


@contextmanager
def _without_messages() -> Iterator[None]:
    """Standard error closed to C++: the profiler says there when it starts and stops."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
