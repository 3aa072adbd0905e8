"""What a report was measured on: hardware, versions, revision, and who else used the processor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import subprocess
from pathlib import Path

import torch

import ppmoe_ops

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "sve", "asimd", "bf16")
ROOT = Path(ppmoe_ops.__file__).resolve().parent.parent


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def processor() -> str:
    """The processor's name, what it can do, and its last-level cache."""
    text = _read("/proc/cpuinfo")
    name = re.search(r"^(?:model name|Processor)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    have = set(flags.group(1).split()) if flags else set()
    parts = [name.group(1).strip() if name else platform.machine()]
    parts += [flag.upper().replace("_", "-") for flag in FLAGS if flag in have]
    cache = _read("/sys/devices/system/cpu/cpu0/cache/index3/size").strip()
    if cache.endswith("K") and cache[:-1].isdigit():
        parts.append(f"{int(cache[:-1]) // 1024} MiB L3")
    return ", ".join(parts)


def _memory() -> str:
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return f"{int(total.group(1)) / (1 << 20):.0f} GiB" if total else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def revision() -> str:
    """The git revision of the source tree, `+` where files differ from it; empty without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return ""
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def facts(device: torch.device) -> dict[str, str]:
    """Hardware and versions, in the order a reader asks for them."""
    found = {
        "Processor": processor(),
        "Threads": f"{torch.get_num_threads()} of {len(os.sched_getaffinity(0))} processors",
        "Memory": _memory(),
    }
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
        found["CUDA"] = torch.version.cuda or "unknown"
    found |= {
        "ppmoe_ops": ppmoe_ops.__version__,
        "Revision": revision() or "not a git checkout",
        "PyTorch": torch.__version__,
        "Triton": _version("triton"),
        "Python": platform.python_version(),
        "System": " ".join([platform.system(), *platform.libc_ver()]).strip(),
    }
    return found


class OtherLoad:
    """How much of the processors others used since this was made."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds that were busy, that were there at all, and that were ours."""
        first = _read("/proc/stat").partition("\n")[0].split()[1:]
        ticks = [int(each) for each in first[:8]] or [0] * 8
        hertz = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        mine = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        ours = sum(each.ru_utime + each.ru_stime for each in (mine, children))
        return (sum(ticks) - idle) / hertz, sum(ticks) / hertz, ours

    def share(self) -> float:
        """Busy time that was not ours, as a share of all processor time."""
        busy, total, ours = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(0.0, (busy - ours) / total) if total else 0.0
