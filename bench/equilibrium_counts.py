"""Rows that count: evaluations of f, samples in them, and bytes; their time is beside the point.

The maps are z -> tanh(W z + x), W symmetric: 16 states of 768 values, a 2-norm of 0.95, and x a
tenth of a normal draw.
"""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ppmoe_ops

from . import gate, targets
from . import plain_equilibrium as plain
from .harness import OPERATOR, Baseline, Problem

Mode = Literal["abs", "rel"]
SEEDS, BATCH, SIZE, NORM = 5, 16, 768, 0.95
MOST = 400
OURS = ("anderson", "broyden", "newton_krylov", "fixed_point")
HARD, EASY = 0.99, 0.3


def _ours(f: Any, z0: Tensor, solver: str, mode: Mode, tolerance: float, **options: Any) -> Tensor:
    given: dict[str, Any] = {
        "atol": tolerance if mode == "abs" else 0.0,
        "rtol": tolerance * (mode == "rel"),
    }
    given |= {"max_iter": MOST, "warn": False, **options}
    with torch.no_grad():
        z, _ = ppmoe_ops.equilibrium(f, z0, solver=solver, **given)
    assert isinstance(z, Tensor)
    return z


def theirs() -> dict[str, Callable[..., Tensor]]:
    """torchdeq's solvers, with Anderson's once more at a ridge that its module cannot be given."""
    if not plain.INSTALLED:
        return {}
    found: dict[str, Callable[..., Tensor]] = {
        f"{targets.TORCHDEQ} {name}": partial(plain.torchdeq, name) for name in plain.SOLVERS
    }
    found[f"{targets.TORCHDEQ} anderson, lam 1e-8"] = partial(plain.torchdeq, "anderson", lam=1e-8)
    return found


def evaluations(
    mode: Mode, tolerance: float, device: torch.device, seeds: int = SEEDS, size: int = SIZE
) -> Problem:
    """How often f is evaluated to a tolerance, by every solver on both sides."""
    counts: dict[str, list[int]] = {}
    left_out: dict[str, str] = {}
    for seed in range(seeds):
        w, x = (each.to(device) for each in plain.symmetric(seed, NORM, BATCH, size))
        z0, f = torch.zeros_like(x), plain.symmetric_map(w, x)
        solves: dict[str, Callable[[Any], Tensor]] = {
            f"ours {name}": partial(
                _ours, z0=z0, solver=name, mode=mode, tolerance=tolerance
            ) for name in OURS
        }  # fmt: skip
        for name, call in theirs().items():
            solves[name] = partial(call, z0=z0, rtol=tolerance, max_iter=MOST, mode=mode)
        for name, solve in solves.items():
            counted = plain.Counted(f)
            reached = plain.largest_residual(f, solve(counted), mode)
            counts.setdefault(name, []).append(counted.calls)
            if not reached <= tolerance:
                left_out[name] = f"residual {reached:.1e} at seed {seed}"
    ours = f"ours {OURS[0]}"
    medians = {name: statistics.median(each) for name, each in counts.items()}
    numbers, broyden = {}, f"{targets.TORCHDEQ} broyden"
    rivals = [medians[name] for name in theirs() if name not in left_out]
    if broyden in medians and ours not in left_out:
        numbers[targets.BROYDEN] = medians[ours] / medians[broyden]
        numbers[targets.FEWEST] = medians[ours] / min(rivals)
    shown = ", ".join(f"{name} {_range(each)}" for name, each in counts.items())
    note = f"evaluations of f, median (least to most) of {seeds} seeds: {shown}"
    w, x = (each.to(device) for each in plain.symmetric(0, NORM, BATCH, size))
    f, z0 = plain.symmetric_map(w, x), torch.zeros_like(x)
    timed = Baseline(OPERATOR, _ours, (f, z0, OURS[0], mode, tolerance))
    return _counting(
        timed, f, mode, tolerance, numbers, (note,), left_out,
        flops=2 * BATCH * size * size * int(medians[ours]), nbytes=4 * x.numel() * 17,
    )  # fmt: skip


def _range(values: Sequence[int]) -> str:
    return f"{statistics.median(values):g} ({min(values)}-{max(values)})"


def _counting(
    timed: Baseline,
    f: plain.Map,
    mode: Mode,
    tolerance: float,
    numbers: Mapping[str, float],
    notes: tuple[str, ...],
    left_out: dict[str, str],
    flops: int,
    nbytes: int,
) -> Problem:
    def check(came: Tensor) -> gate.Verdict:
        reached = plain.largest_residual(f, came, mode)
        passed = reached <= tolerance
        return gate.Verdict(
            passed, "" if passed else f"residual {reached:.2g}; {tolerance:g} asked"
        )

    return Problem(
        timed.args, timed=timed, check=check, composed=True, numbers=numbers, notes=notes,
        left_out=left_out, flops=flops, nbytes=nbytes,
    )  # fmt: skip


class _Subset:
    """f for the samples that a solver names, with the samples counted."""

    def __init__(self, w: Tensor, x: Tensor) -> None:
        self._w, self._x = w, x
        self.samples = 0

    def __call__(self, z: Tensor, index: Tensor | None = None) -> Tensor:
        self.samples += z.size(0)
        w, x = (self._w, self._x) if index is None else (self._w[index], self._x[index])
        return plain.stacked_map(w, x)(z)


def hard_sample(device: torch.device, size: int = 256, tolerance: float = 1e-4) -> Problem:
    """Seven samples that are easy and one that is hard: how many evaluated samples that takes."""
    w, x = plain.stacked([EASY] * 7 + [HARD], size)
    w, x = w.to(device), x.to(device)
    z0, f = torch.zeros_like(x), plain.stacked_map(w, x)
    together = _Subset(w, x)
    _ours(together, z0, OURS[0], "rel", tolerance, compact=True)
    alone = 0
    for row in range(8):
        single = _Subset(w[row : row + 1], x[row : row + 1])
        _ours(single, z0[row : row + 1], OURS[0], "rel", tolerance)
        alone += single.samples
    shown = [f"ours {together.samples}", f"each alone {alone}"]
    for name, call in theirs().items():
        counted = plain.Counted(f)
        call(counted, z0, rtol=tolerance, max_iter=MOST, mode="rel")
        shown.append(f"{name} {counted.samples}")
    note = f"evaluated samples: {', '.join(shown)}"
    timed = Baseline(
        OPERATOR, partial(_ours, compact=True), (_Subset(w, x), z0, OURS[0], "rel", tolerance)
    )
    return _counting(
        timed, f, "rel", tolerance, {targets.WORK: together.samples / alone}, (note,), {},
        flops=2 * size * size * together.samples, nbytes=4 * size * size * together.samples,
    )  # fmt: skip


class _Alive(TorchDispatchMode):
    """Bytes of the tensors that are made and not freed yet, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return result

    def ignore(self, tensor: Tensor) -> None:
        """Do not count what was there before."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = 0
        weakref.finalize(storage, self._drop, storage._cdata)

    def _add(self, storage: Any) -> None:
        if storage._cdata in self._known:
            return
        self._known[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._drop, storage._cdata)
        self.live += storage.nbytes()
        self.most = max(self.most, self.live)

    def _drop(self, key: int) -> None:
        self.live -= self._known.pop(key)


def peak_bytes(call: Callable[[], Any], *known: Tensor) -> int:
    """The most bytes of tensors that `call` has alive at a time, those in `known` left out."""
    with _Alive() as alive:
        for each in known:
            alive.ignore(each)
        call()
    return alive.most


def history(solver: str, device: torch.device, size: int = 1 << 15, steps: int = 20) -> Problem:
    """Memory of a solve that never converges, by how long it may go on."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(8, size, generator=source).to(device)
    z0 = torch.zeros_like(x)

    def f(z: Tensor) -> Tensor:
        # Far from a multiple of the identity, so that no history resolves it.
        return torch.tanh(z.roll(1, -1)).mul_(0.97).add_(x)

    def solve(most: int) -> Tensor:
        return _ours(f, z0, solver, "rel", 0.0, max_iter=most)

    state = x.numel() * x.element_size()
    peaks = {most: peak_bytes(partial(solve, most), x, z0) / state for most in (steps, 4 * steps)}
    shown = [f"ours {_states(peaks)}"]
    for name, call in theirs().items():
        if solver in name:
            other = {
                most: peak_bytes(partial(call, f, z0, rtol=0.0, max_iter=most), x, z0) / state
                for most in (steps, 4 * steps)
            }
            shown.append(f"{name} {_states(other)}")
    note = f"peak memory in states of the batch, by iterations: {', '.join(shown)}"
    return Problem(
        (z0,), timed=Baseline(OPERATOR, solve, (steps,)), composed=True,
        check=lambda came: gate.Verdict(bool(came.isfinite().all()), "a state is not finite"),
        numbers={targets.GROWTH: peaks[4 * steps] / peaks[steps]}, notes=(note,),
        flops=4 * x.numel() * steps, nbytes=17 * state * steps,
    )  # fmt: skip


def _states(peaks: Mapping[int, float]) -> str:
    return ", ".join(f"{value:.1f} at {most}" for most, value in peaks.items())
