"""Turns a case into a row: build, check, time against baselines, relate to the ceilings."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ppmoe_ops import _backends
from ppmoe_ops._library import OPERATORS

from . import gate, targets, timer
from .baseline import Baseline as Baseline
from .baseline import Function as Function
from .baseline import compile_and_call

OPERATOR, AUTOGRAD, COMPILED = "operator", "through autograd", "compiled "


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case with its tensors made.

    Attributes:
        args: of the operator; costs and the check go by them.
        fair: what baselines are compared with where that is not the operator called directly: a
            backward baseline pays for the autograd engine, so its rival does too.
        timed: the operator's side, where that is more than the operator called on `args`.
        check: of what `timed` returns, where that is not what the operator returns.
        flops, nbytes: what is executed, where that is not what the contract counts from shapes.
        nominal: FLOPs as the contract counts them, where fewer are executed.
        composed: the row is several operators. Costs are those given here, and `kept` has what is
            kept for a backward, by the names of baselines and `OPERATOR`.
        read: bytes of weights that a call reads; reading is then the ceiling.
        left_out: baselines that cannot run, and why.
        numbers: what was counted while the problem was made, by names of `targets.OWN`.
        notes: what else the row says, for people.
        counter: deals the turns of everything timed in this row.
    """

    args: tuple[Any, ...]
    baselines: tuple[Baseline, ...] = ()
    fair: Baseline | None = None
    timed: Baseline | None = None
    check: Callable[[Any], gate.Verdict] | None = None
    flops: int | None = None
    nbytes: int | None = None
    nominal: int = 0
    composed: bool = False
    kept: Mapping[str, int] = dataclasses.field(default_factory=dict)
    read: int = 0
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    counter: Iterator[int] = dataclasses.field(default_factory=itertools.count)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row to be.

    Attributes:
        operator: its name under `torch.ops.ppmoe_ops`.
        label: the shape, for people.
        dtype: of the data, as the row shows it.
        build: makes the problem on a device.
        scaled: how the shape is smaller than the model's; empty where it is not.
        quick: part of the report's quick set.
        headline: shown in the report's summary, with what it says there.
        function: the public function where its own call cost is what is measured.
        target: what it is held to, a key of `targets.TARGETS`.
        threads: of this row alone; None is as many as the others have.
    """

    operator: str
    label: str
    dtype: str
    build: Callable[[torch.device], Problem]
    scaled: str = ""
    quick: bool = True
    headline: str = ""
    function: Function | None = None
    target: str = ""
    threads: int | None = None

    @property
    def key(self) -> str:
        """Unique among cases, and stable across revisions."""
        kind = "call cost" if self.function else self.dtype
        parts = [self.operator, self.label, kind, *([self.scaled] if self.scaled else [])]
        return " | ".join(parts)


@dataclasses.dataclass
class Row:
    """What a report says of a case. Times are in seconds, rates in units a second."""

    operator: str
    label: str
    dtype: str
    backend: str
    scaled: str = ""
    headline: str = ""
    target: str = ""
    call_cost: bool = False
    threads: int | None = None
    refused: str = ""
    seconds: timer.Spread | None = None
    rounds: int = 0
    flops: int = 0
    nominal: int = 0
    """FLOPs as the contract counts them, where fewer are executed."""
    nbytes: int = 0
    saved: int | None = None
    baseline_saved: dict[str, int] = dataclasses.field(default_factory=dict)
    copy_seconds: float = 0.0
    """Of a copy of `nbytes`, timed in turns with the operator."""
    dense_rate: float = 0.0
    """Best FLOP/s of the dense products that the operator was compared with, if any."""
    read_bytes: int = 0
    read_rate: timer.ReadRate | None = None
    """Timed in turns with an operator that reads `read_bytes`."""
    ceiling: str = ""
    ceiling_share: float | None = None
    speedups: dict[str, timer.Spread] = dataclasses.field(default_factory=dict)
    rivals: list[str] = dataclasses.field(default_factory=list)
    """Those of `speedups` that compute the same."""
    yardsticks: list[str] = dataclasses.field(default_factory=list)
    """Those that are neither that nor dense products: the operator itself on other work."""
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the first call of those of `speedups` that torch.compile runs."""
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    """What the problem counted, by names of `targets.OWN`."""
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def roof(self) -> str:
        """Which dense rate is its ceiling."""
        if self.threads is None:
            return self.dtype
        return f"{self.dtype}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def flop_rate(self) -> float:
        return self.flops / self.seconds.median if self.seconds else 0.0

    @property
    def nominal_rate(self) -> float:
        return self.nominal / self.seconds.median if self.seconds else 0.0

    @property
    def byte_rate(self) -> float:
        return self.nbytes / self.seconds.median if self.seconds else 0.0

    @property
    def read_share(self) -> float | None:
        """How near reading the weights comes to reading alone."""
        if self.seconds is None or self.read_rate is None:
            return None
        return self.read_bytes / self.read_rate.bytes_per_second / self.seconds.median

    def judged(self) -> list[targets.Judged]:
        """What was measured, beside what was aimed at."""
        own = dict(self.numbers)
        if self.seconds is not None:
            own[targets.RATE] = self.flop_rate
        if self.baseline_saved and self.saved is not None:
            own[targets.KEPT] = min(self.baseline_saved.values()) / max(self.saved, 1)
        itself = [self.compile_seconds[each] for each in self.yardsticks
                  if each in self.compile_seconds]  # fmt: skip
        if itself:
            own[targets.COMPILING] = max(itself)
        return targets.judge(
            self.target, self.speedups, self.rivals, self.read_share, own, self.skipped
        )


def served_by(operator: str, device: torch.device) -> str:
    """The backend that serves `operator`; a composite is served by what it is composed of."""
    name = f"{operator}_forward" if OPERATORS[operator].composite else operator
    choice = _backends.choices().get(name, {}).get(device.type)
    return (choice.backend if choice else None) or "none"


def modules() -> list[str]:
    """The benchmark modules that the registry names."""
    return sorted({op.benchmark for op in OPERATORS.values() if op.benchmark})


def cases(quick: bool = True, operators: Iterable[str] = (), text: str = "") -> list[Case]:
    """The cases of every benchmark module, in the modules' order; `text` is in their keys.

    A family among `operators` stands for all of its operators.
    """
    wanted = set(operators)
    wanted |= {name for name, op in OPERATORS.items() if op.family in wanted}
    unknown = wanted - set(OPERATORS) - {op.family for op in OPERATORS.values()}
    if unknown:
        raise ValueError(
            f"bench: no operator '{sorted(unknown)[0]}'; allowed: {', '.join(OPERATORS)}"
        )
    found: list[Case] = []
    for name in modules():
        found += importlib.import_module(f"{__package__}.{name}").cases()
    return [
        case
        for case in found
        if (case.quick or not quick)
        and (not wanted or case.operator in wanted)
        and text in case.key
    ]


def missing_operators(found: Sequence[Case]) -> list[str]:
    """Registered operators that no case times."""
    return sorted(set(OPERATORS) - {case.operator for case in found})


@contextlib.contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """As many threads as a row wants; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ready(case: Case, device: torch.device) -> tuple[Problem, timer.Call, gate.Verdict]:
    """A case with its tensors made: the call that is timed, and whether its result is right."""
    problem = case.build(device)
    if problem.timed is not None and case.function is None:
        call = problem.timed.call(problem.counter)
    else:
        call = partial(case.function or OPERATORS[case.operator].overload, *problem.args)
    check = problem.check or partial(gate.check, case.operator, problem.args)
    return problem, call, check(call())


def measure(
    case: Case,
    device: torch.device,
    clock: timer.Clock,
    *,
    seconds: float = 2.0,
    compiled: bool = False,
) -> Row:
    """Check and time one case. A wrong result, or an error, gives a refused row without a time."""
    with thread_count(case.threads):
        return _measure(case, device, clock, seconds, compiled)


def _measure(
    case: Case, device: torch.device, clock: timer.Clock, seconds: float, compiled: bool
) -> Row:
    row = Row(
        operator=case.operator,
        label=case.label,
        dtype=case.dtype,
        backend=served_by(case.operator, device),
        scaled=case.scaled,
        headline=case.headline,
        target=case.target,
        call_cost=case.function is not None,
        threads=case.threads,
    )
    try:
        problem, call, verdict = ready(case, device)
    except Exception as error:
        row.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return row
    if not verdict.passed:
        row.refused = verdict.reason
        return row
    _fill_costs(row, problem)
    candidates = _candidates(row, problem, call, compiled)
    copies: dict[str, timer.Call] = {}
    if problem.read:
        copies = timer.read_candidates(device)
    elif not row.call_cost:
        copies = timer.copy_candidates(row.nbytes, device)
    if row.call_cost:
        clock = timer.HostClock(device)
    result = timer.interleave({**candidates, **copies}, clock=clock, seconds=seconds)
    row.seconds = result.timing(OPERATOR)
    row.rounds = len(result.rounds[OPERATOR])
    differentiated = {each.name for each in problem.baselines if each.wrt}
    for name in candidates:
        if name not in (OPERATOR, AUTOGRAD):
            through_autograd = name.removeprefix(COMPILED) in differentiated
            rival = AUTOGRAD if through_autograd and AUTOGRAD in candidates else OPERATOR
            row.speedups[name] = result.speedup(rival, name)
    if copies:
        name = timer.fastest(result, list(copies))
        best = result.timing(name).median
        if problem.read:
            row.read_bytes = problem.read
            row.read_rate = timer.ReadRate(timer.READ_BYTES / best, name)
        else:
            row.copy_seconds = best
    for baseline in problem.baselines:
        if baseline.dense and baseline.name in candidates:
            flops = baseline.flops or row.flops
            row.dense_rate = flops / result.timing(baseline.name).best
    return row


def _fill_costs(row: Row, problem: Problem) -> None:
    op = OPERATORS[row.operator]
    args = problem.args
    row.flops = op.flops(*args) if problem.flops is None else problem.flops
    row.nominal = problem.nominal
    row.nbytes = op.nbytes(*args) if problem.nbytes is None else problem.nbytes
    if problem.composed:
        row.baseline_saved = dict(problem.kept)
        row.saved = row.baseline_saved.pop(OPERATOR, None)
    elif op.saved_bytes is not None:
        row.saved = op.saved_bytes(*args)
    row.skipped |= problem.left_out
    row.numbers, row.notes = dict(problem.numbers), list(problem.notes)


def _candidates(
    row: Row, problem: Problem, call: timer.Call, compiled: bool
) -> dict[str, timer.Call]:
    found: dict[str, timer.Call] = {OPERATOR: call}
    if any(each.compile for each in problem.baselines):
        # Shapes of earlier rows count towards a limit, past which compiling stops.
        torch.compiler.reset()
    if problem.fair is not None:
        found[AUTOGRAD] = problem.fair.call()
    wanted = list(problem.baselines)
    if compiled:
        # Kept graphs are differentiated many times, which donated buffers would not survive.
        config: Any = importlib.import_module("torch._functorch.config")
        config.donated_buffer = False
        wanted += [
            dataclasses.replace(
                each, name=f"{COMPILED}{each.name}", function=torch.compile(each.function)
            )
            for each in problem.baselines
            if each.same_result and not each.compile and not row.call_cost
        ]
    for baseline in wanted:
        try:
            if baseline.compile:
                candidate, row.compile_seconds[baseline.name] = compile_and_call(baseline)
            else:
                candidate = baseline.call(problem.counter)
                candidate()
            compared = baseline.same_result and not row.call_cost and not problem.composed
            by_compiler = baseline.compile or baseline.name.startswith(COMPILED)
            if compared and row.saved is not None and not by_compiler:
                row.baseline_saved[baseline.name] = baseline.saved_bytes()
        except Exception as error:
            row.skipped[baseline.name] = str(error).splitlines()[0] if str(error) else repr(error)
            continue
        found[baseline.name] = candidate
        if baseline.same_result:
            row.rivals.append(baseline.name)
        elif not baseline.dense:
            row.yardsticks.append(baseline.name)
    return found


def relate(rows: Sequence[Row], ceilings: timer.Ceilings) -> timer.Ceilings:
    """Set each row's share of the ceiling that binds; return the ceilings with what rows showed.

    A dense product that a row ran faster than the square ones before it raises the ceiling of its
    dtype: no share may look good because the ceiling was measured in a bad moment.
    """
    gemm = dict(ceilings.gemm)
    reads = [each for each in (ceilings.read, *(row.read_rate for row in rows)) if each is not None]
    for row in rows:
        gemm[row.roof] = max(gemm.get(row.roof, 0.0), row.dense_rate)
    for row in rows:
        if row.read_share is not None:
            row.ceiling, row.ceiling_share = "read", row.read_share
        elif row.seconds is not None and row.copy_seconds:
            rate = gemm.get(row.roof)
            gemm_seconds = row.flops / rate if rate else 0.0
            row.ceiling = "gemm" if gemm_seconds > row.copy_seconds else "copy"
            row.ceiling_share = max(gemm_seconds, row.copy_seconds) / row.seconds.median
    kept = {name: rate for name, rate in gemm.items() if rate}
    read = max(reads, key=lambda each: each.bytes_per_second, default=None)
    return dataclasses.replace(ceilings, gemm=kept, read=read)
