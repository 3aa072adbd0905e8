"""The documents say what is so: examples run, names exist, variables are listed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppmoe_ops import _matrix
from ppmoe_ops._library import OPERATORS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "ENVIRONMENT.md", "CHANGELOG.md")
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh", ".sh")
MOST_LINES = 400


def text(name: str) -> str:
    return (ROOT / name).read_text()


def tree_files() -> list[Path]:
    """Files that belong to the tree: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        names = [ROOT / name for name in done.stdout.splitlines()]
    else:  # a source archive
        left_out = re.compile(r"/(\.venv|build|dist|reports|\.git|__pycache__|\.\w+_cache)/")
        every = ROOT.rglob("*")
        names = [path for path in every if not left_out.search(f"/{path.relative_to(ROOT)}")]
    return sorted(path for path in names if path.is_file() and path.suffix != ".so")


def sources() -> list[Path]:
    return [path for path in tree_files() if path.suffix in SOURCES]


def code_blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(name), re.MULTILINE | re.DOTALL)


def between_markers(name: str, marker: str) -> str:
    start, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    assert text(name).count(start) == 1
    assert text(name).count(end) == 1
    return text(name).partition(start)[2].partition(end)[0].strip()


def test_readme_example_prints_what_it_says(tmp_path: Path) -> None:
    (example,), (expected,) = code_blocks("README.md", "python"), code_blocks("README.md", "text")
    assert len(example.strip().splitlines()) <= 12
    script = tmp_path / "example.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{example}")
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_readme_carries_the_generated_support_matrix() -> None:
    stale = "regenerate it: python -m ppmoe_ops.info --matrix"
    assert between_markers("README.md", "matrix") == _matrix.markdown(), stale


def test_readme_has_a_place_for_the_numbers() -> None:
    assert between_markers("README.md", "numbers")


def test_readme_describes_every_public_operator() -> None:
    table = text("README.md").partition("## Operators")[2].partition("\n## ")[0]
    described = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert described == {op.name for op in _matrix.public_operators()}


def test_matrix_lists_kernels_of_operators_alone() -> None:
    kernels = _matrix.registered("cpu") | _matrix.registered("cuda")
    assert kernels
    assert kernels <= set(OPERATORS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", text("Makefile"), re.MULTILINE))
    named = re.findall(r"(?:`|^|&& )make ([a-z][\w-]*)", text(document), re.MULTILINE)
    assert set(named) <= targets


def test_every_phony_target_is_described() -> None:
    declared = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", text("Makefile"), re.MULTILINE)
    assert declared is not None
    phony = set(declared.group(1).replace("\\", "").split())
    described = set(re.findall(r"^([a-z-]+):.*  ## ", text("Makefile"), re.MULTILINE))
    assert phony == described


def named_paths(document: str) -> Iterator[str]:
    """What stands in backticks or links and looks like a file or folder of this tree."""
    words = re.findall(r"`([^`\s]+)`|\]\(([^)#]+)\)", text(document))
    made = re.compile(r"<|\*|^reports/|^runs/|^dist/|^\.venv|^/|\.so$|^https?:|_build_info\.json$")
    for word in (one or other for one, other in words):
        looks_like_one = "/" in word or re.search(r"\w\.(py|md|txt|cpp|cu|h|sh|toml)$", word)
        if looks_like_one and re.fullmatch(r"[\w./-]+", word) and not made.search(word):
            yield word


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    # A bare file name may be of any folder of the package.
    gone = [
        word
        for word in named_paths(document)
        if not (ROOT / word).exists()
        and ("/" in word or not any(ROOT.glob(f"ppmoe_ops/**/{word}")))
    ]
    assert not gone, f"{document} names {', '.join(gone)}"


def variables_read() -> dict[str, str]:
    """Environment variable -> a source file that reads it."""
    patterns = (
        r"""environ(?:\.get|\.setdefault|\.pop)?[(\[]\s*["']([A-Z][A-Z0-9_]+)["']""",
        r"""getenv\(\s*["']([A-Z][A-Z0-9_]+)["']""",
        r"""setenv\(\s*["']([A-Z][A-Z0-9_]+)["']""",
        r"""^\w*VARIABLE = ["']([A-Z][A-Z0-9_]+)["']""",
        r"""["']((?:PPMOE_OPS|TRITON)_[A-Z0-9_]+)["']""",
    )
    found: dict[str, str] = {}
    for path in sources():
        name = str(path.relative_to(ROOT))
        for pattern in patterns:
            for variable in re.findall(pattern, path.read_text(), re.MULTILINE):
                # Tests also set variables of torch and of the shell for the processes they start.
                if not name.startswith("tests/") or variable.startswith(("PPMOE_OPS", "TRITON")):
                    found.setdefault(variable, name)
    everywhere = ("HOME", "PATH", "PYTHONPATH")
    return {variable: name for variable, name in found.items() if variable not in everywhere}


def test_environment_lists_every_variable() -> None:
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", text("ENVIRONMENT.md"), re.MULTILINE))
    read = variables_read()
    assert "PPMOE_OPS_BACKEND" in read
    assert "PPMOE_OPS_CPU_CAPABILITY" in read
    missing = {name: path for name, path in read.items() if name not in listed}
    assert not missing, f"not in ENVIRONMENT.md: {missing}"


def test_environment_lists_no_variable_that_nobody_reads() -> None:
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", text("ENVIRONMENT.md"), re.MULTILINE))
    # Read by Triton and by make.
    elsewhere = {"TRITON_DEFAULT_FP_FUSION", "PYTHON", "VENV", "WORKERS"}
    content = "\n".join(path.read_text() for path in sources())
    unread = {name for name in listed - elsewhere if name not in content}
    assert not unread


def test_no_private_paths_or_package_hosts() -> None:
    # Written in pieces, so that this file does not find itself.
    private = ("/ro" + "ot/", "/ho" + "me/", "/wo" + "rk/", "/tmp/" + "v/", "site-" + "packages/")
    hosts = ("py" + "pi.org", "pythonhost" + "ed", "download.py" + "torch", "de" + "bian.org")
    found = []
    for path in tree_files():
        try:
            content = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}: {word}" for word in (*private, *hosts) if word in content
        ]
    assert not found, found


def test_documents_are_plain_text() -> None:
    """ASCII alone: nothing that a terminal, a diff or a search could stumble over."""
    for name in DOCUMENTS:
        assert text(name).isascii(), name


def test_sources_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources()
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long, f"longer than {MOST_LINES} lines: {long}"


def test_requirements_are_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line.partition("#")[0].strip() for line in text(name).splitlines()]
        loose = [line for line in lines if line and not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
        assert not loose, f"{name}: {loose}"


def test_every_package_folder_is_installed() -> None:
    settings = tomllib.loads(text("pyproject.toml"))["tool"]["setuptools"]
    folders = settings["package-dir"]
    expected = set()
    for package, folder in folders.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            inside = path.parent.relative_to(ROOT / folder).parts
            expected.add(".".join((package, *inside)))
    assert set(settings["packages"]) == expected


def test_every_module_has_a_docstring() -> None:
    without = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.suffix == ".py"
        and path.read_text().strip()
        and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not without
