"""Layers of Swin models whose attention is `window_attention`: what `swin` makes layers into.

A class here stands before the class of a library and has the one method of it that holds the
attention. It reads what the library's own method reads, and calls that where the operator does not
do the same.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppmoe_ops

_LOG = logging.getLogger("ppmoe_models")
_MOST_SCALE = math.log(100.0)  # of the logarithm of a v2 head's scale
# What transformers hands down to its layers and no attention depends on.
_IDLE_ARGUMENTS = ("output_hidden_states", "return_dict", "use_cache")


class Swapped(nn.Module):
    """Stands before a library's class: its methods are the library's, but for the attention.

    Attributes:
        needs: what this code reads from a layer; another version of the library may lack some.
        own: the library's class.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    own: ClassVar[type]

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time: pickle and deepcopy have to be told how.
        return _empty_layer, (type(self).__mro__[1], self.own), self.__dict__

    def _declined(self, reason: str) -> bool:
        """Whether there is a reason to go the library's own way, after saying it once."""
        if reason:
            _announce(f"{self.own.__name__} computes its attention itself: {reason}")
        return bool(reason)


@functools.cache
def swapped_class(ours: type, own: type) -> Any:
    """The class of a layer of class `own` that uses the operator as `ours` does."""
    return type(f"Window{own.__name__}", (ours, own), {"own": own, "__doc__": own.__doc__})


def _empty_layer(ours: type, own: type) -> Any:
    made = swapped_class(ours, own)
    return made.__new__(made)


@functools.cache
def _warn(text: str) -> None:
    _LOG.warning(text)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _announce(text: str) -> None:
    _warn(f"use_window_attention: {text}")


def _reason(dropout: float, *replaced: nn.Module) -> str:
    """What any library's layer may have against the operator, which does not call `replaced`."""
    if dropout:
        return "attention dropout"
    for each in replaced:
        if each._forward_hooks or each._forward_pre_hooks:
            return "hooks on its attention"
        if each._backward_hooks or each._backward_pre_hooks:
            return "hooks on its attention"
    return ""


def _padded(x: Tensor, window: Sequence[int]) -> Tensor:
    """[B, H, W, C] with zeros below and to the right, to multiples of the window."""
    below, right = -x.size(1) % window[0], -x.size(2) % window[1]
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


def _cosine_attention(
    qkv: Sequence[Tensor], table: Tensor, logit_scale: Tensor, window: list[int], shift: list[int]
) -> Tensor:
    """Swin v2's: q, k and v are [B, H, W, C]; logit_scale [heads, 1, 1] is not limited yet."""
    q, k, v = qkv
    heads = logit_scale.size(0)
    scale = logit_scale.clamp(max=_MOST_SCALE).exp().view(heads, 1)
    q = F.normalize(q.unflatten(-1, (heads, -1)), dim=-1) * scale
    k = F.normalize(k.unflatten(-1, (heads, -1)), dim=-1)
    q, k = (each.flatten(-2).to(v.dtype) for each in (q, k))
    return ppmoe_ops.window_attention(q, k, v, table, heads, window, shift, 1.0)


def _cosine_table(network: nn.Module, coordinates: Tensor, heads: int) -> Tensor:
    """v2's bias by relative position, whose rows are in the operator's order."""
    table: Tensor = network(coordinates)
    return 16 * table.view(-1, heads).sigmoid()


class TransformersSwin(Swapped):
    needs = (
        "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
        "attention.num_attention_heads", "attention.scaling",
        "attention.attention_dropout", "attention.config",
        "attention.relative_position_bias.relative_position_bias_table",
        "attention.relative_position_bias.window_size", "layernorm_before", "layernorm_after",
        "mlp", "dropout", "drop_path", "window_size", "shift_size", "set_shift_and_window_size",
    )  # fmt: skip

    def _why_not(self, arguments: dict[str, Any]) -> str:
        layer: Any = self
        attention, bias = layer.attention, layer.attention.relative_position_bias
        asked = {"output_attentions": attention.config.output_attentions, **arguments}
        for name, value in asked.items():
            if value is not None and value is not False and name not in _IDLE_ARGUMENTS:
                return f"{name} is given"
        if tuple(bias.window_size) != (layer.window_size, layer.window_size):
            return "a map that is smaller than the window"
        dropout = attention.attention_dropout if self.training else 0.0
        return _reason(dropout, attention, bias)

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **arguments: Any,
    ) -> Any:
        layer: Any = self
        if not always_partition:
            layer.set_shift_and_window_size(input_dimensions)
        if self._declined(self._why_not(arguments)):
            return super().forward(hidden_states, input_dimensions, always_partition, **arguments)
        attention, (height, width) = layer.attention, input_dimensions
        window, shift = [layer.window_size] * 2, [layer.shift_size] * 2
        x = _padded(layer.layernorm_before(hidden_states).unflatten(1, (height, width)), window)
        x = ppmoe_ops.window_attention(
            attention.q_proj(x), attention.k_proj(x), attention.v_proj(x),
            attention.relative_position_bias.relative_position_bias_table,
            attention.num_attention_heads, window, shift, attention.scaling,
        )  # fmt: skip
        x = layer.dropout(attention.o_proj(x[:, :height, :width])).flatten(1, 2)
        x = hidden_states + layer.drop_path(x)
        return x + layer.dropout(layer.mlp(layer.layernorm_after(x))), None


class TransformersSwinV2(Swapped):
    needs = (
        "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.self.logit_scale", "attention.self.continuous_position_bias_mlp",
        "attention.self.relative_coords_table", "attention.self.dropout",
        "attention.self.num_attention_heads", "attention.output", "layernorm_before",
        "layernorm_after", "intermediate", "output", "drop_path", "window_size", "shift_size",
    )  # fmt: skip

    def _why_not(self, output_attentions: bool | None) -> str:
        layer: Any = self
        attention = layer.attention.self
        if output_attentions:
            return "output_attentions is given"
        dropout = attention.dropout.p if self.training else 0.0
        return _reason(dropout, layer.attention, attention, attention.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool | None = False,
    ) -> Any:
        if self._declined(self._why_not(output_attentions)):
            return super().forward(hidden_states, input_dimensions, output_attentions)
        layer: Any = self
        attention, (height, width) = layer.attention.self, input_dimensions
        window, shift = [layer.window_size] * 2, [layer.shift_size] * 2
        x = _padded(hidden_states.unflatten(1, (height, width)), window)
        qkv = attention.query(x), attention.key(x), attention.value(x)
        table = _cosine_table(
            attention.continuous_position_bias_mlp,
            attention.relative_coords_table,
            attention.num_attention_heads,
        )
        x = _cosine_attention(qkv, table, attention.logit_scale, window, shift)
        x = layer.attention.output(x[:, :height, :width], None).flatten(1, 2)
        x = hidden_states + layer.drop_path(layer.layernorm_before(x))
        return (x + layer.drop_path(layer.layernorm_after(layer.output(layer.intermediate(x)))),)


class TorchvisionSwin(Swapped):
    needs: ClassVar[tuple[str, ...]] = (
        "qkv", "proj", "window_size", "shift_size", "num_heads", "attention_dropout", "dropout",
        "relative_position_bias_table",
    )  # fmt: skip

    def _attention(self, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
        layer: Any = self
        q, k, v = layer.qkv(x).chunk(3, -1)
        table = layer.relative_position_bias_table
        return ppmoe_ops.window_attention(q, k, v, table, layer.num_heads, window, shift)

    def forward(self, x: Tensor) -> Any:
        layer: Any = self
        dropout = layer.attention_dropout if self.training else 0.0
        if self._declined(_reason(dropout)):
            return super().forward(x)
        height, width = x.shape[1:3]
        window = list(layer.window_size)
        x = _padded(x, window)
        sides = zip(layer.shift_size, window, x.shape[1:3], strict=True)
        shift = [0 if one >= side else step for step, one, side in sides]
        x = layer.proj(self._attention(x, window, shift)[:, :height, :width])
        return F.dropout(x, layer.dropout, self.training)


class TorchvisionSwinV2(TorchvisionSwin):
    needs = (*TorchvisionSwin.needs[:-1], "logit_scale", "cpb_mlp", "relative_coords_table")

    def _attention(self, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
        layer: Any = self
        bias = layer.qkv.bias
        if bias is not None:  # k has none, whatever stands there
            q, k, v = bias.chunk(3)
            bias = torch.cat((q, torch.zeros_like(k), v))
        qkv = F.linear(x, layer.qkv.weight, bias).chunk(3, -1)
        table = _cosine_table(layer.cpb_mlp, layer.relative_coords_table, layer.num_heads)
        return _cosine_attention(qkv, table, layer.logit_scale, window, shift)


class TimmSwin(Swapped):
    needs: ClassVar[tuple[str, ...]] = (
        "_attn", "window_size", "shift_size", "input_resolution", "dynamic_mask", "attn.qkv",
        "attn.num_heads", "attn.attn_drop", "attn.softmax", "attn.proj", "attn.proj_drop",
        "attn.scale", "attn.relative_position_bias_table",
    )  # fmt: skip

    def _why_not(self, x: Tensor) -> str:
        layer: Any = self
        attn, (height, width) = layer.attn, x.shape[1:3]
        if any(layer.shift_size):
            if height % layer.window_size[0] or width % layer.window_size[1]:
                return "it shifts a map that windows do not divide, and rolls before it pads"
            if not layer.dynamic_mask and (height, width) != tuple(layer.input_resolution):
                return "its mask is for another map"
        dropout = attn.attn_drop.p if self.training else 0.0
        return _reason(dropout, attn, attn.softmax, attn.attn_drop)

    def _attention(self, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
        attn: Any = self.attn
        q, k, v = attn.qkv(x).chunk(3, -1)
        table = attn.relative_position_bias_table
        return ppmoe_ops.window_attention(q, k, v, table, attn.num_heads, window, shift, attn.scale)

    def _attn(self, x: Tensor) -> Any:
        layer: Any = self
        if self._declined(self._why_not(x)):
            return super()._attn(x)  # type: ignore[misc]
        height, width = x.shape[1:3]
        window, shift = list(layer.window_size), list(layer.shift_size)
        x = self._attention(_padded(x, window), window, shift)[:, :height, :width]
        return layer.attn.proj_drop(layer.attn.proj(x))


class TimmSwinV2(TimmSwin):
    needs = (
        *TimmSwin.needs[:-2], "attn.q_bias", "attn.k_bias", "attn.v_bias", "attn.logit_scale",
        "attn.qkv_bias_separate", "attn.cpb_mlp", "attn.relative_coords_table",
    )  # fmt: skip

    def _attention(self, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
        attn: Any = self.attn
        if attn.q_bias is None:
            qkv = attn.qkv(x)
        else:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            separate = attn.qkv_bias_separate
            qkv = attn.qkv(x) + bias if separate else F.linear(x, attn.qkv.weight, bias)
        table = _cosine_table(attn.cpb_mlp, attn.relative_coords_table, attn.num_heads)
        return _cosine_attention(qkv.chunk(3, -1), table, attn.logit_scale, window, shift)
