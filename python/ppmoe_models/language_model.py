"""A small decoder-only language model over bytes, with `PPMoELayer`s in every other block."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppmoe_models.feed_forward import FeedForward
from ppmoe_models.ppmoe_layer import MoELosses, PPMoELayer

INIT_STD = 0.02
ROTARY_BASE = 10000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The sizes of a `LanguageModel`.

    Attributes:
        vocabulary: different tokens; 256 for bytes.
        context: the most tokens of a sequence.
        layers: blocks of attention and feed-forward network.
        hidden: H; a multiple of `heads`, with an even share each.
        heads: of the attention.
        width: F of one expert.
        experts: E, or None for the dense backbone.
        moe_every: each so-manieth block has experts: 2 is every other one, the second first.
        top_k, activation, shared_experts, capacity_factor, jitter, score, ranks, balance_weight,
            z_weight: as in `PPMoELayer`.
        checkpoint: compute blocks again in the backward instead of keeping what is inside them.

    Blocks without experts have a dense network as wide as what a token meets in the others,
    (top_k + shared_experts) * width. With experts = None all blocks are like that: the dense
    backbone of equal active parameters.

    Example:
        >>> from ppmoe_models import LanguageModelConfig
        >>> config = LanguageModelConfig(width=64, top_k=2, shared_experts=1)
        >>> config.dense_width, config.dense().experts
        (192, None)
    """

    vocabulary: int = 256
    context: int = 256
    layers: int = 4
    hidden: int = 192
    heads: int = 6
    width: int = 256
    experts: int | None = 8
    moe_every: int = 2
    top_k: int = 2
    activation: str = "swiglu"
    shared_experts: int = 0
    capacity_factor: float | None = None
    jitter: float = 0.0
    score: str = "softmax"
    ranks: int = 1
    balance_weight: float = 0.01
    z_weight: float = 0.001
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "heads", "width", "moe_every", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"LanguageModelConfig: {name} is {getattr(self, name)}; allowed: 1 or more"
                )
        if self.hidden % (2 * self.heads) != 0:
            raise ValueError(
                f"LanguageModelConfig: hidden is {self.hidden}; allowed: multiples of "
                f"2 * heads = {2 * self.heads} (positions rotate pairs of features)"
            )

    @property
    def dense_width(self) -> int:
        """F of the dense networks."""
        return (self.top_k + self.shared_experts) * self.width

    def dense(self) -> LanguageModelConfig:
        """The dense backbone of equal active parameters."""
        return dataclasses.replace(self, experts=None)


class LanguageModelOutput(NamedTuple):
    """What a `LanguageModel` returns.

    Attributes:
        logits: [B, S, vocabulary].
        router_loss: scalar, the sum of `MoELosses.total` over the layers (zero where none has
            experts): what to add to the task's loss.
        losses: the `MoELosses` of each layer with experts, from the first on.
    """

    logits: Tensor
    router_loss: Tensor
    losses: tuple[MoELosses, ...]


def rotary_table(context: int, width: int) -> Tensor:
    """[2, context, width / 2]: cosine and sine of every position and pair of features."""
    rate = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(context, dtype=torch.float64).unsqueeze(-1) * rate
    return torch.stack((angle.cos(), angle.sin())).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of features of [..., S, D] by its position's angle; feature i pairs with
    i + D / 2."""
    cos, sin = table[:, : x.size(-2)]
    one, other = x.chunk(2, -1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), -1).to(x.dtype)


class CausalAttention(nn.Module):
    """Attention of every position to itself and those before it, with rotary positions."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.w_in = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.w_out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """[B, S, H] to [B, S, H]."""
        batch, length, hidden = x.shape
        query, key, value = (
            each.view(batch, length, self.heads, -1).transpose(1, 2)
            for each in self.w_in(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(query, table), rotate(key, table), value, is_causal=True
        )
        return self.w_out(mixed.transpose(1, 2).reshape(batch, length, hidden))


class Block(nn.Module):
    """Attention and a feed-forward network, dense or of experts, each behind a norm."""

    def __init__(self, config: LanguageModelConfig, experts: int | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden, bias=False)
        self.attention = CausalAttention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden, bias=False)
        self.ffn: PPMoELayer | FeedForward
        if experts is None:
            self.ffn = FeedForward(
                config.hidden, config.dense_width, config.activation, bias=False, init_std=INIT_STD
            )
        else:
            self.ffn = PPMoELayer(
                config.hidden,
                config.width,
                experts,
                config.top_k,
                activation=config.activation,
                bias=False,
                score=config.score,
                balance_weight=config.balance_weight,
                z_weight=config.z_weight,
                shared_experts=config.shared_experts,
                capacity_factor=config.capacity_factor,
                jitter=config.jitter,
                ranks=config.ranks,
                init_std=INIT_STD,
            )

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, MoELosses | None]:
        x = x + self.attention(self.attention_norm(x), table)
        if isinstance(self.ffn, FeedForward):
            return x + self.ffn(self.ffn_norm(x)), None
        out, losses = self.ffn(self.ffn_norm(x))
        return x + out, losses


class LanguageModel(nn.Module):
    """A decoder: embedding, blocks, norm, and the embedding again as the last product.

    Args:
        config: its sizes.

    Shapes: [B, S] integer ids, S at most `context`, to a `LanguageModelOutput`.

    Raises:
        ValueError: from a call, a sequence that is longer than the context.

    Example:
        >>> import torch
        >>> from ppmoe_models import LanguageModel, LanguageModelConfig
        >>> model = LanguageModel(LanguageModelConfig(layers=2, hidden=32, heads=2, width=16))
        >>> out = model(torch.zeros(3, 7, dtype=torch.long))
        >>> out.logits.shape, len(out.losses)
        (torch.Size([3, 7, 256]), 1)
        >>> model.num_parameters() - model.num_active_parameters()  # 6 of 8 experts
        9216
    """

    table: Tensor

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.blocks = nn.ModuleList(
            Block(config, None if (index + 1) % config.moe_every else config.experts)
            for index in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.hidden, bias=False)
        table = rotary_table(config.context, config.hidden // config.heads)
        self.register_buffer("table", table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again: normal, those that add to the residual stream the smaller the
        more of them there are."""
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        self.norm.reset_parameters()
        residual = INIT_STD / max(2 * self.config.layers, 1) ** 0.5
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention_norm.reset_parameters()
            block.ffn_norm.reset_parameters()
            block.ffn.reset_parameters()
            nn.init.normal_(block.attention.w_in.weight, std=INIT_STD)
            nn.init.normal_(block.attention.w_out.weight, std=residual)
            if isinstance(block.ffn, FeedForward):
                nn.init.normal_(block.ffn.w_out.weight, std=residual)
            else:
                nn.init.normal_(block.ffn.w_out, std=residual)
                if block.ffn.shared is not None:
                    nn.init.normal_(block.ffn.shared.w_out.weight, std=residual)

    def forward(self, ids: Tensor) -> LanguageModelOutput:
        """[B, S] ids to logits [B, S, vocabulary] and the losses of the routers."""
        if ids.dim() != 2 or ids.size(1) > self.config.context:
            raise ValueError(
                f"LanguageModel: ids has shape {list(ids.shape)}; expected [B, S] with S at most "
                f"{self.config.context} (context)"
            )
        x = self.embedding(ids)
        router_loss = self.embedding.weight.new_zeros(())
        losses: list[MoELosses] = []
        for block in self.blocks:
            if self.config.checkpoint and self.training:
                x, of_block = checkpoint(block, x, self.table, use_reentrant=False)
            else:
                x, of_block = block(x, self.table)
            if of_block is not None:
                losses.append(of_block)
                router_loss = router_loss + of_block.total
        logits = F.linear(self.norm(x), self.embedding.weight)
        return LanguageModelOutput(logits, router_loss, tuple(losses))

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        new_tokens: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue sequences.

        Args:
            ids: [B, S] integer, S at least 1; the model sees the last `context` of them.
            new_tokens: how many to add.
            temperature: what logits are divided by; 0 takes the most probable token.
            generator: for the draws.

        Returns:
            [B, S + new_tokens] in the dtype of `ids`.

        Raises:
            ValueError: an empty sequence to start from, or a negative temperature.

        Example:
            >>> import torch
            >>> from ppmoe_models import LanguageModel, LanguageModelConfig
            >>> model = LanguageModel(LanguageModelConfig(layers=2, hidden=32, heads=2, width=16))
            >>> model.generate(torch.zeros(1, 2, dtype=torch.long), 3).shape
            torch.Size([1, 5])
        """
        if ids.dim() != 2 or ids.size(1) == 0:
            raise ValueError(
                f"generate: ids has shape {list(ids.shape)}; expected [B, S] with S at least 1"
            )
        if not temperature >= 0:
            raise ValueError(f"generate: temperature is {temperature}; allowed: 0 or more")
        training = self.training
        self.eval()
        try:
            for _ in range(new_tokens):
                logits = self(ids[:, -self.config.context :]).logits[:, -1].float()
                if temperature == 0:
                    new = logits.argmax(-1, keepdim=True)
                else:
                    shares = torch.softmax(logits / temperature, -1)
                    new = torch.multinomial(shares, 1, generator=generator)
                ids = torch.cat((ids, new.to(ids.dtype)), 1)
        finally:
            self.train(training)
        return ids

    def num_parameters(self) -> int:
        """All parameters; the embedding, used twice, counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Parameters that one token meets: without the experts that it does not choose."""
        layers = (each for each in self.modules() if isinstance(each, PPMoELayer))
        return self.num_parameters() - sum(each.num_inactive_parameters() for each in layers)
