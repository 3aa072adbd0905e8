"""Benchmarks of ladder attention: all sides compute the same, and rows count what is executed."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ppmoe_ops.bench as door
from ppmoe_ops._library import OPERATORS

door.benchmarks()
(
    baseline, bench, gate, harness, inputs, ladder, maps, phases, plain, plain_pslt, pslt,
    pslt_phases, result, targets, timer,
) = (
    importlib.import_module(f"{door.PACKAGE}.{name}")
    for name in (
        "baseline", "bench_ladder_attention", "gate", "harness", "inputs", "ladder_cases",
        "ladder_inputs", "phases", "plain_ladder_attention", "plain_pslt", "pslt_cases",
        "pslt_phases", "result", "targets", "timer",
    )
)  # fmt: skip
CPU = torch.device("cpu")
LADDER = [name for name, op in OPERATORS.items() if op.family == "ladder_attention"]
SMALL = maps.Maps(2, 14, 16, 2)
ONE_WINDOW = maps.Maps(2, 7, 16, 2)
EXACT = dataclasses.replace(SMALL, dtype=torch.float64)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny calls: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _measured(case: Any) -> Any:
    return harness.measure(case, CPU, timer.HostClock(), seconds=0.0)


def _works(operator: str, work: Any) -> list[Any]:
    """The work in each of an operator's modes."""
    if "attention" in operator:
        return [dataclasses.replace(work, shift=shift) for shift in (0, 3, -3)]
    if operator.startswith("ladder_ffn"):
        return [dataclasses.replace(work, training=training) for training in (False, True)]
    return [work]


@pytest.mark.parametrize("operator", LADDER)
def test_every_operator_has_arguments_and_passes_its_gate(operator: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for work in _works(operator, dataclasses.replace(SMALL, dtype=dtype)):
            args = inputs.build(operator, work)
            again = inputs.build(operator, work)
            assert [type(each) for each in args] == [type(each) for each in again]
            case = bench.operator(operator, work)
            _, _, verdict = harness.ready(case, CPU)
            assert verdict.passed, f"{case.key}: {verdict.reason}"


@pytest.mark.parametrize("operator", LADDER)
def test_baselines_compute_what_the_operator_computes(operator: str) -> None:
    for work in (*_works(operator, EXACT), dataclasses.replace(EXACT, side=7, given=True)):
        made = ladder.problem(operator, work, CPU)
        ours = gate.outputs(OPERATORS[operator].overload(*made.args))
        ours = [each for each in ours if each.numel()]
        compared = [each for each in made.baselines if each.same_result]
        assert compared
        for rival in compared:
            theirs = gate.outputs(rival.call()())
            if operator == "window_attention_backward":
                theirs = [*theirs[0].chunk(3, -1), theirs[1]]
            assert len(theirs) in (len(ours), 1)
            for a, b in zip(ours, theirs, strict=False):
                torch.testing.assert_close(a, b, msg=f"{rival.name}, {work}")


@pytest.mark.parametrize("operator", LADDER)
def test_a_wrong_operator_is_refused_and_not_timed(operator: str) -> None:
    def function(*args: Any) -> Any:
        right = OPERATORS[operator].overload(*args)
        changed = gate.outputs(right)
        changed[0] = changed[0].clone()
        changed[0].view(-1)[-1] += 1e-2
        return changed if isinstance(right, (list, tuple)) else changed[0]

    row = _measured(dataclasses.replace(bench.operator(operator, SMALL), function=function))
    assert row.refused
    assert row.seconds is None


def test_a_cut_map_is_joined_again() -> None:
    x = torch.randn(2, 14, 14, 24)
    for shift in (0, 3, -3):
        grid = plain.Grid(14, 2, 7, shift)
        parts = grid.cut(grid.roll(x), 3)
        assert parts[0].shape == (2, 4 * 2, 49, 4)
        joined = torch.cat([grid.unroll(grid.join(each)) for each in parts], -1)
        assert torch.equal(joined, x)


def test_cores_agree_with_the_plain_models() -> None:
    """Two compositions that were written apart."""
    block = plain_pslt.ladder_core(48, 2).double().eval()
    args = [torch.randn(2, 14, 14, 48, dtype=torch.float64)]
    for branch in block.blocks:
        attn = branch.attn
        into = attn.kv if attn.given else attn.qkv
        args += [branch.norm1.weight, branch.norm1.bias, into.weight, into.bias]
        args += [attn.relative_position_bias_table, attn.proj.weight, attn.proj.bias]
    for layer in (block.se.fc1, block.se.fc2, block.pointconv):
        args += [layer.weight, layer.bias]
    work = dataclasses.replace(SMALL, dtype=torch.float64)
    with torch.no_grad():
        for form in ("manual", "sdpa"):
            grids = ladder.grids(work, form)
            masks = tuple(grid.mask(args[0]) for grid in grids)
            torch.testing.assert_close(plain.core_learnt(*args, masks, grids), block(args[0]))


@pytest.mark.parametrize("work", [SMALL, ONE_WINDOW], ids=["14x14", "7x7"])
@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
def test_sides_of_the_ladder_core_compute_the_same(work: Any, step: bool) -> None:
    case = bench.ladder_core(work, step=step)
    made, call, verdict = harness.ready(case, CPU)
    assert verdict.passed, verdict.reason
    ours = gate.outputs(call())
    assert len(ours) == (29 if step else 1)
    for rival in made.baselines[1:]:
        for a, b in zip(ours, gate.outputs(rival.call()()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=rival.name)
    wrong = [each + 1e-2 for each in ours]
    assert not made.check(wrong if step else wrong[0]).passed
    if step:
        reason = made.check([ours[0], *(1.05 * each for each in ours[1:])]).reason
        assert reason.startswith("gradient 0: error")
    assert set(made.kept) == ({harness.OPERATOR, targets.MANUAL, targets.SDPA} if step else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_of_the_core_are_cut_for_baselines_alone(dtype: torch.dtype) -> None:
    made, call, verdict = harness.ready(bench.window_core(24, dtype), CPU)
    assert verdict.passed, verdict.reason
    assert made.args[0].shape == (64, 7, 7, 96)
    assert not made.args[0].is_contiguous()
    rival = made.baselines[1]
    assert rival.args[0].shape == (64, 4, 49, 24)
    assert all(each.is_contiguous() for each in rival.args[:4])
    assert not made.check(call() + 1e-1).passed
    row = bench.window_core(24, dtype)
    assert row.threads == 1
    assert OPERATORS["window_attention"].flops(*made.args) == 4 * 64 * 4 * 49 * 49 * 24


@pytest.mark.parametrize("shift", [0, 3, -3])
def test_executed_flops_are_those_of_pairs_that_meet(shift: int) -> None:
    work = dataclasses.replace(SMALL, shift=shift)
    grid = plain.Grid(14, 2, 7, shift)
    mask = grid.mask(torch.zeros(()))
    pairs = 4 * 49 * 49 if mask is None else int((mask == 0).sum())
    made = ladder.problem("window_attention", work, CPU)
    assert made.flops == 4 * 2 * 16 * pairs
    assert made.nominal == (4 * 2 * 16 * 4 * 49 * 49 if shift else 0)
    assert pairs == (5476 if shift else 9604)


def test_flops_of_the_core_are_those_of_its_parts() -> None:
    forward, step = (
        ladder.ladder_core(ONE_WINDOW, CPU), ladder.ladder_core_step(ONE_WINDOW, CPU)
    )  # fmt: skip
    g, c, tokens = 16, 48, 2 * 49
    linears = 2 * tokens * ((4 + 3 + 3) * g * g + 2 * c * c)
    assert forward.flops == linears + 3 * 4 * tokens * 49 * g
    assert forward.baselines[0].flops == linears
    assert step.flops == 3 * forward.flops
    assert step.baselines[0].flops == 3 * linears


def test_dense_products_are_those_of_a_linear_layer_and_its_derivative() -> None:
    rows, weight = torch.randn(2, 3, 3, 4), torch.randn(5, 4)
    flops = 2 * 18 * 4 * 5
    for kind, times, count in (("forward", 1, 1), ("backward", 2, 2), ("step", 3, 3)):
        made = ladder.dense([rows, weight], kind)
        assert made.flops == times * flops
        assert len(made.call()()) == count
    into, of_weight = ladder.dense([rows, weight], "backward").call()()
    leaves = rows.flatten(0, 2).requires_grad_(), weight.requires_grad_()
    out = torch.nn.functional.linear(*leaves)
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.testing.assert_close((into, of_weight), expected)


def test_rows_are_related_to_the_ceiling_of_their_threads() -> None:
    case = dataclasses.replace(bench.ladder_core(SMALL), threads=1)
    row = _measured(case)
    assert not row.refused
    assert row.roof == "float32, 1 thread"
    copies = [timer.CopyRate(1 << 17, 1e30, "x")]
    harness.relate([row], timer.Ceilings(copies, {"float32": 1e30, row.roof: 1e9}))
    assert row.ceiling == "gemm"
    expected = row.flops / max(1e9, row.dense_rate) / row.seconds.median
    assert row.ceiling_share == pytest.approx(expected)
    assert row.nominal > row.flops
    assert result.gflops(row).endswith(")")


def test_a_row_has_its_own_threads_and_gives_them_back() -> None:
    seen = []

    def build(device: torch.device) -> Any:
        seen.append(torch.get_num_threads())
        raise ValueError("enough")

    before = torch.get_num_threads()
    case = harness.Case("ladder_ffn", "x", "float32", build, threads=2)
    assert _measured(case).refused == "ValueError: enough"
    assert seen == [2]
    assert torch.get_num_threads() == before


def _spread(value: float) -> Any:
    return timer.Spread(value, value, value, value)


def test_targets_on_a_rows_own_numbers() -> None:
    row = harness.Row("window_attention", "x", "float32", "cpp", target="window core float32")
    row.flops, row.seconds = 60 * 10**9, _spread(1.0)
    row.speedups, row.rivals = {targets.SDPA: _spread(2.5)}, [targets.SDPA]
    rate, best = row.judged()
    assert rate.cells() == ["GFLOP/s", "60.0", "50.0", "70.0", "must"]
    assert best.cells()[0] == "speed relative to the best baseline"
    row.skipped = {targets.FLEX: "slow"}
    assert row.judged()[1].cells()[0] == "speed relative to the best baseline that ran"

    row.target, row.saved, row.baseline_saved = "ladder block kept", 10, {"a": 120, "b": 70}
    assert [each.value for each in row.judged()] == [7.0]
    assert row.judged()[0].verdict == "must"

    row.target, row.yardsticks = "PSLT compiling", ["fused", "whole"]
    assert row.judged()[0].verdict == "not measured"
    row.compile_seconds = {"fused": 15.0, "whole": 30.0, "plain": 900.0}
    assert row.judged()[0].cells()[1:] == ["30.0 s", "60.0 s", "20.0 s", "must"]


def test_a_compiled_baseline_is_timed_without_its_first_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    rival = baseline.Baseline("c", lambda x: x + 1, (torch.ones(2),), compile=True)
    call, seconds = baseline.compile_and_call(rival)
    assert call().tolist() == [2.0, 2.0]
    assert seconds >= 0
    case = bench.ladder_core(ONE_WINDOW, slow=True)
    row = _measured(case)
    assert set(row.compile_seconds) == {targets.COMPILED_MANUAL, targets.COMPILED_SDPA}
    assert set(row.rivals) == {targets.MANUAL, targets.SDPA, *row.compile_seconds}
    assert any("compiled in" in line for line in result.relative(row))


def test_slow_baselines_are_in_the_full_set_alone() -> None:
    quick = [case for case in bench.cases() if case.quick]
    assert not any(ladder.SLOW in case.label for case in quick)
    slow = [case.target for case in bench.cases() if ladder.SLOW in case.label]
    assert {"window core float32", "ladder core forward+backward"} <= set(slow)
    row = _measured(bench.ladder_core(ONE_WINDOW))
    assert ladder.SLOW in row.skipped[targets.COMPILED_SDPA]


def test_a_family_stands_for_its_operators() -> None:
    found = harness.cases(operators=["ladder_attention"])
    assert {case.operator for case in found} == set(LADDER)
    assert len(found) == 22


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The whole model's benchmarks on a thin one of a ladder block a stage."""
    options: dict[str, Any] = {"num_classes": 10, "depths": (1, 1), "drop_path_rate": 0.0}
    ours = pslt.package("pslt").PSLT(12, **options)
    theirs = plain_pslt.PlainPSLT(dim=12, img_size=pslt.SIZE, **options)
    pslt.settle(theirs, torch.randn(2, 3, pslt.SIZE, pslt.SIZE))
    state = theirs.state_dict()
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    pair = pslt.Pair(ours, theirs)

    def made(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        return pslt.Pair(pair.ours.to(dtype), pair.plain.to(dtype))

    monkeypatch.setattr(pslt, "models", made)
    return pair


def test_rows_of_the_whole_model_are_checked(small_model: Any) -> None:
    made, call, verdict = harness.ready(bench.inference(1), CPU)
    assert verdict.passed, verdict.reason
    came = call()
    for rival in made.baselines:
        torch.testing.assert_close(came, rival.call()(), rtol=1e-3, atol=1e-4)
    assert not made.check(came + 1e-3).passed
    assert set(made.left_out) == {targets.COMPILED_PLAIN, targets.COMPILED_LAST}
    assert 0 < made.flops < made.nominal


def test_a_training_step_has_the_gradients_of_the_plain_model(small_model: Any) -> None:
    made, call, verdict = harness.ready(bench.step(2), CPU)
    assert verdict.passed, verdict.reason
    assert len(call()) == 1 + len(list(small_model.plain.parameters()))
    with torch.no_grad():
        next(iter(small_model.ours.parameters())).mul_(1.1)
    assert not made.check(call()).passed


def test_what_a_block_keeps_is_measured() -> None:
    case = bench.block_step(dataclasses.replace(SMALL, batch=3, heads=4))
    made, call, verdict = harness.ready(case, CPU)
    assert verdict.passed, verdict.reason
    tokens = 3 * 14 * 14 * 4 * 16
    # What lies between the halves of a branch, two branches' results, and all three joined.
    kept = made.kept[harness.OPERATOR]
    assert 8 * tokens <= kept < 8 * tokens + (1 << 13)
    assert all(made.kept[name] > 4 * kept for name in (targets.MANUAL, targets.SDPA))
    assert not made.check([each + 1e-2 for each in call()]).passed
    row = _measured(case)
    assert row.saved == kept
    assert [each.target.against for each in row.judged()] == [targets.KEPT]


def test_parts_of_the_model_add_up(small_model: Any) -> None:
    x = pslt.images(1, torch.float32)
    theirs = small_model.plain.eval()
    ours = small_model.ours.eval().fuse_for_inference()
    flops = pslt_phases.flops_by_part(theirs, x)
    parts = {name: count for name, count in flops.items() if name != "whole"}
    assert sum(parts.values()) == flops["whole"]
    assert parts["between"] == 0
    assert all(count > 0 for name, count in parts.items() if name != "between")
    found = pslt_phases.by_part(ours, theirs, x, 0.0)
    for times in found:
        assert times.keys() == flops.keys()
        assert times["stage 3, ladder"] > 0
    lines = pslt_phases.table(*found, flops, 1e11)
    assert [line[0] for line in lines[1:]] == list(flops)
    assert lines[-1][2] == "100%"
    assert not theirs._forward_hooks


def test_steps_of_a_block_are_its_operators() -> None:
    found = list(pslt_phases.steps(SMALL, CPU))
    whole, *rest = found
    assert [step.count for step in found] == [1, 1, 1, 1, 3, 1]
    assert sum(step.count * step.flops for step in rest) == whole.flops
    ours, theirs = [0.5, *[0.1] * 5], [1.0, *[0.2] * 5]
    lines = pslt_phases.block_table(found, ours, theirs, 1e11)
    assert lines[-2][:3] == ["operators together", "700 ms", "140%"]
    assert lines[-1][-1] == "2.00\N{MULTIPLICATION SIGN}"


def test_profile_takes_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(pslt_phases, "run", lambda *given: asked.append(given) or 0)
    assert door.main(["profile", "pslt", "--seconds", "0.1", "--threads", "1"]) == 0
    assert asked == [(CPU, 0.1, 1)]
    with pytest.raises(SystemExit, match="allowed: expert_ffn, pslt"):
        phases.run("route", CPU, 0.1, 1)


def test_call_costs_are_of_one_window() -> None:
    for name in ladder.FORWARD:
        made = bench.call_cost(name, CPU)
        first = made.args[0]
        assert first.numel() <= 49 * 3 * 24
        function = partial(getattr(door.ppmoe_ops, name), *made.args)
        assert isinstance(gate.outputs(function())[0], Tensor)


def test_convolutions_share_the_time_of_their_module() -> None:
    twice = [float(at) for at in range(2 * 24 + 1)]
    shares = pslt_phases._shares(twice)
    assert shares == {name: count / 24 for name, count in pslt_phases.CONVOLUTIONS.items()}
    with pytest.raises(SystemExit, match="saw 23 convolutions"):
        pslt_phases._shares(twice[:24])
