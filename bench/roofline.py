"""What each operator of expert slicing must take at least, and what it is expected to take.

Everything here is counted from shapes and from the routing's ids; nothing runs. FLOPs are those of
local slots; the fewest bytes are the contracts' own (`OPERATORS[...].nbytes`). The bytes of the
launches of `expert_ffn` add up to what its kernels move. With W the weights of experts that have
rows and N local slots: forward W + N H (gathered) + 2 N F (the activation, out and in) + 2 N H
(expert outputs, out and in) + T H, and 2 N F more where a backward follows; backward 5 N H + 10 N F
+ W + T H and the gradients of weights.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops._library import OPERATORS

from . import device_cases as device
from . import expert_ffn_cases as ffn
from . import inputs, roofline_model
from .device_cases import DeviceCase
from .inputs import Workload
from .roofline_model import ASSUMED, H200, Machine, Step, Tiling

META = torch.device("meta")
ALONE_SLOTS, INVERTED_SLOTS = 4096, 8192
"""Up to so many, expert_index and the inverse of slots each need one launch."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One case, counted.

    Attributes:
        flops, nbytes: executed, and the fewest that any implementation moves.
        read: bytes of the weights of experts that have rows.
        steps: its launches.
    """

    case: DeviceCase
    flops: float
    nbytes: float
    read: float
    steps: tuple[Step, ...]

    @property
    def moved(self) -> float:
        """Bytes that the launches move together."""
        return sum(step.nbytes for step in self.steps)

    def seconds(self) -> float:
        """What it is expected to take on an H200."""
        return roofline_model.predicted(self.steps, H200)

    def bound(self, machine: Machine = H200) -> tuple[float, str]:
        """Seconds that any implementation needs at least on `machine`, and for what."""
        return machine.bound(self.flops, self.nbytes)

    def by_launch(self, machine: Machine = H200) -> float:
        """The bound of these launches, one after the other."""
        return roofline_model.by_launch(self.steps, machine)

    def held_to(self, seconds: float) -> float:
        """What the case's target says of a time: a rate, a share, or microseconds."""
        what = device.TARGETS[self.case.target].what
        if what == device.RATE:
            return self.flops / seconds / 1e12
        if what == device.MICROSECONDS:
            return 1e6 * seconds
        if what == device.READING:
            return self.read / H200.bandwidth / seconds
        return self.bound()[0] / seconds

    @property
    def useful(self) -> float:
        """Share of the products in tiles that somebody asked for; 1 where there are no tiles."""
        tiled = [step for step in self.steps if step.tiling is not None]
        done = sum(step.flops / step.useful for step in tiled)
        return sum(step.flops for step in tiled) / done if done else 1.0

    @property
    def waves(self) -> float:
        """Share of the processors' time that tiles fill, weighed by FLOPs."""
        tiled = [step for step in self.steps if step.tiling is not None]
        done = sum(step.flops / step.waves(H200) for step in tiled)
        return sum(step.flops for step in tiled) / done if done else 1.0


class _Rows:
    """Rows of a work's local experts, expected over random routing where that is uniform."""

    def __init__(self, work: Workload, offsets: Tensor) -> None:
        self.work = work
        self.counts = offsets.diff().tolist()
        self.odds = work.model.top_k / work.model.experts

    def tiles(self, height: int) -> tuple[float, float]:
        """Tiles of all experts, and the share of their rows that hold a slot."""
        if self.work.routing == "uniform":
            rows, tiles = roofline_model.tiles_of_random_rows(self.work.tokens, self.odds, height)
            rows, tiles = rows * self.work.local, tiles * self.work.local
        else:
            rows = float(sum(self.counts))
            tiles = float(sum(-(-count // height) for count in self.counts))
        return tiles, rows / (tiles * height) if tiles else 1.0


@functools.cache
def _tables() -> Any:
    """The configurations of the kernels; they need Triton to be imported."""
    return importlib.import_module("ppmoe_ops.kernels.expert_slice.configs")


def tiling(table: str, itemsize: int, load: float) -> Tiling:
    """The tile sizes that a launcher takes for `load` rows an expert."""
    launch = importlib.import_module("ppmoe_ops.kernels._launch")
    few = "few" if load <= launch.FEW else "some" if load <= launch.SOME else "many"
    config = getattr(_tables(), table)[itemsize][few]
    gradient = table == "WEIGHT_GRADIENT"
    rows, columns, depth = (
        (config.block_n, config.block_k, config.block_m)
        if gradient
        else (config.block_m, config.block_n, config.block_k)
    )
    return Tiling(rows, columns, depth, config.num_warps, config.num_stages, itemsize)


def _load(rows: int, experts: int) -> int:
    return -(-rows // max(experts, 1))


def product(
    name: str, rows: _Rows, total: int, reserved: int, width: int, depth: int, nbytes: float,
    efficiency: float = ASSUMED.mainloop, table: str = "LINEAR",
) -> Step:  # fmt: skip
    """Rows of all experts by weights [width, depth]."""
    work = rows.work
    cut = tiling(table, work.dtype.itemsize, _load(reserved, work.local))
    high, useful = rows.tiles(cut.rows)
    columns = -(-width // cut.columns)
    useful *= roofline_model.useful_columns(width, cut.columns)
    flops = 2.0 * total * width * depth
    return Step(name, flops, nbytes, cut, high * columns, useful, efficiency)


def gradient(
    name: str, rows: _Rows, total: int, reserved: int, width: int, depth: int, nbytes: float
) -> Step:
    """Gradients [width, depth] of every expert's weights, summed over its rows."""
    work = rows.work
    cut = tiling("WEIGHT_GRADIENT", work.dtype.itemsize, _load(reserved, work.local))
    _, useful = rows.tiles(cut.depth)
    useful *= roofline_model.useful_columns(width, cut.rows)
    useful *= roofline_model.useful_columns(depth, cut.columns)
    tiles = work.local * -(-width // cut.rows) * -(-depth // cut.columns)
    flops = 2.0 * total * width * depth
    return Step(name, flops, nbytes, cut, tiles, useful, ASSUMED.gradient)


def _index(work: Workload) -> list[Step]:
    slots = work.tokens * work.model.top_k
    args = inputs.build("expert_index", work, META)
    nbytes = OPERATORS["expert_index"].nbytes(*args)
    if slots <= ALONE_SLOTS:
        return [Step("index", nbytes=nbytes)]
    return [Step("count", nbytes=4 * slots), Step("place", nbytes=nbytes)]


def _inverse(work: Workload) -> list[Step]:
    slots = work.tokens * work.model.top_k
    if slots <= INVERTED_SLOTS:
        return [Step("inverse", nbytes=8 * slots)]
    return [Step("fill", nbytes=4 * slots), Step("inverse", nbytes=8 * slots)]


def _forward(work: Workload, offsets: Tensor, hit: int, save: bool) -> list[Step]:
    model, size = work.model, work.dtype.itemsize
    rows, total = _Rows(work, offsets), int(offsets[-1])
    reserved = work.tokens * min(model.top_k, work.local)
    hidden, width = model.hidden, model.width
    kept = 2 * total * width * size if save else 0
    up = (total * hidden + hit * 2 * width * hidden + total * width) * size + kept
    down = (total * width + hit * width * hidden + total * hidden) * size
    summed = (total + work.tokens) * hidden * size + 4 * work.tokens * model.top_k
    slots = work.tokens * model.top_k
    return [
        Step("inverse", nbytes=4 * slots),
        Step("plan", nbytes=12 * total),
        product(
            "gather, up, activation", rows, total, reserved, 2 * width, hidden, up, ASSUMED.gathered
        ),
        product("down", rows, total, reserved, hidden, width, down),
        Step("gather and sum", nbytes=summed),
    ]


def _backward(work: Workload, offsets: Tensor, hit: int) -> list[Step]:
    model, size = work.model, work.dtype.itemsize
    rows, total = _Rows(work, offsets), int(offsets[-1])
    reserved = work.tokens * min(model.top_k, work.local)
    hidden, width, slots = model.hidden, model.width, work.tokens * model.top_k
    inner = (total * hidden + 5 * total * width + hit * width * hidden) * size
    by_out = (total * (hidden + width) + work.local * width * hidden) * size
    by_in = (total * (hidden + 2 * width) + work.local * 2 * width * hidden) * size
    by_x = (total * (hidden + 2 * width) + hit * 2 * width * hidden) * size
    summed = (total + work.tokens) * hidden * size + 4 * slots
    return [
        Step("inverse", nbytes=4 * slots),
        Step("plan", nbytes=12 * total),
        product("into the activation", rows, total, reserved, width, hidden, inner,
                ASSUMED.gathered),
        gradient("gradient of w_out", rows, total, reserved, hidden, width, by_out),
        gradient("gradient of w_in", rows, total, reserved, 2 * width, hidden, by_in),
        product("into x", rows, total, reserved, hidden, 2 * width, by_x),
        Step("gather and sum", nbytes=summed),
    ]  # fmt: skip


def _linear(work: Workload, args: Any, nbytes: float) -> list[Step]:
    rows, offsets, weight = args[:3]
    total, (width, depth) = rows.size(0), weight.shape[1:]
    return [product("product", _Rows(work, offsets), total, total, width, depth, nbytes)]


def _linear_backward(work: Workload, args: Any, nbytes: float) -> list[Step]:
    _, rows, offsets, weight = args[:4]
    total, (width, depth) = rows.size(0), weight.shape[1:]
    cut, size = _Rows(work, offsets), work.dtype.itemsize
    moved = total * (width + depth) + int((offsets.diff() > 0).sum()) * width * depth
    rest = total * (width + depth) + weight.numel()
    return [
        product("into rows", cut, total, total, depth, width, moved * size),
        gradient("gradient of weight", cut, total, total, width, depth, rest * size),
    ]


def predict(case: DeviceCase) -> Prediction:
    """Count a case; needs no device, but the tile sizes need Triton."""
    work = case.work
    if case.operator.startswith("expert_ffn"):
        return _predict_ffn(case)
    args = inputs.build(case.operator, work, META)
    op = OPERATORS[case.operator]
    nbytes: float = op.nbytes(*args)
    builders: dict[str, Callable[[], list[Step]]] = {
        "expert_index": lambda: _index(work),
        "merge_rows": lambda: [*_inverse(work), Step("merge", nbytes=nbytes)],
        "slice_rows_backward": lambda: [*_inverse(work), Step("merge", nbytes=nbytes)],
        "router_losses_forward": lambda: [Step("rows", nbytes=nbytes), Step("sum", nbytes=4096)],
        "grouped_linear": lambda: _linear(work, args, nbytes),
        "grouped_linear_backward": lambda: _linear_backward(work, args, nbytes),
    }
    steps = builders.get(case.operator, lambda: [Step(case.operator, nbytes=nbytes)])()
    if case.operator in device.PRODUCTS:
        # The contract also counts weights of experts that have no rows.
        nbytes = min(nbytes, sum(step.nbytes for step in steps))
    return Prediction(case, op.flops(*args), nbytes, 0, tuple(steps))


def _predict_ffn(case: DeviceCase) -> Prediction:
    work, name = case.work, case.operator
    backward = inputs.build("expert_ffn_backward", work, META)
    forward = ffn.forward_args(backward)
    offsets, w_in, w_out = forward[2], forward[4], forward[6]
    hit = int((offsets.diff() > 0).sum())
    one = ffn.executed_flops(forward)
    save = case.step or name == "expert_ffn_forward"
    steps: list[Step] = []
    flops = nbytes = 0.0
    if name == "expert_ffn":
        steps += _index(work)
        nbytes += OPERATORS["expert_index"].nbytes(*inputs.build("expert_index", work, META))
    if name != "expert_ffn_backward":
        steps += _forward(work, offsets, hit, save)
        flops += one
        nbytes += OPERATORS["expert_ffn_forward"].nbytes(*forward, save)
    if case.step or name == "expert_ffn_backward":
        steps += _backward(work, offsets, hit)
        flops += 2 * one
        nbytes += OPERATORS["expert_ffn_backward"].nbytes(*backward)
    read = hit * (w_in[0].numel() + w_out[0].numel()) * work.dtype.itemsize
    nbytes = min(nbytes, sum(step.nbytes for step in steps))
    return Prediction(case, flops, nbytes, read, tuple(steps))
