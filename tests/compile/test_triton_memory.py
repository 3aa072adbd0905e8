"""The index and memory-bound Triton kernels compiled to machine code for GPUs that are not here.

What is launched and what is compiled come from the same `Launch`. Every kernel is compiled for
every target in the shape of a real model; for one target in more shapes and dtypes: few tokens,
rows that only narrow loads can read, sizes of one (which Triton makes constants), wide rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_aids import TARGETS, compile_launch, usage_of

from ppmoe_ops.kernels._launch import Launch
from ppmoe_ops.kernels.expert_slice import expert_index, route, router_losses, rows

ROOT = Path(__file__).resolve().parents[2]
HALF, FULL, DOUBLE = torch.bfloat16, torch.float32, torch.float64
MAIN = 90  # the target of the further shapes


def empty(*shape: int, of: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=of, device="meta")


def wide(dtype: torch.dtype) -> torch.dtype:
    return DOUBLE if dtype == DOUBLE else FULL


def index(tokens: int, top_k: int, local: int, ids: torch.dtype) -> list[Launch]:
    slots, offsets = empty(tokens * top_k, of=torch.int32), empty(local + 1, of=torch.int32)
    return expert_index.index_launches(empty(tokens, top_k, of=ids), 0, local, slots, offsets)


def moves(tokens: int, top_k: int, hidden: int, dtype: torch.dtype) -> list[Launch]:
    x, many = empty(tokens, hidden, of=dtype), empty(tokens * top_k, hidden, of=dtype)
    slots, weights = empty(tokens * top_k, of=torch.int32), empty(tokens, top_k, of=wide(dtype))
    return [
        rows.slice_launch(x, slots, top_k, many),
        rows.invert_launch(slots, slots),
        rows.merge_launch(many, slots, weights, top_k, x),
        rows.merge_launch(many, slots, None, top_k, x),
        rows.merge_backward_launch(x, many, slots, slots, weights, many, weights),
    ]


def routes(tokens: int, experts: int, top_k: int, dtype: torch.dtype, **given: Any) -> list[Launch]:
    options = {"score": "softmax", "renormalize": True, "groups": 1, "top_groups": 1, **given}
    options["scale"] = 2.5
    logits, ids = empty(tokens, experts, of=dtype), empty(tokens, top_k, of=torch.int32)
    weights = empty(tokens, top_k, of=wide(dtype))
    bias = empty(experts, of=FULL) if options["groups"] > 1 else None
    return [
        route.route_launch(logits, bias, options, weights, ids),
        route.route_backward_launch(weights, weights, ids, logits, options, logits),
    ]


def losses(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> list[Launch]:
    logits, ids = empty(tokens, experts, of=dtype), empty(tokens, top_k, of=torch.int64)
    scalar, shares = empty(of=wide(dtype)), empty(experts, of=wide(dtype))
    lse = empty(tokens, of=wide(dtype))
    forward = router_losses.forward_launches(logits, ids, scalar, scalar, shares, lse)
    return [
        *forward,
        router_losses.backward_launch(scalar, scalar, logits, shares, lse, logits),
    ]


RAW = {"renormalize": False}
LIMITED = {"score": "sigmoid", "groups": 8, "top_groups": 4}
# What is compiled for every target, and what for one.
MODELS: dict[str, Callable[[], list[Launch]]] = {
    "index 8192x8 of 128": lambda: index(8192, 8, 128, torch.int32),
    "rows 8192x8 of 2048": lambda: moves(8192, 8, 2048, HALF),
    "route 8192 of 128": lambda: routes(8192, 128, 8, FULL),
    "route 8192 of 256 limited": lambda: routes(8192, 256, 8, FULL, **LIMITED),
    "losses 8192 of 128": lambda: losses(8192, 128, 8, FULL),
}
FURTHER: dict[str, Callable[[], list[Launch]]] = {
    "index 16x8 of 128": lambda: index(16, 8, 128, torch.int64),
    "index 8192x8 of 2048": lambda: index(8192, 8, 2048, torch.int64),
    "index 1x1 of 1": lambda: index(1, 1, 1, torch.int64),
    "rows 16x8 of 4096": lambda: moves(16, 8, 4096, HALF),
    "rows 333x3 of 2056": lambda: moves(333, 3, 2056, HALF),
    "rows 333x3 of 771": lambda: moves(333, 3, 771, HALF),
    "rows 7x1 of 8": lambda: moves(7, 1, 8, HALF),
    "rows 1x1 of 1": lambda: moves(1, 1, 1, FULL),
    "rows 8192x8 of 2048 full": lambda: moves(8192, 8, 2048, FULL),
    "rows 8192x8 of 2048 double": lambda: moves(8192, 8, 2048, DOUBLE),
    "route 16 of 128": lambda: routes(16, 128, 8, FULL),
    "route 8192 of 8": lambda: routes(8192, 8, 2, HALF),
    "route 8192 of 60 raw": lambda: routes(8192, 60, 4, FULL, **RAW),
    "route 4096 of 128 double": lambda: routes(4096, 128, 8, DOUBLE, **RAW),
    "route 4096 of 16384": lambda: routes(4096, 16384, 8, FULL),
    "route 1 of 1": lambda: routes(1, 1, 1, FULL, score="sigmoid"),
    "losses 8192 of 8": lambda: losses(8192, 8, 2, HALF),
    "losses 16 of 60": lambda: losses(16, 60, 4, FULL),
    "losses 4096 of 128 double": lambda: losses(4096, 128, 8, DOUBLE),
    "losses 4096 of 16384": lambda: losses(4096, 16384, 8, FULL),
    "losses 1 of 1": lambda: losses(1, 1, 1, FULL),
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """One line for each kernel; printed and kept under reports/ at the end."""
    lines = [f"{'shape':27} {'kernel':30} {'target':6} {'regs':>4} {'shared':>7} {'stack':>5}"]
    yield lines
    text = "\n".join(lines)
    print(text)
    reports = ROOT / "reports"
    reports.mkdir(exist_ok=True)
    (reports / "triton_memory_resources.txt").write_text(text + "\n")


def check_addresses(name: str, ttir: str) -> None:
    """Every address is formed from 64-bit offsets."""
    operands = r"tt\.addptr %\S+, %\S+ : \S*!tt\.ptr<\w+>+, (?:tensor<[\dx]+)?(\w+)"
    steps = re.findall(operands, ttir)
    assert len(steps) == ttir.count("tt.addptr")
    assert set(steps) <= {"i64"}, name


CASES = [
    *((shape, target) for target in TARGETS for shape in MODELS),
    *((shape, MAIN) for shape in FURTHER),
]


@pytest.mark.parametrize(("shape", "target"), CASES)
def test_compiles_without_spills(shape: str, target: int, table: list[str], tmp_path: Path) -> None:
    for launch in {**MODELS, **FURTHER}[shape]():
        name = launch.kernel.fn.__name__.strip("_").removesuffix("_kernel")
        compiled = compile_launch(launch, target)
        usage = usage_of(compiled, tmp_path)
        table.append(
            f"{shape:27} {name:30} sm_{target:<3} {usage.registers:4} {usage.shared:7} "
            f"{usage.stack:5}"
        )
        assert usage.shared <= TARGETS[target]
        assert usage.stack == 0, name
        check_addresses(name, compiled.asm["ttir"])


def loads(launch: Launch, target: int) -> tuple[list[str], list[str]]:
    ptx = compile_launch(launch, target).asm["ptx"]
    return re.findall(r"ld\.global\S*", ptx), re.findall(r"st\.global\S*", ptx)


@pytest.mark.parametrize("hidden", [2048, 2056])
@pytest.mark.parametrize("dtype", [HALF, FULL, DOUBLE])
def test_rows_move_16_bytes_at_once(dtype: torch.dtype, hidden: int) -> None:
    wide_load = r"\.v2\.b64" if dtype == DOUBLE else r"\.v4\.b32"
    for launch in moves(300, 3, hidden, dtype):
        name = launch.kernel.fn.__name__
        if "invert" in name:
            continue
        read, written = loads(launch, MAIN)
        assert any(re.search(wide_load, each) for each in read), name
        assert any(re.search(wide_load, each) for each in written), name


@pytest.mark.parametrize("target", TARGETS)
def test_choices_are_made_by_integer_maxima_of_a_warp(target: int) -> None:
    launch = routes(16, 128, 8, FULL)[0]
    ptx = compile_launch(launch, target).asm["ptx"]
    assert "redux.sync.max.s32" in ptx
    assert "redux.sync.min.s32" in ptx
