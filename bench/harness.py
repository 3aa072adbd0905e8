"""Turns a case into a row: build, check, time against baselines, relate to the ceilings."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _backends
from ppmoe_ops._library import OPERATORS

from . import gate, targets, timer

Function = Callable[..., Any]
OPERATOR, AUTOGRAD, COMPILED = "operator", "through autograd", "compiled "


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Something to be faster than; also the operator's own side where that is not a plain call.

    Attributes:
        function, args: what is called.
        wrt, grads: the timed call is `torch.autograd.grad` of `function(*args)` with respect to
            these arguments, on a graph that is kept.
        step: with `wrt`, the forward is part of the timed call, which returns its results and then
            the gradients.
        turns: further arguments of equal cost; calls take them in turn, so that each finds
            weights that no cache holds.
        same_result: False for a baseline that only does equal work.
        dense: such a baseline that is dense products and nothing else.
    """

    name: str
    function: Function
    args: tuple[Any, ...]
    wrt: tuple[int, ...] = ()
    grads: tuple[Tensor, ...] = ()
    step: bool = False
    turns: tuple[tuple[Any, ...], ...] = ()
    same_result: bool = True
    dense: bool = False

    def call(self, counter: Iterator[int] | None = None) -> Callable[[], Any]:
        """The callable that is timed; `counter` is shared by those that must not meet a turn."""
        if not self.turns:
            return self._call(self.args)
        calls = [self._call(args) for args in (self.args, *self.turns)]
        count = counter if counter is not None else itertools.count()
        return lambda: calls[next(count) % len(calls)]()

    def _call(self, given: tuple[Any, ...]) -> Callable[[], Any]:
        if not self.wrt:
            return partial(self.function, *given)
        args = self._leaves(given)
        if self.step:
            return partial(_step, self.function, args, self.wrt, self.grads)
        results = gate.outputs(self.function(*args))
        results = [each for each in results if each.requires_grad][: len(self.grads)]
        leaves = [args[position] for position in self.wrt]
        grads = [grad.to(each.dtype) for grad, each in zip(self.grads, results, strict=True)]
        return partial(torch.autograd.grad, results, leaves, grads, retain_graph=True)

    def saved_bytes(self) -> int:
        """Bytes that its forward keeps for the backward."""
        args = self._leaves(self.args)
        return gate.saved_bytes(partial(self.function, *args), args)

    def _leaves(self, given: tuple[Any, ...]) -> list[Any]:
        args = list(given)
        for position, value in enumerate(args):
            wanted = position in self.wrt if self.wrt else _differentiable(value)
            if wanted and value is not None:
                args[position] = value.detach().requires_grad_()
        return args


def _step(
    function: Function, args: list[Any], wrt: tuple[int, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    # torch.autograd.grad leaves no .grad behind, so nothing is added up from call to call.
    results = [each for each in gate.outputs(function(*args)) if each.requires_grad]
    results = results[: len(grads)]
    found = torch.autograd.grad(results, [args[position] for position in wrt], grads)
    return (*(each.detach() for each in results), *found)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


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
        read: bytes of weights that a call reads; reading is then the ceiling.
        left_out: baselines that cannot run, and why.
        counter: deals the turns of everything timed in this row.
    """

    args: tuple[Any, ...]
    baselines: tuple[Baseline, ...] = ()
    fair: Baseline | None = None
    timed: Baseline | None = None
    check: Callable[[Any], gate.Verdict] | None = None
    flops: int | None = None
    nbytes: int | None = None
    read: int = 0
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
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
    refused: str = ""
    seconds: timer.Spread | None = None
    rounds: int = 0
    flops: int = 0
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

    @property
    def flop_rate(self) -> float:
        return self.flops / self.seconds.median if self.seconds else 0.0

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
        return targets.judge(self.target, self.speedups, self.rivals, self.read_share)


def served_by(operator: str, device: torch.device) -> str:
    """The backend that serves `operator`; a composite is served by what it is composed of."""
    name = f"{operator}_forward" if OPERATORS[operator].composite else operator
    choice = _backends.choices().get(name, {}).get(device.type)
    return (choice.backend if choice else None) or "none"


def modules() -> list[str]:
    """The benchmark modules that the registry names."""
    return sorted({op.benchmark for op in OPERATORS.values() if op.benchmark})


def cases(quick: bool = True, operators: Iterable[str] = (), text: str = "") -> list[Case]:
    """The cases of every benchmark module, in the modules' order; `text` is in their keys."""
    wanted = set(operators)
    unknown = wanted - set(OPERATORS)
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
    row = Row(
        operator=case.operator,
        label=case.label,
        dtype=case.dtype,
        backend=served_by(case.operator, device),
        scaled=case.scaled,
        headline=case.headline,
        target=case.target,
        call_cost=case.function is not None,
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
            row.dense_rate = row.flops / result.timing(baseline.name).best
    return row


def _fill_costs(row: Row, problem: Problem) -> None:
    op = OPERATORS[row.operator]
    args = problem.args
    row.flops = op.flops(*args) if problem.flops is None else problem.flops
    row.nbytes = op.nbytes(*args) if problem.nbytes is None else problem.nbytes
    if op.saved_bytes is not None:
        row.saved = op.saved_bytes(*args)
    row.skipped |= problem.left_out


def _candidates(
    row: Row, problem: Problem, call: timer.Call, compiled: bool
) -> dict[str, timer.Call]:
    found: dict[str, timer.Call] = {OPERATOR: call}
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
            if each.same_result and not row.call_cost
        ]
    for baseline in wanted:
        try:
            candidate = baseline.call(problem.counter)
            candidate()
            compared = baseline.same_result and not row.call_cost
            if compared and row.saved is not None and not baseline.name.startswith(COMPILED):
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
        gemm[row.dtype] = max(gemm.get(row.dtype, 0.0), row.dense_rate)
    for row in rows:
        if row.read_share is not None:
            row.ceiling, row.ceiling_share = "read", row.read_share
        elif row.seconds is not None and row.copy_seconds:
            rate = gemm.get(row.dtype)
            gemm_seconds = row.flops / rate if rate else 0.0
            row.ceiling = "gemm" if gemm_seconds > row.copy_seconds else "copy"
            row.ceiling_share = max(gemm_seconds, row.copy_seconds) / row.seconds.median
    kept = {name: rate for name, rate in gemm.items() if rate}
    read = max(reads, key=lambda each: each.bytes_per_second, default=None)
    return dataclasses.replace(ceilings, gemm=kept, read=read)
