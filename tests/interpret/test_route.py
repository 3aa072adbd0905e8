"""The Triton launchers of `route` and its backward: ids, weights, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.kernels.expert_slice import route as kernels
from ppmoe_ops.testing import poison_memory

from .aids import (
    DTYPES,
    Guarded,
    bad_calls,
    bad_values,
    call,
    check,
    counted,
    refuses,
    slicing,
    turn_programs_around,
)

INF, NAN = float("inf"), float("nan")
CHOICES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax_raw": {"renormalize": False, "scale": 0.5},
    "softmax_bias": {"selection_bias": True, "scale": 2.5},
    "softmax_raw_bias": {"selection_bias": True, "renormalize": False},
    "softmax_groups": {"groups": 4, "top_groups": 2},
    "sigmoid": {"score": "sigmoid", "scale": 1.5},
    "sigmoid_raw": {"score": "sigmoid", "renormalize": False},
    "sigmoid_groups": {"score": "sigmoid", "groups": 4, "top_groups": 3, "selection_bias": True},
}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinities


@pytest.fixture(autouse=True)
def by_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The checks of the family call the launchers here; memory is poisoned."""
    monkeypatch.setattr(slicing, "call", call)
    with poison_memory():
        yield


def options_for(choice: str, experts: int) -> dict[str, Any]:
    options = dict(CHOICES[choice])
    if options.get("selection_bias"):
        options["selection_bias"] = torch.randn(experts)
    return options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
def test_matches_the_reference(choice: str, dtype: torch.dtype) -> None:
    for experts, top_k in ((60, 4), (64, 8)):
        logits = (torch.randn(15, experts) * 3).to(dtype)
        slicing.check_route((logits, top_k), options_for(choice, experts))


@pytest.mark.parametrize("experts", [1, 2, 3, 17, 70, 257, 1100])
def test_any_number_of_experts_and_of_choices(experts: int) -> None:
    for top_k in {1, min(3, experts), min(40, experts), experts if experts < 100 else 8}:
        slicing.check_route((torch.randn(3, experts), top_k))
        slicing.check_route((torch.randn(3, experts).double(), top_k), {"renormalize": False})


def test_wide_rows_get_more_warps_and_few_tokens_small_tiles() -> None:
    def shape(tokens: int, experts: int) -> tuple[int, int, int]:
        logits, ids = torch.empty(tokens, experts), torch.empty(tokens, 2, dtype=torch.int32)
        options = {"score": "softmax", "renormalize": True, "groups": 1, "top_groups": 1}
        made = kernels.route_launch(logits, None, {**options, "scale": 1.0}, ids.float(), ids)
        return made.config.block_m, made.config.num_warps, made.programs

    assert shape(16, 128) == (4, 4, 4)
    assert shape(8192, 128) == (16, 4, 512)
    assert shape(8192, 4000) == (1, 8, 8192)
    assert shape(3, 100_000) == (1, 16, 3)
    assert shape(3, 8) == (4, 4, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equal_logits_go_to_the_lower_ids(score: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(5, 48, dtype=dtype)
    logits[1] = -2.0
    logits[2, ::5] = 1.0
    logits[3, ::2] = -0.0
    logits[4, 1::2] = -0.0
    _, experts = slicing.check_route((logits, 12, score), exact_ids=True)
    ranking = sorted(range(48), key=lambda expert: (expert % 5 != 0, expert))
    first = list(range(12))
    assert experts.tolist() == [first, first, ranking[:12], first, first]


def test_the_order_is_that_of_logits_and_not_of_rounded_scores() -> None:
    logits = torch.arange(40).flip(0).float().repeat(2, 1) - 300
    logits[:, 0] = 0.0
    logits[1, 1:] = logits[1, 1:].flip(0)
    _, experts = slicing.check_route((logits, 4))
    assert experts.tolist() == [[0, 1, 2, 3], [0, 39, 38, 37]]
    close = 1 + torch.arange(20).double() * 1e-14  # equal in float32
    _, experts = slicing.check_route((close.unsqueeze(0), 3))
    assert experts.tolist() == [[19, 18, 17]]


def special_rows(experts: int, dtype: torch.dtype) -> Tensor:
    rows = torch.randn(11, experts, dtype=torch.float64)
    rows[0, 3] = NAN
    rows[1] = NAN
    rows[2, 5] = INF
    rows[3, :4] = INF
    rows[4] = -INF
    rows[5, 1:] = -INF
    rows[6, :-2] = -INF
    rows[7, 0], rows[7, 1], rows[7, 2] = NAN, INF, -INF
    rows[8] = torch.finfo(dtype).max
    rows[9] = torch.finfo(dtype).min
    rows[10, -1] = torch.finfo(dtype).smallest_normal / 2
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("choice", CHOICES)
def test_logits_that_are_not_finite(choice: str, dtype: torch.dtype) -> None:
    for experts, top_k in ((12, 6), (16, 2)):
        args = (special_rows(experts, dtype), top_k)
        slicing.check_route(args, options_for(choice, experts))


@pytest.mark.parametrize("value", [-INF, INF, NAN])
def test_bias_that_is_not_finite(value: float) -> None:
    bias = torch.zeros(16)
    bias[[2, 3, 9]] = value
    for score in ("softmax", "sigmoid"):
        for groups, top_groups in ((1, 1), (4, 2)):
            args = (torch.randn(5, 16), 4, score, True, bias, groups, top_groups)
            slicing.check_route(args)


@pytest.mark.parametrize("choice", ["softmax_raw", "softmax_bias", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_logits(choice: str, dtype: torch.dtype) -> None:
    for magnitude in (30.0, 300.0):
        logits = (torch.randn(12, 24) * magnitude).to(dtype)
        slicing.check_route((logits, 17), options_for(choice, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups(dtype: torch.dtype) -> None:
    # The second group has the single best expert, the first and third the better pairs.
    scores = torch.tensor([0.5, 0.5, 0.1, 0.9, 0.01, 0.01, 0.6, 0.5, 0.1], dtype=torch.float64)
    logits = torch.logit(scores).to(dtype).unsqueeze(0)
    args = (logits, 4, "sigmoid")
    _, experts = slicing.check_route(args, {"groups": 3, "top_groups": 2})
    assert set(experts[0].tolist()) == {0, 1, 6, 7}
    for groups in (2, 8, 16):
        for top_groups in {1, groups // 2, groups}:
            options = {"groups": groups, "top_groups": top_groups}
            top_k = min(6, top_groups * (16 // groups))
            slicing.check_route((torch.randn(9, 16).to(dtype), top_k, "sigmoid"), options)
    equal = torch.zeros(2, 24, dtype=dtype)
    equal[1, 12:] = 1.0
    _, experts = slicing.check_route((equal, 5), {"groups": 6, "top_groups": 2}, exact_ids=True)
    assert experts.tolist() == [[0, 1, 2, 3, 4], [12, 13, 14, 15, 16]]


def test_strides_and_the_dtype_of_the_bias() -> None:
    big = torch.randn(24, 40)
    for logits in (big[:, 3:19], big[::2], big[:, ::2], big.t(), big[:1].expand(5, 40)):
        slicing.check_route((logits, 4))
        bias = torch.randn(2 * logits.size(1)).half()[::2]
        slicing.check_route((logits, 4, "sigmoid", True, bias))


@pytest.mark.parametrize("scale", [0.0, -2.0, 1e-30, 1e30, INF, NAN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_scale(scale: float, dtype: torch.dtype) -> None:
    for choice in ("softmax", "sigmoid"):
        options = {**options_for(choice, 16), "scale": scale}
        slicing.check_route((torch.randn(4, 16).to(dtype), 4), options)


def backward_args(
    logits: Tensor, top_k: int, options: dict[str, Any]
) -> tuple[Tensor | int | str | bool | float | torch.dtype | None, ...]:
    weights, experts = OPERATORS["route"].reference(logits, top_k, **options)
    score, renormalize = options.get("score", "softmax"), options.get("renormalize", True)
    kept = logits if score == "sigmoid" or not renormalize else None
    grad = torch.randn_like(weights)
    scale = options.get("scale", 1.0)
    return grad, weights, experts, kept, logits.size(1), logits.dtype, score, renormalize, scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", ["softmax", "softmax_raw", "sigmoid", "sigmoid_raw"])
def test_backward(choice: str, dtype: torch.dtype) -> None:
    for experts, top_k in ((8, 1), (40, 9)):
        for magnitude in (2.0, 60.0):
            logits = (torch.randn(17, experts) * magnitude).to(dtype)
            check("route_backward", backward_args(logits, top_k, CHOICES[choice]))
        logits[:, 3:] = -INF  # experts that are switched off
        check("route_backward", backward_args(logits, top_k, CHOICES[choice]))
    args = backward_args(logits, 4, {**CHOICES[choice], "scale": 0.0})
    assert torch.equal(call("route_backward", args), torch.zeros_like(logits))


def test_backward_of_strided_and_expanded_inputs() -> None:
    for choice in ("softmax", "softmax_raw", "sigmoid"):
        _, weights, experts, kept, *rest = backward_args(
            torch.randn(6, 24)[:, ::2], 4, CHOICES[choice]
        )
        for grad in (torch.ones(()).expand(6, 4), torch.randn(4, 6).t(), torch.randn(6, 8)[:, ::2]):
            check("route_backward", (grad, weights.t().clone().t(), experts, kept, *rest))


@pytest.mark.parametrize("choice", ["softmax", "softmax_raw", "sigmoid"])
def test_bad_ids_count_as_not_chosen_and_touch_nothing_outside(choice: str) -> None:
    guarded = Guarded()
    options = {"score": "softmax", "renormalize": True, "scale": 1.0, **CHOICES[choice]}
    grad, weights, *_ = backward_args(torch.randn(5, 12), 4, CHOICES[choice])
    good = torch.arange(4, dtype=torch.int32).repeat(5, 1)
    bad = good.clone()
    bad[1, 2], bad[2, 0], bad[3, 1], bad[4, 3] = 12, -1, -(2**31), 2**31 - 1
    logits, out = guarded.of(torch.randn(5, 12)), guarded.of(torch.zeros(5, 12))
    grad, weights, bad = guarded.of(grad), guarded.of(weights), guarded.of(bad)
    kernels.route_backward_launch(grad, weights, bad, logits, options, out).run(out.device)
    guarded.check()
    kept = torch.zeros_like(out)
    kernels.route_backward_launch(grad, weights, good, logits, options, kept).run(out.device)
    assert torch.equal(out[0], kept[0])
    if choice != "softmax_raw":
        assert out[3, 1] == 0
        assert kept[3, 1] != 0


def test_launches_and_empty_inputs() -> None:
    logits = torch.randn(7, 8)
    with counted(kernels) as names:
        weights, experts = call("route", (logits, 2))
        args = (weights, weights, experts, logits, 8, torch.float32, "sigmoid", True, 1.0)
        call("route_backward", args)
        assert names == ["route_kernel", "route_backward_kernel"]
        weights, experts = call("route", (logits[:0], 2))
        assert weights.shape == experts.shape == (0, 2)
        args = (weights, weights, experts, logits[:0], 8, torch.float32, "sigmoid", True, 1.0)
        assert call("route_backward", args).shape == (0, 8)
        assert len(names) == 2
    nothing = torch.zeros(7, 0)
    args = (nothing, nothing, nothing.int(), None, 8, torch.float16, "softmax", True, 1.0)
    assert torch.equal(call("route_backward", args), torch.zeros(7, 8).half())


def test_the_order_of_programs_does_not_matter_nor_the_time() -> None:
    logits = torch.randn(100, 24)
    args = backward_args(logits, 3, CHOICES["softmax_raw"])

    def run() -> list[Tensor]:
        return [*call("route", (logits, 3, "sigmoid")), call("route_backward", args)]

    first, again = run(), run()
    with pytest.MonkeyPatch.context() as patch:
        turn_programs_around(patch)
        turned = run()
    for one, other, third in zip(first, again, turned, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@pytest.mark.parametrize("row", bad_values("route_backward"), ids=str)
def test_synchronising_check_raises(row: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPMOE_OPS_CHECK", "1")
    refuses(row)


@pytest.mark.parametrize("row", bad_calls("route", "route_backward"), ids=str)
def test_refuses_in_the_words_of_the_reference(row: object) -> None:
    refuses(row)
