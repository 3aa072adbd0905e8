"""One step of `device.py`, in a process of its own; writes JSON."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
FAMILY = "expert_slice"  # has rows of its own, in `device_rows.py`


def build() -> None:
    """Compile the CUDA library with nvcc alone, from the list that setup.py builds from."""
    sys.path.insert(0, str(ROOT / "csrc"))
    kernels = importlib.import_module("build")
    nvcc = kernels.nvcc_path()
    if nvcc is None:
        raise SystemExit("no nvcc: set CUDA_HOME")
    root = Path(torch.__file__).parent
    command = [str(nvcc), *kernels.CUDA_FLAGS, *kernels.gencode_flags(kernels.cuda_archs())]
    command += ["--threads=0", "-shared", f"-I{kernels.CSRC / 'include'}"]
    command += [f"-isystem={root / 'include'}", "-o", str(ROOT / "ppmoe_ops" / "_C_cuda.so")]
    command += [str(kernels.CSRC / source) for source in kernels.CUDA_SOURCES]
    subprocess.run([*command, f"-L{root / 'lib'}", "-ltorch_cpu"], check=True)


def ceilings(device: torch.device) -> dict[str, Any]:
    """The machine, its copy rates and its dense bfloat16 products."""
    from ppmoe_ops.benchmarks import machine, timer

    found = timer.measure_ceilings(device, (torch.bfloat16,), timer.clock_for(device))
    return {"facts": machine.facts(device), "ceilings": dataclasses.asdict(found)}


def calls(device: torch.device) -> dict[str, float]:
    """Host seconds of a call whose work is nothing, launches included."""
    from ppmoe_ops.benchmarks import inputs, timer

    clock = timer.HostClock(device)
    x = torch.ones(1, device=device)
    candidates: dict[str, Callable[[], Any]] = {"x.mul(1)": lambda: x.mul(1)}
    for name in ("expert_index", "slice_rows", "merge_rows", "grouped_linear"):
        args = inputs.build(name, inputs.Workload(inputs.TINY, 1), device)
        overload = getattr(torch.ops.ppmoe_ops, name).default
        candidates[name] = functools.partial(overload, *args)
    for call in candidates.values():
        for _ in range(20):
            call()
    result = timer.interleave(candidates, clock=clock, seconds=3.0)
    return {name: result.timing(name).median for name in candidates}


def operators(device: torch.device) -> dict[str, Any]:
    """Operators of other families with kernels for the device; of all, why some have none."""
    from ppmoe_ops import _backends, _library

    served, unserved = [], {}
    for name, choice in _backends.choices().items():
        backend = choice[device.type].backend
        if backend in ("cuda", "triton", "cpp"):
            served.append(name)
        else:
            unserved[name] = "; ".join(choice[device.type].missing.values())
    # A composite is timed where its forward operator is.
    for name, op in _library.OPERATORS.items():
        if op.composite and f"{name}_forward" in served:
            served.append(name)
    served = [name for name in served if _library.OPERATORS[name].family != FAMILY]
    return {"operators": served, "unserved": unserved}


def rows(
    group: str, peer: str, device: torch.device, seconds: float, out: Path, kept: float = 0.4
) -> dict[str, Any]:
    """Rows of expert slicing: a group's, or a baseline's on the layer. Stops when time is up."""
    from ppmoe_ops.benchmarks import device_rows, plain_moe_peers

    ends = time.monotonic() + seconds
    found: dict[str, Any] = {"rows": []}
    for case in device_rows.wanted(group, device):
        if peer and case.operator != "expert_ffn":
            continue
        if time.monotonic() > ends:
            row = device_rows.DeviceRow(case.key, case.operator, case.label, peer or "-")
            row.refused = "not run: out of time"
        elif peer:
            row = device_rows.compare(case, plain_moe_peers.peer(peer), device, kept)
        else:
            row = device_rows.measure(case, device, kept)
        found["rows"].append(dataclasses.asdict(row) | {"peer": peer})
        # Kept after every row: the next one may break the device.
        out.write_text(json.dumps(found))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def peers(device: torch.device) -> dict[str, Any]:
    """Names of the baselines."""
    from ppmoe_ops.benchmarks import device_cases, plain_moe_peers

    return {
        "peers": [each.name for each in plain_moe_peers.PEERS],
        "groups": list(device_cases.GROUPS),
    }


def operator(
    name: str, device: torch.device, ceilings_json: str, seconds: float, out: Path
) -> dict[str, Any]:
    """Rows of one operator of another family; each is checked before it is timed."""
    from ppmoe_ops.benchmarks import harness, timer

    known = json.loads(ceilings_json or "{}")
    roofs = None
    if known:
        copies = [timer.CopyRate(**each) for each in known["copies"]]
        roofs = timer.Ceilings(copies, known["gemm"])
    clock = timer.clock_for(device)
    ends = time.monotonic() + seconds
    found: dict[str, Any] = {"rows": []}
    for case in harness.cases(quick=True, operators=[name]):
        if time.monotonic() > ends:
            row = harness.Row(name, case.label, case.dtype, "-", refused="not run: out of time")
        else:
            row = harness.measure(case, device, clock, seconds=0.4)
            if roofs is not None:
                harness.relate([row], roofs)
        plain = dataclasses.asdict(row)
        found["rows"].append(plain | {"flop_rate": row.flop_rate, "byte_rate": row.byte_rate})
        # Kept after every row: the next one may break the device.
        out.write_text(json.dumps(found))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def main() -> None:
    steps = ("build", "ceilings", "calls", "list", "peers", "operator", "rows")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=steps)
    parser.add_argument("name", nargs="?", default="", help="an operator, or a group of rows")
    parser.add_argument("--peer", default="", help="a baseline instead of the operator itself")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ceilings", default="")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kept", type=float, default=0.4, help="seconds of timing a row")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    if given.step == "build":
        build()
        return
    device = torch.device(given.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if given.step == "operator":
        found = operator(given.name, device, given.ceilings, given.seconds, given.json)
    elif given.step == "rows":
        found = rows(given.name, given.peer, device, given.seconds, given.json, given.kept)
    else:
        plain = {"ceilings": ceilings, "calls": calls, "list": operators, "peers": peers}
        found = plain[given.step](device)
    given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
