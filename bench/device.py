"""Builds, tests and measures the package on one GPU; run by `device.sh`.

Every step is a process of its own: one that fails, hangs or breaks the device is reported, and the
others still run. Results are printed as one table at the end and kept in device.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "device" / "site"
WORKER = Path(__file__).resolve().parent / "device_worker.py"
# A step may take this share of what is left of the time, and never more seconds than this.
BUILD, TESTS, CEILINGS, OPERATOR = (0.45, 200.0), (0.5, 150.0), (0.5, 60.0), (0.5, 90.0)


@dataclasses.dataclass
class Step:
    """What became of one step."""

    name: str
    passed: bool
    seconds: float
    detail: str = ""


@dataclasses.dataclass
class Session:
    """Everything that is written to device.json, and how long there is for it."""

    out: Path
    device: str
    ends: float
    environment: dict[str, str]
    steps: list[Step] = dataclasses.field(default_factory=list)
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    ceilings: dict[str, Any] = dataclasses.field(default_factory=dict)
    calls: dict[str, float] = dataclasses.field(default_factory=dict)
    unserved: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def save(self) -> None:
        """Write what is known so far; called after every step."""
        known = dataclasses.asdict(self)
        for name in ("out", "ends", "environment"):
            del known[name]
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "device.json").write_text(json.dumps(known, indent=1) + "\n")

    def run(
        self, name: str, command: Sequence[str], limit: tuple[float, float], **variables: str
    ) -> str:
        """Run a step and return what it printed; its last lines are its detail if it fails."""
        started = time.monotonic()
        share, most = limit
        allowed = max(5.0, min(most, share * (self.ends - started)))
        print(f"device: {name} (at most {allowed:.0f} s)", flush=True)
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**self.environment, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=allowed,
                check=False,
            )
            text, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as expired:
            raw = expired.stdout or b""
            text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
            text, code = f"{text}\nstopped after {allowed:.0f} s", -1
        except OSError as error:
            text, code = str(error), -1
        detail = "" if code == 0 else f"exit {code}: " + " / ".join(text.split("\n")[-6:])[-600:]
        self.steps.append(Step(name, code == 0, time.monotonic() - started, detail))
        if code != 0:
            print(f"device: {name} failed:\n{text[-2500:]}", flush=True)
        self.save()
        return text

    def work(self, name: str, limit: tuple[float, float], *arguments: str) -> dict[str, Any]:
        """Run a step of device_worker.py and return its JSON, empty if it gave none."""
        result = self.out / "device_step.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, str(WORKER), *arguments]
        self.run(name, [*command, "--device", self.device, "--json", str(result)], limit)
        if not result.is_file():
            return {}
        try:
            found: dict[str, Any] = json.loads(result.read_text())
        except json.JSONDecodeError:
            return {}
        finally:
            result.unlink(missing_ok=True)
        return found


def link_package() -> None:
    """Lay the source tree out as it is installed, by links: no pip is needed, nothing is copied."""
    package = SITE / "ppmoe_ops"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():
        old.unlink()
    for entry in (ROOT / "ppmoe_ops").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    (package / "benchmarks").symlink_to(ROOT / "bench")


def build(session: Session) -> None:
    """Build in place; where the build cannot run, compile the CUDA library alone with nvcc."""
    library = ROOT / "ppmoe_ops" / "_C_cuda.so"
    library.unlink(missing_ok=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    session.run("build", command, BUILD, PPMOE_OPS_CUDA="1")
    if not library.is_file():
        session.work("build with nvcc alone", BUILD, "build")
    if not library.is_file():
        print("device: no CUDA library; Triton kernels are measured all the same", flush=True)


def test(session: Session) -> None:
    """The gpu tier. Options of pyproject.toml are left out: they need plugins."""
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=line"]
    text = session.run("gpu tests", [sys.executable, "-m", "pytest", "tests/gpu", *options], TESTS)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", text)
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", text, re.MULTILINE)
    step = session.steps[-1]
    if counts:
        step.detail = ", ".join(counts) + (": " + ", ".join(failed[:12]) if failed else "")
    if len(failed) > 12:
        step.detail += f" and {len(failed) - 12} more"


def measure(session: Session) -> None:
    """Ceilings, call costs, then every operator that has kernels for the device."""
    found = session.work("ceilings", CEILINGS, "ceilings")
    session.facts = found.get("facts", {})
    session.ceilings = found.get("ceilings", {})
    session.calls = session.work("call cost", CEILINGS, "calls")
    listed = session.work("list of operators", CEILINGS, "list")
    session.unserved = listed.get("unserved", {})
    for operator in listed.get("operators", []):
        left = session.ends - time.monotonic()
        if left < 15:
            session.steps.append(Step(operator, False, 0.0, "not run: out of time"))
            continue
        rows = session.work(
            operator,
            OPERATOR,
            "operator",
            operator,
            "--ceilings",
            json.dumps(session.ceilings),
            "--seconds",
            str(max(10.0, min(0.4 * left, OPERATOR[1] - 15))),
        )
        session.rows += rows.get("rows", [])
        session.save()


def rate(value: float, unit: float) -> str:
    return f"{value / unit:.0f}" if value >= 10 * unit else f"{value / unit:.2g}" if value else "-"


def row_line(row: dict[str, Any]) -> str:
    """One row of the table: what, time, rates, ceiling, ratios."""
    what = f"{row['operator']:23.23} {row['label']:32.32} {row['backend']:6.6}"
    if not row.get("seconds"):
        return f"{what} refused: {row['refused'][:60]}"
    time_us = row["seconds"]["median"] * 1e6
    share = row.get("ceiling_share")
    ceiling = f"{100 * share:.0f}% {row['ceiling']}" if share else "-"
    plain = {name: each["median"] for name, each in row["speedups"].items()}
    dense = [value for name, value in plain.items() if "dense" in name]
    others = {name: value for name, value in plain.items() if "dense" not in name}
    nearest = min(others, key=lambda name: others[name]) if others else ""
    ratio = f"{others[nearest]:.2f} {nearest[:20]}" if nearest else "-"
    return (
        f"{what} {time_us:9.1f} {rate(row['byte_rate'], 1e9):>6} "
        f"{rate(row['flop_rate'], 1e12):>6} {ceiling:>9} "
        f"{f'{dense[0]:.2f}' if dense else '-':>6} {ratio}"
    )


def table(session: Session) -> str:
    """The one table: steps, ceilings, call costs, rows."""
    lines = ["", "=" * 40 + " device " + "=" * 40]
    lines += [f"{name}: {value}" for name, value in session.facts.items()]
    for step in session.steps:
        mark = "ok    " if step.passed else "FAILED"
        lines.append(f"{mark} {step.name} ({step.seconds:.0f} s) {step.detail[:300]}".rstrip())
    ceilings = session.ceilings
    if ceilings:
        copies = max(ceilings["copies"], key=lambda each: each["nbytes"])
        lines.append(f"copy from memory: {rate(copies['bytes_per_second'], 1e9)} GB/s")
        for name, value in ceilings["gemm"].items():
            lines.append(f"dense GEMM {name}: {rate(value, 1e12)} TFLOP/s")
    for name, value in session.calls.items():
        lines.append(f"host time of a call, {name}: {value * 1e6:.1f} us")
    if session.unserved:
        lines.append("no kernel: " + "; ".join(f"{k} ({v})" for k, v in session.unserved.items()))
    lines.append(
        f"{'operator':23} {'shape':32} {'by':6} {'us':>9} {'GB/s':>6} {'TFLOP':>6} "
        f"{'ceiling':>9} {'dense':>6} times faster than the best composition"
    )
    lines += [row_line(row) for row in session.rows]
    if not session.rows:
        lines.append("no rows")
    return "\n".join(lines)


def why_not(device: str) -> str:
    """Why nothing can be measured on `device`; empty if it can."""
    import torch

    if device == "cpu" or torch.cuda.is_available():
        return ""
    return (
        f"no CUDA GPU: torch {torch.__version__} (CUDA {torch.version.cuda or 'not built in'}) "
        "sees none. Nothing was measured."
    )


def native_arch() -> str:
    """The architecture of this GPU, as TORCH_CUDA_ARCH_LIST writes it."""
    import torch

    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"


def main() -> int:
    """Run all steps; 0 if all passed, 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything together")
    parser.add_argument("--device", default="cuda", help="cpu tries the script on small shapes")
    parser.add_argument("--skip", default="", help="comma-separated: build, tests, measure")
    options = parser.parse_args()
    reason = why_not(options.device)
    if reason:
        print(f"device: {reason}", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or "reports")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
        "TRITON_CACHE_DIR": str(SITE.parent / "triton"),
    }
    for name in ("PPMOE_OPS_BACKEND", "PPMOE_OPS_LIBRARY_DIR", "TRITON_INTERPRET"):
        environment.pop(name, None)
    if native_arch():
        environment.setdefault("TORCH_CUDA_ARCH_LIST", native_arch())
    session = Session(
        out if out.is_absolute() else ROOT / out,
        options.device,
        time.monotonic() + 60 * options.minutes,
        environment,
    )
    skipped = options.skip.split(",")
    for name, step in (("build", build), ("link", None), ("tests", test), ("measure", measure)):
        if name in skipped:
            continue
        try:
            step(session) if step else link_package()
        except Exception as error:
            session.steps.append(Step(name, False, 0.0, f"{type(error).__name__}: {error}"))
    session.save()
    print(table(session), flush=True)
    return 0 if all(step.passed for step in session.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
