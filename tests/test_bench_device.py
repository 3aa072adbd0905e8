"""What a device run measures: its cases, rows and baselines, on small shapes and no GPU."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

import ppmoe_ops.bench as door

door.benchmarks()
cases, inputs, peers, plain, rows, timer = (
    importlib.import_module(f"{door.PACKAGE}.{name}")
    for name in (
        "device_cases",
        "inputs",
        "plain_moe_peers",
        "plain_expert_ffn",
        "device_rows",
        "device_timer",
    )
)
CPU = torch.device("cpu")
LAYER = rows.wanted(cases.LAYER, CPU)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "MOST_SETS", 3)


# --- the cases ------------------------------------------------------------------------------------


def test_cases_cover_the_family_at_the_shapes_of_the_targets() -> None:
    found = cases.cases()
    assert cases.uncovered() == []
    assert len({case.key for case in found}) == len(found)
    assert {case.group for case in found} == set(cases.GROUPS)
    assert {case.target for case in found} - {""} == set(cases.TARGETS)
    shapes = {(c.work.model.name, c.work.tokens, c.ranks, c.step) for c in found
              if c.operator == "expert_ffn"}  # fmt: skip
    assert shapes >= {
        ("Qwen3-30B-A3B", 32768, 1, False), ("Qwen3-30B-A3B", 32768, 1, True),
        ("Mixtral 8x7B", 8192, 1, False), ("Mixtral 8x7B", 8192, 8, False),
        ("Qwen3-30B-A3B", 8192, 8, False), ("Qwen3-30B-A3B", 16, 1, False),
        ("Mixtral 8x7B", 16, 1, False), ("OLMoE", 8192, 1, True),
    }  # fmt: skip
    for case in found:
        assert case.work.dtype == torch.bfloat16
        assert case.work.local * case.ranks == case.work.model.experts
        alone = case.operator in cases.ROUTER
        assert not (alone and case.ranks > 1)


def test_targets() -> None:
    limits = {name: (target.must, target.aim) for name, target in cases.TARGETS.items()}
    assert limits == {
        "Qwen3-30B forward": (500, 500),
        "Qwen3-30B forward+backward": (415, 415),
        "Mixtral forward": (620, 620),
        "Mixtral, one rank of 8": (0.75, 0.75),
        "Qwen3-30B, one rank of 8": (0.55, 0.65),
        "decode": (0.8, 0.8),
        "index": (12, 12),
        "memory": (0.85, 0.85),
        "launch": (10, 5),
    }
    share = cases.TARGETS["Qwen3-30B, one rank of 8"]
    assert [share.verdict(each) for each in (None, 0.5, 0.55, 0.7)] == [
        "not measured", "missed", "must", "aim"]  # fmt: skip
    launch = cases.TARGETS["launch"]
    assert [launch.verdict(each) for each in (11.0, 9.0, 5.0)] == ["missed", "must", "aim"]
    assert (share.show(0.6), launch.show(4.26), cases.TARGETS["memory"].show(None)) == (
        "60%", "4.3 us", "-")  # fmt: skip
    assert cases.TARGETS["Mixtral forward"].show(611.7) == "612 TFLOP/s"


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.OPERATORS_TIMED)
def test_every_operator_has_a_row(name: str) -> None:
    case = next(case for case in rows.wanted(cases.ROWS, CPU) if case.operator == name)
    row = rows.measure(case, CPU, 0.0)
    assert row.refused == ""
    assert row.seconds.median > 0
    assert row.same_bits is True
    assert row.waits == 0
    assert row.nbytes > 0
    assert (row.flops > 0) == (name in cases.PRODUCTS)
    assert (row.copy is not None) == (name not in cases.PRODUCTS)
    assert row.held == []
    assert "rehearsal" in row.how


@pytest.mark.parametrize("case", LAYER, ids=lambda case: case.label)
def test_the_layer_has_a_row(case: Any) -> None:
    row = rows.measure(case, CPU, 0.0)
    assert row.refused == ""
    assert row.dense is not None
    x = case.work.tokens * 64 * 2
    offsets = inputs.build("expert_ffn", case.work, CPU)[2]
    kept = int(offsets[-1]) * 2 * 32 * 2
    experts = case.work.local * 3 * 64 * 32 * 2
    grads = x + case.work.tokens * 2 * 4 + experts if case.step else 0
    assert row.bound == 2 * x + kept + grads
    reserved = case.work.tokens * min(2, case.work.local) * 2 * 32 * 2
    assert row.reserve == (reserved - kept if case.step else 0)
    assert row.flops == (3 if case.step else 1) * int(offsets[-1]) * 6 * 64 * 32


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LAYER[0]
    made = rows.make(case, CPU)
    wrong = dataclasses.replace(made, calls=[lambda: made.calls[0]() + 1])
    monkeypatch.setattr(rows, "make", lambda *_: wrong)
    row = rows.measure(case, CPU, 0.0)
    assert row.seconds is None
    assert "is above" in row.refused


def test_an_error_is_a_row_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "make", lambda *_: 1 / 0)
    row = rows.measure(LAYER[0], CPU, 0.0)
    assert row.refused == "ZeroDivisionError: division by zero"


def test_rows_are_held_to_their_targets() -> None:
    for case in (each for each in cases.cases() if each.target):
        small = rows.small(case)
        row, made = rows.DeviceRow("", "", "", ""), rows.make(small, CPU)
        row.seconds, row.bound_seconds = timer.spread([1e-6]), 2e-6
        rows._hold(row, small, made)
        what, measured, _, _, verdict = row.held
        assert what == cases.TARGETS[case.target].what
        if what == cases.RATE:
            assert measured == f"{made.flops / 1e-6 / 1e12:.0f} TFLOP/s"
        elif what == cases.MICROSECONDS:
            assert (measured, verdict) == ("1.0 us", "aim")
        elif what == cases.BOUND:
            assert (measured, verdict) == ("200%", "aim")
        else:
            ids = made.args[1]
            read = ids.unique().numel() * 3 * 64 * 32 * 2 / 4.3e12 / 1e-6
            assert measured == f"{100 * read:.0f}%"


# --- baselines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [each.name for each in peers.PEERS])
def test_baselines_run_or_say_why_not(name: str) -> None:
    peer = peers.peer(name)
    if "compiled" in name:
        # Compiling takes long; what is compiled is the plain form, which has a row of its own.
        assert callable(peer.make(LAYER[0].work))
        return
    forward = rows.compare(LAYER[0], peer, CPU, 0.0)
    step = rows.compare(LAYER[1], peer, CPU, 0.0)
    sliced = rows.compare(LAYER[3], peer, CPU, 0.0)
    if "not installed" in forward.refused:
        assert name in ("Liger", "ScatterMoE")
        return
    assert forward.refused == ""
    assert forward.by == name
    assert step.refused == ("seconds a call" if name == "transformers eager" else "")
    alone = name in ("transformers eager", "Liger", "ScatterMoE")
    assert ("other ranks" in sliced.refused) == alone


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: x * torch.nan])
def test_a_baseline_that_computes_something_else_is_left_out(change: Any) -> None:
    def make(_: Any) -> Any:
        return lambda *args: change(peers.grouped_glue(*args))

    row = rows.compare(LAYER[0], peers.Peer("other", make), CPU, 0.0)
    assert row.seconds is None
    assert row.refused.startswith("its results are")


def test_a_baseline_that_cannot_run_says_why() -> None:
    def make(_: Any) -> Any:
        raise ValueError("not for this work")

    assert rows.compare(LAYER[0], peers.Peer("other", make), CPU).refused == "not for this work"
    with pytest.raises(ValueError, match=r"no peer 'other'; allowed: transformers grouped_mm, "):
        peers.peer("other")


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_grouped_form_is_the_loop(ranks: int) -> None:
    work = inputs.Workload(inputs.TINY, 40, routing="zipf", local_experts=8 // ranks)
    case = cases.DeviceCase("expert_ffn", work, ranks)
    args = rows._theirs(case, rows.make(case, CPU).args)
    leaves = [each.requires_grad_() if each.is_floating_point() else each for each in args]
    wrt = [each for each in leaves if each.requires_grad]
    results = []
    for function in (plain.loop, peers.grouped_glue):
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, wrt, torch.ones_like(out))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
