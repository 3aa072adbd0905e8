"""Text, its split, its windows, and the bigram model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ppmoe_models.text_data import (
    bigram_nats,
    bigram_table,
    even_windows,
    load_text,
    random_windows,
    standard_library,
)


def text_of(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_bigram_on_a_hand_made_text() -> None:
    # Pairs of "abacab": ab twice, ba, ac, ca once each.
    a, b, c = b"abc"
    table = bigram_table(text_of(b"abacab"), smoothing=1.0)
    assert table[a, b].exp().item() == pytest.approx((2 + 1) / (3 + 256))
    assert table[a, c].exp().item() == pytest.approx((1 + 1) / (3 + 256))
    assert table[a, a].exp().item() == pytest.approx(1 / (3 + 256))
    assert table[b, a].exp().item() == pytest.approx((1 + 1) / (1 + 256))
    assert table[0, 0].exp().item() == pytest.approx(1 / 256)
    half = bigram_table(text_of(b"abacab"), smoothing=0.5)
    assert half[a, b].exp().item() == pytest.approx((2 + 0.5) / (3 + 128))
    torch.testing.assert_close(table.exp().sum(-1), torch.ones(256, dtype=torch.float64))
    # Two windows, "aba" and "zaa": ab, ba, za, aa; first bytes are given, not asked for.
    asked = [3 / 259, 2 / 257, 1 / 256, 1 / 259]
    nats = bigram_nats(table, torch.tensor([list(b"aba"), list(b"zaa")]))
    assert nats == pytest.approx(-sum(map(math.log, asked)) / 4)


def test_bigram_needs_no_pair_to_have_been_seen() -> None:
    table = bigram_table(text_of(b"a"), smoothing=0.5)
    assert bigram_nats(table, torch.tensor([[1, 2, 3]])) == pytest.approx(math.log(256))


def test_the_split_is_by_file_and_the_same_everywhere(tmp_path: Path) -> None:
    files = {
        f"{folder}/{i}.txt": f"{folder}{i};".encode() * 10 for i in range(20) for folder in "ab"
    }
    one = load_text(str(folder_of(tmp_path / "one", files)))
    backwards = dict(reversed(files.items()))
    other = load_text(str(folder_of(tmp_path / "other", backwards)))
    assert torch.equal(one.train, other.train)
    assert torch.equal(one.validation, other.validation)
    assert one.fingerprint == other.fingerprint

    train = bytes(one.train.tolist()).split(b"\n")
    validation = bytes(one.validation.tolist()).split(b"\n")
    assert sorted(train + validation) == sorted(files.values())
    total = sum(map(len, files.values()))
    assert 0.1 * total <= sum(map(len, validation)) < 0.15 * total


def test_only_text_is_read(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": b"first", "b": b"second", "c.bin": b"x\0y", ".git/d": b"z", "e": b""})
    text = load_text(str(tmp_path))
    assert sorted([bytes(text.train.tolist()), bytes(text.validation.tolist())]) == [
        b"first", b"second"
    ]  # fmt: skip
    assert text.source == f"2 files of {tmp_path.name}/"


def test_a_single_file_is_split_at_nine_tenths(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(bytes(range(100)))
    text = load_text(str(tmp_path / "one.txt"))
    assert text.train.tolist() == list(range(90))
    assert text.validation.tolist() == list(range(90, 100))


def test_other_text_has_another_fingerprint(tmp_path: Path) -> None:
    prints = []
    for content in (b"0123456789" * 3, b"0123456789" * 2 + b"9876543210"):
        (tmp_path / "one.txt").write_bytes(content)
        prints.append(load_text(str(tmp_path / "one.txt")).fingerprint)
    assert prints[0] != prints[1]


def test_the_standard_library_is_python() -> None:
    assert (standard_library() / "dataclasses.py").is_file()
    text = load_text()
    assert text.train.numel() > 3_000_000
    assert b"def __init__(self" in bytes(text.train[:2_000_000].tolist())
    assert text.source.endswith("files of the Python standard library")


@pytest.mark.parametrize(
    ("files", "data", "message"),
    [
        ({}, "nowhere", "expected a file or a folder"),
        ({"a/one": b"text"}, "a", "has 1 text files; expected 2 or more"),
        ({"short": b"abc"}, "short", "too short to be split"),
    ],
)
def test_bad_data(tmp_path: Path, files: dict[str, bytes], data: str, message: str) -> None:
    folder_of(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        load_text(str(tmp_path / data))


def test_windows_are_pieces_of_the_text() -> None:
    text = torch.arange(50, dtype=torch.uint8)
    windows = random_windows(text, 200, 7, torch.Generator().manual_seed(0))
    assert torch.equal(windows, windows[:, :1] + torch.arange(7))
    assert windows.min() == 0
    assert windows.max() == 49
    assert windows[:, 0].unique().numel() > 30


def test_even_windows_do_not_overlap() -> None:
    text = torch.arange(50, dtype=torch.uint8)
    windows = even_windows(text, 100, 7)
    assert windows.shape == (7, 7)
    assert windows.unique().numel() == 49
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 49


def test_windows_longer_than_the_text() -> None:
    text = torch.arange(5, dtype=torch.uint8)
    for call in (lambda: even_windows(text, 1, 6), lambda: random_windows(text, 1, 6, None)):
        with pytest.raises(ValueError, match="5 bytes; expected 6 or more"):
            call()
