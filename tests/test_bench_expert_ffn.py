"""Benchmarks of `expert_ffn`: both sides compute the same, and what a row is held to is said."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ppmoe_ops.bench as door

door.benchmarks()
command, ffn, gate, growth, harness, inputs, page, phases, plain, report, result, targets, timer = (
    importlib.import_module(f"{door.PACKAGE}.{name}")
    for name in (
        "command",
        "expert_ffn_cases",
        "gate",
        "growth",
        "harness",
        "inputs",
        "page",
        "phases",
        "plain_expert_ffn",
        "report",
        "result",
        "targets",
        "timer",
    )
)
CPU = torch.device("cpu")
SMALL = inputs.Model("small", 24, 16, 8, 2)
KINDS = ("forward", "forward+backward", "decode")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny calls: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes need few weights to rotate, and little to read."""
    monkeypatch.setattr(ffn, "ROTATED_BYTES", 1 << 16)
    monkeypatch.setattr(timer, "READ_BYTES", 1 << 16)


def _case(kind: str, tokens: int = 20, **options: Any) -> Any:
    dtype = options.pop("dtype", torch.float32)
    return ffn.case(kind, tokens, dtype, model=SMALL, **options)


def _measured(case: Any) -> Any:
    return harness.measure(case, CPU, timer.HostClock(), seconds=0.0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("routing", ["balanced", "zipf", "one_expert"])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_both_sides_compute_the_same(kind: str, ranks: int, routing: str) -> None:
    made, call, verdict = harness.ready(_case(kind, ranks=ranks, routing=routing), CPU)
    assert verdict.passed, verdict.reason
    ours = gate.outputs(call())
    assert len(ours) == (1 if kind == "forward" else 5)
    for baseline in made.baselines:
        theirs = gate.outputs(baseline.call()())
        if baseline.same_result:
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, msg=baseline.name)


def test_grouped_form_is_the_loop_and_its_gradients() -> None:
    for ranks in (1, 4):
        made, _, _ = harness.ready(_case("forward+backward", ranks=ranks), CPU)
        rival = next(each for each in made.baselines if each.name == targets.LOOP)
        other = dataclasses.replace(rival, function=plain.grouped)
        for a, b in zip(rival.call()(), other.call()(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
def test_decode_meets_every_weight_once_before_it_comes_back(tokens: int) -> None:
    made, call, verdict = harness.ready(_case("decode", tokens), CPU)
    assert verdict.passed, verdict.reason
    sides = [made.timed, *made.baselines]
    sets = [(side.args, *side.turns) for side in sides]
    assert len({len(each) for each in sets}) == 1
    seen: list[tuple[int, int]] = []
    for x, ids, weights, w_in, w_out, _ in sets[0]:
        assert x.shape == (tokens, 24)
        assert weights.shape == ids.shape == (tokens, 2)
        assert w_in.size(0) == w_out.size(0) == 8
        seen += [(w_in.data_ptr(), expert) for expert in set(ids.flatten().tolist())]
    if 2 * tokens <= 8:
        assert len(set(seen)) == len(seen)
    expert_bytes = 4 * (32 * 24 + 24 * 16)
    assert len(set(seen)) * expert_bytes >= ffn.ROTATED_BYTES
    assert made.read == min(2 * tokens, 8) * expert_bytes
    for turn in range(1, len(sets[0])):
        rival = next(each for each in made.baselines if each.name == targets.LOOP)
        x, ids, weights, w_in, w_out, first = sets[0][turn]
        mine = plain.layer(x, ids, weights, w_in, w_out, first)
        torch.testing.assert_close(mine, rival.function(*rival.turns[turn - 1]))
    assert isinstance(call(), Tensor)


def test_turns_are_dealt_to_all_sides_together() -> None:
    counter = itertools.count()
    sides = [harness.Baseline("a", lambda turn: turn, (0,), turns=((1,), (2,))) for _ in range(2)]
    a, b = (side.call(counter) for side in sides)
    assert [a(), b(), a(), b(), a()] == [0, 1, 2, 0, 1]


def test_rows_count_executed_work_and_say_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plain, "why_no_transformers", lambda: "transformers is not installed")
    one_rank = _measured(_case("forward", 24, ranks=4))
    # A quarter of 48 slots; the contract's own count is 24 * min(2, 2).
    assert one_rank.flops == 2 * 12 * 24 * (32 + 16)
    assert one_rank.skipped[targets.GROUPED] == "transformers is not installed"
    assert one_rank.ceiling == ""
    step = _measured(_case("forward+backward", 24))
    assert step.flops == 3 * 4 * one_rank.flops
    assert step.nbytes > one_rank.nbytes
    assert set(step.speedups) == {targets.DENSE, targets.LOOP}
    assert step.rivals == [targets.LOOP]
    assert step.dense_rate > 0
    assert set(step.baseline_saved) == {targets.LOOP}
    assert not step.refused


def test_decode_is_held_against_reading() -> None:
    row = _measured(_case("decode", 2))
    found = harness.relate([row], timer.Ceilings([timer.CopyRate(1 << 17, 1e10, "x")], {}))
    assert row.ceiling == "read"
    assert row.ceiling_share == pytest.approx(
        row.read_bytes / row.read_rate.bytes_per_second / row.seconds.median
    )
    assert found.read == row.read_rate
    assert found.read.how in timer.read_candidates(CPU)
    assert [each.target.against for each in row.judged()] == [targets.READ]


def test_a_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = plain.layer

    def wrong(x: Tensor, *rest: Any) -> Tensor:
        return right(x, *rest) + 1e-3 * (x - x.detach())

    monkeypatch.setattr(plain, "layer", wrong)
    row = _measured(_case("forward+backward"))
    assert row.refused.startswith("result 0: error")
    assert _measured(_case("forward")).refused == ""


def _spread(value: float) -> Any:
    return timer.Spread(value, value, value, value)


def test_targets_say_aim_must_and_missed() -> None:
    speeds = {targets.DENSE: _spread(0.93), targets.LOOP: _spread(1.2), "other": _spread(0.99)}
    found = targets.judge("forward R=1 float32", speeds, [targets.LOOP, "other"], None)
    assert [each.verdict for each in found] == ["must", "missed"]
    assert found[0].cells()[1:4] == ["93%", "92%", "97%"]
    found = targets.judge("forward R=1 float32", speeds, [targets.LOOP], None)
    assert [each.verdict for each in found] == ["must", "aim"]
    slow = targets.judge("routing", {targets.BALANCED: _spread(0.9)}, [], None)
    assert slow[0].value == pytest.approx(1 / 0.9)
    assert slow[0].verdict == "must"
    assert targets.judge("decode float32", {}, [], 0.95)[0].verdict == "aim"
    assert targets.judge("decode float32", {}, [], None)[0].verdict == "not measured"
    assert targets.judge("", speeds, [], None) == []


def test_every_target_has_a_quick_case() -> None:
    quick = [case for case in harness.cases(quick=True) if case.target]
    full = {case.target for case in harness.cases(quick=False)} & set(targets.TARGETS)
    assert full == set(targets.TARGETS)
    assert {case.target for case in quick} == set(targets.TARGETS) - set(targets.SLOW)


def test_targets_are_in_every_form_of_the_report() -> None:
    row = _measured(_case("decode", 2))
    ceilings = timer.Ceilings(
        [timer.CopyRate(1 << 17, 1e10, "x")], {"float32": 1e11}, timer.ReadRate(2e10, "z")
    )
    made = result.Report("a", "b", {"c": "d"}, ceilings, [row], ["e"], [])
    words = f"share of {targets.READ}"
    assert result.to_json(made)["rows"][0]["targets"][0]["Target"] == words
    assert "## Targets" in result.to_markdown(made)
    assert "| Read from memory | 20.0 GB/s (z) |" in result.to_markdown(made)
    text = page.render(made)
    assert "<h2>Targets</h2>" in text
    assert words in text


def test_the_command_prints_targets_and_says_once_what_did_not_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = _measured(_case("decode", 2))
    row.skipped = {"other": "is not installed"}
    ceilings = timer.Ceilings([timer.CopyRate(1 << 17, 1e10, "x")], {})
    command._print_rows(result.Report("a", "b", {}, ceilings, [row, row, row], [], []))
    printed = capsys.readouterr().out
    assert printed.count("is not installed") == printed.count("and 2 more") == 1
    assert "verdict" in printed
    assert f"share of {targets.READ}" in printed


def test_growth_sweeps_what_it_says() -> None:
    local, foreign, idle = growth.sweeps(torch.float32, CPU, SMALL, 32)
    assert [point.value for point in local.points] == [16, 32, 64, 128]
    assert [point.value for point in foreign.points] == [0, 32, 96, 224, 480]
    assert [point.value for point in idle.points] == [0, 4]
    on_line = [0.5 + 2 * point.value for point in local.points]
    assert local.deviations(on_line) == pytest.approx([0] * 4)
    off = [*on_line[:3], 1.5 * on_line[3]]
    assert max(map(abs, local.deviations(off))) > targets.LINEAR
    lines = growth.table(foreign, [0.2] * 5, [1.0, 1.04, 0.5, 1.06, 1.0])
    assert [line[-1] for line in lines[1:]] == ["yes", "yes", "yes", "no", "yes"]


@pytest.mark.parametrize("local", [8, 2])
def test_phases_are_those_of_the_operator(local: int) -> None:
    work = inputs.Workload(SMALL, 24, local_experts=local)
    flops = 2 * 6 * local * 24 * (32 + 16)
    for direction, times in zip(phases.directions(work, CPU), (1, 2), strict=True):
        direction.call()
        for phase in direction.phases:
            phase.call()
            assert phase.nbytes > 0
        assert sum(phase.flops for phase in direction.phases) == times * flops
        seconds = [0.01] * len(direction.phases)
        lines = phases.table(0.1, direction.phases, seconds, 1e11, 1e10)
        assert len({len(line) for line in lines}) == 1
        products = next(line for line in lines if line[0] == "products together")
        assert products[2] == f"{20 * times}%"


def test_phases_of_the_activation_are_its_derivative() -> None:
    pre = torch.randn(5, 8, requires_grad=True)
    grad = torch.randn(5, 4)
    expected = torch.autograd.grad(phases.swiglu(pre), pre, grad)[0]
    came = torch.cat(phases.swiglu_backward(grad, pre.detach()), -1)
    torch.testing.assert_close(came, expected)


def test_commands_say_what_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["profile"], ["growth", "expert_ffn"], ["profile", "no_such_operator"]):
        with pytest.raises(SystemExit):
            command.main(words)
    with pytest.raises(SystemExit, match="no phases of 'route'"):
        command.main(["profile", "route"])
    capsys.readouterr()


def test_a_reader_that_has_enough_gets_no_traceback() -> None:
    listing = [sys.executable, "-m", "ppmoe_ops.bench", "list", "--full"]
    root = str(report.machine.ROOT)
    with subprocess.Popen(
        listing, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == command.PIPE_CLOSED
