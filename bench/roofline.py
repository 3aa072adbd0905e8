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
LINEAR, GRADIENT = "LINEAR", "WEIGHT_GRADIENT"
INTO, OUT_OF, ACTIVATION_GRADIENT = "INTO", "OUT_OF", "ACTIVATION_GRADIENT"
# The layer chooses from the same table of weight gradients by other loads.
OF_THE_LAYER = "the layer's "
FFN_GRADIENT = f"{OF_THE_LAYER}{GRADIENT}"
LAYER_TABLES = (INTO, OUT_OF, ACTIVATION_GRADIENT, FFN_GRADIENT)
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
    """Rows of a work's local experts; tiles are expected ones where routing is uniform."""

    def __init__(self, work: Workload, offsets: Tensor) -> None:
        self.work = work
        self.counts = offsets.diff().tolist()
        self.total = int(offsets[-1])
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


def _module(name: str) -> Any:
    """A module of the kernels; they need Triton to be imported."""
    return importlib.import_module(f"ppmoe_ops.kernels.{name}")


def _entry(table: str, itemsize: int, rows: int, experts: int) -> Any:
    """The configuration that a launcher takes for `rows` rows of all experts."""
    configs, launch = _module("expert_slice.configs"), _module("_launch")
    load = -(-rows // max(experts, 1))
    few, some = launch.FEW, launch.SOME
    if table in LAYER_TABLES:
        few, some = configs.FFN_FEW, configs.FFN_SOME
    name = "few" if load <= few else "some" if load <= some else "many"
    return getattr(configs, table.removeprefix(OF_THE_LAYER))[itemsize][name]


def tiling(table: str, itemsize: int, rows: int, experts: int, halves: int = 1) -> Tiling:
    """The tiles of a table for `rows` rows; with a gate, a tile has columns of both `halves`."""
    config = _entry(table, itemsize, rows, experts)
    knobs = config.num_warps, config.num_stages, itemsize
    if table.endswith("WEIGHT_GRADIENT"):
        return Tiling(config.block_n, config.block_k, config.block_m, *knobs)
    programs = None
    if table in LAYER_TABLES:
        # As `persistent` of the launchers has it.
        programs = 2 if config.num_warps <= 4 and config.block_m <= 64 else 1
    return Tiling(config.block_m, halves * config.block_n, config.block_k, *knobs, programs)


def product(
    name: str, rows: _Rows, table: str, reserved: int, width: int, depth: int, nbytes: float,
    *, halves: int = 1, edge: float = 1.0, efficiency: float = ASSUMED.mainloop,
) -> Step:  # fmt: skip
    """Rows of all experts by weights [halves * width, depth].

    `edge` is how many elements are moved for one of the tile's columns behind the inner loop.
    """
    work, size = rows.work, rows.work.dtype.itemsize
    cut = tiling(table, size, reserved, work.local, halves)
    high, useful = rows.tiles(cut.rows)
    tile = cut.columns // halves
    useful *= roofline_model.useful_columns(width, tile)
    flops = 2.0 * rows.total * halves * width * depth
    moved = cut.rows * tile * edge * size
    tiles = high * -(-width // tile)
    return Step(name, flops, nbytes, cut, tiles, useful, efficiency, moved)


def gradient(
    name: str, rows: _Rows, table: str, reserved: int, width: int, depth: int, nbytes: float
) -> Step:
    """Gradients [width, depth] of every expert's weights, summed over its rows."""
    work, size = rows.work, rows.work.dtype.itemsize
    cut = tiling(table, size, reserved, work.local)
    _, useful = rows.tiles(cut.depth)
    useful *= roofline_model.useful_columns(width, cut.rows)
    useful *= roofline_model.useful_columns(depth, cut.columns)
    tiles = work.local * -(-width // cut.rows) * -(-depth // cut.columns)
    flops = 2.0 * rows.total * width * depth
    moved = cut.rows * cut.columns * size
    return Step(name, flops, nbytes, cut, tiles, useful, ASSUMED.gradient, moved)


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


def _plan(work: Workload, rows: _Rows) -> list[Step]:
    slots = work.tokens * work.model.top_k
    filled = [Step("fill", nbytes=4 * slots)] if slots > INVERTED_SLOTS else []
    return [*filled, Step("plan", nbytes=8 * rows.total)]


def _summed(work: Workload, rows: _Rows) -> Step:
    moved = (rows.total + work.tokens) * work.model.hidden * work.dtype.itemsize
    return Step("gather and sum", nbytes=moved + 4 * work.tokens * work.model.top_k)


def _reserved(work: Workload) -> int:
    return work.tokens * min(work.model.top_k, work.local)


def _forward(work: Workload, rows: _Rows, hit: int, save: bool) -> list[Step]:
    hidden, width, size = work.model.hidden, work.model.width, work.dtype.itemsize
    total, reserved = rows.total, _reserved(work)
    kept = 2 * total * width if save else 0
    into = (total * hidden + hit * 2 * width * hidden + total * width + kept) * size
    out_of = (total * width + hit * width * hidden + total * hidden) * size
    return [
        *_plan(work, rows),
        product("gather, up, activation", rows, INTO, reserved, width, hidden, into,
                halves=2, edge=3 if save else 1, efficiency=ASSUMED.gathered),
        product("down", rows, OUT_OF, reserved, hidden, width, out_of),
        _summed(work, rows),
    ]  # fmt: skip


def _backward(work: Workload, rows: _Rows, hit: int) -> list[Step]:
    hidden, width, size = work.model.hidden, work.model.width, work.dtype.itemsize
    total, reserved = rows.total, _reserved(work)
    inner = (total * hidden + 5 * total * width + hit * width * hidden) * size
    by_out = (total * (hidden + width) + work.local * width * hidden) * size
    by_in = (total * (hidden + 2 * width) + work.local * 2 * width * hidden) * size
    by_x = (total * (hidden + 2 * width) + hit * 2 * width * hidden) * size
    into = product("into the activation", rows, ACTIVATION_GRADIENT, reserved, width, hidden,
                   inner, edge=5, efficiency=ASSUMED.gathered)  # fmt: skip
    assert into.tiling is not None
    parts = -(-width // into.tiling.columns)
    return [
        *_plan(work, rows),
        into,
        Step("gradient of routing weights", nbytes=4 * total * (parts + 2)),
        product("into x", rows, OUT_OF, reserved, hidden, 2 * width, by_x),
        _summed(work, rows),
        gradient("gradient of w_in", rows, FFN_GRADIENT, reserved, 2 * width, hidden, by_in),
        gradient("gradient of w_out", rows, FFN_GRADIENT, reserved, hidden, width, by_out),
    ]


def _linear(work: Workload, args: Any, nbytes: float) -> list[Step]:
    width, depth = args[2].shape[1:]
    rows = _Rows(work, args[1])
    return [product("product", rows, LINEAR, rows.total, width, depth, nbytes)]


def _linear_backward(work: Workload, args: Any, nbytes: float) -> list[Step]:
    _, _, offsets, weight = args[:4]
    width, depth = weight.shape[1:]
    rows, size = _Rows(work, offsets), work.dtype.itemsize
    total = rows.total
    moved = total * (width + depth) + int((offsets.diff() > 0).sum()) * width * depth
    rest = total * (width + depth) + weight.numel()
    return [
        product("into rows", rows, LINEAR, total, depth, width, moved * size),
        gradient("gradient of weight", rows, GRADIENT, total, width, depth, rest * size),
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
    rows, hit = _Rows(work, offsets), int((offsets.diff() > 0).sum())
    one = ffn.executed_flops(forward)
    save = case.step or name == "expert_ffn_forward"
    steps: list[Step] = []
    flops = nbytes = 0.0
    if name == "expert_ffn":
        steps += _index(work)
        nbytes += OPERATORS["expert_index"].nbytes(*inputs.build("expert_index", work, META))
    if name != "expert_ffn_backward":
        steps += _forward(work, rows, hit, save)
        flops += one
        nbytes += OPERATORS["expert_ffn_forward"].nbytes(*forward, save)
    if case.step or name == "expert_ffn_backward":
        steps += _backward(work, rows, hit)
        flops += 2 * one
        nbytes += OPERATORS["expert_ffn_backward"].nbytes(*backward)
    read = hit * (w_in[0].numel() + w_out[0].numel()) * work.dtype.itemsize
    nbytes = min(nbytes, sum(step.nbytes for step in steps))
    return Prediction(case, flops, nbytes, read, tuple(steps))
