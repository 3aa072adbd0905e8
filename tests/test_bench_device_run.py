"""How a device run takes its time, and what its script does and prints; nothing needs a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import ppmoe_ops.bench as door

door.benchmarks()
cases, command, page, rows, table, timer = (
    importlib.import_module(f"{door.PACKAGE}.{name}")
    for name in (
        "device_cases",
        "command",
        "device_page",
        "device_rows",
        "device_table",
        "device_timer",
    )
)
BENCH = Path(rows.__file__).resolve().parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYER = rows.wanted(cases.LAYER, CPU)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "MOST_SETS", 3)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script `device.py`, which is run and not imported; its steps see this package."""
    spec = importlib.util.spec_from_file_location("device_script", BENCH / "device.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "device_script", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def session(device: ModuleType, tmp_path: Path) -> Any:
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return device.Session(tmp_path, "cpu", time.monotonic() + 300, environment)


# --- time, bits, memory ---------------------------------------------------------------------------


def test_inputs_are_copied_until_they_exceed_the_cache() -> None:
    args = (torch.ones(1 << 18), 3, torch.ones(4))
    assert len(timer.copies(args, needed=1)) == 1
    sets = timer.copies(args, needed=(2 << 20) + 64)
    assert len(sets) == 3
    assert len({each[0].data_ptr() for each in sets}) == 3
    assert all(torch.equal(each[0], args[0]) and each[1] == 3 for each in sets)
    assert timer.rotation(sets) == "3 x 1 MiB, in L2"
    large = torch.empty(1 << 30, dtype=torch.int8, device="meta")
    assert timer.rotation([(large,)]) == "1 x 1024 MiB"


def test_bits_that_change_are_seen() -> None:
    counter = iter(range(9))
    assert timer.same_bits(lambda: torch.arange(4.0), CPU)
    assert timer.same_bits(lambda: torch.full((3,), torch.nan), CPU)
    assert not timer.same_bits(lambda: torch.full((3,), float(next(counter))), CPU)
    assert not timer.same_bits(lambda: torch.tensor(0.0 if next(counter) % 2 else -0.0), CPU)
    tail = iter(range(9))
    undefined = lambda: torch.tensor([1.0, float(next(tail))])  # noqa: E731
    assert timer.same_bits(undefined, CPU, lambda came: [each[:1] for each in came])


class Clock:
    """A device whose time is counted in calls: stands in for torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.captured = 0
        self.capturing = self.refuses = False
        self.allocated = 0

        class Event:
            def __init__(event, **_: Any) -> None: ...
            def record(event) -> None:
                event.at = self.now

            def elapsed_time(event, other: Any) -> float:
                return 1e3 * (other.at - event.at)

            def synchronize(event) -> None: ...

        class Graph:
            def replay(graph) -> None:
                self.now += 1e-5 * self.captured

        @contextlib.contextmanager
        def graph(_: Any) -> Iterator[None]:
            self.capturing, self.captured = True, 0
            yield
            self.capturing = False
            if self.refuses:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

        stream = SimpleNamespace(wait_stream=lambda _: None)
        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": lambda: stream,
            "stream": lambda _: contextlib.nullcontext(), "current_stream": lambda: stream,
            "synchronize": lambda: None, "set_sync_debug_mode": lambda _: None,
            "memory_allocated": lambda _: self.allocated,
            "reset_peak_memory_stats": lambda _: None,
            "max_memory_allocated": lambda _: self.allocated + 100,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self) -> None:
        if self.capturing:
            self.captured += 1
        else:
            self.now += 1e-5


def test_graphs_hold_whole_turns_and_report_seconds_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    timed = timer.device_time([clock.call] * 3, CUDA, 0.0)
    assert timed.how == "graph"
    # 2 ms of 10 us calls, in whole turns of three.
    assert timed.calls == clock.captured == 201
    assert timed.seconds.median == pytest.approx(1e-5)


def test_what_cannot_be_captured_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    events = SimpleNamespace(measure=lambda call, repeats: 2e-5)
    monkeypatch.setattr(timer, "CudaClock", lambda **_: events)
    timed = timer.device_time([clock.call], CUDA, 0.0, waits=2)
    assert timed.how == "events (2 host synchronisations a call)"
    assert (clock.captured, timed.seconds.median) == (0, 2e-5)
    clock.refuses = True
    timed = timer.device_time([clock.call], CUDA, 0.0)
    assert timed.how == "events (not captured: operation not permitted when stream is capturing)"


def test_waits_and_peaks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def waits() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert timer.synchronisations(waits, CUDA) == 3
    assert timer.synchronisations(waits, CPU) == 0
    clock.allocated = 7
    assert timer.peak_bytes(clock.call, CUDA) == 100
    assert timer.peak_bytes(clock.call, CPU) is None


# --- the script -----------------------------------------------------------------------------------


def test_a_rehearsal_of_the_layer(device: Any, session: Any) -> None:
    device.rows(session, "layer", "layer", device.LAYER)
    device.rows(session, "again", "layer", device.LAYER, "torch grouped_mm")
    assert [step.passed for step in session.steps] == [True, True], session.steps
    text = device.table.whole(session.known())
    for case in LAYER:
        assert text.count(case.label) >= 2
    assert "refused" not in text
    assert "baselines of the layer" in text
    stored = json.loads((session.out / "device.json").read_text())
    assert (stored["kind"], stored["device"]) == ("device", "cpu")
    assert [row["key"] for row in stored["rows"]] == 2 * [case.key for case in LAYER]


def test_steps_that_fail_or_hang_are_reported(device: Any, session: Any) -> None:
    session.run("fails", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], (0.5, 60))
    session.ends = time.monotonic()
    session.run("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], (0.5, 60))
    session.run("is not there", ["/no/such/program"], (0.5, 60))
    failed, hung, missing = session.steps
    assert not failed.passed
    assert failed.detail.startswith("exit 3: why")
    assert not hung.passed
    assert "stopped after 5 s" in hung.detail
    assert not missing.passed
    device.rows(session, "late", "layer", device.LAYER)
    assert session.steps[-1].detail == "not run: out of time"
    assert [step["name"] for step in session.known()["steps"]][-1] == "late"


def test_the_tuner_runs_only_where_there_is_one(
    device: Any, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[dict[str, Any]] = []
    monkeypatch.setattr(device, "rows", lambda *_, **marks: again.append(marks))
    session.device = "cuda"
    monkeypatch.setattr(device, "TUNER", "no_such_module")
    device.tune(session)
    assert (session.steps, again) == ([], [])
    monkeypatch.setattr(device, "TUNER", "this")
    device.tune(session)
    assert [step.name for step in session.steps] == ["tune"]
    assert again == [{"tuned": True}]


def test_without_a_gpu_the_run_says_so(device: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        assert device.why_not("cuda") == ""
        return
    assert device.why_not("cpu") == ""
    run = subprocess.run(
        [sys.executable, str(BENCH / "device.py")], capture_output=True, text=True, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "Nothing was measured" in run.stderr


def test_tables_need_the_standard_library_alone() -> None:
    code = f"import sys; sys.path = [{str(BENCH)!r}, *sys.path]; sys.modules['torch'] = None; "
    code += "import device_table; print(device_table.rate(5e12, 1e12))"
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True,
                         check=False)  # fmt: skip
    assert run.stdout.strip() == "5", run.stderr


def a_run() -> list[dict[str, Any]]:
    """Rows of everything that a table shows."""
    row = rows.DeviceRow("key", "expert_ffn", "shape", "triton")
    row.seconds, row.how, row.inputs = timer.spread([2e-6]), "graph", "1 x 3 MiB"
    row.flops, row.nbytes, row.waits, row.same_bits = 4e6, 6e6, 1, False
    row.peak, row.bound, row.reserve, row.bound_seconds = 5 << 20, 4 << 20, 2 << 20, 1e-6
    row.held = ["TFLOP/s", "2 TFLOP/s", "500 TFLOP/s", "500 TFLOP/s", "missed"]
    refused = dataclasses.replace(
        row, key="r", operator="route", seconds=None, refused="error 1 above 0"
    )
    theirs = dataclasses.replace(row, by="Liger", seconds=timer.spread([5e-6]), held=[])
    absent = dataclasses.replace(row, by="ScatterMoE", seconds=None, refused="not installed")
    found = [{**dataclasses.asdict(each), "peer": name} for each, name in (
        (row, ""), (refused, ""), (theirs, "Liger"), (absent, "ScatterMoE"), (absent, "ScatterMoE"),
    )]  # fmt: skip
    return found


def test_tables_show_what_went_wrong() -> None:
    found = a_run()
    text = "\n".join(table.family(found))
    assert table.target_cells(found[:1]) == [
        ["expert_ffn", "shape", *found[0]["held"]],
        ["expert_ffn", "shape", "peak memory", "3 MiB", "4 MiB", "4 MiB", "aim"],
    ]
    assert table.target_cells([{**found[0], "held": [], "reserve": 0}])[0][-1] == "missed"
    for part in ("DIFFER", "5 of 4 + 2", "refused  error 1 above 0", "50%", "missed"):
        assert part in text, part
    assert "left out: ScatterMoE, 2 cases: not installed" in text
    assert table.problems(found) == [
        "expert_ffn, shape: its bits differ from call to call",
        "expert_ffn, shape: host synchronisations in a call: 1",
        "route, shape: error 1 above 0",
        "route, shape: its bits differ from call to call",
        "route, shape: host synchronisations in a call: 1",
    ]
    late = {**found[1], "refused": "not run: out of time", "same_bits": None, "waits": None}
    assert table.problems([late, {**late, "refused": "", "how": "events (not captured: x)"}]) == [
        "route, shape: events (not captured: x)"
    ]
    line = next(each for each in text.splitlines() if "Liger" in each)
    assert line.split()[2:5] == ["5.0", "0.8", "2.50"]


def test_bytes_of_arguments() -> None:
    """Tensors of one storage count once; numbers do not count."""
    base = torch.ones(8)
    assert timer.tensor_bytes((base, base[2:], 5, None, torch.ones(2, dtype=torch.int8))) == 34


# --- the results page -----------------------------------------------------------------------------


def test_the_page_without_a_run_says_that_nothing_was_measured(tmp_path: Path) -> None:
    assert command.main(["device", "--out", str(tmp_path)]) == 0
    text = (tmp_path / page.NAME).read_text()
    assert "Nothing here was measured: no GPU could be had." in text
    assert text.count("| not yet run on a GPU |") == sum(
        bool(each.target) for each in cases.cases()
    )
    assert "bash bench/device.sh" in text
    if page.roofline_page.device_run() is None:
        assert text == (page.RESULTS / page.NAME).read_text(), "stale: `ppmoe_ops.bench device`"


def test_a_run_is_stored_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {
        "kind": "device", "device": "cuda", "facts": {"GPU": "NVIDIA H200", "Date": "2026-01-02"},
        "steps": [{"name": "build", "passed": False, "seconds": 1.0, "detail": "exit 1"}],
        "ceilings": {"copies": [{"nbytes": 8, "bytes_per_second": 4.2e12}],
                     "gemm": {"bfloat16": 7.7e14}},
        "rows": a_run(),
    }  # fmt: skip
    given = tmp_path / "given" / "device.json"
    given.parent.mkdir()
    given.write_text(json.dumps(run))
    out = tmp_path / "results"
    assert command.main(["device", str(given), "--out", str(out)]) == 0
    assert json.loads((out / "nvidia-h200-device.json").read_text()) == run
    text = (out / page.NAME).read_text()
    for part in ("4.20 TB/s", "770 TFLOP/s", "| missed |", "| build | FAILED | exit 1 |",
                 "- left out: ScatterMoE: not installed", "its bits differ"):  # fmt: skip
        assert part in text, part
    assert "Nothing here was measured" not in text
    assert "Measured on NVIDIA H200." in (out / "roofline-expert_slice.md").read_text()

    given.write_text(json.dumps({**run, "device": "cpu"}))
    with pytest.raises(SystemExit):
        command.main(["device", str(given), "--out", str(out)])
    assert "holds no rows of a GPU" in capsys.readouterr().err
