"""The fuzzer of `expert_ffn`: some calls of it, and that it fails loudly and can be repeated."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ffn
import fuzz
import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]


def test_two_hundred_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--calls", "200", "--seed", "424242"]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.startswith("200 calls, 0 failed")


def test_a_seed_always_draws_the_same_call() -> None:
    for seed in range(40):
        call = fuzz.draw(seed)
        assert call == fuzz.draw(seed)
        first, again = fuzz.arguments(call), fuzz.arguments(call)
        for one, other in zip([*first[1], first[2]], [*again[1], again[2]], strict=True):
            if isinstance(one, torch.Tensor):
                assert one.stride() == other.stride()
                assert torch.equal(one, other)


def test_what_is_drawn_is_varied() -> None:
    calls = [fuzz.draw(seed) for seed in range(3000)]
    assert {call.dtype for call in calls} == set(fuzz.DTYPES)
    assert {call.activation for call in calls} == set(ffn.ACTIVATIONS)
    assert {call.biases for call in calls} == set(ffn.BIASES)
    assert {call.threads for call in calls} == {1, 2, 3, 4}
    assert {call.shape.routing for call in calls} == {"drawn", "dropped", "one", "rare", "absent"}
    assert {layout for call in calls for layout in call.layouts} == set(fuzz.LAYOUTS)
    assert {call.grad for call in calls} == set(fuzz.GRADS)
    assert len({call.needs for call in calls}) == 64
    sizes = [call.shape for call in calls]
    for size in (0, 1, 513):
        assert any(size in (each.hidden, each.width) for each in sizes)
    assert any(each.tokens == 0 for each in sizes)
    assert any(each.tokens > 4096 for each in sizes)
    assert any(each.here == 0 for each in sizes)
    assert any(each.top_k == each.experts > 1 for each in sizes)


def test_strides_are_those_that_were_drawn() -> None:
    tensor = torch.randn(3, 5, 4)
    for layout in fuzz.LAYOUTS:
        turned = fuzz.laid_out(tensor, layout)
        assert torch.equal(turned, tensor)
        assert turned.is_contiguous() == (layout in ("closed", "offset"))


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_a_wrong_result_fails_and_can_be_repeated(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fuzz.run

    def broken(args: Any) -> torch.Tensor:
        out = right(args)
        if out.numel() < 2 or not args[0].requires_grad:
            return out
        return out * 1.01 if wrong == "output" else out + 0.01 * (args[0] - args[0].detach())

    monkeypatch.setattr(fuzz, "run", broken)
    assert fuzz.main(["--calls", "300", "--seed", "3", "--most", "2"]) == 1
    printed = capsys.readouterr().out
    seeds = re.findall(r"^FAILED --only (\d+): T=", printed, re.MULTILINE)
    assert len(seeds) == 2
    assert ", 2 failed, " in printed
    assert fuzz.main(["--only", seeds[1]]) == 1
    assert f"FAILED --only {seeds[1]}: " in capsys.readouterr().out
    monkeypatch.undo()
    assert fuzz.main(["--only", seeds[1]]) == 0


@pytest.mark.parametrize("tokens", [16, 17])
@pytest.mark.parametrize("layout", ["columns", "spread"])
def test_layouts_must_agree_to_the_bit_where_they_are_promised_to(
    layout: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = fuzz.draw(0)
    call = dataclasses.replace(
        drawn, shape=ffn.Shape(tokens, 40, 30, 1, 1), dtype=torch.float32, activation="silu",
        biases=(True, True), needs=ffn.FLOAT_ARGUMENTS, shift=0, again=True,
        layouts=("closed", "closed", layout, "closed", "closed", "closed"),
    )  # fmt: skip
    right = fuzz.run
    fuzz.check(call)

    def broken(args: Any) -> torch.Tensor:
        out = right(args)
        return out if args[4].is_contiguous() else out * (1 + 2**-23)

    for module in (ffn, fuzz):
        monkeypatch.setattr(module, "run", broken)
    # One bit, and only few rows of weights that are spread may differ in it.
    if tokens == 16 and layout == "spread":
        fuzz.check(call)
    else:
        with pytest.raises(AssertionError, match="closed memory"):
            fuzz.check(call)


def test_an_unexpected_error_fails_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(args: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fuzz, "run", broken)
    assert fuzz.main(["--calls", "3"]) == 1
    assert capsys.readouterr().out.count("RuntimeError: no such kernel") == 3


def test_as_a_program() -> None:
    command = [sys.executable, str(TESTS / "fuzz.py"), "--calls", "2", "--seed", "9"]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("2 calls, 0 failed")
    none = subprocess.run([*command, "--calls", "0"], cwd=TESTS.parent, check=False)
    assert none.returncode == 1
