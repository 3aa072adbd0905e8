"""`anderson_mix`: one step of Anderson's method for every sample, around an f of the caller's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Operator, Sample, register
from ppmoe_ops.ops.equilibrium.mixing import DIVERGED, mixing_weights, ridge
from ppmoe_ops.ops.equilibrium.options import MOST_ANDERSON_HISTORY

_OP = "anderson_mix"
# Columns of `counters`, values of its first one, and columns of `values`.
STATUS, STEPS, HELD, SLOT, BEST_AT = range(5)
RUNNING, CONVERGED, DIVERGED_STATUS, STOPPED = range(4)
RESIDUAL, BEST, LIMIT = range(3)


def anderson_mix(
    f: Tensor,
    z: Tensor,
    z_next: Tensor,
    best_z: Tensor,
    best_f: Tensor,
    dg: Tensor,
    df: Tensor,
    gram: Tensor,
    values: Tensor,
    counters: Tensor,
    rows: Tensor | None = None,
    atol: float = 0.0,
    rtol: float = 1e-3,
    damping: float = 1.0,
    last: bool = False,
) -> Tensor:
    """Take f at the current points of B samples, and make their next points, in place.

    With g = f - z, a running sample counts a step and has converged when
    |g|_2 <= atol + rtol |f|_2; it has diverged when |g|_2 is not finite or above 1e4 (|z| + |f|) of
    its first step. Otherwise the differences to its last step go into a history of m, and
    z_next = f - sum_j gamma_j df_j, gamma = argmin |g - sum_j gamma_j dg_j|. The first step, and
    one after a mixed step that raised |g|_2, has no differences: z_next = f, and what was held is
    dropped. Samples do not touch one another, and one that is done is left alone.

    The caller makes z the first points, `values` and `counters` zeros and the rest anything finite
    or not, calls f, calls this, exchanges z and z_next, and goes on until none is running.

    Args:
        f: [A, d] float32, bfloat16, float16 or float64: f at the points z of the samples `rows`.
            Any strides; rows that are closed in memory are read where they are.
        z: [B, d] as f, contiguous as all that follows. Written only for a sample that stops where
            z is not its best point: it gets that.
        z_next: [B, d] as f; the points before z come, the next points go. A sample that is done
            keeps its best point.
        best_z: [B, d] as f. Once a sample is done, the point with the smallest residual.
        best_f: [B, d] as f. Once a sample is done, f at best_z.
        dg: [B, m + 1, d] float32 (float64 for float64), 0 <= m <= 16: differences of g, and the
            last g. Where m is 0 it may be [B, 0, d].
        df: [B, m + 1, d] as dg, of f.
        gram: [B, m + 1, m + 1] float64, dg dg^T.
        values: [B, 3] float64: |g|_2 of the last step, the smallest one (inf once diverged), and
            the bound that tells divergence.
        counters: [B, 5] int32: status (0 running, 1 converged, 2 diverged, 3 stopped by `last`),
            steps, differences held, the row of the last pair, the step of the best point.
        rows: [A] int64, rising: the samples that f has rows for; None for all of them.
        atol: absolute tolerance.
        rtol: tolerance relative to |f|_2.
        damping: beta in z_next = (1 - beta) (z - sum gamma dz) + beta (f - sum gamma df).
        last: stop every sample after this step.

    Returns:
        How many samples are still running, [] int32. Sums run in float32 lanes within blocks of a
        fixed size, and in float64 over blocks.

    Raises:
        ValueError: a shape or dtype that is not as above, a written tensor that is not contiguous,
            rows that do not rise, a tolerance that is negative or not finite, a damping outside
            (0, 1].
        IndexError: a row outside [0, B).

    Gradient: none; `ppmoe_ops.equilibrium` differentiates a solve.
    Saved for backward: nothing.

    Source: Anderson's method of type II in difference form; LION (arXiv 2303.09992) leaves its
        solver open.

    Example:
        >>> import torch, ppmoe_ops
        >>> b, d, m = 1, 2, 1
        >>> z, z_next, best_z, best_f = torch.zeros(4, b, d)
        >>> dg, df = torch.zeros(2, b, m + 1, d)
        >>> gram = torch.zeros(b, m + 1, m + 1, dtype=torch.float64)
        >>> values = torch.zeros(b, 3, dtype=torch.float64)
        >>> counters = torch.zeros(b, 5, dtype=torch.int32)
        >>> for step in range(3):
        ...     f = 0.5 * z + torch.tensor([1.0, 2.0])
        ...     running = ppmoe_ops.anderson_mix(
        ...         f, z, z_next, best_z, best_f, dg, df, gram, values, counters)
        ...     z, z_next = z_next, z
        >>> int(running), best_z.tolist()
        (0, [[2.0, 4.0]])
    """
    return ANDERSON_MIX.overload(
        f, z, z_next, best_z, best_f, dg, df, gram, values, counters, rows, atol, rtol, damping,
        last,
    )  # fmt: skip


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_written(
    name: str, tensor: Tensor, axes: str, sizes: tuple[tuple[int, str], ...], dtype: torch.dtype,
    why: str,
) -> None:  # fmt: skip
    check.dim(_OP, name, tensor, axes)
    check.dtype(_OP, name, tensor, (dtype,), why)
    for axis, (letter, (size, as_what)) in enumerate(zip(axes.split(", "), sizes, strict=True)):
        check.size(_OP, name, letter, tensor.size(axis), size, as_what)
    if not tensor.is_contiguous():
        raise ValueError(f"{_OP}: {name} is not contiguous; allowed: contiguous, as it is written")


def _check(
    f: Tensor, z: Tensor, z_next: Tensor, best_z: Tensor, best_f: Tensor, dg: Tensor, df: Tensor,
    gram: Tensor, values: Tensor, counters: Tensor, rows: Tensor | None, atol: float, rtol: float,
    damping: float,
) -> None:  # fmt: skip
    check.dim(_OP, "f", f, "A, d")
    check.dtype(_OP, "f", f, check.FLOATS)
    check.dim(_OP, "z", z, "B, d")
    batch = (z.size(0), "as z")
    state = (batch, (f.size(1), "as f"))
    for name, each in (("z", z), ("z_next", z_next), ("best_z", best_z), ("best_f", best_f)):
        _check_written(name, each, "B, d", state, f.dtype, "as f")
    check.dim(_OP, "df", df, "B, R, d")
    pairs = df.size(1)
    check.between(_OP, "the number of rows R of df", pairs, 1, MOST_ANDERSON_HISTORY + 1)
    width, why = _wide(f.dtype), "what f is summed in"
    history = (batch, (pairs, "as df"), state[1])
    _check_written("df", df, "B, R, d", history, width, why)
    check.dim(_OP, "dg", dg, "B, R, d")
    if not (pairs == 1 and dg.size(1) == 0):
        _check_written("dg", dg, "B, R, d", history, width, why)
    squares = (batch, *((pairs, "as df"),) * 2)
    _check_written("gram", gram, "B, R, R", squares, torch.float64, "its only one")
    three, five = (3, "its only size"), (5, "its only size")
    _check_written("values", values, "B, N", (batch, three), torch.float64, "its only one")
    _check_written("counters", counters, "B, N", (batch, five), torch.int32, "its only one")
    if rows is None:
        check.size(_OP, "f", "A", f.size(0), batch[0], "as B of z, without rows")
    else:
        check.dim(_OP, "rows", rows, "A")
        check.dtype(_OP, "rows", rows, (torch.int64,))
        check.size(_OP, "rows", "A", rows.size(0), f.size(0), "as f")
    check.tolerance(_OP, "atol", atol)
    check.tolerance(_OP, "rtol", rtol)
    if not 0 < damping <= 1:
        raise ValueError(f"{_OP}: damping is {damping:g}; allowed: above 0, at most 1")


def _check_rows(rows: Tensor, samples: int) -> None:
    before = -1
    for row in rows.tolist():
        if not 0 <= row < samples:
            raise IndexError(f"{_OP}: rows holds {row}; allowed: 0 to {samples - 1}")
        if row <= before:
            raise ValueError(f"{_OP}: rows holds {row} after {before}; allowed: rising rows")
        before = row


def _norm(x: Tensor) -> Tensor:
    return x.double().square().sum(1).sqrt()


def _reference(
    f: Tensor, z: Tensor, z_next: Tensor, best_z: Tensor, best_f: Tensor, dg: Tensor, df: Tensor,
    gram: Tensor, values: Tensor, counters: Tensor, rows: Tensor | None = None,
    atol: float = 0.0, rtol: float = 1e-3, damping: float = 1.0, last: bool = False,
) -> Tensor:  # fmt: skip
    _check(f, z, z_next, best_z, best_f, dg, df, gram, values, counters, rows, atol, rtol, damping)
    if rows is not None and rows.device.type == "cpu":
        _check_rows(rows, z.size(0))
    written = (z, z_next, best_z, best_f, dg, df, gram, values, counters)
    came = written if rows is None else tuple(each[rows] for each in written)
    new = _step(f, came, atol, rtol, damping, last)
    for whole, part in zip(written, new, strict=True):
        if rows is None:
            whole.copy_(part)
        else:
            whole.index_copy_(0, rows, part)
    return (counters[:, STATUS] == RUNNING).sum(dtype=torch.int32)


def _step(
    f: Tensor, written: tuple[Tensor, ...], atol: float, rtol: float, damping: float, last: bool
) -> tuple[Tensor, ...]:
    """What the written tensors become; no host reads, for any device."""
    z, z_next, best_z, best_f, dg, df, gram, values, counters = written
    pairs, width = df.size(1), df.dtype
    history = pairs - 1
    status, steps, held, slot, best_at = counters.long().unbind(1)
    residual, best, limit = values.unbind(1)
    value, point = f.to(width), z.to(width)
    g = value - point
    r, size = _norm(g), _norm(value)

    active, first = status == RUNNING, steps == 0
    limit = torch.where(first, DIVERGED * (_norm(point) + size), limit)
    diverged = ~(r.isfinite() & (r <= limit))
    converged = ~diverged & (r <= atol + rtol * size)
    stop = diverged | converged | last
    better = first | (r < best)
    goes_on = active & ~stop

    # The point before is still in z_next, and its f in the history, until here.
    at = torch.arange(pairs, device=f.device)
    here, there = at == slot[:, None], at == ((slot + 1) % pairs)[:, None]
    keep_old, keep_new = active & ~better & (best_at == steps), active & better & stop
    old_f = torch.where(here[:, :, None], df, 0).sum(1)
    best_z = _where(keep_old, z_next, _where(keep_new, z, best_z))
    best_f = _where(keep_old, old_f.to(f.dtype), _where(keep_new, f, best_f))

    push = goes_on & ~first & ~((held > 0) & (r > residual)) & (history > 0)
    held_now = torch.where(push, held.clamp(max=max(history - 1, 0)) + 1, 0)
    used = (slot[:, None] - at) % pairs < held_now[:, None]
    mixed = value
    if dg.size(1) > 0:
        new = g - torch.where(here[:, :, None], dg, 0).sum(1)
        dg = _where(here & (active & ~first)[:, None], new[:, None], dg)
        dots = (dg.double() * new.double()[:, None]).sum(2)
        changed = (here[:, :, None] & used[:, None, :]) | (here[:, None, :] & used[:, :, None])
        row = torch.where(here[:, :, None], dots[:, None, :], dots[:, :, None])
        gram = torch.where(changed & push[:, None, None], row, gram)
        projection = (dg.double() * g.double()[:, None]).sum(2)
        gamma = mixing_weights(gram, projection, used, ridge(width)).to(width)
        df = _where(here & push[:, None], (value - old_f)[:, None], df)
        mixed = value - (torch.where(used[:, :, None], df, 0) * gamma[:, :, None]).sum(1)
        g_left = g - (torch.where(used[:, :, None], dg, 0) * gamma[:, :, None]).sum(1)
        mixed = mixed - (1 - damping) * g_left if damping != 1 else mixed
        dg = _where(there & active[:, None], g[:, None], dg)
    elif damping != 1:
        mixed = value - (1 - damping) * g
    df = _where(there & goes_on[:, None], value[:, None], df)

    z_next = _where(goes_on, mixed.to(f.dtype), _where(active & stop, best_z, z_next))
    z = _where(active & stop & ~better, best_z, z)
    best = torch.where(active & better, r, best)
    best = torch.where(active & diverged, math.inf, best)
    values = _where(active, torch.stack((r, best, limit), 1), values)
    ended = torch.where(diverged, DIVERGED_STATUS, torch.where(converged, CONVERGED, STOPPED))
    after = (
        torch.where(stop, ended, RUNNING), steps + 1, held_now, (slot + 1) % pairs,
        torch.where(better, steps + 1, best_at),
    )  # fmt: skip
    counters = _where(active, torch.stack(after, 1).int(), counters)
    return z, z_next, best_z, best_f, dg, df, gram, values, counters


def _where(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the samples, or rows of samples, where `condition` holds."""
    return torch.where(
        condition.view(*condition.shape, *(1,) * (old.dim() - condition.dim())), new, old
    )


def _fake(
    f: Tensor, z: Tensor, z_next: Tensor, best_z: Tensor, best_f: Tensor, dg: Tensor, df: Tensor,
    gram: Tensor, values: Tensor, counters: Tensor, rows: Tensor | None = None,
    atol: float = 0.0, rtol: float = 1e-3, damping: float = 1.0, last: bool = False,
) -> Tensor:  # fmt: skip
    _check(f, z, z_next, best_z, best_f, dg, df, gram, values, counters, rows, atol, rtol, damping)
    return f.new_empty((), dtype=torch.int32)


Work = tuple[Tensor, Tensor, Tensor, Tensor]  # z, z_next, dg, df


def buffers(z0: Tensor, history: int, work: Work | None = None) -> tuple[Tensor, ...]:
    """z, z_next and all that follows in the arguments up to `counters`, for a solve from z0."""
    samples, width = z0.shape
    pairs, wide = history + 1, _wide(z0.dtype)
    if work is None:
        z = torch.empty_like(z0, memory_format=torch.contiguous_format)
        dg = z.new_empty((samples, pairs if history else 0, width), dtype=wide)
        work = z, torch.empty_like(z), dg, z.new_empty((samples, pairs, width), dtype=wide)
    z, z_next, dg, df = work
    z.copy_(z0)
    return (
        z, z_next, torch.empty_like(z), torch.empty_like(z), dg, df,
        z.new_zeros((samples, pairs, pairs), dtype=torch.float64),
        z.new_zeros((samples, 3), dtype=torch.float64),
        z.new_zeros((samples, 5), dtype=torch.int32),
    )  # fmt: skip


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for samples, width, history, steps, damping in (
        (3, 20, 3, 2, 1.0),
        (2, 33, 2, 5, 0.5),
        (4, 16, 0, 1, 1.0),
        (1, 1, 1, 3, 1.0),
        (0, 8, 2, 0, 1.0),
        (3, 0, 2, 0, 1.0),
    ):
        weight = 0.9 * torch.randn(width, width, device=device) / max(width, 1) ** 0.5
        offset = torch.randn(samples, width, device=device)

        def function(at: Tensor, weight: Tensor = weight, offset: Tensor = offset) -> Tensor:
            return torch.tanh(at.float() @ weight + offset).to(dtype)

        z0 = torch.zeros(samples, width, device=device, dtype=dtype)
        now = [each.zero_() if at else each for at, each in enumerate(buffers(z0, history))]
        for _ in range(steps):
            call: Any = (function(now[0]), *now, None, 0.0, 0.0, damping)
            _reference(*call)
            now[0], now[1] = now[1], now[0]
        yield (function(now[0]), *now, None, 0.0, 1e-9, damping, False), {}
        if samples == 3 and width:
            again, rows = [each.clone() for each in now], torch.tensor([0, 2], device=device)
            wider = torch.zeros(2, 2 * width, device=device, dtype=dtype)
            some = wider[:, :width].copy_(function(now[0])[rows])
            yield (some, *again, rows, 0.0, 0.3), {}
            other = [each.clone() for each in again]
            yield (function(now[0]), *other, None, 1.0, 0.0, 1.0, True), {}


def _flops(f: Tensor, z: Tensor, z_next: Tensor, best_z: Tensor, best_f: Tensor, dg: Tensor,
           df: Tensor, *_: Any, **__: Any) -> int:  # fmt: skip
    # g and its norm, |f|, differences; two dots and one mixing product for each of them.
    return f.size(0) * f.size(1) * (7 + 6 * (df.size(1) - 1))


def _nbytes(
    f: Tensor, z: Tensor, z_next: Tensor, best_z: Tensor, best_f: Tensor, dg: Tensor, df: Tensor,
    gram: Tensor, values: Tensor, counters: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    # f and z are read and z_next is written; so are the last pair and the rest of the history.
    each = 3 * f.element_size() + (dg.size(1) + df.size(1)) * df.element_size()
    small = sum(t.nbytes for t in (gram, values, counters)) // max(z.size(0), 1)
    return f.size(0) * (f.size(1) * each + small)


ANDERSON_MIX = register(
    Operator(
        name=_OP,
        family="equilibrium",
        schema="(Tensor f, Tensor(a!) z, Tensor(b!) z_next, Tensor(c!) best_z, Tensor(d!) best_f, "
        "Tensor(e!) dg, Tensor(g!) df, Tensor(h!) gram, Tensor(i!) values, Tensor(j!) counters, "
        "Tensor? rows=None, float atol=0., float rtol=1e-3, float damping=1., bool last=False) "
        "-> Tensor",
        reference=_reference,
        fake=_fake,
        flops=_flops,
        nbytes=_nbytes,
        samples=_samples,
        benchmark="bench_equilibrium",
    )
)
