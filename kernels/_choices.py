"""Where chosen configurations are kept: one JSON file for a device and a version of Triton."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = "PPMOE_OPS_AUTOTUNE"
FOLDER_VARIABLE = "PPMOE_OPS_CACHE_DIR"
MODES = ("0", "cached", "1")
FORMAT = 1

# What is stored for a kernel: its configuration, the time, and what was dropped.
Record = dict[str, Any]


def mode() -> str:
    """How configurations are chosen: the table alone unless the environment says otherwise."""
    found = os.environ.get(VARIABLE, "0")
    if found not in MODES:
        raise ValueError(f"{VARIABLE} is {found!r}; expected one of {', '.join(MODES)}, or unset")
    return found


def folder() -> Path:
    """The folder of the files, which need not exist yet."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "ppmoe_ops"


def path_of(device: str, version: str) -> Path:
    """The file for the device of that name and that version of Triton."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    return folder() / f"tuned-{plain}-{version}.json"


def read(path: Path) -> dict[str, Record]:
    """The records by key; none, with a warning, where the file cannot be understood."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return _ignored(path, str(error))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return _ignored(path, f"it is not of format {FORMAT}")
    choices = content.get("choices")
    if not isinstance(choices, dict) or not all(map(_is_record, choices.values())):
        return _ignored(path, "its choices are not records with a configuration")
    return choices


def _is_record(found: object) -> bool:
    return isinstance(found, dict) and isinstance(found.get("config"), dict)


def _ignored(path: Path, why: str) -> dict[str, Record]:
    warnings.warn(f"tuned configurations in {path} are ignored: {why}", stacklevel=3)
    return {}


# A launch must not read a file: what another process stores later is seen by the next process.
known = functools.cache(read)


def store(path: Path, key: str, record: Record, stale: Record | None = None) -> Record:
    """Add a record and return the one that holds: the first that was stored, unless it is `stale`.

    So that all processes of a job end with the same configurations. Readers see the old file or the
    new one, never a part; a folder that cannot be written costs a warning, and the choice is kept
    for this process alone.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            choices = read(path)
            if choices.get(key) in (None, stale):
                choices[key] = record
                _replace(path, {"format": FORMAT, "choices": dict(sorted(choices.items()))})
        known.cache_clear()
    except OSError as error:
        warnings.warn(f"tuned configurations are not kept in {path}: {error}", stacklevel=2)
        choices = known(path)
        choices[key] = record
    return choices[key]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with open(path.with_suffix(".lock"), "w") as lock:
        # File systems without locks may lose a choice to a concurrent writer: it is made again.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, content: dict[str, Any]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
