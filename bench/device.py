"""Builds, tests and measures the package on one GPU; run by `device.sh`.

Every step is a process of its own: one that fails, hangs or breaks the device is reported, and the
others still run. What matters most comes first; every step has a share of the time that is left.
Results are printed as tables at the end and kept in device.json and device.txt.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "device" / "site"
WORKER = Path(__file__).resolve().parent / "device_worker.py"
# A step may take this share of what is left of the time, and never more seconds than this.
BUILD, TESTS, CEILINGS, OPERATOR = (0.4, 180.0), (0.35, 150.0), (0.3, 40.0), (0.5, 60.0)
LAYER, ROWS, PEER, SANITIZER, TUNE = (
    (0.4, 75.0),
    (0.35, 60.0),
    (0.3, 40.0),
    (0.5, 60.0),
    (0.5, 60.0),
)
TUNER = "ppmoe_ops.tune"
# The table stands beside this script, wherever that was called from.
sys.path.append(str(Path(__file__).resolve().parent))
table: Any = importlib.import_module("device_table")


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
    served: list[str] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    others: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def known(self) -> dict[str, Any]:
        """What is written: `kind` tells such a file from a CPU's report."""
        known = dataclasses.asdict(self)
        for name in ("out", "ends", "environment"):
            del known[name]
        return {"kind": "device", **known}

    def save(self) -> None:
        """Write what is known so far; called after every step."""
        (self.out / "device.json").write_text(json.dumps(self.known(), indent=1) + "\n")

    @property
    def left(self) -> float:
        """Seconds until the run must end."""
        return self.ends - time.monotonic()

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


def link_package(_: Session) -> None:
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


def pytest_step(session: Session, name: str, chosen: str, limit: tuple[float, float]) -> None:
    """Tests of the gpu tier. Options of pyproject.toml are left out: they need plugins."""
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=line", "-k", chosen]
    if importlib.util.find_spec("xdist"):
        # Triton compiles on the host, one process at a time.
        options += ["-n", str(min(6, os.cpu_count() or 1))]
    text = session.run(name, [sys.executable, "-m", "pytest", "tests/gpu", *options], limit)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", text)
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", text, re.MULTILINE)
    step = session.steps[-1]
    if counts:
        step.detail = ", ".join(counts) + (": " + ", ".join(failed[:12]) if failed else "")
    if len(failed) > 12:
        step.detail += f" and {len(failed) - 12} more"


def test(session: Session) -> None:
    """The gpu tier but for compute-sanitizer, which takes longer and tells less."""
    pytest_step(session, "gpu tests", "not sanitizer", TESTS)


def sanitize(session: Session) -> None:
    """compute-sanitizer over the kernels."""
    pytest_step(session, "compute-sanitizer", "sanitizer", SANITIZER)


def rows(
    session: Session, name: str, group: str, limit: tuple[float, float], peer: str = "",
    **marks: Any,
) -> None:  # fmt: skip
    """Rows of expert slicing, by the operators themselves or by a baseline."""
    if session.left < 15:
        session.steps.append(Step(name, False, 0.0, "not run: out of time"))
        return
    share, most = limit
    # Time to start and to write what is known is not the worker's to use.
    allowed = max(5.0, min(most, share * session.left) - 10)
    kept = "0.01" if session.device == "cpu" else "0.3" if group == "layer" else "0.12"
    asked = ["rows", group, "--seconds", str(allowed), "--kept", kept]
    found = session.work(name, limit, *asked, *(["--peer", peer] if peer else []))
    session.rows += [{**row, **marks} for row in found.get("rows", [])]
    session.save()


def measure(session: Session) -> None:
    """Ceilings and what targets are set for: the layer, then every operator of the family."""
    found = session.work("ceilings", CEILINGS, "ceilings")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    session.facts = {**found.get("facts", {}), "Date": today}
    session.ceilings = found.get("ceilings", {})
    rows(session, "layer", "layer", LAYER)
    rows(session, "operators", "operators", ROWS)
    listed = session.work("list of operators", CEILINGS, "list")
    session.unserved = listed.get("unserved", {})
    # A rehearsal stays with the family that has rows of its own; others take minutes on a CPU.
    session.served = listed.get("operators", []) if session.device == "cuda" else []


def compare(session: Session) -> None:
    """The layer by every baseline; one that is missing is left out with the reason."""
    for name in session.work("list of baselines", CEILINGS, "peers").get("peers", []):
        rows(session, f"baseline: {name}", "layer", PEER, name)


def tune(session: Session) -> None:
    """The tuner, if this version has one, and the layer once more with what it chose."""
    command = [sys.executable, "-c", f"import importlib.util as u; print(u.find_spec({TUNER!r}))"]
    asked = subprocess.run(command, env=session.environment, cwd=ROOT, capture_output=True,
                           text=True, check=False)  # fmt: skip
    if asked.returncode != 0 or asked.stdout.strip() == "None" or session.device != "cuda":
        return
    session.run("tune", [sys.executable, "-m", TUNER], TUNE)
    if session.steps[-1].passed:
        rows(session, "layer after tuning", "layer", LAYER, tuned=True)


def more(session: Session) -> None:
    """Other shapes, call costs and other families, as long as there is time."""
    rows(session, "more shapes", "more", ROWS)
    if session.left > 15:
        session.calls = session.work("call cost", CEILINGS, "calls")
    for operator in session.served:
        if session.left < 15:
            session.steps.append(Step(operator, False, 0.0, "not run: out of time"))
            continue
        share, most = OPERATOR
        allowed = str(max(5.0, min(most, share * session.left) - 15))
        known = json.dumps(session.ceilings)
        asked = ["operator", operator, "--ceilings", known, "--seconds", allowed]
        session.others += session.work(operator, OPERATOR, *asked).get("rows", [])
        session.save()


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


PARTS: dict[str, Callable[[Session], None]] = {
    "build": build,
    "link": link_package,
    "tests": test,
    "measure": measure,
    "sanitizer": sanitize,
    "peers": compare,
    "tune": tune,
    "more": more,
}


def main() -> int:
    """Run all steps; 0 if all passed, 1 if a step failed or a row is wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything together")
    parser.add_argument("--device", default="cuda", help="cpu tries the script on small shapes")
    parser.add_argument("--skip", default="", help="comma-separated: " + ", ".join(PARTS))
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
    # A rehearsal may use a library from elsewhere; on a GPU the one that was built here is meant.
    others = ["PPMOE_OPS_LIBRARY_DIR"] if options.device == "cuda" else []
    for name in ("PPMOE_OPS_BACKEND", "TRITON_INTERPRET", *others):
        environment.pop(name, None)
    if native_arch():
        environment.setdefault("TORCH_CUDA_ARCH_LIST", native_arch())
    out = out if out.is_absolute() else ROOT / out
    out.mkdir(parents=True, exist_ok=True)
    session = Session(
        out,
        options.device,
        time.monotonic() + 60 * options.minutes,
        environment,
    )
    skipped = options.skip.split(",")
    for name, step in PARTS.items():
        if name in skipped:
            continue
        try:
            step(session)
        except Exception as error:
            session.steps.append(Step(name, False, 0.0, f"{type(error).__name__}: {error}"))
    session.save()
    text: str = table.whole(session.known())
    (out / "device.txt").write_text(text + "\n")
    print(text, flush=True)
    wrong = any(not step.passed for step in session.steps) or table.problems(session.rows)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
