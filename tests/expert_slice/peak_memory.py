"""How far the memory of this process grows during calls of `expert_ffn`; run by its test.

Prints one line a case: its name, the growth of the resident peak, and what is allowed, in bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import ppmoe_ops

MIB = 1 << 20
# Packed rows and slabs, of some threads, and what torch itself takes at its first call.
SCRATCH = 24 * MIB
HIDDEN, WIDTH, LOCAL = 1024, 2048, 6


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) << 10


def growth(call: Callable[[], object]) -> int:
    """By how much a call raises the peak; `call` has run once on small inputs before."""
    # What has been freed is in use again first, so that the peak is what is in use now.
    now = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert now is not None
    filler = torch.ones(max(peak() - (int(now.group(1)) << 10), 0) // 4)
    before = peak()
    call()
    assert filler.numel() >= 0
    return peak() - before


def report(name: str, came: int, allowed: int) -> None:
    print(f"{name} {came} {allowed}", flush=True)


def index(tokens: int, top_k: int, experts: int) -> tuple[Tensor, Tensor]:
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k]
    slots, offsets = ppmoe_ops.expert_index(ids, 0, LOCAL)
    return slots, offsets


def main() -> None:
    torch.set_num_threads(2)
    w_in = {
        "closed": torch.randn(LOCAL, 2 * WIDTH, HIDDEN),
        "transposed": torch.randn(LOCAL, HIDDEN, 2 * WIDTH).transpose(1, 2),
    }
    w_out = {
        "closed": torch.randn(LOCAL, HIDDEN, WIDTH),
        "transposed": torch.randn(LOCAL, WIDTH, HIDDEN).transpose(1, 2),
    }
    bytes_of_weights = w_in["closed"].nbytes + w_out["closed"].nbytes
    assert bytes_of_weights > 5 * SCRATCH

    def call(tokens: int, layout: str, experts: int = LOCAL, frozen: bool = True) -> Tensor:
        slots, offsets = index(tokens, 2, experts)
        x = torch.randn(tokens, HIDDEN, requires_grad=not frozen)
        out = ppmoe_ops.expert_ffn(
            x, slots, offsets, torch.rand(tokens, 2), w_in[layout], None, w_out[layout], None,
            "swiglu",
        )  # fmt: skip
        if not frozen:
            out.sum().backward()
        return out

    for tokens in (4, 90):
        for layout in w_in:
            call(2, layout)
            came = growth(lambda tokens=tokens, layout=layout: call(tokens, layout))
            report(f"forward_{layout}_{tokens}", came, SCRATCH)
            call(2, layout, frozen=False)
            came = growth(lambda tokens=tokens, layout=layout: call(tokens, layout, frozen=False))
            report(f"backward_{layout}_{tokens}", came, SCRATCH)

    # Of 64 experts six are here: a tenth of the slots that could be, and of what is reserved.
    tokens = 6000
    slots, offsets = index(tokens, 2, 64)
    x = torch.randn(tokens, HIDDEN, requires_grad=True)
    weights = torch.rand(tokens, 2)
    reserved = tokens * 2 * 2 * WIDTH * 4
    saved = int(offsets[-1]) * 2 * WIDTH * 4
    results = []
    came = growth(
        lambda: results.append(
            ppmoe_ops.expert_ffn(
                x, slots, offsets, weights, w_in["closed"], None, w_out["closed"], None, "swiglu"
            )
        )
    )
    # The result, what is saved, and the activations, which are half of that.
    allowed = x.nbytes + saved + saved // 2 + SCRATCH
    assert allowed < reserved / 1.5
    report("reserved", came, allowed)


if __name__ == "__main__":
    main()
