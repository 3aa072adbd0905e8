"""The page of `python -m ppmoe_ops.bench roofline`: bounds and predictions, and what was measured.

A device run that is stored as a JSON file in the folder `results` fills the last column.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import device_cases as device
from . import roofline, roofline_model, units
from .device_cases import DeviceCase
from .result import table
from .roofline import Prediction
from .roofline_model import ASSUMED, H200, Machine, Step

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "roofline-expert_slice.md"
CPU_REPORT = "cpu-epyc-2-threads.json"
NOT_RUN = "not yet run on a GPU"
LOADS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048)

INTRO = (
    "Written by `python -m ppmoe_ops.bench roofline`. **Bounds** are counted from shapes and ids: "
    "FLOPs over the rate of a dense product, or the fewest bytes over the rate of a copy, the "
    "longer of the two. **Predictions** add what is expected to cost time, by the assumptions "
    "below. They are written down before any run so that a run can prove them wrong; nothing but a "
    "column 'Measured' was measured on a GPU.",
    "bfloat16, SwiGLU, uniformly random routing unless a row says otherwise. R ranks hold E / R "
    "experts each and the first is counted. `expert_ffn` is the layer from the router's ids on, "
    "`expert_index` included; the other operators are called directly. `bash bench/device.sh` "
    "measures these cases on a GPU in eight minutes; its `device.json`, stored in this folder, "
    "fills the column when the page is written again.",
)
WHY = {
    "launch": "from the end of one kernel to the first bytes of the next inside a CUDA graph: the "
    "dependency, the blocks' start and their first loads",
    "mainloop": "share of the dense rate in a product's inner loop: one set of warps loads, "
    "multiplies and waits, where the dense product has warps for each",
    "gathered": "the same where rows come through an index: the copy engine cannot load them, and "
    "rows of a tile lie in different pages",
    "gradient": "the same for weight gradients: both operands are read across the rows that are "
    "summed, one of them gathered, with a mask at the expert's last rows, and sums are short",
    "fill": "of a tile before its first product: finding the expert, then the first loads. Where "
    "one program is on a multiprocessor nothing hides it, nor the writing of the tile",
    "stream": "share of copy bandwidth of a kernel that moves rows through an index",
    "few": "share of copy bandwidth of a product with few rows, which reads weights and little "
    "else",
}
READING = (
    "A launch that takes longer than predicted by more than a tenth is the place to look, before "
    "anything is changed. By the prediction, most of a layer's time above its bound is the inner "
    "loop where an expert has thousands of rows, so a low rate with full tiles means the loop (its "
    "instructions, its loads), not the schedule. With hundreds of rows an expert, as on one rank "
    "of eight, tiles and waves matter as much: there another tile is the first thing to try. In "
    "decode the weights are read once whatever the tile is, so the loads in flight decide. The "
    "small operators are a launch or two: the number of launches is their time.",
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A stored device run: its GPU, and seconds by the keys of cases."""

    name: str
    seconds: Mapping[str, float]


def device_run(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The newest device run among the results, if any."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data.get("kind") == "device" and data.get("device") == "cuda":
            found.append((data["facts"].get("Date", ""), path.name, data))
    return max(found, key=lambda each: each[:2])[2] if found else None


def stored(folder: Path = RESULTS) -> Measured | None:
    """What that run measured of the cases here."""
    data = device_run(folder)
    if data is None:
        return None
    # After tuning, and by a baseline, are other kernels than the prediction is about.
    seconds = {
        row["key"]: row["seconds"]["median"]
        for row in data["rows"]
        if row.get("seconds") and not row.get("tuned") and not row.get("peer")
    }
    return Measured(data["facts"]["GPU"], seconds)


def this_cpu(folder: Path = RESULTS) -> Machine | None:
    """The CPU of the stored report, by the ceilings that it measured."""
    path = folder / CPU_REPORT
    if not path.is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    copies = max(data["ceilings"]["copies"], key=lambda copy: copy["nbytes"])
    facts, size = data["facts"], units.size(copies["nbytes"])
    name = f"{facts['Processor'].split(',')[0]}, {facts['Threads'].split()[0]} cores"
    source = f"best dense bfloat16 product and copy of {size} in {CPU_REPORT}"
    gemm = data["ceilings"]["gemm"]["bfloat16"]
    return Machine(name, gemm, copies["bytes_per_second"], source)


def microseconds(seconds: float) -> str:
    """Time in microseconds, in three digits where there are no more."""
    return units.digits(1e6 * seconds)


def _time(case: DeviceCase, measured: Measured | None) -> float | None:
    return measured.seconds.get(case.key) if measured else None


def _was(case: DeviceCase, measured: Measured | None) -> str:
    came = _time(case, measured)
    return NOT_RUN if came is None else f"{microseconds(came)} us"


def _machines(machines: Iterable[Machine]) -> str:
    lines = [
        [each.name, f"{units.digits(each.flops / 1e12)} TFLOP/s",
         f"{units.digits(each.bandwidth / 1e12)} TB/s", each.source]
        for each in machines
    ]  # fmt: skip
    return table(["Machine", "Dense bfloat16", "Copy", "Where the figures come from"], lines)


def _assumptions() -> str:
    lines = []
    for name, value in dataclasses.asdict(ASSUMED).items():
        shown = f"{microseconds(value)} us" if name in ("launch", "fill") else units.percent(value)
        lines.append([name, shown, WHY[name]])
    return table(["Assumption", "Value", "Of what, and why"], lines)


def _targets(found: Sequence[Prediction], measured: Measured | None) -> str:
    lines = []
    for each in found:
        if not each.case.target:
            continue
        target = device.TARGETS[each.case.target]
        came = _time(each.case, measured)
        expected = each.held_to(each.seconds())
        held = None if came is None else each.held_to(came)
        lines.append([
            f"`{each.case.operator}`", each.case.label, target.what, target.show(target.must),
            target.show(target.aim), target.show(each.held_to(each.bound()[0])),
            f"{target.show(expected)} ({target.verdict(expected)})",
            NOT_RUN if held is None else f"{target.show(held)} ({target.verdict(held)})",
        ])  # fmt: skip
    head = ["Operator", "Shape", "Target", "Must", "Aim", "At the bound", "Predicted", "Measured"]
    return table(head, lines)


def _bounds(found: Sequence[Prediction], cpu: Machine | None) -> str:
    lines = []
    for each in found:
        seconds, by = each.bound()
        on_cpu = units.seconds(each.bound(cpu)[0]) if cpu else units.NONE
        lines.append([
            f"`{each.case.operator}`", each.case.label,
            units.giga(each.flops) if each.flops else units.NONE, units.digits(each.nbytes / 1e6),
            f"{microseconds(seconds)} ({by})", on_cpu,
        ])  # fmt: skip
    head = ["Operator", "Shape", "GFLOP", "Fewest MB", "Bound on an H200, us", "Bound on this CPU"]
    return table(head, lines)


def _predictions(found: Sequence[Prediction], measured: Measured | None) -> str:
    lines = []
    for each in found:
        seconds = each.seconds()
        if each.flops:
            rate = f"{units.digits(each.flops / seconds / 1e12)} TFLOP/s"
        else:
            rate = f"{units.digits(each.nbytes / seconds / 1e12)} TB/s"
        tiled = each.flops > 0
        lines.append([
            f"`{each.case.operator}`", each.case.label, str(len(each.steps)),
            units.digits(each.moved / 1e6), microseconds(each.by_launch()),
            units.percent(each.useful) if tiled else units.NONE,
            units.percent(each.waves) if tiled else units.NONE,
            microseconds(seconds), rate, units.percent(each.bound()[0] / seconds),
            _was(each.case, measured),
        ])  # fmt: skip
    head = ["Operator", "Shape", "Launches", "MB moved", "Bound of the launches, us",
            "Useful in tiles", "Useful in waves", "Predicted, us", "Predicted rate",
            "Predicted share of the bound", "Measured"]  # fmt: skip
    return table(head, lines)


def _launches(each: Prediction) -> str:
    def line(step: Step) -> list[str]:
        cut, tiled = step.tiling, step.tiling is not None
        return [
            step.name,
            units.giga(step.flops) if step.flops else units.NONE,
            units.digits(step.nbytes / 1e6),
            f"{cut.rows} x {cut.columns} x {cut.depth}" if cut else units.NONE,
            f"{step.tiles:,.0f}" if tiled else units.NONE,
            units.percent(step.useful) if tiled else units.NONE,
            units.percent(step.waves(H200)) if tiled else units.NONE,
            microseconds(H200.bound(step.flops, step.nbytes)[0]),
            microseconds(step.predicted(H200)),
        ]

    head = ["Launch", "GFLOP", "MB", "Tile", "Tiles", "Useful in tiles", "Useful in waves",
            "Bound, us", "Predicted, us"]  # fmt: skip
    return table(head, [line(step) for step in each.steps])


def _heights(found: Sequence[Prediction]) -> str:
    """Useful rows of each tile height in use, over random routing of so many rows an expert."""
    heights = sorted({step.tiling.rows for each in found for step in each.steps
                      if step.tiling and "gradient" not in step.name})  # fmt: skip
    experts = 128
    lines = []
    for height in heights:
        shares = (roofline_model.useful_rows(load * experts, 1 / experts, height) for load in LOADS)
        lines.append([str(height), *map(units.percent, shares)])
    return table(["Tile height", *(f"{load} rows" for load in LOADS)], lines)


def render(folder: Path = RESULTS, runs: Path | None = None) -> str:
    """The whole page, of the CPU's report in `folder` and the device runs in `runs`."""
    found = [roofline.predict(case) for case in device.cases()]
    measured, cpu = stored(runs or folder), this_cpu(folder)
    ran = f"Measured on {measured.name}." if measured else "**No row was run on a GPU yet.**"
    layers = [each for each in found if each.case.group == device.LAYER]
    parts = [
        "# Expert slicing: bounds and predictions",
        *INTRO,
        ran,
        "## Ceilings",
        _machines([H200, *([cpu] if cpu else [])]),
        "## What a prediction assumes",
        _assumptions(),
        "## Targets",
        "Those in microseconds at T=16 stand for two launches, of which nothing but their number "
        "can be changed.",
        _targets(found, measured),
        "## Where the time of the layer should go",
    ]
    for each in layers:
        parts += [f"### {each.case.label}", _launches(each)]
    parts += [
        "## How to read a run",
        *READING,
        "## Rows of a tile that hold a token",
        "Expected over random routing of so many rows an expert, 128 experts, for the tile heights "
        "in use.",
        _heights(found),
        "## Bounds",
        _bounds(found, cpu),
        "## Predictions",
        _predictions(found, measured),
    ]
    return "\n\n".join(parts) + "\n"


def run(out: Path | None, runs: Path = RESULTS) -> int:
    """Write the page into `out`, or among the results of a source tree."""
    folder = out if out is not None else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(render(runs=runs), encoding="utf-8")
    print(f"written: {folder / NAME}")
    return 0
