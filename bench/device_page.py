"""The results page of device runs: what was measured on a GPU, or plainly that nothing was."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from . import device_cases as device
from . import device_table, roofline_page
from .result import table
from .roofline_page import NOT_RUN, RESULTS

NAME = "gpu-expert_slice.md"
COMMAND = (
    "`bash bench/device.sh` on a machine with an NVIDIA GPU builds, tests and measures all of this "
    "in eight minutes, without a network. `python -m ppmoe_ops.bench device reports/device.json` "
    "then stores the run and writes this page and the one of "
    f"[bounds and predictions]({roofline_page.NAME}) again."
)
METHOD = (
    "bfloat16. A time is device time in a CUDA graph: the graph holds many calls that take turns "
    "on the sets of inputs that a row names, and is replayed many times between two events; shown "
    "is the median over replays. Sets are copied until they are 256 MiB, so that no call finds its "
    "inputs in the L2 cache; where 32 sets are less than that, 'in L2' says so. A call in which "
    "the host waits, or that cannot be captured, is timed by events around it behind a write that "
    "evicts the cache, host gaps included.",
    "Every row is checked against the reference on the same inputs before it is timed, and called "
    "again for the same bits. 'Peak MiB' is the most that is allocated at once beyond the inputs, "
    "of what X, the pre-activation of local slots and the outputs add up to, + what is reserved "
    "beside that and never touched. 'dense' is the time of batched dense products of equal FLOPs "
    "relative to the row's, 'copy' that of a copy of as many bytes; 'waits' are host "
    "synchronisations of one call.",
    "A baseline is timed in a process of its own and only if its results are near the operator's. "
    "It gets ids as int64 and routing weights in bfloat16.",
)


def store(run: Path, folder: Path = RESULTS) -> Path:
    """Keep a run among the results, by its GPU's name; a rehearsal is refused."""
    data = json.loads(run.read_text(encoding="utf-8"))
    if data.get("kind") != "device" or data.get("device") != "cuda" or not data.get("rows"):
        raise ValueError(f"bench: {run} holds no rows of a GPU; allowed: device.json of a GPU run")
    name = re.sub(r"[^a-z0-9]+", "-", data["facts"]["GPU"].lower()).strip("-")
    target = folder / f"{name}-device.json"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run, target)
    return target


def _without_a_run() -> list[str]:
    held = [
        [f"`{case.operator}`", case.label, target.what, target.show(target.must),
         target.show(target.aim), NOT_RUN]
        for case in device.cases() if case.target
        for target in [device.TARGETS[case.target]]
    ]  # fmt: skip
    head = ["Operator", "Shape", "Target", "Must", "Aim", "Measured"]
    return [
        "**Nothing here was measured: no GPU could be had.** The kernels are compiled for their "
        "architectures and their code is tested on CPUs; how fast they are is not known.",
        "## Targets",
        table(head, held),
    ]


def _of_a_run(data: dict[str, Any]) -> list[str]:
    facts = [[name, value] for name, value in data["facts"].items()]
    ceilings = data["ceilings"]
    if ceilings:
        copies = max(ceilings["copies"], key=lambda each: each["nbytes"])
        facts.append(["Copy from memory", f"{copies['bytes_per_second'] / 1e12:.2f} TB/s"])
        for name, value in ceilings["gemm"].items():
            facts.append([f"Dense GEMM {name}", f"{value / 1e12:.0f} TFLOP/s"])
    own = [row for row in data["rows"] if not row.get("peer") and not row.get("tuned")]
    by_key = {row["key"]: row for row in own}
    peers = [device_table.peer_cells(row, by_key.get(row["key"]))
             for row in data["rows"] if row.get("peer") and row.get("seconds")]  # fmt: skip
    left_out = sorted({f"{row['by']}: {row['refused']}" for row in data["rows"]
                       if row.get("peer") and not row.get("seconds")})  # fmt: skip
    steps = [[each["name"], "passed" if each["passed"] else "FAILED", each["detail"][:200]]
             for each in data["steps"]]  # fmt: skip
    return [
        "## Measured on",
        table(["", ""], facts),
        "## Targets",
        table(device_table.TARGET_HEAD, device_table.target_cells(own)),
        *(f"- wrong: {each}" for each in device_table.problems(data["rows"])),
        "## Operators and the layer",
        table(device_table.ROW_HEAD, [device_table.row_cells(row) for row in own]),
        "## Baselines of the layer",
        table(device_table.PEER_HEAD, peers),
        *(f"- left out: {each}" for each in left_out),
        "## Steps",
        table(["Step", "", "Detail"], steps),
    ]


def render(folder: Path = RESULTS) -> str:
    """The whole page."""
    data = roofline_page.device_run(folder)
    parts = ["# Expert slicing on a GPU", *(_of_a_run(data) if data else _without_a_run())]
    parts += ["## How to measure", COMMAND, "## Method", *METHOD]
    return "\n\n".join(parts) + "\n"


def run(given: str, out: Path | None) -> int:
    """Store the run `given`, if any, and write the page."""
    folder = out if out is not None else RESULTS
    if given:
        print(f"stored: {store(Path(given), folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(render(folder), encoding="utf-8")
    print(f"written: {folder / NAME}")
    return roofline_page.run(out, folder) if given else 0
