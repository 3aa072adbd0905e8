"""Plain iteration and Anderson's method: one call of f and one of `anderson_mix` a step."""

from __future__ import annotations

from ppmoe_ops.ops.equilibrium.solution import Solution, Track


def anderson(track: Track) -> Solution:
    """z <- f - sum_j gamma_j df_j; with a history of 0, z <- f."""
    damping = track.options.damping
    while track.judge(track.evaluate(), damping=damping):
        pass
    return track.solution()
