"""Turns a case into a row: build, check, time against baselines, relate to the ceilings."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _backends
from ppmoe_ops._library import OPERATORS

from . import gate, timer

Function = Callable[..., Any]
OPERATOR, AUTOGRAD, COMPILED = "operator", "through autograd", "compiled "


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Something to be faster than.

    With `wrt`, the timed call is `torch.autograd.grad` of `function(*args)` with respect to those
    arguments, on a graph that is kept. `same_result` is False for a baseline that only does equal
    work, such as one dense product.
    """

    name: str
    function: Function
    args: tuple[Any, ...]
    wrt: tuple[int, ...] = ()
    grads: tuple[Tensor, ...] = ()
    same_result: bool = True

    def call(self) -> Callable[[], Any]:
        """The callable that is timed."""
        if not self.wrt:
            return partial(self.function, *self.args)
        args = self._leaves()
        results = gate.outputs(self.function(*args))
        results = [each for each in results if each.requires_grad][: len(self.grads)]
        leaves = [args[position] for position in self.wrt]
        grads = [grad.to(each.dtype) for grad, each in zip(self.grads, results, strict=True)]
        return partial(torch.autograd.grad, results, leaves, grads, retain_graph=True)

    def saved_bytes(self) -> int:
        """Bytes that its forward keeps for the backward."""
        args = self._leaves()
        return gate.saved_bytes(partial(self.function, *args), args)

    def _leaves(self) -> list[Any]:
        args = list(self.args)
        for position, value in enumerate(args):
            wanted = position in self.wrt if self.wrt else _differentiable(value)
            if wanted and value is not None:
                args[position] = value.detach().requires_grad_()
        return args


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case with its tensors made.

    `fair` is what baselines are compared with where that is not the operator called directly:
    a backward baseline pays for the autograd engine, so its rival does too.
    """

    args: tuple[Any, ...]
    baselines: tuple[Baseline, ...] = ()
    fair: Baseline | None = None


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
    """

    operator: str
    label: str
    dtype: str
    build: Callable[[torch.device], Problem]
    scaled: str = ""
    quick: bool = True
    headline: str = ""
    function: Function | None = None

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
    """Best FLOP/s of the one dense product that the operator was compared with, if any."""
    ceiling: str = ""
    ceiling_share: float | None = None
    speedups: dict[str, timer.Spread] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def flop_rate(self) -> float:
        return self.flops / self.seconds.median if self.seconds else 0.0

    @property
    def byte_rate(self) -> float:
        return self.nbytes / self.seconds.median if self.seconds else 0.0


def served_by(operator: str, device: torch.device) -> str:
    """The backend that serves `operator`; a composite is served by what it is composed of."""
    name = f"{operator}_forward" if OPERATORS[operator].composite else operator
    choice = _backends.choices().get(name, {}).get(device.type)
    return (choice.backend if choice else None) or "none"


def modules() -> list[str]:
    """The benchmark modules that the registry names."""
    return sorted({op.benchmark for op in OPERATORS.values() if op.benchmark})


def cases(quick: bool = True, operators: Iterable[str] = ()) -> list[Case]:
    """The cases of every benchmark module, in the modules' order."""
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
        if (case.quick or not quick) and (not wanted or case.operator in wanted)
    ]


def missing_operators(found: Sequence[Case]) -> list[str]:
    """Registered operators that no case times."""
    return sorted(set(OPERATORS) - {case.operator for case in found})


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
        call_cost=case.function is not None,
    )
    try:
        problem = case.build(device)
        call = partial(case.function or OPERATORS[case.operator].overload, *problem.args)
        verdict = gate.check(case.operator, problem.args, call())
    except Exception as error:
        row.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return row
    if not verdict.passed:
        row.refused = verdict.reason
        return row
    _fill_costs(row, problem)
    candidates = _candidates(row, problem, call, compiled)
    copies: dict[str, timer.Call] = {}
    if not row.call_cost:
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
        row.copy_seconds = result.timing(timer.fastest(result, list(copies))).median
    for baseline in problem.baselines:
        if not baseline.same_result and baseline.name in candidates:
            row.dense_rate = row.flops / result.timing(baseline.name).best
    return row


def _fill_costs(row: Row, problem: Problem) -> None:
    op = OPERATORS[row.operator]
    row.flops = op.flops(*problem.args)
    row.nbytes = op.nbytes(*problem.args)
    if op.saved_bytes is not None:
        row.saved = op.saved_bytes(*problem.args)
        if not row.call_cost:
            for baseline in problem.baselines:
                if baseline.same_result:
                    row.baseline_saved[baseline.name] = baseline.saved_bytes()


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
            candidate = baseline.call()
            candidate()
        except Exception as error:
            row.skipped[baseline.name] = str(error).splitlines()[0] if str(error) else repr(error)
            continue
        found[baseline.name] = candidate
    return found


def relate(rows: Sequence[Row], ceilings: timer.Ceilings) -> timer.Ceilings:
    """Set each row's share of the ceiling that binds; return the ceilings with what rows showed.

    A dense product that a row ran faster than the square ones before it raises the ceiling of its
    dtype: no share may look good because the ceiling was measured in a bad moment.
    """
    gemm = dict(ceilings.gemm)
    for row in rows:
        gemm[row.dtype] = max(gemm.get(row.dtype, 0.0), row.dense_rate)
    for row in rows:
        if row.seconds is not None and row.copy_seconds:
            rate = gemm.get(row.dtype)
            gemm_seconds = row.flops / rate if rate else 0.0
            row.ceiling = "gemm" if gemm_seconds > row.copy_seconds else "copy"
            row.ceiling_share = max(gemm_seconds, row.copy_seconds) / row.seconds.median
    kept = {name: rate for name, rate in gemm.items() if rate}
    return dataclasses.replace(ceilings, gemm=kept)
