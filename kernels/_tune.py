"""A choice among configurations by time, off unless PPMOE_OPS_AUTOTUNE asks for it.

By default the table alone decides: configurations sum in different orders, so a choice that depends
on time would give other bits for the same input from one run to the next. "cached" takes stored
choices and never times; "1" times where none is stored and keeps the choice. A candidate that fails
or gives other results is dropped; one that never ends is waited for. Not yet run on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import warnings
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ppmoe_ops.kernels import _choices
from ppmoe_ops.kernels._launch import INTERPRETING, Config, Launch

# Other configurations than the table's, by bytes per element and load.
Candidates = dict[int, dict[str, tuple[Config, ...]]]

MakeLaunch = Callable[[Config], Launch]
Outputs = Sequence[Tensor | None]

BUDGET = 50.0  # milliseconds that a candidate runs for, after its first two runs
MOST_RUNS = 20
AT_ONCE = 1 << 22  # elements that are compared at once: in a wider type they take memory


def tuned(
    name: str,
    config: Config,
    make_launch: MakeLaunch,
    outputs: Outputs,
    candidates: Candidates,
    dtype: torch.dtype,
    load: str,
    *facts: object,
) -> Launch:
    """The launch of the chosen configuration: `config` from the table, or one of `candidates`.

    `make_launch` prepares the same call for any of them, which fills all of `outputs`, or at least
    the same elements. A choice holds for kernel, type, load, `facts` (widths, activation) and way.
    """
    launch, mode = make_launch(config), _choices.mode()
    if mode == "0":
        return launch
    others = candidates.get(dtype.itemsize, {}).get(load, ())
    written = [tensor for tensor in outputs if tensor is not None and tensor.numel()]
    if not others or not written or launch.programs == 0:
        return launch
    way = f"way={launch.arguments.get('WAY', '-')}"
    key = " ".join(map(str, (name.replace(" ", "_"), str(dtype)[6:], load, *facts, way)))
    device = written[0].device
    path = _choices.path_of(device_name(device), triton.__version__)
    stored = _choices.known(path).get(key)
    chosen = _among(stored, (config, *others))
    if chosen is None and mode == "1" and may_time(written):
        try:
            record = measure(launch, others, make_launch, written)
        except torch.OutOfMemoryError:
            warnings.warn(f"{name}: no memory to tune; the table's configuration", stacklevel=2)
            return launch
        chosen = _among(_choices.store(path, key, record, stored), (config, *others))
    return launch if chosen is None or chosen == config else make_launch(chosen)


def _among(record: _choices.Record | None, allowed: Sequence[Config]) -> Config | None:
    """The configuration of a record; None if it is not (any more) one that the launch allows."""
    fields = None if record is None else record["config"]
    return next((each for each in allowed if dataclasses.asdict(each) == fields), None)


@functools.cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def may_time(written: Sequence[Tensor]) -> bool:
    """Whether launches run, and may be waited for: not in a capture, on fakes, or interpreted."""
    if INTERPRETING or any(isinstance(each, FakeTensor) or not each.is_cuda for each in written):
        return False
    return not torch.cuda.is_current_stream_capturing()


def measure(
    launch: Launch,
    others: Sequence[Config],
    make_launch: MakeLaunch,
    written: Sequence[Tensor],
) -> _choices.Record:
    """Time the table's launch and every other one that gives the same; the record of the fastest.

    Takes as much memory as the outputs, once, and what a comparison of AT_ONCE elements takes.
    """
    device = written[0].device
    run_checked(launch, written)
    expected = [each.clone() for each in written]
    best, best_time = launch.config, milliseconds(launch, device)
    record: _choices.Record = {"table_ms": best_time, "dropped": []}
    for config in others:
        try:
            other = make_launch(config)
            run_checked(other, written)
            why = next(filter(None, map(difference, expected, written)), None)
            time = milliseconds(other, device) if why is None else 0.0
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what compilers and drivers raise has no common type
            why = f"{type(error).__name__}: {error}"[:200]
            _wait(device)  # raises again what no later launch survives
        if why is not None:
            record["dropped"].append({"config": dataclasses.asdict(config), "why": why})
        elif time < best_time:
            best, best_time = config, time
    return {"config": dataclasses.asdict(best), "ms": best_time, **record}


def run_checked(launch: Launch, written: Sequence[Tensor]) -> None:
    """Run once on outputs of NaN, so that what a launch does not write is seen, and wait."""
    for each in written:
        each.fill_(float("nan"))
    launch.run(written[0].device)
    _wait(written[0].device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def difference(expected: Tensor, found: Tensor) -> str | None:
    """What is beyond the rounding of another order of summation; NaN equals NaN."""
    dtype = torch.float64 if expected.dtype == torch.float64 else torch.float32
    parts = [each.reshape(-1).split(AT_ONCE) for each in (expected, found)]
    finite = (part.nan_to_num(0.0, 0.0, 0.0).abs().amax() for part in parts[0])
    largest = max(float(each) for each in finite)
    relative = 4 * torch.finfo(expected.dtype).eps
    # Terms that cancel leave the error of their size, not of what is left.
    absolute = 1024 * torch.finfo(dtype).eps * largest
    wrong = 0
    for one, other in zip(*parts, strict=True):
        close = torch.isclose(other.to(dtype), one.to(dtype), relative, absolute, equal_nan=True)
        wrong += int((~close).sum())
    return f"{wrong} of {expected.numel()} elements differ" if wrong else None


def milliseconds(launch: Launch, device: torch.device) -> float:
    """The median time of a few runs; inputs may be in the cache, for every candidate alike."""
    with torch.cuda.device(device):
        estimate = _once(launch, device)
        runs = max(1, min(MOST_RUNS, int(BUDGET / max(estimate, 1e-3))))
        return statistics.median(_once(launch, device) for _ in range(runs))


def _once(launch: Launch, device: torch.device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    launch.run(device)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
