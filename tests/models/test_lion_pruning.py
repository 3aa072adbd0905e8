"""`LotteryTicket` against its rule computed by hand, and beside what optimizers come with."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppmoe_models import LotteryTicket


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def give_gradients(weights: list[nn.Parameter]) -> list[Tensor]:
    for each in weights:
        each.grad = torch.randn_like(each)
    return [each.grad.clone() for each in weights if each.grad is not None]


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_one_step_by_hand(penalty: str) -> None:
    # Importances: 0.3 0.4 | 0.02 1.0; of four weights two are crucial, over both tensors.
    one = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    other = nn.Parameter(torch.tensor([[[[0.01]]], [[[0.5]]]]))
    bias = nn.Parameter(torch.tensor([3.0]))
    ticket = LotteryTicket(
        torch.optim.SGD([one, other, bias], lr=0.1), keep=0.5, decay=0.5, penalty=penalty
    )
    one.grad, other.grad = torch.tensor([[0.3, 0.2]]), torch.tensor([[[[2.0]]], [[[2.0]]]])
    bias.grad = torch.tensor([1.0])
    assert ticket.step() is None
    shrunk = (1.0 - 0.05, 0.0) if penalty == "l1" else (1.0 * 0.95, 0.01 * 0.95)
    torch.testing.assert_close(one.data, torch.tensor([[shrunk[0], -2.0 - 0.1 * 0.2]]))
    torch.testing.assert_close(other.data.flatten(), torch.tensor([shrunk[1], 0.5 - 0.1 * 2.0]))
    torch.testing.assert_close(bias.data, torch.tensor([3.0 - 0.1]))
    assert ticket.crucial is not None
    assert [each.flatten().tolist() for each in ticket.crucial] == [[False, True], [False, True]]
    assert ticket.counts() == (4, 3 if penalty == "l1" else 4)


def test_one_global_threshold_anew_in_each_step() -> None:
    weights = parameters((4, 5), (2, 3, 3, 3), (7,), (2, 2, 2))
    ticket = LotteryTicket(torch.optim.SGD(weights, lr=0.01), keep=0.25, decay=0.1)
    assert [each.shape for each in ticket.scored] == [(4, 5), (2, 3, 3, 3)]
    for _ in range(3):
        before = [each.detach().clone() for each in weights]
        gradients = give_gradients(weights)
        ticket.step()
        scores = [(w * g).abs() for w, g in zip(before, gradients, strict=True)][:2]
        every = torch.cat([each.flatten() for each in scores])
        threshold = every.sort(descending=True).values[round(0.25 * every.numel()) - 1]
        assert ticket.crucial is not None
        for index, score in enumerate(scores):
            crucial = ticket.crucial[index]
            assert torch.equal(crucial, score >= threshold)
            updated = before[index] - 0.01 * gradients[index]
            shrunk = before[index].sign() * (before[index].abs() - 0.001).clamp(min=0)
            torch.testing.assert_close(
                weights[index].data, torch.where(crucial, updated, shrunk), rtol=1e-6, atol=1e-7
            )
        for index in (2, 3):
            torch.testing.assert_close(weights[index].data, before[index] - 0.01 * gradients[index])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_everything_kept_is_the_optimizer_itself(kind: Any) -> None:
    one, options = parameters((3, 4), (5,)), {"lr": 0.01, "weight_decay": 0.1}
    other = [nn.Parameter(each.detach().clone()) for each in one]
    if kind is torch.optim.SGD:
        options["momentum"] = 0.9
    ticket, plain = LotteryTicket(kind(one, **options), keep=1.0), kind(other, **options)
    for _ in range(4):
        for each, grad in zip(other, give_gradients(one), strict=True):
            each.grad = grad
        ticket.step()
        plain.step()
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_momentum_moves_nothing_that_is_not_crucial() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 1.0]]))
    ticket = LotteryTicket(torch.optim.SGD([weight], lr=0.1, momentum=0.9), keep=0.5, decay=0.0)
    weight.grad = torch.tensor([[2.0, 1.0]])
    ticket.step()
    assert weight.tolist() == [[pytest.approx(0.8), 1.0]]
    weight.grad = torch.tensor([[0.1, 1.0]])
    ticket.step()
    assert weight.tolist() == [[pytest.approx(0.8), pytest.approx(0.9)]]


def test_weights_go_to_zero_and_stay() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 6))
    target = torch.zeros(6, 6)
    target[0] = 3.0
    ticket = LotteryTicket(torch.optim.Adam([weight], lr=0.05), keep=1 / 6, decay=1.0)
    for _ in range(200):
        ticket.zero_grad()
        ((weight - target) * torch.tensor([1.0] + 5 * [0.01])[:, None]).square().sum().backward()
        ticket.step()
    assert ticket.counts() == (36, 6)
    torch.testing.assert_close(weight.data, target, rtol=0.05, atol=0.05)


def test_groups_have_their_own_rates() -> None:
    one, other = (nn.Parameter(torch.ones(1, 2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one], "lr": 0.1}, {"params": [other], "lr": 0.2}])
    ticket = LotteryTicket(optimizer, keep=0.25, decay=0.5)
    one.grad, other.grad = torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    ticket.step()
    torch.testing.assert_close(one.data, torch.tensor([[0.6, 0.95]]))
    torch.testing.assert_close(other.data, torch.tensor([[0.9, 0.9]]))
    scheduler = torch.optim.lr_scheduler.StepLR(ticket.optimizer, 1, 0.5)
    one.grad = other.grad = None
    ticket.step()
    scheduler.step()
    assert [group["lr"] for group in ticket.param_groups] == [0.05, 0.1]


def test_only_given_parameters_are_scored_and_those_without_gradients_rest() -> None:
    prompt, still, head = parameters((2, 2), (3, 3), (4, 4))
    ticket = LotteryTicket(
        torch.optim.SGD([prompt, still, head], lr=0.1), keep=0.1, decay=1.0,
        parameters=[prompt, still],
    )  # fmt: skip
    before = [each.detach().clone() for each in (still, head)]
    give_gradients([prompt, head])
    gradient = head.grad
    ticket.step()
    assert torch.equal(still, before[0])
    assert gradient is not None
    torch.testing.assert_close(head.data, before[1] - 0.1 * gradient)


def test_closures_are_called_once_with_gradients() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    ticket = LotteryTicket(torch.optim.SGD([weight], lr=0.1), keep=1.0)
    calls = []

    def closure() -> Tensor:
        ticket.zero_grad()
        loss = (3 * weight).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert ticket.step(closure).item() == 12.0
    assert calls == [12.0]
    torch.testing.assert_close(weight.data, torch.full((2, 2), 0.7))


@pytest.mark.parametrize("unscaled", [True, False])
def test_under_a_scaler_the_same_weights_are_crucial(unscaled: bool) -> None:
    found = []
    for scaled in (False, True):
        torch.manual_seed(1)
        weights = parameters((4, 4), (3,))
        ticket = LotteryTicket(torch.optim.SGD(weights, lr=0.1), keep=0.5, decay=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        scaler.scale(sum((each.sin() * each).sum() for each in weights)).backward()
        if unscaled:
            scaler.unscale_(ticket)
        scaler.step(ticket)
        scaler.update()
        found.append([each.detach().clone() for each in weights])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_that_are_not_finite_are_not_hidden() -> None:
    weight = nn.Parameter(torch.ones(1, 3))
    ticket = LotteryTicket(torch.optim.SGD([weight], lr=0.1), keep=0.3)
    weight.grad = torch.tensor([[float("nan"), 1.0, 2.0]])
    ticket.step()
    assert weight[0, 0].isnan()


def test_pruning_cuts_and_holds() -> None:
    weights = parameters((3, 4), (2, 2, 3, 3))
    ticket = LotteryTicket(torch.optim.Adam(weights, lr=0.1), keep=1.0)
    sizes = torch.cat([each.detach().abs().flatten() for each in weights])
    give_gradients(weights)
    ticket.step()
    assert ticket.prune(keep=0.5) == (48, 24)
    kept = [each != 0 for each in weights]
    largest = torch.cat([each.detach().abs().flatten() for each in weights])
    assert largest[largest > 0].min() > 0.05
    assert sizes.numel() == 48
    for _ in range(3):
        give_gradients(weights)
        ticket.step()
    assert all(torch.equal(each != 0, mask) for each, mask in zip(weights, kept, strict=True))
    with torch.no_grad():
        weights[0][kept[0]] = 0.2
    assert ticket.prune(below=0.25).nonzero == int(kept[1].sum())

    # A second ticket goes on from its state.
    again = [nn.Parameter(each.detach().clone()) for each in weights]
    file = io.BytesIO()
    torch.save(ticket.state_dict(), file)
    file.seek(0)
    other = LotteryTicket(torch.optim.Adam(again, lr=0.1), keep=1.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for mine, grad in zip(again, give_gradients(weights), strict=True):
        mine.grad = grad
    ticket.step()
    other.step()
    for a, b in zip(weights, again, strict=True):
        assert torch.equal(a, b)
    wrong = LotteryTicket(torch.optim.Adam(parameters((2, 2)), lr=0.1))
    with pytest.raises(ValueError, match=r"masks in the state are \[\[3, 4\], \[2, 2, 3, 3\]\]"):
        wrong.load_state_dict(ticket.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep is 0.0; allowed: above 0, up to 1"),
        ({"keep": float("nan")}, "keep is nan; allowed"),
        ({"decay": -1.0}, "decay is -1.0; allowed: 0 or more"),
        ({"penalty": "l3"}, "penalty is 'l3'; allowed: l1, l2"),
        ({"parameters": [torch.zeros(2, 2)]}, "parameters has 1 tensors that the optimizer has"),
        ({"parameters": []}, "parameters has no 2-D or 4-D tensor"),
    ],
)
def test_what_is_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LotteryTicket(torch.optim.SGD(parameters((2, 2)), lr=0.1), **options)


@pytest.mark.parametrize("given", [{}, {"below": 0.1, "keep": 0.5}, {"keep": 1.5}])
def test_pruning_needs_one_threshold(given: dict[str, float]) -> None:
    ticket = LotteryTicket(torch.optim.SGD(parameters((2, 2)), lr=0.1))
    with pytest.raises(ValueError, match=r"expected one|keep is 1.5; allowed"):
        ticket.prune(**given)
