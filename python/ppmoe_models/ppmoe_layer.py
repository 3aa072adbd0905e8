"""`PPMoELayer`: a mixture-of-experts feed-forward layer on the expert-slicing operators."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppmoe_ops
from ppmoe_models.capacity import decimal_ratio, drop_late_slots, expert_capacity
from ppmoe_models.feed_forward import FeedForward, inner_width


class MoELosses(NamedTuple):
    """What one call of a `PPMoELayer` says about its routing, beside the output.

    Attributes:
        total: scalar, balance_weight * balance + z_weight * z: what to add to the task's loss.
        balance: scalar, the load-balance loss, 1 when balanced; over all choices, dropped or not,
            as a capacity would hide the overload that the loss is there to mend.
        z: scalar, the router's z-loss.
        load: [E] int64, how many slots chose each expert, dropped ones included.
        dropped: scalar int64, slots that found their expert full.
    """

    total: Tensor
    balance: Tensor
    z: Tensor
    load: Tensor
    dropped: Tensor


class PPMoELayer(nn.Module):
    """Route every token to `top_k` of `num_experts` feed-forward networks and add up their outputs.

    A call returns the output and a `MoELosses`. The losses are a result like any other: the caller
    adds `losses.total` to the task's loss. Nothing is kept in the module or anywhere else, so that
    checkpointing, `torch.compile`, `torch.func` and pipeline stages see all there is, and a loss
    can be neither counted twice nor left over from another call.

    With `ranks` > 1 the layer computes what so many tensor-parallel ranks would, one after another:
    rank r owns the experts [r * E / R, (r + 1) * E / R), computes its part of the output from the
    tokens that every rank has, and the parts are added in the order of the ranks, as one all-reduce
    would. (On real ranks each computes the router's losses in full: where the router's gradient is
    summed over the ranks, divide these losses by R.)

    Args:
        hidden: H, features of a token.
        width: F, features between the two products of an expert.
        num_experts: E.
        top_k: K, experts a token.
        activation: gelu, gelu_tanh, relu, silu, or with a gate swiglu, geglu.
        bias: whether experts (and shared ones) have biases. The router has none.
        score: "softmax" or "sigmoid" over the router's logits.
        renormalize: divide a token's weights by their sum. None is True for top_k > 1; with
            top_k = 1 it must not be True, as the router would get no gradient.
        selection_bias: keep a buffer `selection_bias` [E], zero at first, that is added to the
            scores for the choice alone; see `adjust_selection_bias`.
        groups, top_groups, scale: as in `ppmoe_ops.route`.
        balance_weight, z_weight: of the two losses in `MoELosses.total`.
        shared_experts: a dense network of this many times `width` that every token passes too.
        capacity_factor: None drops nothing. A number f lets an expert take at most
            ceil(K * f * T / E) slots a call, T tokens, and drops the others: they add nothing, and
            no weight of the token's other experts changes. Earlier tokens have priority.
        jitter: eps; in training the router's input is multiplied by noise, uniform in
            [1 - eps, 1 + eps].
        ranks: R, ranks to simulate; divides E.
        init_std: None draws every expert as `nn.Linear` would; a number draws all weights from a
            normal distribution of that standard deviation (0.02 in many language models) and sets
            biases to zero.
        device, dtype: of the parameters.

    Attributes:
        router: `nn.Linear` H to E without bias; computed in float32 (float64 for float64 input),
            also under autocast.
        w_in: [E, F, H] (gated: [E, 2F, H], the gate's half first), and b_in [E, F] or None.
        w_out: [E, H, F], and b_out [E, H] or None.
        shared: a `FeedForward` or None.

    Raises:
        ValueError: arguments that do not fit; from a call, an input that is not [..., H].

    Shapes: [..., H] to [..., H]; all leading axes together are the T tokens.

    Source: PPMoE (arXiv 2304.11414) section 3.3; capacity: arXiv 2101.03961 section 2.2, jitter:
    its appendix.

    Example:
        >>> import torch
        >>> from ppmoe_models import PPMoELayer
        >>> layer = PPMoELayer(hidden=16, width=32, num_experts=4, top_k=2)
        >>> out, losses = layer(torch.randn(2, 5, 16))
        >>> out.shape, int(losses.load.sum()), int(losses.dropped)
        (torch.Size([2, 5, 16]), 20, 0)
        >>> (out.square().mean() + losses.total).backward()
        >>> layer.router.weight.grad.shape
        torch.Size([4, 16])
    """

    selection_bias: Tensor | None
    b_in: nn.Parameter | None
    b_out: nn.Parameter | None
    shared: FeedForward | None

    def __init__(
        self,
        hidden: int,
        width: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str = "gelu",
        bias: bool = True,
        score: str = "softmax",
        renormalize: bool | None = None,
        selection_bias: bool = False,
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        balance_weight: float = 0.01,
        z_weight: float = 0.001,
        shared_experts: int = 0,
        capacity_factor: float | None = None,
        jitter: float = 0.0,
        ranks: int = 1,
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size, least in (
            ("hidden", hidden, 1), ("width", width, 1), ("num_experts", num_experts, 1),
            ("ranks", ranks, 1), ("shared_experts", shared_experts, 0),
        ):  # fmt: skip
            if size < least:
                raise ValueError(f"PPMoELayer: {name} is {size}; allowed: {least} or more")
        inner = inner_width("PPMoELayer", width, activation)
        if top_k == 1 and renormalize:
            raise ValueError(
                "PPMoELayer: renormalize is True with top_k = 1; allowed: False, or None, as one "
                "weight divided by itself is 1 and the router would get no gradient"
            )
        if num_experts % ranks != 0:
            raise ValueError(
                f"PPMoELayer: ranks is {ranks}; allowed: divisors of num_experts = {num_experts}"
            )
        if capacity_factor is not None and not 0 < capacity_factor < float("inf"):
            raise ValueError(
                f"PPMoELayer: capacity_factor is {capacity_factor}; allowed: None, or above 0"
            )
        if not 0 <= jitter < 1:
            raise ValueError(f"PPMoELayer: jitter is {jitter}; allowed: at least 0 and below 1")
        self.hidden, self.width, self.num_experts, self.top_k = hidden, width, num_experts, top_k
        self.activation, self.score = activation, score
        self.renormalize = top_k > 1 if renormalize is None else renormalize
        self.groups, self.top_groups, self.scale = groups, top_groups, scale
        self.balance_weight, self.z_weight = balance_weight, z_weight
        self.shared_experts, self.capacity_factor = shared_experts, capacity_factor
        self._capacity = None if capacity_factor is None else decimal_ratio(capacity_factor)
        self.jitter, self.ranks, self.init_std = jitter, ranks, init_std

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.router = nn.Linear(hidden, num_experts, False, device, dtype)
        self.w_in = parameter(num_experts, inner, hidden)
        self.w_out = parameter(num_experts, hidden, width)
        self.register_parameter("b_in", parameter(num_experts, inner) if bias else None)
        self.register_parameter("b_out", parameter(num_experts, hidden) if bias else None)
        self.shared = None
        if shared_experts:
            self.shared = FeedForward(
                hidden, shared_experts * width, activation,
                bias=bias, init_std=init_std, device=device, dtype=dtype,
            )  # fmt: skip
        zeros = torch.zeros(num_experts, device=device) if selection_bias else None
        self.register_buffer("selection_bias", zeros)
        # Without tokens: the operator's own checks, before the first batch comes.
        self._route(self.router.weight.new_empty(0, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again, as `init_std` says, and set the selection bias to zero."""
        weights = ((self.router.weight, None), (self.w_in, self.b_in), (self.w_out, self.b_out))
        for weight, bias in weights:
            bound = weight.size(-1) ** -0.5
            if self.init_std is None:
                nn.init.uniform_(weight, -bound, bound)
            else:
                nn.init.normal_(weight, std=self.init_std)
            if bias is not None:
                bound = bound if self.init_std is None else 0.0
                nn.init.uniform_(bias, -bound, bound)
        if self.shared is not None:
            self.shared.reset_parameters()
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, MoELosses]:
        """[..., H] to [..., H] and the call's `MoELosses`."""
        if x.dim() == 0 or x.size(-1) != self.hidden:
            raise ValueError(
                f"PPMoELayer: x has shape {list(x.shape)}; expected [..., {self.hidden}]"
            )
        tokens = x.reshape(-1, self.hidden)
        logits = self._logits(tokens)
        weights, experts = self._route(logits)
        balance, z = ppmoe_ops.router_losses(logits, experts)
        slots, offsets = ppmoe_ops.expert_index(experts, 0, self.num_experts)
        load = offsets.diff().long()
        dropped = load.new_zeros(())
        if self._capacity is not None:
            capacity = expert_capacity(tokens.size(0), self.top_k, self.num_experts, self._capacity)
            experts = drop_late_slots(experts, slots, offsets, capacity)
            dropped = (load - capacity).clamp(min=0).sum()

        out = self._sum_over_ranks(tokens, weights, experts)
        if self.shared is not None:
            out = out + self.shared(tokens)
        total = self.balance_weight * balance + self.z_weight * z
        return out.reshape(x.shape), MoELosses(total, balance, z, load, dropped)

    def _logits(self, tokens: Tensor) -> Tensor:
        """[T, E] in float32, or float64."""
        wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.to(wide)
            if self.training and self.jitter:
                x = x * (1 - self.jitter + 2 * self.jitter * torch.rand_like(x))
            return F.linear(x, self.router.weight.to(wide))

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return ppmoe_ops.route(
            logits,
            self.top_k,
            self.score,
            self.renormalize,
            self.selection_bias,
            self.groups,
            self.top_groups,
            self.scale,
        )

    def _sum_over_ranks(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        local = self.num_experts // self.ranks

        def shares(parameter: Tensor) -> tuple[Tensor, ...]:
            # One node of the graph: slices of their own would each make a gradient of full size.
            return parameter.split(local) if self.ranks > 1 else (parameter,)

        w_in, w_out = shares(self.w_in), shares(self.w_out)
        b_in = None if self.b_in is None else shares(self.b_in)
        b_out = None if self.b_out is None else shares(self.b_out)
        parts = []
        for rank in range(self.ranks):
            slots, offsets = ppmoe_ops.expert_index(experts, rank * local, local)
            part = ppmoe_ops.expert_ffn(
                tokens,
                slots,
                offsets,
                weights,
                w_in[rank],
                b_in[rank] if b_in is not None else None,
                w_out[rank],
                b_out[rank] if b_out is not None else None,
                self.activation,
            )
            parts.append(part)
        return functools.reduce(torch.add, parts)

    @torch.no_grad()
    def adjust_selection_bias(self, load: Tensor, step: float = 0.001) -> None:
        """Make experts with more than the mean load less likely to be chosen, others more.

        Balances without a loss, as in DeepSeek-V3 (arXiv 2412.19437) section 2.1.2.

        Args:
            load: [E] as in `MoELosses`, or its sum over calls and replicas.
            step: how far each bias moves.

        Raises:
            ValueError: the layer was made without `selection_bias`.

        Example:
            >>> import torch
            >>> from ppmoe_models import PPMoELayer
            >>> layer = PPMoELayer(8, 8, num_experts=2, top_k=1, selection_bias=True)
            >>> layer.adjust_selection_bias(torch.tensor([7, 1]), step=0.5)
            >>> layer.selection_bias.tolist()
            [-0.5, 0.5]
        """
        if self.selection_bias is None:
            raise ValueError("PPMoELayer: made with selection_bias = False; expected True")
        load = load.to(self.selection_bias.device, torch.float64)
        direction = torch.sign(load.mean() - load)
        self.selection_bias.add_(direction.to(self.selection_bias.dtype), alpha=step)

    def num_inactive_parameters(self) -> int:
        """Parameters that a token does not meet: those of E - K experts.

        Example:
            >>> from ppmoe_models import PPMoELayer
            >>> PPMoELayer(8, 16, num_experts=4, top_k=1, bias=False).num_inactive_parameters()
            768
        """
        stacked = (self.w_in, self.b_in, self.w_out, self.b_out)
        each = sum(parameter[0].numel() for parameter in stacked if parameter is not None)
        return (self.num_experts - self.top_k) * each

    def extra_repr(self) -> str:
        parts = [f"{self.hidden}, {self.width}, num_experts={self.num_experts}"]
        parts += [f"top_k={self.top_k}, activation={self.activation}, score={self.score}"]
        parts += [f"renormalize={self.renormalize}, bias={self.b_in is not None}"]
        optional = {"groups": 1, "top_groups": 1, "scale": 1.0, "shared_experts": 0,
                    "capacity_factor": None, "jitter": 0.0, "ranks": 1}  # fmt: skip
        for name, default in optional.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        if self.selection_bias is not None:
            parts.append("selection_bias=True")
        return ", ".join(parts)
