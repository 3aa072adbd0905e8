"""Cases of ladder attention: each operator, the attention core, the ladder core, all of PSLT.

Also a pytest-benchmark file: `pytest bench --benchmark-only` gives absolute times and JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import ppmoe_ops

from . import ladder_cases, pslt_cases
from .harness import Baseline, Case, Problem
from .inputs import build
from .ladder_cases import FORWARD, SLOW
from .ladder_inputs import Maps

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
# PSLT's two ladder stages, and the maps of a stage before them with the same head dimension.
STAGE3, STAGE4, FINE = Maps(16, 14, 96, 4), Maps(16, 7, 192, 8), Maps(16, 28, 48, 2)
NAMES = {14: "PSLT stage 3", 7: "PSLT stage 4", 28: "PSLT width at stride 8"}
SWIN = tuple(
    (f"Swin-T stage {index + 1}", Maps(16, 56 >> index, 96 << index, 3 << index))
    for index in range(4)
)
CORES = {24: Maps(64, 7, 96, 4), 32: Maps(64, 7, 128, 4)}
TINY = Maps(1, 7, 24, 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _label(name: str, work: Maps, channels: int, *more: str, threads: int | None = None) -> str:
    heads = f"{work.heads} head{'s' * (work.heads > 1)}"
    parts = [f"{name} B={work.batch} {work.side}x{work.side} C={channels} {heads}", *more]
    if threads is not None:
        parts.append(f"{threads} thread{'s' * (threads > 1)}")
    return " ".join(each for each in parts if each)


def _shift(work: Maps) -> str:
    return f"shift {work.shift}" if work.shift else ""


def operator(
    name: str,
    work: Maps,
    *,
    model: str = "",
    quick: bool = False,
    slow: bool = False,
    threads: int | None = None,
    headline: str = "",
) -> Case:
    """One operator by itself."""
    whole = name.startswith(("pixel_adaptive_fusion", "ladder_block"))
    channels = work.channels if whole else work.width
    mode = ""
    if name.startswith("ladder_ffn"):
        mode = "training" if work.training else "inference"
    shift = _shift(work) if "attention" in name else ""
    known = model or NAMES.get(work.side, "")
    return Case(
        operator=name,
        label=_label(known, work, channels, shift, mode, SLOW * slow, threads=threads),
        dtype=_name(work.dtype),
        build=partial(ladder_cases.problem, name, work, slow=slow),
        quick=quick,
        headline=headline,
        threads=threads,
    )


def window_core(head_dim: int, dtype: torch.dtype, *, slow: bool = False, **options: Any) -> Case:
    """Attention alone on one thread: 64 windows of 49 tokens, 4 heads."""
    work = dataclasses.replace(CORES[head_dim], dtype=dtype)
    label = f"core alone N=49 head dim {head_dim}, 64 windows, 4 heads"
    return Case(
        operator="window_attention",
        label=f"{label}{f', {SLOW}' * slow} 1 thread",
        dtype=_name(dtype),
        build=partial(ladder_cases.window_core, work, slow=slow),
        target=f"window core {_name(dtype)}",
        threads=1,
        **{"quick": False, **options},
    )


def ladder_core(
    work: Maps,
    *,
    step: bool = False,
    slow: bool = False,
    threads: int | None = None,
    **options: Any,
) -> Case:
    """Three branches without FFNs and the fusion."""
    kind = "forward+backward" if step else "forward"
    name = _name(work.dtype)
    target = f"ladder core {kind}"
    if not step:
        target += f" {name}" + f" B={work.batch}" * (work.dtype == FLOAT32)
    make = ladder_cases.ladder_core_step if step else ladder_cases.ladder_core
    words = f"{kind}{f', {SLOW}' * slow}"
    return Case(
        operator="ladder_attention",
        label=_label(f"{NAMES[work.side]} core", work, work.channels, words, threads=threads),
        dtype=name,
        build=partial(make, work, slow=slow),
        target=target,
        threads=threads,
        **{"quick": False, **options},
    )


def inference(
    batch: int,
    dtype: torch.dtype = FLOAT32,
    kind: pslt_cases.Kind = "",
    *,
    threads: int | None = None,
    **options: Any,
) -> Case:
    """The whole fused model."""
    target = f"PSLT inference B={batch}" if dtype == FLOAT32 and kind == "" else ""
    if kind in ("compiled", "compiled SDPA") and batch == 16:
        target = "PSLT inference compiled"
    elif kind in pslt_cases.ITSELF:
        target = "PSLT compiling"
    words = {"": "", "compiled": f", {SLOW}", "compiled SDPA": f", {SLOW}, SDPA"}
    more = words.get(kind, f", {kind}") + f" {threads} thread" * (threads == 1)
    return Case(
        operator="ladder_block",
        label=f"PSLT inference B={batch} 224x224{more}",
        dtype=_name(dtype),
        build=partial(pslt_cases.inference, batch, dtype, kind),
        target=target,
        threads=threads,
        **{"quick": False, **options},
    )


def step(batch: int, half: bool = False, threads: int | None = None, **options: Any) -> Case:
    """Forward, loss and backward of the whole model."""
    one = f" {threads} thread" * (threads == 1)
    return Case(
        operator="ladder_attention",
        label=f"PSLT training step B={batch} 224x224{' autocast' * half}{one}",
        dtype="bfloat16" if half else "float32",
        build=partial(pslt_cases.step, batch, half),
        target="PSLT step" if not half and batch == 16 else "",
        threads=threads,
        **{"quick": False, **options},
    )


def block_step(work: Maps, **options: Any) -> Case:
    """One block in training."""
    return Case(
        operator="ladder_attention",
        label=_label(f"{NAMES[work.side]} block", work, work.channels, "forward+backward"),
        dtype=_name(work.dtype),
        build=partial(pslt_cases.block_step, work),
        target="ladder block kept",
        **{"quick": False, **options},
    )


def call_cost(name: str, device: torch.device) -> Problem:
    """One small window, beside the cheapest call that PyTorch has."""
    args = build(name, TINY, device)
    x = torch.ones(1, device=device)
    return Problem(args, (Baseline("x.mul(1)", x.mul, (1,), same_result=False),))


def _quick() -> Iterator[Case]:
    yield window_core(24, FLOAT32, quick=True, headline="window attention core, one thread")
    yield window_core(24, BFLOAT16, quick=True)
    half = dataclasses.replace(STAGE3, dtype=BFLOAT16)
    one = dataclasses.replace(STAGE3, batch=1)
    yield ladder_core(one, quick=True, headline="ladder core, one image")
    yield ladder_core(STAGE3, quick=True, headline="ladder core, 16 images")
    yield ladder_core(half, quick=True, headline="ladder core, 16 images, bfloat16")
    yield ladder_core(STAGE3, step=True, quick=True, headline="ladder core and backward")
    yield block_step(STAGE3, quick=True)
    yield inference(1, quick=True, headline="PSLT inference, one image")
    yield inference(16, quick=True, headline="PSLT inference, 16 images")
    yield step(16, quick=True, headline="PSLT training step, 16 images")

    shifted = dataclasses.replace(STAGE3, shift=3)
    yield operator("window_attention_backward", shifted, quick=True)
    yield operator("ladder_attention_backward", shifted, quick=True)
    training = dataclasses.replace(STAGE3, training=True)
    yield operator("ladder_ffn", training, quick=True)
    yield operator("ladder_ffn_backward", training, quick=True)
    yield operator("pixel_adaptive_fusion", STAGE3, quick=True)
    yield operator("pixel_adaptive_fusion_backward", STAGE3, quick=True)
    yield operator("ladder_block", STAGE3, quick=True)

    for name in FORWARD:
        yield Case(
            operator=name,
            label="one window of 7x7, 24 channels a branch",
            dtype="float32",
            build=partial(call_cost, name),
            function=getattr(ppmoe_ops, name),
        )


def _shapes() -> Iterator[Maps]:
    for work in (STAGE3, STAGE4, FINE):
        for batch in (1, 16):
            for dtype in (FLOAT32, BFLOAT16):
                yield dataclasses.replace(work, batch=batch, dtype=dtype)


def _full() -> Iterator[Case]:
    for head_dim in CORES:
        for dtype in (FLOAT32, BFLOAT16):
            yield window_core(head_dim, dtype)
            yield window_core(head_dim, dtype, slow=True)
    for threads in (1, None):
        for work in _shapes():
            for forward_and_backward in (False, True):
                for slow in (False, True):
                    yield ladder_core(work, step=forward_and_backward, slow=slow, threads=threads)
    for name, work in SWIN:
        # The last map is one window across, so nothing is shifted there.
        for shift in (0, 3) if work.side > work.window else (0,):
            for batch in (1, 16):
                for dtype in (FLOAT32, BFLOAT16):
                    made = dataclasses.replace(work, batch=batch, dtype=dtype, shift=shift)
                    for threads in (1, None):
                        for slow in (False, True):
                            yield operator("window_attention", made, model=name, slow=slow,
                                           threads=threads)  # fmt: skip
                    yield operator("window_attention_backward", made, model=name)
    yield from _every_operator()
    yield from _whole_model()


def _every_operator() -> Iterator[Case]:
    for work in (*_shapes(), dataclasses.replace(STAGE3, dtype=FLOAT16)):
        by = work.steps[1]
        for shift in dict.fromkeys((0, by, -by)):
            shifted = dataclasses.replace(work, shift=shift)
            for name in ("window_attention", "ladder_attention"):
                yield operator(name, shifted)
                yield operator(f"{name}_backward", shifted)
        for training in (False, True):
            made = dataclasses.replace(work, training=training)
            yield operator("ladder_ffn", made)
            yield operator("ladder_ffn_backward", made)
        yield operator("pixel_adaptive_fusion", work)
        yield operator("pixel_adaptive_fusion_backward", work)
        yield operator("ladder_block", work)
        yield operator("ladder_block", work, slow=True)
        if work.dtype != FLOAT16:
            yield block_step(work)


def _whole_model() -> Iterator[Case]:
    for threads in (1, None):
        for batch in (1, 16):
            for dtype in (FLOAT32, BFLOAT16):
                yield inference(batch, dtype, threads=threads)
        for half in (False, True):
            yield step(16, half, threads)
    yield inference(1, kind="itself compiled")
    yield inference(1, kind="itself compiled, not fused")
    for batch in (1, 16):
        yield inference(batch, kind="compiled")
        yield inference(batch, kind="compiled SDPA")


def cases() -> list[Case]:
    """Quick cases, then the rest; a case of both is listed once."""
    found: dict[str, Case] = {}
    for each in (*_quick(), *_full()):
        found.setdefault(each.key, each)
    return list(found.values())


def test_ladder_attention(benchmark: Any, bench_call: Callable[[], Any]) -> None:
    """One absolute row of pytest-benchmark; `conftest.py` makes the cases."""
    benchmark(bench_call)
