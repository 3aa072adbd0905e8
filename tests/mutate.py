"""Plants one bug at a time and expects a test to fail: `python tests/mutate.py [--only TEXT ...]`.

The tree is copied, its kernels are built once for the best instruction set of this CPU, and every
mutation of `mutations/` is then applied to the copy, built (only what changed) and tested. Triton
kernels are not built but interpreted. Prints a table; the exit status is 1 if a mutation survives.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("csrc", "kernels", "ppmoe_ops", "tests", "bench", "pyproject.toml")
INTERPRETED = "tests/interpret"
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
# A mutated loop may never end.
LONGEST_RUN = 600


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one mutation."""

    caught: bool
    by: str
    seconds: float


class Workbench:
    """A copy of the tree with kernels of its own (none are compiled without an instruction set)."""

    def __init__(self, folder: Path, isa: str | None) -> None:
        self.tree = folder / "tree"
        self.out = folder / "built"
        self.clean = folder / "clean"  # what was built without a mutation
        self.isa = isa
        self.tree.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.tree / name, ignore=IGNORED)
            else:
                shutil.copy2(source, self.tree / name)
        # Under the name that it is installed by.
        (self.tree / "ppmoe_ops" / "kernels").symlink_to(self.tree / "kernels")

    def build(self) -> str:
        """Build what changed; the compiler's words if that fails."""
        if self.isa is None:
            return ""
        command = [sys.executable, "csrc/build.py", "--out", str(self.out), "--isa", self.isa]
        run = self._run(command, {"PPMOE_OPS_CUDA": "0"})
        return "" if run.returncode == 0 else run.stdout

    def test(self, selection: str) -> Verdict:
        """Run tests until the first one fails."""
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", *selection.split(), "-x", "-q"]
        command += ["-p", "no:cacheprovider", "--tb=line"]
        environment = {"PPMOE_OPS_LIBRARY_DIR": str(self.out)}
        if selection.startswith(INTERPRETED):
            environment["TRITON_INTERPRET"] = "1"
        else:
            command += ["-m", "kernel"]
        try:
            run = self._run(command, environment)
        except subprocess.TimeoutExpired:
            return Verdict(True, "does not end", time.monotonic() - started)
        seconds = time.monotonic() - started
        if run.returncode == 0:
            return Verdict(False, "", seconds)
        failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", run.stdout, re.MULTILINE)
        crashed = f"crash ({run.returncode})" if run.returncode < 0 else run.stdout[-300:]
        return Verdict(True, failed.group(1) if failed else crashed, seconds)

    def _run(
        self, command: list[str], environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PPMOE_OPS_")}
        # Before an editable install of the tree that this is a copy of.
        kept["PYTHONPATH"] = str(self.tree)
        return subprocess.run(
            command,
            cwd=self.tree,
            env={**kept, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST_RUN,
            check=False,
        )

    def try_out(self, mutation: Mutation) -> Verdict:
        """Apply a mutation, build and test, and put the old text back."""
        path = self.tree / mutation.file
        original, times = path.read_text(), path.stat()
        assert original.count(mutation.old) == 1, f"{mutation.file}: {mutation.old!r}"
        path.write_text(original.replace(mutation.old, mutation.new))
        try:
            if mutation.file.startswith("csrc/"):
                failure = self.build()
                if failure:
                    return Verdict(False, f"does not compile: {failure[-2000:]}", 0.0)
            verdict = self.test(mutation.tests)
            if verdict.caught or mutation.tests.startswith(INTERPRETED):
                return verdict
            return self.test("tests/expert_slice")
        finally:
            # Objects with their times, so that nothing is built again for the old text.
            path.write_text(original)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if self.isa is not None:
                shutil.rmtree(self.out)
                shutil.copytree(self.clean, self.out)


def best_isa() -> str:
    """The last instruction set that the CPU and the compiler have."""
    code = (
        "from ppmoe_ops import _host\n"
        "built, best = _host.built_isas(), _host.cpu_capability()\n"
        "print(best if best in built else built[-1])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="mutations whose file or note has one of these"
    )
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    options = parser.parse_args()
    chosen = [
        each
        for each in MUTATIONS
        if any(text in f"{each.file}: {each.note}" for text in options.only)
    ]
    if options.list:
        print("\n".join(f"{each.file}: {each.note}" for each in chosen))
        return
    with tempfile.TemporaryDirectory() as folder:
        compiled = [each for each in chosen if not each.tests.startswith(INTERPRETED)]
        bench = Workbench(Path(folder), best_isa() if compiled else None)
        failure = bench.build()
        if failure:
            sys.exit(failure)
        if compiled:
            shutil.copytree(bench.out, bench.clean)
        every = len(chosen) == len(MUTATIONS)
        runs = [
            "tests/expert_slice" if every else " ".join(sorted({each.tests for each in compiled})),
            " ".join(sorted({each.tests for each in chosen if each not in compiled})),
        ]
        started = time.monotonic()
        for clean in (bench.test(some) for some in runs if some):
            if clean.caught:
                sys.exit(f"tests fail without a mutation: {clean.by}")
        seconds = time.monotonic() - started
        built = f"built for {bench.isa}" if compiled else "interpreted"
        print(f"{len(chosen)} mutations, {built}; clean run {seconds:.0f} s", flush=True)
        survivors = 0
        for number, mutation in enumerate(chosen, 1):
            verdict = bench.try_out(mutation)
            survivors += not verdict.caught
            word = "caught  " if verdict.caught else "SURVIVED"
            name = f"{Path(mutation.file).name}: {mutation.note}"
            line = f"{number:3} {word} {verdict.seconds:4.0f} s  {name:72} {verdict.by}"
            print(line.rstrip(), flush=True)
    print(f"{len(chosen) - survivors} caught, {survivors} survived")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
