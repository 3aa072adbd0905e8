"""The Triton launchers of `router_losses` and its backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.kernels.expert_slice import router_losses as kernels
from ppmoe_ops.testing import assert_error_rule, cast_sample, poison_memory

from .aids import (
    DTYPES,
    Guarded,
    bad_calls,
    call,
    check,
    counted,
    outputs,
    refuses,
    turn_programs_around,
)

INF, NAN = float("inf"), float("nan")
NAME = "router_losses_forward"
# T, E, K.
SHAPES = [(7, 8, 2), (33, 60, 4), (300, 16, 1), (513, 33, 8), (5, 1, 1), (2, 1100, 3)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinities


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poison_memory():
        yield


def check_forward(logits: Tensor, experts: Tensor) -> tuple[Tensor, ...]:
    """The rule for the four results, wide enough for scalars that plain torch may hit by chance."""
    got = outputs(call(NAME, (logits, experts)))
    plain = OPERATORS[NAME].reference(logits, experts)
    exact = OPERATORS[NAME].reference(*cast_sample((logits, experts), torch.float64))
    for name, *three in zip(("balance", "z", "shares", "lse"), got, plain, exact, strict=True):
        assert_error_rule(*three, factor=8.0 if three[0].dim() == 0 else 2.0, name=name)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
def test_matches_the_reference(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(tokens, experts) * 3).to(dtype)
    ids = torch.randint(-1, experts, (tokens, top_k))
    _, _, shares, lse = check_forward(logits, ids.int() if top_k == 2 else ids)
    args = (torch.randn_like(shares[0]), torch.randn_like(shares[0]), logits, shares, lse)
    check("router_losses_backward", args)


def test_many_programs_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LOSSES_PROGRAMS", 3)
    monkeypatch.setattr(kernels, "IDS_AT_ONCE", 64)
    for tokens, experts in ((700, 16), (770, 300)):
        check_forward(torch.randn(tokens, experts), torch.randint(0, experts, (tokens, 3)))


def test_more_experts_than_a_histogram_has_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BINS", (16, 32))
    check_forward(torch.randn(40, 100), torch.randint(-2, 102, (40, 3)))


def test_balanced_is_one_and_one_expert_for_all_their_number() -> None:
    ids = torch.arange(128).view(64, 2) % 16
    balance, z, _, _ = call(NAME, (torch.zeros(64, 16), ids))
    assert balance.item() == pytest.approx(1.0, rel=1e-6)
    assert z.item() == pytest.approx(torch.tensor(16.0).log().square().item(), rel=1e-6)
    logits = torch.full((50, 8), -100.0)
    logits[:, 3] = 0.0
    balance, _, _, _ = call(NAME, (logits, torch.full((50, 1), 3)))
    assert balance.item() == pytest.approx(8.0, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_outside_the_experts_do_not_count(dtype: torch.dtype) -> None:
    ids = torch.randint(-3, 9, (300, 3))
    ids[0] = torch.tensor([-(2**62), 2**40, 2**32 + 1])
    _, _, shares, _ = check_forward(torch.randn(300, 6).to(dtype), ids)
    valid = [i for i in ids.flatten().tolist() if 0 <= i < 6]
    expected = torch.tensor([valid.count(e) for e in range(6)], dtype=torch.float64) / len(valid)
    torch.testing.assert_close(shares.double(), expected, rtol=2e-7, atol=0)


def test_launches_and_empty_inputs() -> None:
    with counted(kernels) as names:
        for top_k in (2, 0):
            results = call(NAME, (torch.empty(0, 4), torch.empty(0, top_k).long()))
            assert [each.tolist() for each in results] == [0.0, 0.0, [0.0] * 4, []]
        scalar, shares, lse = torch.ones(()), torch.zeros(4), torch.zeros(0)
        args = (scalar, scalar, torch.empty(0, 4), shares, lse)
        assert call("router_losses_backward", args).shape == (0, 4)
        assert names == []
        for ids in (torch.full((3, 2), -1), torch.empty(3, 0).int()):
            balance, _, shares, _ = check_forward(torch.zeros(3, 4), ids)
            assert balance.item() == 0.0
            assert shares.tolist() == [0.0] * 4
        assert names == ["router_losses_rows_kernel", "router_losses_finish_kernel"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e4, -1e4])
def test_extreme_logits(value: float, dtype: torch.dtype) -> None:
    for columns in (slice(None), slice(0, 1), slice(17, 20)):
        logits = torch.randn(5, 20)
        logits[2, columns] = value
        logits = logits.to(dtype)
        _, _, shares, lse = check_forward(logits, torch.randint(0, 20, (5, 2)))
        one = torch.ones_like(shares[0])
        check("router_losses_backward", (one, one, logits, shares, lse))


def test_strided_and_expanded_inputs() -> None:
    big, ids = torch.randn(40, 60), torch.randint(0, 8, (40, 6))
    for logits in (big[:, 3:23], big[:, ::3], big[:1].expand(40, 60), big[:, 1:]):
        _, _, shares, lse = check_forward(logits, ids[:, ::2])
        check_forward(logits.double(), ids[:, :1].expand(40, 3))
        apart = torch.stack([lse, lse], -1)[:, 0]
        one = torch.ones(1, 1)
        check("router_losses_backward", (one, one[0], logits, shares, apart))


@pytest.mark.parametrize("losses", [(1.0, 0.0), (0.0, 1.0)])
def test_gradient_of_one_loss_alone(losses: tuple[float, float]) -> None:
    logits = torch.randn(20, 12)
    _, _, shares, lse = call(NAME, (logits, torch.randint(0, 12, (20, 2))))
    args = (torch.tensor(losses[0]), torch.tensor(losses[1]), logits, shares, lse)
    check("router_losses_backward", args)


def test_the_order_of_programs_does_not_matter_nor_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, ids = torch.randn(700, 40), torch.randint(0, 40, (700, 2))

    def run() -> list[Tensor]:
        balance, z, shares, lse = call(NAME, (logits, ids))
        return [
            balance,
            z,
            shares,
            lse,
            call("router_losses_backward", (z, z, logits, shares, lse)),
        ]

    first, again = run(), run()
    turn_programs_around(monkeypatch)
    for one, other, third in zip(first, again, run(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_nothing_is_written_outside() -> None:
    guarded = Guarded()
    logits = torch.randn(33, 11)
    ids = torch.randint(-9, 30, (33, 2))
    balance, z = guarded.of(torch.zeros(())), guarded.of(torch.zeros(()))
    shares, lse = guarded.of(torch.zeros(11)), guarded.of(torch.zeros(33))
    for launch in kernels.forward_launches(logits, ids, balance, z, shares, lse):
        launch.run(logits.device)
    out = guarded.of(torch.zeros(33, 11))
    kernels.backward_launch(balance, z, logits, shares, lse, out).run(logits.device)
    guarded.check()


@pytest.mark.parametrize("row", bad_calls(NAME, "router_losses_backward"), ids=str)
def test_refuses_in_the_words_of_the_reference(row: object) -> None:
    refuses(row)
