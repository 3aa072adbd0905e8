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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TOKENS = (8192, 2048, 16)


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
    """Operators with kernels for the device, and why the others have none."""
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
    return {"operators": served, "unserved": unserved}


def cases(name: str, device: torch.device) -> Iterator[Any]:
    """Shapes of real models where the benchmark makes such; else its own quick cases."""
    from ppmoe_ops._library import OPERATORS
    from ppmoe_ops.benchmarks import harness, inputs

    if OPERATORS[name].family != "expert_slice":
        yield from harness.cases(quick=True, operators=[name])
        return
    module = importlib.import_module(f"ppmoe_ops.benchmarks.{OPERATORS[name].benchmark}")
    if device.type == "cpu":
        yield module.case(name, inputs.Workload(inputs.TINY, 64, torch.bfloat16))
        return
    for tokens in TOKENS:
        for model in (inputs.QWEN3_30B, inputs.OLMOE, inputs.MIXTRAL):
            yield module.case(name, inputs.Workload(model, tokens, torch.bfloat16))


def operator(
    name: str, device: torch.device, ceilings_json: str, seconds: float, out: Path
) -> dict[str, Any]:
    """Rows of one operator; each is checked before it is timed. Stops when its time is up."""
    from ppmoe_ops.benchmarks import harness, timer

    known = json.loads(ceilings_json or "{}")
    roofs = None
    if known:
        copies = [timer.CopyRate(**each) for each in known["copies"]]
        roofs = timer.Ceilings(copies, known["gemm"])
    clock = timer.clock_for(device)
    ends = time.monotonic() + seconds
    found: dict[str, Any] = {"rows": []}
    for case in cases(name, device):
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("build", "ceilings", "calls", "list", "operator"))
    parser.add_argument("operator", nargs="?", default="")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ceilings", default="")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    if given.step == "build":
        build()
        return
    device = torch.device(given.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if given.step == "operator":
        found = operator(given.operator, device, given.ceilings, given.seconds, given.json)
    else:
        found = {"ceilings": ceilings, "calls": calls, "list": operators}[given.step](device)
    given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
