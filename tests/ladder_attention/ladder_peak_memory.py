"""How far the memory of this process grows during calls of the family; run by its test.

Prints one line a case: its name, the growth of the resident peak, and what is allowed, in bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "expert_slice"))

import torch
from ladder import Args, Shape, run
from ladder_problems import attention_args, branch_args, ffn_args, fusion_args
from ladder_rule import all_results
from peak_memory import MIB, growth, report

SCRATCH = 16 * MIB
# Maps of 32 MiB, beside which scratch and weights are small.
LARGE = Shape(8, 128, 128, 2, 32, (8, 8), (3, -3))
SMALL = Shape(1, 8, 8, 2, 32, (8, 8), (3, -3))


def main() -> None:
    torch.set_num_threads(2)

    def measure(
        name: str, op: str, make: Callable[[Shape], Args], maps: float, backward: bool
    ) -> None:
        """`maps` are those of results and of what may lie between the phases of a call."""
        large, small = make(LARGE), make(SMALL)
        first = next(iter(large.values()))
        call = all_results if backward else run
        call(op, small)
        came = growth(lambda: call(op, large))
        report(name, came, int(maps * first.nbytes) + SCRATCH)

    def fusion(shape: Shape) -> Args:
        return fusion_args(shape.map)

    # Strided maps, so that a copy would show.
    def sliced(shape: Shape) -> Args:
        args = attention_args(shape)
        fused = torch.cat([args[name] for name in "qkv"], -1)
        return {**args, **dict(zip("qkv", fused.chunk(3, -1), strict=True))}

    measure("attention", "window_attention", sliced, 1, False)
    # Three gradients, the result, and the upstream gradient in float32 and bfloat16.
    measure("attention_backward", "window_attention", sliced, 6, True)
    # Projections, the norm, what is attended, the result.
    measure("branch", "ladder_attention", branch_args, 5, False)
    measure("ffn", "ladder_ffn", lambda s: ffn_args(s.map), 2, False)
    measure("ffn_training", "ladder_ffn", lambda s: ffn_args(s.map, training=True), 3, False)
    measure("fusion", "pixel_adaptive_fusion", fusion, 1, False)
    measure("fusion_backward", "pixel_adaptive_fusion", fusion, 8, True)


if __name__ == "__main__":
    main()
