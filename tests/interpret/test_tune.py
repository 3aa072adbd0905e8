"""The choice among configurations by time: modes, the file, what is dropped. Time is injected."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from ppmoe_ops import tune  # noqa: E402
from ppmoe_ops.kernels import _choices, _tune  # noqa: E402
from ppmoe_ops.kernels._launch import Config, Launch  # noqa: E402
from ppmoe_ops.kernels.expert_slice import configs, grouped_linear  # noqa: E402

TABLE = Config(16, 16, 16, num_warps=4, num_stages=2)
FAST = dataclasses.replace(TABLE, block_n=32)
SLOW = dataclasses.replace(TABLE, block_k=32)
CANDIDATES: _tune.Candidates = {4: {"many": (FAST, SLOW)}}
TIMES = {TABLE: 2.0, FAST: 1.0, SLOW: 3.0}
KEY = "into float32 many 8x4 gelu way=-"

Write = Callable[[Tensor], None]


class FakeKernel:
    """Called as a Triton kernel is; counts its runs."""

    def __init__(self, write: Write) -> None:
        self.write, self.runs = write, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.run

    def run(self, out: Tensor, **_: Any) -> None:
        self.runs += 1
        self.write(out)


class Problem:
    """An operator whose launches write `out`, each configuration in its own way."""

    def __init__(self, **writes: Write) -> None:
        self.out = torch.empty(6)
        self.kernels = {
            config: FakeKernel(writes.get(name, right))
            for name, config in {"table": TABLE, "fast": FAST, "slow": SLOW}.items()
        }

    def launch(self, config: Config) -> Launch:
        return Launch(self.kernels[config], 1, {"out": self.out}, config)

    def choose(self, *facts: object) -> Config:
        facts = facts or ("8x4", "gelu")
        args = ("into", TABLE, self.launch, (self.out, None), CANDIDATES, torch.float32, "many")
        return _tune.tuned(*args, *facts).config

    def runs(self) -> int:
        return sum(kernel.runs for kernel in self.kernels.values())


def right(out: Tensor) -> None:
    """The last two elements are of rows that nobody lists."""
    out[:4] = torch.tensor([1.0, float("nan"), float("inf"), -1e3])


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of choices in a folder of its own; the fake timer allows timing."""
    monkeypatch.setenv(_choices.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(_tune, "may_time", lambda written: True)
    monkeypatch.setattr(_tune, "milliseconds", lambda launch, device: TIMES[launch.config])
    _choices.known.cache_clear()
    return _choices.path_of("cpu", triton.__version__)


def set_mode(monkeypatch: pytest.MonkeyPatch, mode: str | None) -> None:
    if mode is None:
        monkeypatch.delenv(_choices.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(_choices.VARIABLE, mode)


@pytest.mark.parametrize("mode", [None, "0", "cached"])
def test_nothing_is_timed_unless_it_is_asked_for(
    mode: str | None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_mode(monkeypatch, mode)
    problem = Problem()
    assert problem.choose() == TABLE
    assert problem.runs() == 0
    assert not place.exists()


def test_the_fastest_is_stored_and_found_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_mode(monkeypatch, "1")
    problem = Problem()
    assert problem.choose() == FAST
    runs = problem.runs()
    assert problem.choose() == FAST
    assert problem.runs() == runs == 3
    record = json.loads(place.read_text())["choices"][KEY]
    assert record["config"] == dataclasses.asdict(FAST)
    assert (record["ms"], record["table_ms"], record["dropped"]) == (1.0, 2.0, [])

    _choices.known.cache_clear()  # as in another process
    set_mode(monkeypatch, "cached")
    fresh = Problem()
    assert fresh.choose() == FAST
    assert fresh.choose("8x5", "gelu") == TABLE
    assert fresh.runs() == 0
    set_mode(monkeypatch, "0")
    assert fresh.choose() == TABLE


def test_the_table_wins_where_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    set_mode(monkeypatch, "1")
    monkeypatch.setattr(_tune, "milliseconds", lambda launch, device: 1.0)
    problem = Problem()
    assert problem.choose() == problem.choose() == TABLE
    assert problem.runs() == 3


def wrong(out: Tensor) -> None:
    right(out)
    out[3] = -1.1e3


def partial(out: Tensor) -> None:
    right(out)
    out[0] = float("nan")


def excessive(out: Tensor) -> None:
    right(out)
    out[4] = 1.0


def unwritten(out: Tensor) -> None:
    """What an earlier launch has left must not pass for a result."""


def fails(out: Tensor) -> None:
    raise RuntimeError("out of resources: shared memory")


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (wrong, "1 of 6 elements differ"),
        (partial, "1 of 6 elements differ"),
        (excessive, "1 of 6 elements differ"),
        (unwritten, "3 of 6 elements differ"),
        (fails, "RuntimeError: out of resources"),
    ],
)
def test_a_bad_candidate_is_dropped_and_said(
    write: Write, why: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_mode(monkeypatch, "1")
    assert Problem(fast=write).choose() == TABLE
    (dropped,) = json.loads(place.read_text())["choices"][KEY]["dropped"]
    assert dropped["config"] == dataclasses.asdict(FAST)
    assert dropped["why"].startswith(why)


def test_another_order_of_summation_is_no_difference() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        values = torch.randn(1000, dtype=torch.float64).to(dtype)
        rounded = values * (1 + torch.finfo(dtype).eps)
        assert _tune.difference(values, rounded) is None
        # As much, but not in proportion: what is left where terms of size 1 cancel.
        assert _tune.difference(values, values + torch.finfo(dtype).eps ** 2) is None
        assert _tune.difference(values, values.roll(1)) is not None


def test_comparison_goes_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tune, "AT_ONCE", 7)
    values = torch.randn(5, 5)
    other = values.clone()
    other[4, 4] += 1
    assert _tune.difference(values, values) is None
    assert _tune.difference(values, other) == "1 of 25 elements differ"


def test_no_memory_means_no_tuning(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(out: Tensor) -> None:
        raise torch.OutOfMemoryError("no memory")

    set_mode(monkeypatch, "1")
    with pytest.warns(UserWarning, match="no memory to tune"):
        assert Problem(fast=full).choose() == TABLE
    assert not place.exists()


@pytest.mark.parametrize("value", ["", "2", "true", "CACHED"])
def test_other_values_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_mode(monkeypatch, value)
    with pytest.raises(ValueError, match=r"PPMOE_OPS_AUTOTUNE is .*expected one of 0, cached, 1"):
        Problem().choose()


@pytest.mark.parametrize(
    "content",
    [
        '{"format": 1, "cho',
        "[]",
        '{"format": 0, "choices": {}}',
        '{"format": 1}',
        f'{{"format": 1, "choices": {{"{KEY}": 3}}}}',
        "\xff\xfe",
    ],
)
def test_a_corrupt_file_is_ignored_with_a_warning(
    content: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.parent.mkdir()
    place.write_text(content, encoding="latin-1")
    set_mode(monkeypatch, "cached")
    with pytest.warns(UserWarning, match="tuned configurations in .* are ignored"):
        assert Problem().choose() == TABLE
    set_mode(monkeypatch, "1")
    with pytest.warns(UserWarning, match="are ignored"):
        assert Problem().choose() == FAST
    assert list(_choices.read(place)) == [KEY]


def test_a_configuration_that_is_no_candidate_is_chosen_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of an older table, say, whose BLOCK_M is not the plan's."""
    _choices.store(place, KEY, {"config": dataclasses.asdict(TABLE) | {"block_m": 64}})
    set_mode(monkeypatch, "cached")
    assert Problem().choose() == TABLE
    set_mode(monkeypatch, "1")
    assert Problem().choose() == FAST
    assert _choices.read(place)[KEY]["config"] == dataclasses.asdict(FAST)


def test_the_first_choice_holds_for_all_processes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_mode(monkeypatch, "1")
    assert _choices.known(place) == {}
    first = {"config": dataclasses.asdict(SLOW)}
    place.parent.mkdir()
    place.write_text(json.dumps({"format": 1, "choices": {KEY: first}}))
    assert Problem().choose() == SLOW


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(_choices.FOLDER_VARIABLE, str(tmp_path / "file"))
    set_mode(monkeypatch, "1")
    problem = Problem()
    with (
        pytest.warns(UserWarning, match="are not kept in"),
        pytest.warns(UserWarning, match="are ignored"),
    ):
        assert problem.choose() == FAST
    runs = problem.runs()
    assert problem.choose() == FAST
    assert problem.runs() == runs


def store_some(path: str, writer: int) -> None:
    for each in range(10):
        _choices.store(Path(path), f"{writer} {each}", {"config": {"writer": writer}})


def test_concurrent_writers_lose_nothing(place: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=store_some, args=(str(place), each)) for each in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _choices.read(place)  # never a part of a file
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(_choices.read(place)) == 40
    assert not list(place.parent.glob("*.tmp"))


def test_file_names_are_plain() -> None:
    assert _choices.path_of("NVIDIA H200 (a/b)", "3.6.0").name == "tuned-NVIDIA-H200-a-b-3.6.0.json"


def test_nothing_is_timed_on_the_cpu_on_fakes_or_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(_tune, "INTERPRETING", False)
    assert not _tune.may_time([torch.empty(1)])
    with FakeTensorMode():
        fake = torch.empty(1, device="cuda")
    assert not _tune.may_time([fake])


def test_nothing_is_timed_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

    monkeypatch.undo()
    for interpreting in (False, True):
        for capturing in (False, True):
            monkeypatch.setattr(_tune, "INTERPRETING", interpreting)
            monkeypatch.setattr(
                torch.cuda, "is_current_stream_capturing", lambda found=capturing: found
            )
            expected = not capturing and not interpreting
            assert _tune.may_time([OnGpu()]) == expected  # type: ignore[list-item]


def test_a_stored_choice_reaches_the_kernel(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (chosen,) = configs.CANDIDATES["linear"][2]["few"]
    rows, weight = torch.randn(16, 16).half(), torch.randn(2, 16, 16).half()
    offsets = torch.tensor([0, 9, 16], dtype=torch.int32)
    plain = grouped_linear.grouped_linear(rows, offsets, weight)
    key = "linear float16 few 16x16 rows way=-"
    _choices.store(place, key, {"config": dataclasses.asdict(chosen)})
    set_mode(monkeypatch, "cached")
    seen: list[Config] = []
    run = Launch.run
    monkeypatch.setattr(
        Launch, "run", lambda self, device: (seen.append(self.config), run(self, device))[1]
    )
    torch.testing.assert_close(grouped_linear.grouped_linear(rows, offsets, weight), plain)
    assert seen == [chosen]


@pytest.mark.parametrize(
    ("tokens", "experts", "loads"), [(24, 2, {"few"}), (100, 2, {"some"}), (257, 1, {"plain"})]
)
def test_every_product_is_tuned_and_every_candidate_agrees(
    tokens: int, experts: int, loads: set[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of the layer: the interpreter takes what a device without TMA takes."""
    timed: list[Config] = []

    def time(launch: Launch, device: torch.device) -> float:
        timed.append(launch.config)
        return -float(len(timed))  # the last is the fastest

    set_mode(monkeypatch, "1")
    monkeypatch.setattr(_tune, "milliseconds", time)
    words = {"hidden": 32, "width": 48, "experts": experts, "top_k": 1}
    given = argparse.Namespace(dtype="float16", activation="swiglu", **words)
    tune.run_products(given, tokens, "cpu")
    choices = _choices.read(place)
    # Twice into, once out of and with its rows' gradient, three gradients; two grouped weights.
    kinds = [key.split(" float16 ")[0] for key in choices]
    assert {each: kinds.count(each) for each in kinds} == {
        "into": 2, "out_of": 2, "activation_gradient": 1, "weight_gradient": 2,
        "linear": 4, "grouped_weight_gradient": 2,
    }  # fmt: skip
    layer = [key for key in choices if "linear" not in key and "grouped" not in key]
    assert {key.split()[2] for key in layer} == loads
    for key, record in choices.items():
        assert record["dropped"] == [], key
        assert record["ms"] < record["table_ms"], key
    assert all(
        record["config"] == dataclasses.asdict(_last(key)) for key, record in choices.items()
    )


def _last(key: str) -> Config:
    name, _, load, *_ = key.replace("grouped_", "").split()
    return configs.CANDIDATES[name.replace("_", " ")][2][load][-1]
