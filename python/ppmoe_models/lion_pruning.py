"""`LotteryTicket`: training in which unimportant weights only shrink, and a hard cut at the end.

LION prunes its implicit layers by the lottery hypothesis; crucial parameters are updated in the
ordinary way and the others are driven to zero. No more than that could be read of it. The rest is
that of CDR (robust early-learning, ICLR 2021), which uses the same words: importance |w dL/dw|,
2-D and 4-D tensors alone, one threshold for all of them, anew in every step. From its code differ:
gradients of crucial weights are not multiplied by the share that is kept; weights that are not
crucial get no momentum either; and they shrink by a constant amount ("l1"), which reaches zero,
unless "l2" is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ppmoe_models.prompt_modes_base import ParameterCounts

PENALTIES = ("l1", "l2")


class LotteryTicket:
    """Around an optimizer: each step updates the weights that matter, the others only shrink.

    In every step the `keep` largest of all importances |w dL/dw|, over all scored tensors, are
    crucial: the optimizer updates those weights as ever. The others get no gradient, and whatever
    the optimizer does with them, they become w (1 - lr decay) ("l2"), or move towards 0 by
    lr decay and stop there ("l1"), with the lr of their group. A weight that is 0 has no importance
    and stays 0. Tensors of other dimensions, such as biases, are always updated.

    Args:
        optimizer: any of `torch.optim` with dense gradients. Its learning-rate scheduler wraps it,
            not this.
        keep: share of scored weights that are crucial, above 0, up to 1.
        decay: 0 or more.
        penalty: "l1" or "l2".
        parameters: the tensors that count; None means all of the optimizer's. Those that are not
            2-D or 4-D are passed over.

    Mixed precision: hand this to `GradScaler.unscale_` and `GradScaler.step` in place of the
    optimizer. Unscaled first or not, the same weights are crucial, as a common factor does not
    change an order; steps with infinite gradients are left out by the scaler before they come here.

    Attributes:
        optimizer: the one inside.
        scored: the tensors that are scored.
        crucial: for each of them, in the last step: bool, or None before it.
        masks: for each, once `prune` is called: bool, what is kept.

    Raises:
        ValueError: values that are not allowed, or nothing to score.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([[1.0, 1.0, -0.25]]))
        >>> ticket = LotteryTicket(torch.optim.SGD([w], lr=1.0), keep=0.3, decay=0.5)
        >>> w.grad = torch.tensor([[0.1, 0.25, 0.5]])
        >>> ticket.step()
        >>> w.tolist(), ticket.counts()
        ([[0.5, 0.75, 0.0]], ParameterCounts(nominal=3, nonzero=2))
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        keep: float = 0.5,
        decay: float = 0.01,
        penalty: str = "l1",
        parameters: Iterable[Tensor] | None = None,
    ) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"LotteryTicket: keep is {keep}; allowed: above 0, up to 1")
        if not decay >= 0:
            raise ValueError(f"LotteryTicket: decay is {decay}; allowed: 0 or more")
        if penalty not in PENALTIES:
            raise ValueError(
                f"LotteryTicket: penalty is '{penalty}'; allowed: {', '.join(PENALTIES)}"
            )
        self.optimizer, self.keep, self.decay, self.penalty = optimizer, keep, decay, penalty
        of_optimizer = [each for group in optimizer.param_groups for each in group["params"]]
        given = of_optimizer if parameters is None else list(parameters)
        strange = {id(each) for each in given} - {id(each) for each in of_optimizer}
        if strange:
            raise ValueError(
                f"LotteryTicket: parameters has {len(strange)} tensors that the optimizer has not; "
                "expected some of the optimizer's"
            )
        self.scored: list[Tensor] = [each for each in given if each.dim() in (2, 4)]
        if not self.scored:
            raise ValueError("LotteryTicket: parameters has no 2-D or 4-D tensor; expected one")
        self.crucial: list[Tensor] | None = None
        self.masks: list[Tensor] | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The optimizer's, of each parameter."""
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` computes the loss and the gradients once, and its result comes back.

        A scored tensor without a gradient is left alone.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scored = [each.grad is not None for each in self.scored]
        self.crucial = self._crucial()
        before = [each.clone() for each in self.scored]
        for weight, crucial in zip(self.scored, self.crucial, strict=True):
            if weight.grad is not None:
                weight.grad.masked_fill_(~crucial, 0)
        self.optimizer.step()
        rates = {id(each): group["lr"] for group in self.param_groups for each in group["params"]}
        for index, (weight, old) in enumerate(zip(self.scored, before, strict=True)):
            if scored[index]:
                shrunk = self._shrunk(old, float(rates[id(weight)]) * self.decay)
                weight.copy_(torch.where(self.crucial[index], weight, shrunk))
        self._mask()
        return loss

    def _crucial(self) -> list[Tensor]:
        scores = [
            torch.zeros_like(each) if each.grad is None else (each * each.grad).abs()
            for each in self.scored
        ]
        flat = torch.cat([each.flatten().to(scores[0].device, torch.float32) for each in scores])
        kept = max(1, round(self.keep * flat.numel()))
        threshold = flat.kthvalue(flat.numel() - kept + 1).values
        # What is not a number is crucial, so that it shows as it would without this.
        return [~(each.float() < threshold.to(each.device)) & (each != 0) for each in scores]

    def _shrunk(self, old: Tensor, amount: float) -> Tensor:
        if self.penalty == "l2":
            return old * (1 - amount)
        return old - old.clamp(-amount, amount)

    def _mask(self) -> None:
        for weight, mask in zip(self.scored, self.masks or (), strict=False):
            weight.masked_fill_(~mask, 0)

    @torch.no_grad()
    def prune(self, *, below: float | None = None, keep: float | None = None) -> ParameterCounts:
        """Set small weights to zero, and keep them there in all steps to come.

        Args:
            below: what is smaller than this, in absolute value; or
            keep: all but this share of the scored weights, the largest.

        Raises:
            ValueError: not exactly one of the two, or one that is not allowed.
        """
        if (below is None) == (keep is None):
            raise ValueError("LotteryTicket: prune has below and keep, or none; expected one")
        flat = torch.cat([each.flatten().float().to(self.scored[0].device) for each in self.scored])
        if below is None:
            assert keep is not None
            if not 0 < keep <= 1:
                raise ValueError(f"LotteryTicket: keep is {keep}; allowed: above 0, up to 1")
            rank = flat.numel() - max(1, round(keep * flat.numel())) + 1
            below = float(flat.abs().kthvalue(rank).values)
        self.masks = [(each.float().abs() >= below) & (each != 0) for each in self.scored]
        self._mask()
        return self.counts()

    def counts(self) -> ParameterCounts:
        """Scored weights: all, and those that are not zero."""
        nonzero = sum(int(torch.count_nonzero(each.detach())) for each in self.scored)
        return ParameterCounts(sum(each.numel() for each in self.scored), nonzero)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, with the masks beside it."""
        return {"optimizer": self.optimizer.state_dict(), "masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: its masks are of other tensors.
        """
        masks = state["masks"]
        if masks is not None:
            shapes = [list(each.shape) for each in self.scored]
            found = [list(each.shape) for each in masks]
            if found != shapes:
                raise ValueError(
                    f"LotteryTicket: masks in the state are {found}; expected {shapes}"
                )
            masks = [
                mask.to(weight.device) for mask, weight in zip(masks, self.scored, strict=True)
            ]
        self.optimizer.load_state_dict(state["optimizer"])
        self.masks = masks
