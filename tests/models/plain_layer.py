"""An expert layer one token and one choice at a time, which shares nothing with the operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from ppmoe_models import FeedForward, PPMoELayer


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: x * (x > 0),
    "silu": silu,
}
GATED = {"swiglu": silu, "geglu": gelu}


class Result(NamedTuple):
    """Output and losses of the plain layer, and who got what."""

    out: Tensor
    total: Tensor
    balance: Tensor
    z: Tensor
    chosen: list[list[int]]
    kept: list[list[int]]


def activate(pre: Tensor, activation: str) -> Tensor:
    if activation in GATED:
        half = pre.numel() // 2
        return GATED[activation](pre[:half]) * pre[half:]
    return PLAIN[activation](pre)


def product(weight: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
    return weight @ row if bias is None else weight @ row + bias


def choose(layer: PPMoELayer, scores: Tensor) -> list[int]:
    """The experts of one token, best first."""
    key = scores.detach().clone()
    if layer.selection_bias is not None:
        key += layer.selection_bias
    ranked = sorted(range(len(key)), key=lambda e: (-key[e].item(), e))
    if layer.groups > 1:
        size = layer.num_experts // layer.groups
        best = [
            sum(sorted(key[g * size : (g + 1) * size].tolist())[-2:]) for g in range(layer.groups)
        ]
        groups = sorted(range(layer.groups), key=lambda g: (-best[g], g))[: layer.top_groups]
        ranked = [e for e in ranked if e // size in groups]
    return ranked[: layer.top_k]


def keep(layer: PPMoELayer, chosen: list[list[int]]) -> list[list[int]]:
    """The choices that find room, in order of the tokens; -1 for the others."""
    if layer.capacity_factor is None:
        return chosen
    factor = Fraction(str(layer.capacity_factor))
    room = [math.ceil(layer.top_k * factor * len(chosen) / layer.num_experts)] * layer.num_experts
    kept = []
    for ids in chosen:
        of_token = []
        for e in ids:
            of_token.append(e if room[e] > 0 else -1)
            room[e] -= 1
        kept.append(of_token)
    return kept


def shared(network: FeedForward, row: Tensor, activation: str) -> Tensor:
    hidden = activate(product(network.w_in.weight, row, network.w_in.bias), activation)
    return product(network.w_out.weight, hidden, network.w_out.bias)


def plain_layer(layer: PPMoELayer, x: Tensor) -> Result:
    """What `layer` should give for [..., H], without jitter, whatever its number of ranks."""
    tokens = x.reshape(-1, layer.hidden)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = [layer.router.weight.to(wide) @ row.to(wide) for row in tokens]
    probabilities = [(row - row.max()).exp() / (row - row.max()).exp().sum() for row in logits]
    scores = probabilities if layer.score == "softmax" else [1 / (1 + (-r).exp()) for r in logits]
    chosen = [choose(layer, row) for row in scores]
    kept = keep(layer, chosen)

    outputs = []
    for t, row in enumerate(tokens):
        weights = scores[t][chosen[t]]
        if layer.renormalize:
            weights = weights / weights.sum()
        total = torch.zeros(layer.hidden, dtype=wide)
        for k, e in enumerate(kept[t]):
            if e < 0:
                continue
            b_in = None if layer.b_in is None else layer.b_in[e]
            b_out = None if layer.b_out is None else layer.b_out[e]
            hidden = activate(product(layer.w_in[e], row, b_in), layer.activation)
            total = total + layer.scale * weights[k] * product(layer.w_out[e], hidden, b_out)
        total = total.to(x.dtype)
        if layer.shared is not None:
            total = total + shared(layer.shared, row, layer.activation)
        outputs.append(total)

    picked = [e for ids in chosen for e in ids]
    counts = [picked.count(e) for e in range(layer.num_experts)]
    share = torch.tensor(counts, dtype=wide) / len(picked)
    mean = torch.stack(probabilities).mean(0)
    balance = layer.num_experts * (share * mean).sum()
    z = torch.stack([row.exp().sum().log() ** 2 for row in logits]).mean()
    total = layer.balance_weight * balance + layer.z_weight * z
    return Result(torch.stack(outputs).view(x.shape), total, balance, z, chosen, kept)
