"""`FeedForward`: a dense feed-forward network with the activations of `expert_ffn`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}
_GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}
ACTIVATIONS = (*_PLAIN, *_GATED)


def inner_width(owner: str, width: int, activation: str) -> int:
    """Rows of the first matrix: `width`, twice that where the activation has a gate.

    Args:
        owner: what to call the module in an error.
        width: F.
        activation: one of `ACTIVATIONS`.

    Raises:
        ValueError: an unknown activation.

    Example:
        >>> inner_width("PPMoELayer", 8, "gelu"), inner_width("PPMoELayer", 8, "swiglu")
        (8, 16)
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{owner}: activation is '{activation}'; allowed: {', '.join(ACTIVATIONS)}"
        )
    return 2 * width if activation in _GATED else width


class FeedForward(nn.Module):
    """w_out @ act(w_in @ x), dense: what one expert computes, at any width.

    Args:
        hidden: H, features of a token.
        width: F, features between the two products.
        activation: gelu, gelu_tanh, relu, silu, or with a gate swiglu, geglu; a gated one has 2F
            rows in `w_in`, the gate's half first, as `expert_ffn` has.
        bias: whether both products have one.
        init_std: None draws the parameters as `nn.Linear` does; a number draws the weights from a
            normal distribution of that standard deviation and sets biases to zero.
        device, dtype: of the parameters.

    Shapes: [..., H] to [..., H].

    Example:
        >>> import torch
        >>> from ppmoe_models import FeedForward
        >>> FeedForward(16, 32, "swiglu")(torch.zeros(2, 3, 16)).shape
        torch.Size([2, 3, 16])
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        activation: str = "gelu",
        *,
        bias: bool = True,
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = inner_width("FeedForward", width, activation)
        self.activation = activation
        self.init_std = init_std
        self.w_in = nn.Linear(hidden, inner, bias, device, dtype)
        self.w_out = nn.Linear(width, hidden, bias, device, dtype)
        if init_std is not None:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again."""
        for linear in (self.w_in, self.w_out):
            if self.init_std is None:
                linear.reset_parameters()
                continue
            nn.init.normal_(linear.weight, std=self.init_std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        pre = self.w_in(x)
        if self.activation in _GATED:
            gate, up = pre.chunk(2, -1)
            return self.w_out(_GATED[self.activation](gate) * up)
        return self.w_out(_PLAIN[self.activation](pre))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
