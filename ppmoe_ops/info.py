"""`python -m ppmoe_ops.info`: versions, the build, this machine, and what serves each operator.

`--json` prints the same as JSON. `--matrix` prints the support matrix of README.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ppmoe_ops import _backends, _load
from ppmoe_ops._library import OPERATORS
from ppmoe_ops._version import __version__

NOT_BUILT = "no build record: the compiled parts were never built here (`pip install .` does it)"
DEVICES = ("cpu", "cuda")


def collect() -> dict[str, Any]:
    """Everything that `python -m ppmoe_ops.info` prints, as plain data.

    Example:
        >>> from ppmoe_ops import info
        >>> sorted(info.collect())
        ['backend_forced', 'build', 'cpu', 'gpu', 'operators', 'versions']
    """
    build = _load.build_info()
    return {
        "versions": {
            "ppmoe_ops": __version__,
            "torch": torch.__version__,
            "triton": _installed("triton"),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "build": {
            "compiler": build.get("compiler"),
            "summary": build.get("summary", []),
            "missing": None if build else NOT_BUILT,
            "directory": str(_load.library_directory()),
        },
        "cpu": _cpu(),
        "gpu": _gpu(),
        "backend_forced": _backends.forced(),
        "operators": {name: _operator(name) for name in sorted(OPERATORS)},
    }


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": _processor(),
        "threads": torch.get_num_threads(),
        "capability": None,
        "in_use": None,
        "built": [],
        "missing": None,
    }
    try:
        host = importlib.import_module("ppmoe_ops._host")
    except ImportError as error:
        facts["missing"] = f"ppmoe_ops._host does not import: {error}"
        return facts
    facts["capability"] = host.cpu_capability()
    facts["built"] = host.built_isas()
    try:
        facts["in_use"] = host.selected_isa()
    except ValueError as error:  # PPMOE_OPS_CPU_CAPABILITY names what this CPU does not have
        facts["missing"] = str(error)
    return facts


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if name:
            return name.group(1)
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    if torch.version.cuda is None:
        return {"devices": [], "missing": f"torch {torch.__version__} is a build without CUDA"}
    if not torch.cuda.is_available():
        return {"devices": [], "missing": "torch finds no GPU or no driver"}
    count = torch.cuda.device_count()
    return {"devices": [torch.cuda.get_device_name(each) for each in range(count)], "missing": None}


def _operator(name: str) -> dict[str, Any]:
    """Per device: the backend, and the reason for each one that would have come before it."""
    if OPERATORS[name].composite:
        return {"composite_of": f"{name}_forward"}
    chosen = _backends.choices()[name]
    return {
        device: {"backend": chosen[device].backend, "missing": dict(chosen[device].missing)}
        for device in DEVICES
    }


def report(facts: dict[str, Any]) -> str:
    """`facts` of `collect` as the text that a person reads."""
    return "\n".join(_lines(facts))


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    versions = facts["versions"]
    yield f"ppmoe_ops {versions['ppmoe_ops']}"
    yield ""
    yield "versions"
    yield from _table(
        [[key, value or "not installed"] for key, value in versions.items() if key != "ppmoe_ops"]
    )
    yield ""
    yield "build"
    build = facts["build"]
    yield from (f"  {line}" for line in build["summary"] or [build["missing"]])
    yield ""
    yield "machine"
    yield from _table([["cpu", _cpu_line(facts["cpu"])], ["gpu", _gpu_line(facts["gpu"])]])
    yield ""
    forced = facts["backend_forced"]
    yield "what serves each operator" + (f" ({_backends.VARIABLE}={forced})" if forced else "")
    yield from _table(_operator_rows(facts["operators"]))
    reasons = list(_reasons(facts["operators"]))
    if reasons:
        yield ""
        yield "why a backend is missing"
        yield from (f"  {line}" for line in reasons)


def _cpu_line(cpu: dict[str, Any]) -> str:
    start = f"{cpu['name']}, {cpu['threads']} threads"
    if cpu["in_use"] is None:
        return f"{start}; {cpu['missing']}"
    built = ", ".join(cpu["built"])
    return f"{start}; kernels use {cpu['in_use']} (best here {cpu['capability']}; built {built})"


def _gpu_line(gpu: dict[str, Any]) -> str:
    return ", ".join(gpu["devices"]) or f"none: {gpu['missing']}"


def _operator_rows(operators: dict[str, Any]) -> Iterator[list[str]]:
    yield ["operator", *(f"{device} tensors" for device in DEVICES)]
    for name, entry in operators.items():
        if "composite_of" in entry:
            yield [name, f"through {entry['composite_of']}"]
        else:
            yield [name, *(entry[device]["backend"] or "refused" for device in DEVICES)]


def _reasons(operators: dict[str, Any]) -> Iterator[str]:
    """One line for each device, backend and reason, with the operators it holds for."""
    having: dict[tuple[str, str, str], list[str]] = {}
    served = [name for name, entry in operators.items() if "composite_of" not in entry]
    for name in served:
        for device in DEVICES:
            for backend, reason in operators[name][device]["missing"].items():
                having.setdefault((device, backend, reason), []).append(name)
    for (device, backend, reason), names in sorted(having.items()):
        whom = "all operators" if len(names) == len(served) else ", ".join(names)
        yield f"{backend} for {device} tensors: {reason}"
        yield from textwrap.wrap(f"({whom})", 92, initial_indent="    ", subsequent_indent="     ")


def _table(rows: Any) -> Iterator[str]:
    """Rows in columns, two spaces in; a short last cell does not widen its column."""
    rows = [list(row) for row in rows]
    most = max(map(len, rows))
    widths = [
        max((len(row[i]) for row in rows if len(row) == most), default=0) for i in range(most)
    ]
    widths[0] = max(len(row[0]) for row in rows)
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  " + "  ".join(cells).rstrip()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ppmoe_ops.info",
        description="Versions, the build, this machine, and what serves each operator.",
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print the same as JSON")
    shape.add_argument(
        "--matrix", action="store_true", help="print the support matrix (in a source tree)"
    )
    options = parser.parse_args(arguments)
    if options.matrix:
        from ppmoe_ops import _matrix

        try:
            text = _matrix.markdown()
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            return 1
    else:
        facts = collect()
        text = json.dumps(facts, indent=2) if options.json else report(facts)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
