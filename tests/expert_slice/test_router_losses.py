"""`router_losses` on compiled kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slicing import DTYPES, call, check_gradients, distinct_ids, dtype_name, plain_losses

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import assert_error_rule, cast_sample

pytestmark = pytest.mark.kernel
INF, NAN = float("inf"), float("nan")
FORWARD = OPERATORS["router_losses_forward"]


def check_forward(logits: torch.Tensor, experts: torch.Tensor) -> list[torch.Tensor]:
    """The rule for the four results of the forward operator, wide enough for scalars."""
    actual = call("router_losses_forward", (logits, experts))
    plain = FORWARD.reference(logits, experts)
    exact = FORWARD.reference(*cast_sample((logits, experts), torch.float64))
    for name, *three in zip(("balance", "z", "shares", "lse"), actual, plain, exact, strict=True):
        assert_error_rule(*three, factor=8.0 if three[0].dim() == 0 else 2.0, name=name)
    return list(actual)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=dtype_name)
def test_matches_the_composition(dtype: torch.dtype, ids: torch.dtype) -> None:
    for tokens, experts, top_k in ((7, 8, 2), (33, 60, 4), (700, 16, 1), (513, 33, 8), (5, 1, 1)):
        results: list[list[torch.Tensor]] = []
        # A scalar of the plain composition may be right by chance; twelve are not.
        for _ in range(12):
            logits = (torch.randn(tokens, experts) * 3).to(dtype)
            chosen = distinct_ids(tokens, top_k, experts).to(ids)
            three = [call("router_losses", (logits, chosen))]
            three += [plain_losses(each, chosen) for each in (logits, logits.double())]
            results.append([torch.stack(pair) for pair in three])
        actual, plain, exact = (torch.stack(each, -1) for each in zip(*results, strict=True))
        for index, name in enumerate(("balance", "z")):
            assert_error_rule(actual[index], plain[index], exact[index], name=name)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_is_one_when_balanced(top_k: int) -> None:
    ids = torch.arange(64 * top_k).view(64, top_k) % 16
    balance, z = call("router_losses", (torch.zeros(64, 16), ids))
    assert balance.item() == pytest.approx(1.0, rel=1e-6)
    assert z.item() == pytest.approx(torch.tensor(16.0).log().square().item(), rel=1e-6)


def test_balance_is_the_number_of_experts_when_one_takes_all() -> None:
    logits = torch.full((50, 8), -100.0)
    logits[:, 3] = 0.0
    balance, _ = call("router_losses", (logits, torch.full((50, 1), 3)))
    assert balance.item() == pytest.approx(8.0, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_ids_outside_the_experts_do_not_count(dtype: torch.dtype) -> None:
    logits = torch.randn(300, 6).to(dtype)
    ids = torch.randint(-3, 9, (300, 3))
    ids[0] = torch.tensor([-(2**62), 2**40, 2**32 + 1])
    _, _, shares, _ = check_forward(logits, ids)
    valid = [i for i in ids.flatten().tolist() if 0 <= i < 6]
    expected = torch.tensor([valid.count(e) for e in range(6)], dtype=torch.float64) / len(valid)
    torch.testing.assert_close(shares.double(), expected, rtol=2e-7, atol=0)


def test_no_tokens_or_no_valid_id_or_no_choice_is_zero() -> None:
    for tokens, top_k in ((0, 2), (0, 0)):
        balance, z = call(
            "router_losses", (torch.empty(tokens, 4), torch.empty(tokens, top_k).long())
        )
        assert balance.item() == 0.0
        assert z.item() == 0.0
    for ids in (torch.full((3, 2), -1), torch.empty(3, 0).int()):
        balance, z = call("router_losses", (torch.zeros(3, 4), ids))
        assert balance.item() == 0.0
        assert z.item() == pytest.approx(torch.tensor(4.0).log().square().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e4, -1e4])
def test_extreme_logits(value: float, dtype: torch.dtype) -> None:
    for columns in (slice(None), slice(0, 1), slice(17, 20)):
        logits = torch.randn(5, 20)
        logits[2, columns] = value
        check_forward(logits.to(dtype), torch.randint(0, 20, (5, 2)))


def test_strided_and_expanded_inputs() -> None:
    big = torch.randn(40, 60)
    ids = torch.randint(0, 8, (40, 6))
    for logits in (big[:, 3:23], big[:, ::3], big[:1].expand(40, 60), big[:, 1:]):
        check_forward(logits, ids[:, ::2])
        check_forward(logits.double(), ids[:, :1].expand(40, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gradient(dtype: torch.dtype) -> None:
    for tokens, experts, top_k in ((7, 8, 2), (33, 60, 4), (300, 17, 1), (1, 1, 1)):
        logits = torch.randn(tokens, experts).to(dtype).requires_grad_()
        ids = torch.randint(-1, experts, (tokens, top_k))

        def kernel(*args: torch.Tensor) -> Any:
            return call("router_losses", args)

        check_gradients(kernel, plain_losses, (logits, ids))


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_loss_alone(output: int) -> None:
    logits = torch.randn(20, 12, requires_grad=True)
    ids = torch.randint(0, 12, (20, 2))
    check_gradients(
        lambda *args: call("router_losses", args)[output],
        lambda *args: plain_losses(*args)[output],
        (logits, ids),
    )


def test_gradient_of_strided_logits() -> None:
    logits = torch.randn(30, 64)[:, 1:60:2].requires_grad_()
    ids = torch.randint(0, 30, (30, 2))
    check_gradients(lambda *args: call("router_losses", args), plain_losses, (logits, ids))
