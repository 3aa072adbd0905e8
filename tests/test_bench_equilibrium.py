"""Benchmarks of equilibrium solves: all sides solve the same, and what is counted is so."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import ppmoe_ops.bench as door
from ppmoe_ops._library import OPERATORS

door.benchmarks()
bench, cases, command, counts, gate, harness, inputs, page, plain, result, targets, timer, works = (
    importlib.import_module(f"{door.PACKAGE}.{name}")
    for name in (
        "bench_equilibrium", "equilibrium_cases", "command", "equilibrium_counts", "gate",
        "harness", "inputs", "page", "plain_equilibrium", "result", "targets", "timer",
        "equilibrium_inputs",
    )
)  # fmt: skip
CPU = torch.device("cpu")
FAMILY = [name for name, op in OPERATORS.items() if op.family == "equilibrium"]
PROMPT = works.Prompt(16, mild=True, dim=48, width=8)
IMAGES = works.Images(2, 12, mild=True)
THEIRS = [f"torchdeq {name}" for name in plain.SOLVERS]


def _work(operator: str, dtype: torch.dtype = torch.float32) -> Any:
    if operator == "anderson_mix":
        return works.States(3, 200, dtype)
    if "conv" in operator:
        return works.Images(2, 9, 4, dtype=dtype)
    return works.Rows(7, 5, dtype)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny calls: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _row(case: Any, problem: Any = None) -> Any:
    made = case if problem is None else dataclasses.replace(case, build=lambda device: problem)
    return harness.measure(made, CPU, timer.HostClock(), seconds=0.0)


@pytest.mark.parametrize("operator", FAMILY)
def test_every_operator_has_arguments_and_passes_its_gate(operator: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        work = _work(operator, dtype)
        args, again = (inputs.build(operator, work) for _ in range(2))
        for a, b in zip(args, again, strict=True):
            assert type(a) is type(b)
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b)
        made, _, verdict = harness.ready(bench.operator(operator, work), CPU)
        assert verdict.passed, verdict.reason
        assert not made.left_out
        for rival in made.baselines:
            rival.call()()


@pytest.mark.parametrize("operator", [name for name in FAMILY if name != "anderson_mix"])
def test_a_wrong_operator_is_refused_and_not_timed(operator: str) -> None:
    def function(*args: Any) -> Any:
        changed = list(OPERATORS[operator].overload(*args))
        changed[0] = changed[0] + 1e-2 * changed[0].abs().max()
        return changed

    case = bench.operator(operator, _work(operator))
    row = _row(dataclasses.replace(case, function=function))
    assert row.refused
    assert row.seconds is None


def test_a_mixing_step_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.operator("anderson_mix", _work("anderson_mix"))
    made, call, verdict = harness.ready(case, CPU)
    assert verdict.passed
    assert int(call()) == 3
    assert not made.check(torch.tensor(2, dtype=torch.int32)).passed
    op = OPERATORS["anderson_mix"]

    def wrong(*args: Any) -> Any:
        running = op.overload(*args)
        args[2].mul_(1.01)
        return running

    monkeypatch.setitem(OPERATORS, op.name, dataclasses.replace(op, reference=wrong))
    assert "error" in made.check(call()).reason


def test_wide_batches_are_not_given_to_lu_on_threads() -> None:
    wide = works.Rows(2, cases.WIDEST_LU + 1)
    made, _, verdict = harness.ready(bench.operator("equilibrium_cell_backward", wide), CPU)
    assert verdict.passed
    assert made.left_out == {"batched dense solves": cases.LU_FAILS}
    made = cases.operator("equilibrium_cell", dataclasses.replace(wide, solver="newton"), CPU)
    assert [each.name for each in made.baselines] == [targets.ROWS_LOOP]


@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
def test_baselines_of_the_cell_find_its_fixed_point(activation: str) -> None:
    work = works.Rows(6, 5, torch.float64, activation=activation, rtol=1e-10, max_iter=500)
    args = inputs.build("equilibrium_cell", work)
    x = OPERATORS["equilibrium_cell"].overload(*args)[0]
    for how in ("loop", *(["newton"] if activation == "tanh" else [])):
        found = plain.cell(*args[:2], activation, how, 1e-10, 500)
        torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-8)
    grad, a, c, x, *_ = inputs.build("equilibrium_cell_backward", work)
    leaves = a.requires_grad_(), c.requires_grad_()
    z = torch.zeros_like(c)
    for _ in range(300):
        z = plain.cell_map(*leaves, activation)(z)
    unrolled = torch.autograd.grad(z, leaves, grad)
    found = plain.cell_adjoint(grad, a.detach(), c.detach(), x, activation)
    torch.testing.assert_close(found, unrolled, rtol=1e-7, atol=1e-7)


def test_a_mixing_baseline_solves_least_squares() -> None:
    source = torch.Generator().manual_seed(0)
    f, z, g, before = torch.randn(4, 2, 30, generator=source, dtype=torch.float64)
    dg, df = torch.randn(2, 2, 3, 30, generator=source, dtype=torch.float64)
    kept = torch.zeros_like(g), torch.zeros_like(g)
    came, residual = plain.mix(f, z, dg, df, (g, before), kept)
    torch.testing.assert_close(dg[:, 0], f - z - g)
    torch.testing.assert_close(kept[1], f)
    gamma = torch.linalg.lstsq(dg.transpose(1, 2), (f - z).unsqueeze(2)).solution
    expected = f - (df * gamma).sum(1)
    torch.testing.assert_close(came, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(residual, (f - z).norm(dim=1))


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
def test_sides_of_a_prompt_layer_solve_the_same(step: bool) -> None:
    made = cases.prompt(PROMPT, CPU, step)
    assert [each.name for each in made.baselines] == [
        *THEIRS, targets.ROWS_LOOP, targets.WHOLE_LOOP
    ]  # fmt: skip
    came = gate.outputs(made.timed.call()())
    assert len(came) == (7 if step else 1)
    for rival in made.baselines:
        for a, b in zip(came, gate.outputs(rival.call()()), strict=True):
            assert (a - b).norm() <= 2e-3 * b.norm(), rival.name
    assert made.check(came if step else came[0]).passed
    wrong = [1.001 * each for each in came]
    assert "residual" in made.check(wrong if step else wrong[0]).reason
    assert "residual" in made.check([came[0] * torch.nan, *came[1:]]).reason
    if step:
        wrong = [came[0], *(1.02 * each for each in came[1:])]
        assert made.check(wrong).reason.startswith("gradient 0: error")
        assert "error of a gradient" in made.notes[1]
    assert "ours" in made.notes[0]
    assert all(name in made.notes[0] for name in THEIRS)


@pytest.mark.parametrize("fused", [False, True], ids=["layers", "fused"])
def test_sides_of_a_layer_on_images_solve_the_same(fused: bool) -> None:
    for step in (False, True):
        made = cases.images(IMAGES, CPU, fused, step)
        assert not made.left_out
        assert set(THEIRS) <= {each.name for each in made.baselines}
        came = gate.outputs(made.timed.call()())
        assert len(came) == (9 if step else 1)
        for rival in made.baselines:
            for a, b in zip(came, gate.outputs(rival.call()()), strict=True):
                assert (a - b).norm() <= 1e-2 * b.norm(), rival.name
        assert made.check(came if step else came[0]).passed
        assert not made.check([1.01 * each for each in came]).passed
        evaluated = made.flops / cases.image_flops(IMAGES) * IMAGES.batch
        assert step or (evaluated % 1 == 0 and 4 <= evaluated <= 40)


def test_a_prompt_layers_linear_part_has_its_norm() -> None:
    for mild in (False, True):
        _, _, w1, _, w2, _ = works.prompt(dataclasses.replace(PROMPT, mild=mild), CPU)
        square = w1 @ w2
        assert torch.linalg.matrix_norm(square, 2).item() == pytest.approx(0.95, rel=1e-5)
        assert torch.allclose(square, square.T, atol=1e-5) != mild


def test_sides_that_miss_the_tolerance_are_left_out_or_refused() -> None:
    short = dataclasses.replace(PROMPT, max_iter=3)
    made = cases.prompt(short, CPU)
    assert set(made.left_out) == {*THEIRS, targets.ROWS_LOOP, targets.WHOLE_LOOP}
    assert "0.0001 was asked for" in made.left_out[THEIRS[0]]
    row = _row(bench.prompt(128), made)
    assert "was asked for" in row.refused
    assert row.seconds is None


def test_a_residual_far_above_another_sides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "FAIR", 1e-3)
    made = cases.prompt(PROMPT, CPU)
    verdict = made.check(made.timed.call()())
    assert "beside" in verdict.reason


def test_without_torchdeq_its_columns_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "INSTALLED", False)
    row = _row(bench.prompt(128), cases.prompt(PROMPT, CPU))
    assert not row.refused
    assert {row.skipped[name] for name in THEIRS} == {plain.ABSENT}
    theirs, loop = row.judged()
    assert (theirs.verdict, theirs.incomplete) == ("not measured", True)
    assert loop.value is not None
    made = counts.evaluations("rel", 1e-2, CPU, seeds=1, size=32)
    assert not made.numbers
    assert "torchdeq" not in made.notes[0]


def test_evaluations_are_counted_in_f() -> None:
    made = counts.evaluations("rel", 1e-2, CPU, seeds=1, size=32)
    w, x = plain.symmetric(0, counts.NORM, counts.BATCH, 32)
    counted = plain.Counted(plain.symmetric_map(w, x))
    plain.torchdeq("broyden", counted, torch.zeros_like(x), 1e-2, counts.MOST)
    assert f"torchdeq broyden {counted.calls} ({counted.calls}-{counted.calls})" in made.notes[0]
    assert counted.samples == counts.BATCH * counted.calls
    row = _row(bench.evaluations("rel", 1e-2), made)
    assert not row.refused
    broyden, fewest = row.judged()
    assert broyden.value == made.numbers[targets.BROYDEN]
    assert fewest.value >= broyden.value
    assert made.check(made.timed.call()()).passed
    assert not made.check(torch.ones_like(x)).passed


def test_work_of_a_hard_sample_is_counted_in_samples() -> None:
    made = counts.hard_sample(CPU, size=32, tolerance=1e-2)
    together, alone = (int(part.split()[-1]) for part in made.notes[0].split(", ")[:2])
    assert made.numbers[targets.WORK] == together / alone
    assert alone >= 16
    # All samples at every step would be eight times the hardest.
    assert together < 0.6 * int(made.notes[0].split("fixed_point_iter ")[1].split(",")[0])
    row = _row(bench.hard_sample(), made)
    assert row.judged()[0].value == together / alone


def test_peak_bytes_are_of_tensors_alive_together() -> None:
    x = torch.zeros(256)

    def call() -> None:
        y = x + 1
        del y
        z = x + 2
        view = z[3:].view(-1)
        torch.cat([z, view])

    assert counts.peak_bytes(call, x) == 4 * (256 + 256 + 253)
    assert counts.peak_bytes(lambda: x[2:], x) == 0


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_memory_is_that_of_the_history(solver: str) -> None:
    made = counts.history(solver, CPU, size=512, steps=10)
    row = _row(bench.history(solver), made)
    assert row.judged()[0].verdict == "aim", made.notes
    if solver == "broyden":
        at = made.notes[0].split("torchdeq broyden ")[1].split(", ")
        least, most = (float(part.split()[0]) for part in at)
        assert most > 2 * least


def test_targets_on_what_was_counted() -> None:
    row = harness.Row("anderson_mix", "x", "float32", "cpp", target="evaluations")
    row.numbers = {targets.BROYDEN: 1.05, targets.FEWEST: 1.2}
    broyden, fewest = row.judged()
    assert broyden.cells() == [targets.BROYDEN, *("1.05\u00d7", "1.10\u00d7", "1.00\u00d7"), "must"]
    assert fewest.verdict == "missed"
    row.target = "prompt forward 128 tokens"
    spread = timer.Spread(*[60.0] * 4)
    row.speedups = {THEIRS[0]: spread, THEIRS[1]: timer.Spread(*[55.0] * 4),
                    targets.ROWS_LOOP: timer.Spread(*[4.5] * 4)}  # fmt: skip
    row.rivals = list(row.speedups)
    theirs, loop = row.judged()
    assert theirs.cells()[:2] == ["speed relative to the fastest of torchdeq", "55.0\u00d7"]
    assert (theirs.verdict, loop.verdict, theirs.incomplete) == ("must", "aim", False)


def test_notes_are_in_every_form_of_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    row = _row(bench.hard_sample(), counts.hard_sample(CPU, size=16, tolerance=1e-1))
    copies = [timer.CopyRate(1 << 17, 1e10, "clone()")]
    ceilings = harness.relate([row], timer.Ceilings(copies, {}))
    report = result.Report("t", "s", {}, ceilings, [row], [], [])
    note = row.notes[0]
    assert note.startswith("evaluated samples: ours ")
    assert note in result.to_markdown(report)
    assert note in page.render(report)
    assert result.to_json(report)["rows"][0]["notes"] == [note]
    command._print_rows(report)
    assert note in capsys.readouterr().out
    row.notes = []
    assert "## Notes" not in result.to_markdown(report)
    assert "<h2>Notes" not in page.render(report)


def test_a_family_stands_for_its_operators() -> None:
    found = harness.cases(operators=["equilibrium"])
    assert {case.operator for case in found} == set(FAMILY)
    assert len(found) == 24
    held = {case.target for case in harness.cases(quick=False, operators=["equilibrium"])}
    assert {"layer on images", "prompt forward+backward", "evaluations"} <= held <= {
        "", *targets.TARGETS
    }  # fmt: skip


def test_call_costs_are_of_one_sample() -> None:
    for name in bench.SMALLEST:
        made = bench.call_cost(name, CPU)
        partial(getattr(door.ppmoe_ops, name), *made.args)()
        assert all(each.numel() <= 600 for each in made.args if isinstance(each, torch.Tensor))
