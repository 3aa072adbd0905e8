"""The CUDA kernels of routing, run on the CPU from their own source (see `emulate.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import slicing
import torch
from bad_input import BAD_CALLS, BadCall
from torch import Tensor

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import assert_error_rule, cast_sample

pytestmark = pytest.mark.kernel
DTYPES = slicing.DTYPES
INF, NAN = float("inf"), float("nan")
NAMES = ("route", "route_backward", "router_losses_forward", "router_losses_backward")

CHOICES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax_raw": {"renormalize": False, "scale": 0.5},
    "softmax_bias": {"selection_bias": True, "scale": 2.5},
    "softmax_groups": {"groups": 4, "top_groups": 2},
    "sigmoid": {"score": "sigmoid", "scale": 1.5},
    "sigmoid_raw": {"score": "sigmoid", "renormalize": False},
    "sigmoid_groups": {"score": "sigmoid", "groups": 4, "top_groups": 3, "selection_bias": True},
}
# One size of every width of kernel, and two that only the scanning kernel takes.
SIZES = ((8, 2), (12, 3), (32, 4), (60, 4), (128, 8), (160, 6), (256, 8), (384, 10), (600, 4))


@pytest.fixture(autouse=True)
def call(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of `slicing` call the emulated operators."""

    def emulated(name: str, args: Any, options: dict[str, Any] | None = None) -> Any:
        return getattr(ops, name)(*args, **(options or {}))

    monkeypatch.setattr(slicing, "call", emulated)


def options_for(choice: str, experts: int) -> dict[str, Any]:
    options = dict(CHOICES[choice])
    if options.get("selection_bias"):
        options["selection_bias"] = torch.randn(experts)
    return options


def check(name: str, args: tuple[Any, ...], factor: float) -> tuple[Tensor, ...]:
    """The error rule for every result of an operator without options."""

    def tensors(result: Any) -> tuple[Tensor, ...]:
        return (result,) if isinstance(result, Tensor) else tuple(result)

    got = tensors(slicing.call(name, args))
    plain = tensors(OPERATORS[name].reference(*args))
    exact = tensors(OPERATORS[name].reference(*cast_sample(args, torch.float64)))
    for three in zip(got, plain, exact, strict=True):
        # A scalar of the reference may be right by chance.
        assert_error_rule(*three, factor=8.0 if three[0].dim() == 0 else factor, name=name)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
def test_route(choice: str, dtype: torch.dtype) -> None:
    for experts, top_k in SIZES:
        logits = (torch.randn(5, experts) * 3).to(dtype)
        slicing.check_route((logits, top_k), options_for(choice, experts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 17, 32, 33, 70])
def test_every_top_k(top_k: int, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 70).to(dtype)
    slicing.check_route((logits, top_k))
    slicing.check_route((logits, top_k, "sigmoid"))


@pytest.mark.parametrize("experts", [1, 2, 7, 9, 16, 17, 33, 65, 127, 257, 511, 512, 513])
def test_any_number_of_experts(experts: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(3, experts).to(dtype)
        slicing.check_route((logits, min(experts, 6)))
        slicing.check_route((logits, 1), {"renormalize": False})


@pytest.mark.parametrize("tokens", [1, 15, 17, 33])
def test_last_tokens_of_a_warp(tokens: int) -> None:
    for experts in (8, 16):
        slicing.check_route((torch.randn(tokens, experts).half(), 3))
        slicing.check_route((torch.randn(tokens, experts), 3, "sigmoid"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [8, 48, 200, 512, 520])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equal_logits_go_to_the_lower_ids(score: str, experts: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(4, experts, dtype=dtype)
    logits[1] = -2.0
    logits[2, ::5] = 1.0
    logits[3, ::2] = -0.0
    top_k = min(12, experts)
    _, ids = slicing.check_route((logits, top_k, score), exact_ids=True)
    ranking = sorted(range(experts), key=lambda expert: (expert % 5 != 0, expert))
    lowest = list(range(top_k))
    assert ids.tolist() == [lowest, lowest, ranking[:top_k], lowest]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equal_groups_go_to_the_lower_group(score: str) -> None:
    for experts in (24, 96, 600):
        logits = torch.zeros(2, experts)
        logits[1, experts // 2 :] = 1.0
        _, ids = slicing.check_route(
            (logits, 5, score), {"groups": 6, "top_groups": 2}, exact_ids=True
        )
        first = experts // 2
        assert ids.tolist() == [list(range(5)), list(range(first, first + 5))]


@pytest.mark.parametrize("experts", [48, 576])
@pytest.mark.parametrize("groups", [2, 3, 16, 48])
def test_groups_of_every_size(groups: int, experts: int) -> None:
    for top_groups in {1, max(1, groups // 2), groups}:
        top_k = min(6, top_groups * (experts // groups))
        slicing.check_route(
            (torch.randn(5, experts), top_k, "sigmoid"),
            {"groups": groups, "top_groups": top_groups},
        )


def special_rows(experts: int, dtype: torch.dtype) -> Tensor:
    rows = torch.randn(11, experts, dtype=torch.float64)
    rows[0, 3] = NAN
    rows[1] = NAN
    rows[2, 5] = INF
    rows[3, :4] = INF
    rows[4] = INF
    rows[5] = -INF
    rows[6, 1:] = -INF
    rows[7, :-2] = -INF
    rows[8, 0], rows[8, 1], rows[8, 2] = NAN, INF, -INF
    rows[9] = torch.finfo(dtype).max
    rows[10] = torch.finfo(dtype).min
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
def test_non_finite_logits(choice: str, dtype: torch.dtype) -> None:
    for experts in (12, 64, 520):
        for top_k in (1, 6):
            slicing.check_route((special_rows(experts, dtype), top_k), options_for(choice, experts))


@pytest.mark.parametrize("bias", [-INF, INF, NAN])
def test_non_finite_selection_bias(bias: float) -> None:
    values = torch.zeros(16)
    values[[2, 3, 9]] = bias
    for score in ("softmax", "sigmoid"):
        for groups, top_groups in ((1, 1), (4, 2)):
            slicing.check_route((torch.randn(7, 16), 4, score, True, values, groups, top_groups))


def test_strided_and_unaligned_logits() -> None:
    big = torch.randn(24, 72)
    for logits in (
        big[:, 3:35],
        big[:, 4:68],
        big[::2],
        big[:, ::2],
        big.t(),
        big[:1].expand(5, 72),
    ):
        for each in (logits, logits.bfloat16(), logits.double()):
            slicing.check_route((each, 4))
            slicing.check_route((each, 4, "sigmoid", True, torch.randn(2 * each.size(1))[::2]))


@pytest.mark.parametrize("scale", [0.0, -2.0, 1e30, INF, NAN])
def test_any_scale(scale: float) -> None:
    for choice in ("softmax", "softmax_raw", "sigmoid", "sigmoid_raw"):
        options = {**options_for(choice, 16), "scale": scale}
        slicing.check_route((torch.randn(4, 16), 4), options)


def backward_args(
    logits: Tensor, top_k: int, score: str, renormalize: bool, scale: float
) -> tuple[Any, ...]:
    weights, ids = OPERATORS["route"].reference(logits, top_k, score, renormalize, scale=scale)
    kept = logits if score == "sigmoid" or not renormalize else None
    grad = torch.randn_like(weights)
    return grad, weights, ids, kept, logits.size(1), logits.dtype, score, renormalize, scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_route_backward(score: str, renormalize: bool, dtype: torch.dtype) -> None:
    for experts, top_k in ((8, 2), (20, 5), (64, 8), (300, 40)):
        for scale in (1.0, -2.5, 0.0):
            logits = (torch.randn(6, experts) * 2).to(dtype)
            check("route_backward", backward_args(logits, top_k, score, renormalize, scale), 3.0)


def test_route_backward_of_strided_tensors() -> None:
    for score, renormalize in (("softmax", False), ("softmax", True), ("sigmoid", True)):
        args = backward_args(torch.randn(6, 24)[:, ::2], 4, score, renormalize, 1.0)
        for grad in (torch.ones(()).expand(6, 4), torch.randn(4, 6).t(), torch.randn(6, 8)[:, ::2]):
            check("route_backward", (grad, *args[1:]), 3.0)


@pytest.mark.parametrize(
    ("score", "renormalize"), [("softmax", True), ("softmax", False), ("sigmoid", True)]
)
def test_ids_that_are_no_experts_write_nothing(score: str, renormalize: bool) -> None:
    logits = torch.randn(3, 10)
    args = list(backward_args(logits, 3, score, renormalize, 1.0))
    ids = args[2].clone()
    bad = torch.tensor([10, -1, 2**31 - 1], dtype=torch.int32)
    ids[:, 1] = bad
    args[2] = ids
    got = slicing.call("route_backward", args)
    assert got.isfinite().all()
    if score == "sigmoid" or renormalize:
        assert (got != 0).sum() <= 6


LOSSES = ((7, 8, 2), (65, 33, 3), (300, 4, 1), (5, 1, 1), (20, 520, 4), (3, 1500, 2), (70, 128, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_router_losses(dtype: torch.dtype, ids: torch.dtype) -> None:
    for tokens, experts, top_k in LOSSES:
        logits = (torch.randn(tokens, experts) * 3).to(dtype)
        chosen = torch.randint(-2, experts + 2, (tokens, top_k)).to(ids)
        _, _, shares, lse = check("router_losses_forward", (logits, chosen), 2.0)
        grads = torch.randn(2, dtype=slicing.wide(dtype))
        check("router_losses_backward", (grads[0], grads[1], logits, shares, lse), 3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e4, -1e4])
def test_losses_of_extreme_logits(value: float, dtype: torch.dtype) -> None:
    for columns in (slice(None), slice(0, 1), slice(17, 20)):
        logits = torch.randn(5, 20)
        logits[2, columns] = value
        check("router_losses_forward", (logits.to(dtype), torch.randint(0, 20, (5, 2))), 2.0)


def test_losses_of_strided_inputs_and_far_ids() -> None:
    big, ids = torch.randn(40, 60), torch.randint(0, 8, (40, 6))
    ids[0] = torch.tensor([-(2**62), 2**40, 2**32 + 1, -1, 20, 2**31])
    for logits in (big[:, 3:23], big[:, ::3], big[:1].expand(40, 60), big[:, 4:24]):
        check("router_losses_forward", (logits, ids[:, ::2]), 2.0)
        check("router_losses_forward", (logits.double(), ids[:, :1].expand(40, 3)), 2.0)


def test_empty_inputs() -> None:
    weights, ids = slicing.call("route", (torch.empty(0, 8), 3))
    assert weights.shape == ids.shape == (0, 3)
    args = (weights, weights, ids, None, 8, torch.float32, "softmax", True, 1.0)
    assert slicing.call("route_backward", args).shape == (0, 8)
    for tokens, top_k in ((0, 2), (0, 0), (3, 0)):
        logits = torch.zeros(tokens, 4)
        balance, z, shares, lse = slicing.call(
            "router_losses_forward", (logits, torch.empty(tokens, top_k).long())
        )
        assert balance.item() == 0.0
        assert z.item() == pytest.approx(torch.tensor(4.0).log().square().item() if tokens else 0)
        assert torch.equal(shares, torch.zeros(4))
        grad = slicing.call("router_losses_backward", (balance, z, logits, shares, lse))
        assert grad.shape == logits.shape


def bad_calls() -> list[BadCall]:
    return [each for each in BAD_CALLS if each.op in NAMES and each.by_shape]


@pytest.mark.parametrize("bad", bad_calls(), ids=str)
def test_bad_arguments_raise_in_the_words_of_the_reference(bad: BadCall) -> None:
    with pytest.raises(ValueError) as expected:  # noqa: PT011
        OPERATORS[bad.op].reference(*bad.args())
    with pytest.raises(ValueError) as got:  # noqa: PT011
        slicing.call(bad.op, bad.args())
    assert str(got.value) == str(expected.value)


SYNCHRONISING_CHECK = """
import sys
from pathlib import Path
import torch, emulate
library = emulate.load(Path(sys.argv[1]))
weights = torch.ones(1, 2)
for ids in ([0, 8], [-1, 2], [7, 0]):
    ids = torch.tensor([ids], dtype=torch.int32)
    try:
        torch.ops.ppmoe_emulated.route_backward(
            weights, weights, ids, None, 8, torch.float32, "softmax", True, 1.0
        )
        print("none")
    except IndexError as error:
        print(error)
"""


def test_the_synchronising_check_raises(emulated_library: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SYNCHRONISING_CHECK, emulated_library],
        env={**os.environ, "PPMOE_OPS_CHECK": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == [
        "route_backward: experts holds 8; allowed: 0 to 7",
        "route_backward: experts holds -1; allowed: 0 to 7",
        "none",
    ]
