"""What a device run measures of expert slicing, in the order of importance, and its targets.

The same list is what `roofline.py` predicts, so that every measured row has a prediction. Routing
is uniformly random: balanced counts are multiples of a tile, which flatters tiled kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ppmoe_ops._library import OPERATORS

from .inputs import DEEPSEEK_V3, MIXTRAL, OLMOE, QWEN3_30B, Model, Routing, Workload

LAYER, ROWS, MORE = "layer", "operators", "more"
GROUPS = (LAYER, ROWS, MORE)
ROUTER = ("route", "route_backward", "router_losses_forward", "router_losses_backward")
INDEX = ("expert_index",)
MOVED = ("slice_rows", "slice_rows_backward", "merge_rows", "merge_rows_backward")
PRODUCTS = (
    "grouped_linear",
    "grouped_linear_backward",
    "expert_ffn_forward",
    "expert_ffn_backward",
)
# Composites are what the layer's rows time, or are timed where their forward operator is.
OPERATORS_TIMED = (*INDEX, *ROUTER, *MOVED, *PRODUCTS)


@dataclasses.dataclass(frozen=True)
class DeviceCase:
    """One row of a device run.

    Attributes:
        operator: its name; `expert_ffn` stands for the layer from the router's ids on, so that
            `expert_index` is in its time, and the other operators are called directly.
        work: shapes, data type and routing; the first of `ranks` equal shares of the experts.
        step: forward and backward in one call, of the layer alone.
        group: which part of the run measures it.
        target: a key of `TARGETS`.
    """

    operator: str
    work: Workload
    ranks: int = 1
    step: bool = False
    group: str = ROWS
    target: str = ""

    @property
    def label(self) -> str:
        """The shape, for people."""
        parts = [self.work.model.name, f"T={self.work.tokens}"]
        if self.operator not in ROUTER:
            parts.append(f"R={self.ranks}")
        if self.operator == "expert_ffn":
            parts.append("forward+backward" if self.step else "forward")
        if self.work.routing != "uniform":
            parts.append(self.work.routing)
        return " ".join(parts)

    @property
    def key(self) -> str:
        """Unique among cases; stored results are found by it."""
        return f"{self.operator} | {self.label}"


@dataclasses.dataclass(frozen=True)
class Target:
    """One number that a row is held to.

    Attributes:
        what: `TFLOP/s`, `share of the bound`, `share of reading the weights` or `us`.
        must, aim: the least (of `us`, the most) that is accepted, and what is aimed at.
    """

    what: str
    must: float
    aim: float

    def verdict(self, value: float | None) -> str:
        """`aim`, `must`, `missed` or `not measured`."""
        if value is None:
            return "not measured"
        sign = -1 if self.what == MICROSECONDS else 1
        for name, limit in (("aim", self.aim), ("must", self.must)):
            if sign * value >= sign * limit:
                return name
        return "missed"

    def show(self, value: float | None) -> str:
        """A number as this target is written."""
        if value is None:
            return "-"
        if self.what in (BOUND, READING):
            return f"{100 * value:.0f}%"
        return f"{value:.1f} us" if self.what == MICROSECONDS else f"{value:.0f} TFLOP/s"


RATE, BOUND, READING = "TFLOP/s", "share of the bound", "share of reading the weights"
MICROSECONDS = "us"
TARGETS: dict[str, Target] = {
    "Qwen3-30B forward": Target(RATE, 500, 500),
    "Qwen3-30B forward+backward": Target(RATE, 415, 415),
    "Mixtral forward": Target(RATE, 620, 620),
    "Mixtral, one rank of 8": Target(BOUND, 0.75, 0.75),
    "Qwen3-30B, one rank of 8": Target(BOUND, 0.55, 0.65),
    "decode": Target(READING, 0.80, 0.80),
    "index": Target(MICROSECONDS, 12, 12),
    "memory": Target(BOUND, 0.85, 0.85),
    "launch": Target(MICROSECONDS, 10, 5),
}


def share(model: Model, tokens: int, ranks: int = 1, routing: Routing = "uniform") -> Workload:
    """The bfloat16 work of the first of `ranks` ranks."""
    local = model.experts // ranks
    return Workload(model, tokens, torch.bfloat16, routing, local_experts=local)


def _layer() -> Iterator[DeviceCase]:
    def layer(model: Model, tokens: int, target: str, ranks: int = 1, step: bool = False) -> None:
        work = share(model, tokens, ranks)
        found.append(DeviceCase("expert_ffn", work, ranks, step, LAYER, target))

    found: list[DeviceCase] = []
    layer(QWEN3_30B, 32768, "Qwen3-30B forward")
    layer(QWEN3_30B, 32768, "Qwen3-30B forward+backward", step=True)
    layer(MIXTRAL, 8192, "Mixtral forward")
    layer(MIXTRAL, 8192, "Mixtral, one rank of 8", 8)
    layer(QWEN3_30B, 8192, "Qwen3-30B, one rank of 8", 8)
    layer(QWEN3_30B, 16, "decode")
    layer(MIXTRAL, 16, "decode")
    return iter(found)


def _target(name: str, tokens: int, ranks: int) -> str:
    if name == "expert_index" and (tokens, ranks) == (8192, 1):
        return "index"
    if name in PRODUCTS or ranks > 1:
        return ""
    if tokens <= 16:
        return "launch"
    # A router's bytes take less time than launching it, however many tokens there are here.
    return "memory" if name in MOVED and tokens >= 8192 else ""


def _operators() -> Iterator[DeviceCase]:
    """Every operator at the shapes that targets are set at."""
    shapes = ((QWEN3_30B, 8192, 1), (QWEN3_30B, 32768, 1), (QWEN3_30B, 8192, 8),
              (QWEN3_30B, 16, 1), (MIXTRAL, 8192, 1), (MIXTRAL, 8192, 8))  # fmt: skip
    for model, tokens, ranks in shapes:
        for name in OPERATORS_TIMED:
            # Routers see all tokens and all experts on every rank.
            if name in ROUTER and ranks > 1:
                continue
            # The layer's shapes have T=32768; the other operators are as far from a cache at 8192.
            if name in PRODUCTS and model == QWEN3_30B and (tokens, ranks) == (8192, 1):
                continue
            target = _target(name, tokens, ranks)
            yield DeviceCase(name, share(model, tokens, ranks), ranks, target=target)


def _more() -> Iterator[DeviceCase]:
    """What is measured if there is time."""
    for model, tokens, ranks, step in (
        (OLMOE, 8192, 1, False),
        (OLMOE, 8192, 1, True),
        (OLMOE, 16, 1, False),
        (MIXTRAL, 8192, 1, True),
        (QWEN3_30B, 8192, 8, True),
        (MIXTRAL, 8192, 8, True),
        (QWEN3_30B, 8192, 1, False),
        (QWEN3_30B, 2048, 1, False),
        (QWEN3_30B, 256, 1, False),
        (QWEN3_30B, 1, 1, False),
    ):
        yield DeviceCase("expert_ffn", share(model, tokens, ranks), ranks, step, MORE)
    for routing in ("balanced", "zipf"):
        work = share(QWEN3_30B, 32768, 1, routing)
        yield DeviceCase("expert_ffn", work, group=MORE)
    yield DeviceCase("route", share(DEEPSEEK_V3, 8192), group=MORE)
    for model, tokens in ((MIXTRAL, 16), (OLMOE, 8192)):
        for name in OPERATORS_TIMED:
            target = _target(name, tokens, 1)
            yield DeviceCase(name, share(model, tokens), group=MORE, target=target)


def cases(group: str = "") -> list[DeviceCase]:
    """The cases of one group, or all of them, the most important first."""
    found = [*_layer(), *_operators(), *_more()]
    return [each for each in found if group in ("", each.group)]


def uncovered() -> list[str]:
    """Operators of the family that no case times, by themselves or through a composite."""
    timed = {each.operator for each in cases()}
    timed |= {name.removesuffix("_forward") for name in timed}
    family = {name for name, op in OPERATORS.items() if op.family == "expert_slice"}
    return sorted(family - timed)
