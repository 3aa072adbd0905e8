"""`route` on compiled kernels: which experts, in which order, with which weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slicing import DTYPES, call, check_gradients, check_route, dtype_name, plain_weights

from ppmoe_ops._library import OPERATORS

pytestmark = pytest.mark.kernel
INF, NAN = float("inf"), float("nan")

CHOICES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax_raw": {"renormalize": False, "scale": 0.5},
    "softmax_bias": {"selection_bias": True, "scale": 2.5},
    "softmax_groups": {"groups": 4, "top_groups": 2},
    "sigmoid": {"score": "sigmoid", "scale": 1.5},
    "sigmoid_raw": {"score": "sigmoid", "renormalize": False},
    "sigmoid_bias": {"score": "sigmoid", "selection_bias": True},
    "sigmoid_groups": {"score": "sigmoid", "groups": 4, "top_groups": 3, "selection_bias": True},
}


def options_for(choice: str, experts: int) -> dict[str, Any]:
    options = dict(CHOICES[choice])
    if options.get("selection_bias"):
        options["selection_bias"] = torch.randn(experts)
    return options


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("choice", CHOICES)
def test_matches_the_reference(choice: str, dtype: torch.dtype) -> None:
    for experts, top_k in ((8, 2), (64, 8), (60, 4), (160, 6), (36, 9)):
        logits = (torch.randn(33, experts) * 3).to(dtype)
        check_route((logits, top_k), options_for(choice, experts))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 40, 70])
def test_every_top_k_up_to_all_experts(top_k: int, dtype: torch.dtype) -> None:
    logits = torch.randn(9, 70).to(dtype)
    check_route((logits, top_k))
    check_route((logits, top_k, "sigmoid"))


@pytest.mark.parametrize("experts", [1, 2, 3, 15, 16, 17, 31, 33, 127, 257])
def test_any_number_of_experts(experts: int) -> None:
    for top_k in {1, min(2, experts), min(8, experts), experts}:
        check_route((torch.randn(5, experts), top_k))
        check_route((torch.randn(5, experts).bfloat16(), top_k), {"renormalize": False})


def test_one_expert_takes_everything() -> None:
    weights, experts = call("route", (torch.randn(6, 1), 1))
    assert experts.tolist() == [[0]] * 6
    assert weights.tolist() == [[1.0]] * 6


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("top_k", [1, 2, 4, 8, 12, 48])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equal_logits_go_to_the_lower_ids(score: str, top_k: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 48, dtype=dtype)
    logits[1] = -2.0
    logits[2, ::5] = 1.0
    _, experts = check_route((logits, top_k, score), exact_ids=True)
    ranking = sorted(range(48), key=lambda expert: (expert % 5 != 0, expert))
    assert experts.tolist() == [list(range(top_k))] * 2 + [ranking[:top_k]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 10])
def test_negative_and_positive_zero_are_equal(top_k: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 20, dtype=dtype)
    logits[0, ::2] = -0.0
    logits[1, 1::2] = -0.0
    _, experts = call("route", (logits, top_k))
    assert experts.tolist() == [list(range(top_k))] * 2


@pytest.mark.parametrize("experts", [12, 16, 40])
def test_order_is_that_of_logits_and_not_of_rounded_scores(experts: int) -> None:
    # Softmax of all but the first underflows to zero; the ids still follow the logits.
    logits = torch.arange(experts).flip(0).float().repeat(2, 1) - 300
    logits[:, 0] = 0.0
    logits[1, 1:] = logits[1, 1:].flip(0)
    _, experts_ = check_route((logits, 6))
    assert experts_.tolist() == [[0, 1, 2, 3, 4, 5], [0, *range(experts - 1, experts - 6, -1)]]


def special_rows(experts: int, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(12, experts, dtype=torch.float64)
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
    rows[11, -1] = torch.finfo(dtype).smallest_normal / 2
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("choice", CHOICES)
def test_non_finite_logits(choice: str, dtype: torch.dtype) -> None:
    grouped = "groups" in CHOICES[choice]
    for experts in (12, 16) if grouped else (13, 16):
        for top_k in (1, 2, 5, 6) if grouped else (1, 2, 5, 8, 11):
            check_route((special_rows(experts, dtype), top_k), options_for(choice, experts))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_nan_ranks_last(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, NAN, 3.0, -1e4]], dtype=dtype)
    weights, experts = call("route", (logits, 4))
    # NaN is -inf: below -1e4, and above nothing.
    assert experts.tolist() == [[2, 0, 3, 1]]
    assert weights.isnan().all()
    _, experts = call("route", (torch.full((1, 5), NAN, dtype=dtype), 3))
    assert experts.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("bias", [-INF, INF, NAN])
def test_non_finite_selection_bias(bias: float) -> None:
    values = torch.zeros(16)
    values[[2, 3, 9]] = bias
    for score in ("softmax", "sigmoid"):
        for groups, top_groups in ((1, 1), (4, 2)):
            check_route((torch.randn(7, 16), 4, score, True, values, groups, top_groups))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bias_changes_the_choice_and_not_the_weights(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=dtype)
    bias = torch.tensor([9.0, 0.0, 0.0, 8.0], dtype=dtype)
    weights, experts = call("route", (logits, 2, "sigmoid", False, bias))
    assert experts.tolist() == [[0, 3]]
    expected = logits[:, [0, 3]].to(weights.dtype).sigmoid()
    torch.testing.assert_close(weights, expected, rtol=4e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_group_counts_by_its_two_best(dtype: torch.dtype) -> None:
    # The second group has the single best expert, the first and third the better pairs.
    scores = torch.tensor([0.5, 0.5, 0.1, 0.9, 0.01, 0.01, 0.6, 0.5, 0.1], dtype=torch.float64)
    logits = torch.logit(scores).to(dtype).unsqueeze(0)
    _, experts = check_route((logits, 4, "sigmoid"), {"groups": 3, "top_groups": 2})
    assert set(experts[0].tolist()) == {0, 1, 6, 7}
    _, experts = check_route((logits, 2, "sigmoid"), {"groups": 3, "top_groups": 1})
    assert experts.tolist() == [[6, 7]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equal_groups_go_to_the_lower_group(score: str) -> None:
    logits = torch.zeros(2, 24)
    logits[1, 12:] = 1.0
    _, experts = check_route((logits, 5, score), {"groups": 6, "top_groups": 2}, exact_ids=True)
    assert experts.tolist() == [[0, 1, 2, 3, 4], [12, 13, 14, 15, 16]]


@pytest.mark.parametrize("groups", [1, 2, 8, 16])
def test_groups_of_every_size(groups: int) -> None:
    for top_groups in {1, max(1, groups // 2), groups}:
        top_k = min(6, top_groups * (16 // groups))
        check_route(
            (torch.randn(20, 16), top_k, "sigmoid"), {"groups": groups, "top_groups": top_groups}
        )


def test_strided_transposed_and_expanded_logits() -> None:
    big = torch.randn(24, 40)
    for logits in (big[:, 3:19], big[::2], big[:, ::2], big.t(), big[:1].expand(5, 40), big[:, 1:]):
        check_route((logits, 4))
        check_route((logits, 4, "sigmoid", True, torch.randn(logits.size(1))))
        check_route((logits.double(), 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bias_in_any_dtype_and_stride(dtype: torch.dtype) -> None:
    for bias_dtype in DTYPES:
        bias = torch.randn(32).to(bias_dtype)[::2]
        check_route((torch.randn(6, 16).to(dtype), 3, "sigmoid", True, bias))


def test_no_tokens() -> None:
    weights, experts = call("route", (torch.empty(0, 8), 3))
    assert weights.shape == experts.shape == (0, 3)


@pytest.mark.parametrize("scale", [0.0, -2.0, 1e-30, 1e30, INF, NAN])
def test_any_scale(scale: float) -> None:
    for choice in ("softmax", "softmax_raw", "sigmoid", "sigmoid_raw"):
        check_route((torch.randn(4, 16), 4), {**options_for(choice, 16), "scale": scale})


@pytest.mark.parametrize("magnitude", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_large_logits_do_not_overflow(dtype: torch.dtype, magnitude: float) -> None:
    logits = (torch.randn(12, 24) * magnitude).to(dtype)
    for choice in ("softmax", "softmax_raw", "softmax_bias", "sigmoid", "sigmoid_raw"):
        check_route((logits, 20), options_for(choice, 24))


def composition(options: dict[str, Any]) -> Any:
    """Weights alone, as autograd sees them: the choice is taken from the reference."""
    score = options.get("score", "softmax")
    renormalize, scale = options.get("renormalize", True), options.get("scale", 1.0)

    def weights(logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        return plain_weights(logits, experts, score, renormalize, scale)

    return weights


def check_gradient(logits: torch.Tensor, top_k: int, options: dict[str, Any]) -> None:
    _, ids = call("route", (logits, top_k), options)

    def kernel(logits: torch.Tensor, _: torch.Tensor) -> Any:
        return call("route", (logits, top_k), options)[0]

    check_gradients(kernel, composition(options), (logits.requires_grad_(), ids))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("choice", CHOICES)
def test_gradient(choice: str, dtype: torch.dtype) -> None:
    for experts, top_k in ((8, 1), (20, 5), (64, 8), (40, 20)):
        options = options_for(choice, experts)
        if top_k == 1:
            options["renormalize"] = False  # else the exact gradient is zero
        check_gradient((torch.randn(17, experts) * 2).to(dtype), top_k, options)


# Some rows have scores of one and zero; not in float64, where all of these are rounding alone.
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_name)
@pytest.mark.parametrize("choice", CHOICES)
def test_gradient_of_large_logits(choice: str, dtype: torch.dtype) -> None:
    for experts, top_k in ((20, 5), (64, 8), (40, 20)):
        magnitude = torch.tensor([2.0, 60.0]).repeat(100).unsqueeze(-1)
        logits = (torch.randn(200, experts) * magnitude).to(dtype)
        check_gradient(logits, top_k, options_for(choice, experts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("choice", ["softmax", "softmax_raw", "sigmoid", "sigmoid_raw"])
def test_gradient_with_masked_out_experts(choice: str, dtype: torch.dtype) -> None:
    # Experts are switched off by -inf logits; more may be asked for than are left.
    logits = torch.randn(6, 16, dtype=dtype)
    logits[:, 3:] = -INF
    check_gradient(logits, 5, options_for(choice, 16))


def test_gradient_is_zero_for_an_unused_output() -> None:
    logits = torch.randn(4, 8, requires_grad=True)
    weights, experts = call("route", (logits, 2))
    assert not experts.requires_grad
    (grad,) = torch.autograd.grad(weights.sum() * 0, logits)
    assert torch.equal(grad, torch.zeros_like(logits))


def test_backward_of_strided_and_expanded_gradients() -> None:
    for score, renormalize in (("softmax", False), ("softmax", True), ("sigmoid", True)):
        logits = torch.randn(6, 24)[:, ::2]
        weights, experts = call("route", (logits, 4, score, renormalize))
        for grad in (torch.ones(()).expand(6, 4), torch.randn(4, 6).t(), torch.randn(6, 8)[:, ::2]):
            kept = logits if score == "sigmoid" or not renormalize else None
            args = (grad, weights, experts, kept, 12, torch.float32, score, renormalize, 1.0)
            actual = call("route_backward", args)
            expected = OPERATORS["route_backward"].reference(*args)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
