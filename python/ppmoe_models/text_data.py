"""Text to train on, split by file, and the bigram model that a language model has to beat."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BYTES = 256
VALIDATION_SHARE = 0.1
# Of the standard library: not its own code, or tables rather than text.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings",
            "pydoc_data", "__pycache__"}  # fmt: skip


class TextData(NamedTuple):
    """Text as bytes, in two parts that share no file.

    Attributes:
        train, validation: [N] uint8.
        source: where the text is from, in words.
        fingerprint: equal for equal text, for a checkpoint to know its data again.
    """

    train: Tensor
    validation: Tensor
    source: str
    fingerprint: str


def standard_library() -> Path:
    """The folder of Python's own modules."""
    return Path(os.__file__).resolve().parent


def load_text(data: str | None = None) -> TextData:
    """Read a file, a folder's text files, or the sources of Python's standard library.

    A tenth of the text is for validation: the files whose path has the smallest checksums, so that
    the split is the same on every machine; of a single file, its end.

    Args:
        data: a file or a folder; None is the standard library, without its tests.

    Raises:
        ValueError: `data` is not there, or holds no text.

    Example:
        >>> text = load_text()
        >>> text.train.dtype, text.train.numel() > 5 * text.validation.numel() > 0
        (torch.uint8, True)
    """
    root = standard_library() if data is None else Path(data)
    if root.is_file():
        content = root.read_bytes()
        cut = len(content) - int(len(content) * VALIDATION_SHARE)
        return _text([content[:cut]], [content[cut:]], f"the file {root.name}")
    if not root.is_dir():
        raise ValueError(f"load_text: data is '{data}'; expected a file or a folder")
    files = _texts(root, data is None)
    if len(files) < 2:
        raise ValueError(f"load_text: {root} has {len(files)} text files; expected 2 or more")

    wanted = VALIDATION_SHARE * sum(map(len, files.values()))
    train: list[bytes] = []
    validation: list[bytes] = []
    for name in sorted(files, key=lambda each: (zlib.crc32(each.encode()), each)):
        if wanted > 0 and len(validation) < len(files) - 1:
            validation.append(files[name])
            wanted -= len(files[name])
        else:
            train.append(files[name])
    what = "the Python standard library" if data is None else f"{root.name}/"
    return _text(train, validation, f"{len(files)} files of {what}")


def _texts(root: Path, library: bool) -> dict[str, bytes]:
    """Path below `root` -> content, for files of text in order of their paths."""
    found = {}
    for path in sorted(root.rglob("*.py" if library else "*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        if hidden or (library and LEFT_OUT.intersection(parts)) or not path.is_file():
            continue
        content = path.read_bytes()
        if content and b"\0" not in content:
            found["/".join(parts)] = content
    return found


def _text(train: Iterable[bytes], validation: Iterable[bytes], source: str) -> TextData:
    # A bytearray, as a tensor over bytes could be written to.
    parts = [bytearray(b"\n".join(files)) for files in (train, validation)]
    if not all(parts):
        raise ValueError(f"load_text: {source} is too short to be split; expected more text")
    fingerprint = "-".join(f"{len(part)}:{zlib.crc32(part):08x}" for part in parts)
    one, other = (torch.frombuffer(part, dtype=torch.uint8) for part in parts)
    return TextData(one, other, source, fingerprint)


def random_windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """[count, length] int64: pieces of [N] `text` from places drawn by `generator`.

    Example:
        >>> import torch
        >>> text = torch.arange(9, dtype=torch.uint8)
        >>> random_windows(text, 2, 9, torch.Generator().manual_seed(0))[1].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8]
    """
    _check_length(text, length)
    starts = torch.randint(text.numel() - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def even_windows(text: Tensor, count: int, length: int) -> Tensor:
    """[at most count, length] int64: pieces of [N] `text` at even distances, without overlap.

    Example:
        >>> import torch
        >>> even_windows(torch.arange(9, dtype=torch.uint8), 2, 3).tolist()
        [[0, 1, 2], [6, 7, 8]]
    """
    _check_length(text, length)
    count = min(count, text.numel() // length)
    starts = torch.linspace(0, text.numel() - length, count, dtype=torch.float64).long()
    return text[starts.unsqueeze(-1) + torch.arange(length)].long()


def _check_length(text: Tensor, length: int) -> None:
    if text.numel() < length:
        raise ValueError(
            f"text_data: a part of the text has {text.numel()} bytes; expected {length} or more "
            "(context + 1): use more text or a smaller context"
        )


def bigram_table(text: Tensor, smoothing: float = 1.0) -> Tensor:
    """[256, 256] float64: log-probability of the next byte (axis 1) after a byte (axis 0).

    Every pair counts `smoothing` more than [N] `text` has it.

    Example:
        >>> import torch
        >>> text = torch.tensor(list(b"abab"), dtype=torch.uint8)
        >>> round(bigram_table(text)[ord("a"), ord("b")].exp().item() * 258, 6)
        3.0
    """
    pairs = text[:-1].int() * BYTES + text[1:]
    counts = torch.bincount(pairs, minlength=BYTES * BYTES).view(BYTES, BYTES).double()
    counts += smoothing
    return (counts / counts.sum(-1, keepdim=True)).log()


def bigram_nats(table: Tensor, windows: Tensor) -> float:
    """Mean negative log-probability a byte of [N, L] `windows`, first bytes excepted.

    These are the bytes that a language model is asked for on the same windows.

    Example:
        >>> import torch
        >>> table = torch.full((256, 256), 0.25, dtype=torch.float64).log()
        >>> round(bigram_nats(table, torch.zeros(2, 5, dtype=torch.long)), 4)
        1.3863
    """
    return F.nll_loss(table[windows[:, :-1].flatten()], windows[:, 1:].flatten()).item()


def bits(nats: float) -> float:
    """Bits for nats.

    Example:
        >>> bits(math.log(8))
        3.0
    """
    return nats / math.log(2)
