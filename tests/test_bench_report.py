"""The report is one plain file for every screen, and revisions are compared in turns."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import ppmoe_ops.bench as door
from ppmoe_ops._library import OPERATORS

door.benchmarks()
bench, command, compare, harness, inputs, machine, page, report, timer, worker = (
    importlib.import_module(f"{door.PACKAGE}.{name}")
    for name in (
        "bench_expert_slice",
        "command",
        "compare",
        "harness",
        "inputs",
        "machine",
        "page",
        "report",
        "timer",
        "worker",
    )
)
CPU = torch.device("cpu")
EXPERTS = [name for name, op in OPERATORS.items() if op.family == "expert_slice"]
WORK = inputs.Workload(inputs.Model("small", 24, 16, 8, 2), 20)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny calls: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _fake_ceilings(*_: Any) -> Any:
    copies = [timer.CopyRate(1 << power, 3e10, "clone()") for power in (17, 27)]
    return timer.Ceilings(copies, {"float32": 1e11, "bfloat16": 4e11})


@pytest.fixture(scope="module")
def small_report() -> Any:
    """One family's operators on small shapes, one refused row, and awkward characters."""
    cases = [
        harness.Case(
            name, f"<small> & {name}", "float32", partial(bench.problem, name, WORK), headline=name
        )
        for name in EXPERTS
    ]
    cases.append(harness.Case("route", "raises", "float32", lambda device: 1 / 0, headline="bad"))
    cases += [case for case in harness.cases(quick=True, operators=["route"]) if case.function]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timer, "measure_ceilings", _fake_ceilings)
        patch.setattr(timer, "recycle_memory", lambda: "left alone")
        patch.setattr(harness, "cases", lambda *_: cases)
        return report.run(report.Options(CPU, seconds=0.0, threads=1))


class Page(HTMLParser):
    """Notes what a page consists of, and whether its tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_one_file_for_every_screen(small_report: Any) -> None:
    text = page.render(small_report)
    parsed = Page(text)
    for tag in ("script", "link", "img", "iframe", "object", "base"):
        assert parsed.counts[tag] == 0
    assert not re.search(r"url\(|@import|https?:|src=|href=", text)
    assert "prefers-color-scheme: dark" in text
    assert ("name", "viewport") in parsed.attributes
    assert "max-width: 620px" in text
    assert parsed.counts["svg"] == 2 * len(EXPERTS) + 1
    assert text.count('role="img" aria-label=') == parsed.counts["svg"]
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", text)


def test_the_page_has_every_row_and_says_what_was_refused(small_report: Any) -> None:
    text = page.render(small_report)
    table = text[text.index('<table class="rows">') :]
    assert table.count("<tr>") - 1 == len(small_report.rows) == len(EXPERTS) + 2
    words = " ".join(Page(text).words)
    assert "refused: ZeroDivisionError: division by zero" in words
    assert "<small> & route" in words
    assert report.exit_code(small_report) == 1
    ours = [row for row in small_report.rows if not row.refused]
    assert report.exit_code(dataclasses.replace(small_report, rows=ours)) == 0


def test_rows_carry_their_costs(small_report: Any) -> None:
    rows = {row.operator: row for row in small_report.rows if row.label.startswith("<small>")}
    linear = rows["grouped_linear"]
    assert linear.flops == 2 * 40 * 24 * 32
    assert linear.ceiling_share > 0
    assert set(linear.speedups) | set(linear.skipped) == {
        "one dense GEMM",
        "loop of mm",
        "grouped_mm",
    }
    assert rows["merge_rows"].baseline_saved["gather, mul, sum"] > rows["merge_rows"].saved == 0
    assert rows["router_losses"].backend == rows["router_losses_forward"].backend != "none"
    cost = small_report.rows[-1]
    assert cost.call_cost
    assert cost.ceiling_share is None


def test_a_dense_baseline_raises_the_ceiling_of_its_dtype() -> None:
    row = harness.Row("grouped_linear", "x", "float32", "cpp", flops=10**9, copy_seconds=1e-4)
    row.seconds, row.dense_rate = timer.spread([0.02]), 2e11
    raised = harness.relate([row], _fake_ceilings())
    assert raised.gemm == {"float32": 2e11, "bfloat16": 4e11}
    assert (row.ceiling, row.ceiling_share) == ("gemm", pytest.approx(0.25))


def test_files_and_summary(
    small_report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = report.write(small_report, tmp_path / "reports")
    assert [path.name for path in files] == ["index.html", "report.md", "report.json"]
    data = json.loads(files[2].read_text())
    assert data["schema"] == 1
    assert len(data["rows"]) == len(small_report.rows)
    assert data["rows"][0]["byte_rate"] > 0
    lines = files[1].read_text().splitlines()
    assert len({line.count(" | ") for line in lines if line.startswith("| `")}) == 1
    report.print_summary(small_report, files)
    printed = capsys.readouterr().out
    assert "refused: route, raises" in printed
    assert "index.html" in printed


def test_facts_name_hardware_and_versions() -> None:
    facts = machine.facts(CPU)
    assert {"Processor", "Threads", "Memory", "PyTorch", "Triton", "Python", "Revision"} <= set(
        facts
    )
    assert all(facts.values())
    assert 0 <= machine.OtherLoad().share() <= 1


def test_the_command_lists_cases_and_refuses_unknown_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert door.main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(harness.cases())
    with pytest.raises(SystemExit):
        command.main(["no_such_operator"])
    assert "allowed: " in capsys.readouterr().err


class FakeSide:
    """A revision that takes `cost` seconds a call; `busy` is shared by both and must be free."""

    def __init__(self, cost: float, busy: list[str], order: list[float]) -> None:
        self.cost, self.busy, self.order = cost, busy, order

    def prepare(self, key: str) -> dict[str, Any]:
        return {"repeats": 2, "seconds": self.cost}

    def sample(self, repeats: int) -> float:
        assert not self.busy
        self.order.append(self.cost)
        return self.cost * 1.001 ** len(self.order)


class MissingSide(FakeSide):
    def prepare(self, key: str) -> dict[str, Any]:
        return {"refused": "has no such case"}


def test_revisions_take_turns() -> None:
    order: list[float] = []
    ours, theirs = FakeSide(0.01, [], order), FakeSide(0.03, [], order)
    compared = compare.take_turns("case", ours, theirs, 2.0, random.Random(0))
    assert compared.speedup.median == pytest.approx(3.0, rel=0.005)
    turns = [tuple(order[at : at + 4]) for at in range(0, len(order), 4)]
    assert all(turn == turn[::-1] for turn in turns)
    assert len(set(turns)) == 2


def test_a_case_that_one_revision_lacks_is_said_and_not_timed() -> None:
    sides = FakeSide(0.01, [], []), MissingSide(0.01, [], [])
    compared = compare.take_turns("case", *sides, 1.0, random.Random(0))
    assert compared.refused == "the revision: has no such case"
    compare.print_results("REV", [compared])


def test_a_worker_answers_line_by_line() -> None:
    class Answers:
        def prepare(self, key: str) -> dict[str, Any]:
            return {"key": key}

        def sample(self, repeats: int) -> dict[str, Any]:
            return {"seconds": repeats}

    replies = io.StringIO()
    worker.serve(Answers(), io.StringIO('{"prepare": "x"}\n{"sample": 3}\n'), replies)
    assert replies.getvalue() == '{"key": "x"}\n{"seconds": 3}\n'


def test_a_worker_process_measures_this_tree() -> None:
    key = next(
        case.key for case in harness.cases(operators=["expert_index"]) if case.function is not None
    )
    side = compare.Worker(machine.ROOT, CPU, 1)
    try:
        assert side.prepare(key)["repeats"] >= 1
        assert side.sample(2) > 0
        assert side.prepare("no such case") == {"refused": "has no such case"}
    finally:
        side.close()
