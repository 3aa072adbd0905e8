"""The time model behind `roofline.py`: what a launch must do, and what it is expected to take.

A bound divides FLOPs by a measured rate, or bytes by a measured bandwidth, and nothing else. A
prediction adds what is known to cost time: launching, rows of a tile that nobody asked for, a last
wave that leaves processors idle, filling the pipeline of a tile and writing it out. Every number
that is assumed and not measured is a field of `Assumptions`, so a device run can prove it wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a machine reaches with plain dense products and copies.

    Attributes:
        name: for people.
        flops: a second, of dense bfloat16 products.
        bandwidth: bytes a second, of a large copy, read and written together.
        source: where the two come from.
        processors: multiprocessors that share tiles.
        shared_memory: bytes of each that tiles may have.
        threads: of each that can be resident.
    """

    name: str
    flops: float
    bandwidth: float
    source: str
    processors: int = 0
    shared_memory: int = 0
    threads: int = 2048

    def bound(self, flops: float, nbytes: float) -> tuple[float, str]:
        """Seconds that any implementation needs at least, and for what."""
        products, moving = flops / self.flops, nbytes / self.bandwidth
        return max(products, moving), "products" if products > moving else "bytes"


H200 = Machine(
    "H200", 790e12, 4.3e12,
    "measured on machines of this kind with PyTorch: 769 to 798 TFLOP/s for an 8192^3 bfloat16 "
    "product of random values, 4.3 TB/s for a copy of 8.6 GB, bytes read and written together",
    processors=132, shared_memory=227 << 10,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a prediction assumes beyond the bound. None of it has been measured.

    Attributes:
        launch: seconds from the end of one kernel to the first bytes of the next, in a graph.
        mainloop: share of the dense rate in the inner loop of a product from Triton, without warp
            specialisation.
        gathered: the same where rows are gathered through an index.
        gradient: the same for a weight gradient, whose operands are both read along their rows.
        fill: seconds of a tile before its first product: finding it, and the first loads.
        stream: share of copy bandwidth of a kernel that moves rows.
        few: share of copy bandwidth of a product whose tiles have few rows.
    """

    launch: float = 2.5e-6
    mainloop: float = 0.85
    gathered: float = 0.80
    gradient: float = 0.65
    fill: float = 1.0e-6
    stream: float = 0.90
    few: float = 0.85


ASSUMED = Assumptions()


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a grouped product is cut.

    Attributes:
        rows, columns, depth: of a tile: out tiles are rows x columns, the loop runs by depth.
        warps, stages: of a program, and of its pipeline.
        element: bytes of an operand's element.
        programs: that a persistent grid starts on a multiprocessor; None if the grid is as large
            as there are tiles.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    element: int = 2
    programs: int | None = None

    def resident(self, machine: Machine) -> int:
        """Programs that a multiprocessor holds at once, by registers, shared memory, threads."""
        needed = (self.rows + self.columns) * self.depth * self.element * self.stages
        by_threads = machine.threads // (32 * self.warps)
        # An accumulator of fp32 takes at most the registers that 64K of them leave.
        by_registers = max(1, (1 << 16) // (2 * self.rows * self.columns))
        most = max(1, min(machine.shared_memory // needed, by_threads, by_registers))
        return most if self.programs is None else min(most, self.programs)


@functools.cache
def tiles_of_random_rows(tokens: int, odds: float, height: int) -> tuple[float, float]:
    """Expected rows and expected tiles of one expert that each token picks with `odds`.

    The number of rows is binomial; terms more than ten deviations out are left out.
    """
    mean = tokens * odds
    if tokens == 0 or odds <= 0:
        return 0.0, 0.0
    if odds >= 1:
        return float(tokens), float(math.ceil(tokens / height))
    reach = 10 * math.sqrt(mean * (1 - odds)) + 10
    low, high = max(0, math.floor(mean - reach)), min(tokens, math.ceil(mean + reach))
    whole = math.lgamma(tokens + 1)
    tiles = 0.0
    for rows in range(low, high + 1):
        ways = whole - math.lgamma(rows + 1) - math.lgamma(tokens - rows + 1)
        odds_of_rows = math.exp(ways + rows * math.log(odds) + (tokens - rows) * math.log1p(-odds))
        tiles += odds_of_rows * math.ceil(rows / height)
    return mean, tiles


def useful_rows(tokens: int, odds: float, height: int) -> float:
    """Share of the rows of all tiles that hold a token."""
    rows, tiles = tiles_of_random_rows(tokens, odds, height)
    return rows / (tiles * height) if tiles else 1.0


def useful_columns(width: int, tile: int) -> float:
    """Share of the columns of all tiles that are in the matrix."""
    return width / (math.ceil(width / tile) * tile)


def useful_waves(tiles: float, at_once: int) -> float:
    """Share of the processors' time that tiles fill, all of them taking equally long."""
    waves = math.ceil(tiles / at_once)
    return tiles / (waves * at_once) if waves else 1.0


@dataclasses.dataclass(frozen=True)
class Step:
    """One launch: what it must do, and how it is cut.

    Attributes:
        name: for people.
        flops, nbytes: executed and moved.
        tiling, tiles, useful: of a product: its tiles, and the share of their products that
            somebody asked for.
        efficiency: of a product, in its inner loop.
        edge: of a product: bytes that a tile moves behind its inner loop.
    """

    name: str
    flops: float = 0.0
    nbytes: float = 0.0
    tiling: Tiling | None = None
    tiles: float = 0.0
    useful: float = 1.0
    efficiency: float = 1.0
    edge: float = 0.0

    def waves(self, machine: Machine) -> float:
        """Share of the processors' time that its tiles fill."""
        if self.tiling is None:
            return 1.0
        return useful_waves(self.tiles, machine.processors * self.tiling.resident(machine))

    def predicted(self, machine: Machine, assumed: Assumptions = ASSUMED) -> float:
        """Seconds that it is expected to take in a graph."""
        if self.tiling is None or not self.flops:
            return assumed.launch + self.nbytes / (assumed.stream * machine.bandwidth)
        few = self.tiling.rows < 64
        moving = self.nbytes / ((assumed.few if few else assumed.stream) * machine.bandwidth)
        # What one multiprocessor needs for a tile: the loop, its start, and writing it out. Of
        # several programs on a multiprocessor, some start or write while another multiplies.
        rate = self.efficiency * machine.flops / machine.processors
        loop = self.flops / self.useful / self.tiles / rate
        whole = loop + assumed.fill + self.edge * machine.processors / machine.bandwidth
        tile = max(loop, whole / self.tiling.resident(machine))
        share = self.waves(machine)
        products = self.tiles * tile / machine.processors / share
        return assumed.launch + max(products, moving)


def predicted(steps: Sequence[Step], machine: Machine, assumed: Assumptions = ASSUMED) -> float:
    """Seconds of all launches, one after the other."""
    return sum(step.predicted(machine, assumed) for step in steps)


def by_launch(steps: Sequence[Step], machine: Machine) -> float:
    """The bound of these launches: each takes as long as its FLOPs or its bytes do."""
    return sum(machine.bound(step.flops, step.nbytes)[0] for step in steps)
