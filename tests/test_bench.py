"""The benchmarks: turns are fair, every operator has a row, and wrong operators get no time.

No test asserts a time that was measured.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ppmoe_ops.bench as door
from ppmoe_ops._library import OPERATORS

door.benchmarks()
bench, gate, harness, inputs, timer = (
    importlib.import_module(f"{door.PACKAGE}.{name}")
    for name in ("bench_expert_slice", "gate", "harness", "inputs", "timer")
)
CPU = torch.device("cpu")
# Those whose inputs are made from a `Workload`; test_bench_ladder_attention.py has the others.
EXPERTS = [name for name, op in OPERATORS.items() if op.family == "expert_slice"]
SMALL = inputs.Model("small", 24, 16, 8, 2)
GROUPED = dataclasses.replace(
    SMALL, experts=16, top_k=3, score="sigmoid", groups=4, top_groups=2, selection_bias=True
)
WORK = inputs.Workload(SMALL, 20)
PART = dataclasses.replace(WORK, first_expert=2, local_experts=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny calls: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class FakeClock:
    """Calls take what `costs` says, times a factor that drifts from sample to sample."""

    def __init__(self, costs: dict[Any, float], drift: float = 1.0) -> None:
        self.costs = costs
        self.drift = drift
        self.samples: list[tuple[Any, int]] = []

    def measure(self, call: Any, repeats: int) -> float:
        self.samples.append((call, repeats))
        return self.costs[call] * self.drift ** len(self.samples)


def call_a() -> None: ...
def call_b() -> None: ...
def call_c() -> None: ...


CALLS = {"a": call_a, "b": call_b, "c": call_c}


def test_spread_is_median_quartiles_and_best() -> None:
    assert timer.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == timer.Spread(3.0, 2.0, 4.0, 1.0)
    assert timer.spread([2.0]) == timer.Spread(2.0, 2.0, 2.0, 2.0)
    assert timer.Spread(4.0, 3.0, 5.0, 1.0).relative == 0.5


def test_ratios_are_exact_on_a_steady_clock() -> None:
    clock = FakeClock({call_a: 0.001, call_b: 0.004, call_c: 0.0005})
    timed = timer.interleave(CALLS, clock=clock, seconds=1.0)
    assert timed.timing("b").median == pytest.approx(0.004)
    assert timed.speedup("a", "b").median == pytest.approx(4.0)
    assert timed.speedup("a", "c").low == pytest.approx(0.5)


def test_a_drifting_machine_moves_times_but_not_ratios() -> None:
    clock = FakeClock({call_a: 0.01, call_b: 0.02}, drift=1.002)
    timed = timer.interleave({"a": call_a, "b": call_b}, clock=clock, seconds=3.0)
    assert timed.timing("a").relative > 0.1
    assert timed.speedup("a", "b").median == pytest.approx(2.0, rel=0.005)
    assert timed.speedup("a", "b").relative < 0.01


def test_every_round_has_every_candidate_in_an_order_of_its_own() -> None:
    clock = FakeClock(dict.fromkeys(CALLS.values(), 0.01))
    timed = timer.interleave(CALLS, clock=clock, seconds=0.5, sample_seconds=0.01)
    assert len({len(values) for values in timed.rounds.values()}) == 1
    assert len(timed.rounds["a"]) >= 5
    measured = [call for call, _ in clock.samples[-3 * 3 * len(timed.rounds["a"]) :]]
    passes = [tuple(measured[at : at + 3]) for at in range(0, len(measured), 3)]
    assert all(set(each) == set(CALLS.values()) for each in passes)
    assert len(set(passes)) > 1


def test_slow_candidates_still_get_five_rounds_and_fast_ones_no_more_than_the_budget() -> None:
    slow = timer.interleave({"a": call_a}, clock=FakeClock({call_a: 9.0}), seconds=1.0)
    assert len(slow.rounds["a"]) == 5
    clock = FakeClock({call_a: 1e-4})
    timer.interleave({"a": call_a}, clock=clock, seconds=1.0, max_rounds=10_000)
    assert sum(1e-4 * repeats for _, repeats in clock.samples) < 1.2


@pytest.mark.parametrize("cost", [1e-8, 1e-6, 3e-4, 0.02, 4.0])
def test_calibration_makes_a_sample_last(cost: float) -> None:
    repeats, seconds = timer.calibrate(call_a, FakeClock({call_a: cost}), 0.01)
    assert seconds == cost
    assert repeats in (1, timer.MAX_REPEATS) or repeats * cost == pytest.approx(0.01, rel=0.05)


def test_clock_of_the_host_counts_calls() -> None:
    done: list[int] = []
    assert timer.HostClock().measure(lambda: done.append(1), 7) >= 0
    assert len(done) == 7


@pytest.mark.parametrize("routing", inputs.ROUTINGS)
@pytest.mark.parametrize("model", [*inputs.MODELS, SMALL, GROUPED], ids=lambda model: model.name)
def test_ids_are_distinct_and_reproducible(model: Any, routing: str) -> None:
    work = inputs.Workload(model, 96, routing=routing, seed=3)
    ids = inputs.expert_ids(work)
    assert ids.shape == (96, model.top_k)
    assert ids.dtype == torch.int32
    assert ids.min() >= 0
    assert ids.max() < model.experts
    assert bool((ids.sort(-1).values.diff(dim=-1) > 0).all())
    assert torch.equal(ids, inputs.expert_ids(work))


def test_routing_is_as_even_as_its_name_says() -> None:
    def counts(routing: str) -> Tensor:
        work = inputs.Workload(inputs.OLMOE, 512, routing=routing)
        return torch.bincount(inputs.expert_ids(work).flatten(), minlength=64)

    assert counts("balanced").tolist() == [64] * 64
    assert counts("one_expert").max() == 512
    assert counts("zipf").max() > 4 * counts("zipf").float().median()


@pytest.mark.parametrize("operator", EXPERTS)
def test_every_operator_has_arguments_and_passes_its_own_gate(operator: str) -> None:
    for work in (WORK, PART, dataclasses.replace(WORK, dtype=torch.bfloat16), _grouped(operator)):
        args = inputs.build(operator, work)
        verdict = gate.check(operator, args, OPERATORS[operator].overload(*args))
        assert verdict.passed, verdict.reason


def _grouped(operator: str) -> Any:
    return inputs.Workload(GROUPED if operator.startswith("route") else SMALL, 20)


def test_every_operator_has_a_quick_row_and_there_are_not_too_many() -> None:
    quick = harness.cases(quick=True)
    assert harness.missing_operators(quick) == []
    # A report of them takes minutes: up to 55 of expert slicing, 22 of ladder attention, 24 of
    # equilibrium solves.
    assert len(quick) <= 101
    full = harness.cases(quick=False)
    assert max(Counter(case.key for case in full).values()) == 1
    assert {case.key for case in quick} < {case.key for case in full}
    assert {case.operator for case in quick if case.function} == set(door.ppmoe_ops.ops.__all__)


def test_an_operator_without_a_row_is_named() -> None:
    without = [case for case in harness.cases(quick=True) if case.operator != "route"]
    assert harness.missing_operators(without) == ["route"]


@pytest.mark.parametrize("operator", [name for name in EXPERTS if name != "route_backward"])
def test_baselines_compute_what_the_operator_computes(operator: str) -> None:
    partial_work = operator.startswith(("expert_index", "expert_ffn")) or operator == "slice_rows"
    for work in (WORK, PART) if partial_work else (WORK,):
        made = bench.problem(operator, work, CPU)
        ours = gate.outputs(OPERATORS[operator].overload(*made.args))
        ours = [each for each in ours if each.numel()]
        compared = [each for each in made.baselines if each.same_result]
        assert compared
        for baseline in compared:
            theirs = gate.outputs(baseline.call()())
            for a, b in zip(ours, theirs, strict=False):
                torch.testing.assert_close(a, b, check_dtype=False, msg=baseline.name)


@pytest.mark.parametrize("model", [SMALL, GROUPED], ids=["softmax", "groups"])
def test_route_baselines_have_the_same_weights_ids_and_gradient(model: Any) -> None:
    work = inputs.Workload(model, 20)
    for operator in ("route", "route_backward"):
        made = bench.problem(operator, work, CPU)
        ours = gate.outputs(OPERATORS[operator].overload(*made.args))
        for baseline in made.baselines:
            for a, b in zip(ours, gate.outputs(baseline.call()()), strict=True):
                torch.testing.assert_close(a, b, check_dtype=False, msg=baseline.name)


def test_saved_bytes_leave_out_inputs_and_results() -> None:
    x = torch.randn(8, requires_grad=True)
    assert gate.saved_bytes(lambda: x * x, [x]) == 0
    assert gate.saved_bytes(lambda: x.exp().sin(), [x]) == 32


def _wrong(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] += 1 if not tensor.is_floating_point() else 1e-3
    return changed


@pytest.mark.parametrize("operator", EXPERTS)
def test_a_wrong_operator_is_refused_and_not_timed(operator: str) -> None:
    def function(*args: Any) -> Any:
        right = OPERATORS[operator].overload(*args)
        if isinstance(right, Tensor):
            return _wrong(right)
        changed = next(at for at, each in enumerate(right) if each.numel())
        return [_wrong(each) if at == changed else each for at, each in enumerate(right)]

    case = harness.Case(operator, "wrong", "float32", partial(bench.problem, operator, WORK))
    row = harness.measure(dataclasses.replace(case, function=function), CPU, timer.HostClock())
    assert row.refused
    assert row.seconds is None


def test_an_operator_that_raises_is_refused() -> None:
    case = harness.Case("route", "raises", "float32", lambda device: 1 / 0)
    row = harness.measure(case, CPU, timer.HostClock())
    assert row.refused.startswith("ZeroDivisionError")


def test_the_error_rule_knows_rounding_from_mistakes() -> None:
    exact = torch.randn(100, dtype=torch.float64)
    plain = exact.bfloat16()
    assert gate.compare(plain, plain, exact, 2.0).passed
    step = torch.nextafter(plain.abs().max(), torch.tensor(torch.inf, dtype=torch.bfloat16))
    off = plain.clone()
    off[0] += 3 * step * 2**-7
    assert not gate.compare(off, plain, exact, 2.0).passed
    off = plain.clone()
    off[3] = torch.nan
    assert not gate.compare(off, plain, exact, 2.0).passed
    assert not gate.compare(plain.float(), plain, exact, 2.0).passed
    infinite = exact.clone()
    infinite[5] = torch.inf
    assert gate.compare(infinite.bfloat16(), infinite.bfloat16(), infinite, 2.0).passed


def test_a_choice_may_differ_from_the_reference_where_keys_are_equal() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, -1.0], [0.5, 0.5, 0.5, 0.5]])
    args = (logits, 2, "sigmoid", True, None, 2, 2, 1.0)
    weights = OPERATORS["route"].reference(*args)[0]

    def passes(*ids: tuple[int, int]) -> bool:
        experts = torch.tensor(ids, dtype=torch.int32)
        return bool(gate.check_route(args, (weights, experts)).passed)

    assert passes((0, 1), (0, 1))
    assert passes((0, 2), (3, 1))
    assert not passes((1, 0), (0, 1))
    assert not passes((0, 3), (0, 1))
    assert not passes((0, 0), (0, 1))


def test_a_choice_outside_the_best_groups_is_refused() -> None:
    logits = torch.tensor([[3.0, 2.0, 5.0, -9.0]])
    args = (logits, 1, "sigmoid", True, None, 2, 1, 1.0)
    weights, experts = OPERATORS["route"].reference(*args)
    assert experts.tolist() == [[0]]
    assert gate.check_route(args, (weights, experts)).passed
    outside = torch.tensor([[2]], dtype=torch.int32)
    assert "group" in gate.check_route(args, (weights, outside)).reason


def test_cases_by_a_part_of_their_key() -> None:
    every = [case.key for case in harness.cases(quick=False)]
    some = [case.key for case in harness.cases(quick=False, text="one_expert")]
    assert some == [key for key in every if "one_expert" in key]
    assert 0 < len(some) < len(every)
    assert harness.cases(text="no such case") == []
