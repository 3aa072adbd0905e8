"""Random calls of `expert_ffn`, forward and backward, by the error rule: `make fuzz`.

A call is drawn from its own seed alone, which is printed where the call fails, so that
`python tests/fuzz.py --only SEED` repeats it.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "expert_slice"))

import torch
from ffn import (
    ACTIVATIONS,
    FLOAT_ARGUMENTS,
    NAMES,
    Args,
    Shape,
    asking,
    assert_same_bits,
    check_ffn,
    judge_gradients,
    of_many_rows,
    problem,
    replaced,
    run,
    summed_alike,
)
from slicing import DTYPES, dtype_name, plain_expert_ffn, wide
from torch import Tensor

from ppmoe_ops.testing import cast_sample, poison_memory

# Calls of one run have seeds from here on: run N starts at N times as much.
SEEDS_PER_RUN = 10**7
# Where float64 and float32 may take different sides of the kink of relu, results are not compared.
KINK = 1e-5
# Results of any size may stem from so few rows that the measure of their errors is small by luck.
ANY = sys.maxsize
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 17, 23, 31, 32, 33, 48)
LARGER = (47, 63, 64, 65, 96, 97, 127, 129, 191, 193, 257)
LARGEST = (384, 385, 511, 512, 513, 700, 1029)


@dataclasses.dataclass(frozen=True)
class Call:
    """What one seed draws."""

    seed: int
    shape: Shape
    dtype: torch.dtype
    activation: str
    biases: tuple[bool, bool]
    needs: tuple[int, ...]
    threads: int
    shift: int
    shuffled: bool
    layouts: tuple[str, ...]
    grad: str
    again: bool

    def __str__(self) -> str:
        s = self.shape
        needs = ",".join(NAMES[at] for at in self.needs) or "none"
        return (
            f"T={s.tokens} H={s.hidden} F={s.width} K={s.top_k} E={s.experts} first={s.first} "
            f"L={s.here} {s.routing}; {dtype_name(self.dtype)} {self.activation}, "
            f"b_in={self.biases[0]} b_out={self.biases[1]}; needs {needs}; {self.threads} threads; "
            f"offsets from {self.shift}, shuffled={self.shuffled}; "
            f"layouts {','.join(self.layouts)}, grad {self.grad}"
        )


LAYOUTS = ("closed", "closed", "offset", "columns", "spread", "transposed", "rows", "outer")
GRADS = ("closed", "columns", "transposed", "spread", "one_row", "one_value", "zeros")


def draw(seed: int) -> Call:
    rng = random.Random(seed)
    how_large = rng.random()
    widths = SIZES if how_large < 0.9 else LARGER if how_large < 0.985 else LARGEST
    experts = rng.choice((1, 2, 3, 4, 5, 8, 16))
    top_k = rng.randint(1, min(experts, 8))
    tokens = rng.choice((0, 1, 2, 3, 5, 7, 12, 13, 16, 17, 24, 25, 40, 61))
    if rng.random() < 0.03 and widths is SIZES:
        tokens = rng.choice((385, 800, 2049, 4097))
    hidden, width = rng.choice(widths), rng.choice(widths)
    if tokens > 100:
        hidden, width, experts = hidden % 6, width % 6, min(experts, 4)
        top_k = min(top_k, experts)
    elif rng.random() < 0.02:
        hidden, width = rng.choice(((0, width), (hidden, 0)))
    first = rng.choice((0, 0, rng.randint(0, experts)))
    local = rng.choice((experts - first, rng.randint(0, experts)))
    routing = rng.choice(("drawn", "drawn", "drawn", "dropped", "one", "absent"))
    if rng.random() < 0.015:
        tokens, top_k, routing = rng.choice((200, 290, 530)), 1, "rare"
        hidden, width = rng.choice(LARGER), rng.choice(LARGER)
        experts = local = 3
        first = 0
    needs = FLOAT_ARGUMENTS
    if rng.random() < 0.4:
        needs = tuple(at for at in FLOAT_ARGUMENTS if rng.random() < 0.5)
    return Call(
        seed=seed,
        shape=Shape(tokens, hidden, width, top_k, experts, first, local, routing),
        dtype=rng.choice(DTYPES),
        activation=rng.choice(ACTIVATIONS),
        biases=(rng.random() < 0.6, rng.random() < 0.6),
        needs=needs,
        threads=rng.randint(1, 4),
        shift=rng.choice((0, 0, 0, 1, 5)),
        shuffled=rng.random() < 0.3,
        layouts=tuple(rng.choice(LAYOUTS) for _ in FLOAT_ARGUMENTS),
        grad=rng.choice(GRADS),
        again=rng.random() < 0.25,
    )


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other memory, NaN between them."""
    shape, last = tensor.shape, tensor.size(-1)

    def room(*sizes: int) -> Tensor:
        return tensor.new_full(sizes, torch.nan)

    if layout == "closed":
        return tensor
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "outer":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "offset":
        view = room(tensor.numel() + 3)[3:].view(shape)
    elif layout == "columns":
        view = room(*shape[:-1], last + 4)[..., 1 : last + 1]
    elif layout == "spread":
        view = room(*shape[:-1], 3 * last)[..., ::3]
    else:
        view = room(2 * shape[0] + 1, *shape[1:])[1::2]
    return view.copy_(tensor)


def arguments(call: Call) -> tuple[Args, Args, Tensor]:
    """The same call in closed and in drawn layouts, and the gradient that comes from above."""
    torch.manual_seed(call.seed)
    args = problem(call.shape, call.dtype, call.activation, call.biases)
    slots, offsets = args[1:3]
    bounds = offsets.tolist()
    if call.shuffled:
        slots = slots.clone()
        for low, high in pairwise(bounds):
            slots[low:high] = slots[low:high][torch.randperm(high - low)]
    reserved = call.shape.tokens * min(call.shape.top_k, call.shape.here)
    shift = min(call.shift, reserved - bounds[-1])
    moved = torch.full_like(slots, -(2**31))
    moved[shift : shift + bounds[-1]] = slots[: bounds[-1]]
    args = replaced(args, slots=moved, offsets=offsets + shift)
    if call.activation == "relu" and near_the_kink(args):
        args = replaced(args, activation="silu")
    turned = list(args)
    for at, layout in zip(FLOAT_ARGUMENTS, call.layouts, strict=True):
        if turned[at] is not None:
            turned[at] = laid_out(turned[at], layout)
    return args, tuple(turned), upstream(call, args[0])


def near_the_kink(args: Args) -> bool:
    """Whether some pre-activation is so small that a rounding may change its sign."""
    seen: list[Tensor] = []

    def look(pre: Tensor, _: str) -> Tensor:
        seen.append(pre)
        return pre

    plain_expert_ffn(*cast_sample(args, torch.float64), act=look)
    return bool((seen[0].abs() < KINK).any())


def upstream(call: Call, x: Tensor) -> Tensor:
    # bfloat16 holds it, so that it is the same in every dtype.
    grad = torch.randn(x.shape).to(torch.bfloat16).to(x.dtype)
    if call.grad == "one_row":
        return grad[:1].expand(x.shape) if x.size(0) else grad
    if call.grad == "one_value":
        return torch.ones((), dtype=x.dtype).expand(x.shape)
    return torch.zeros_like(x) if call.grad == "zeros" else laid_out(grad, call.grad)


def outputs(args: Args, needs: tuple[int, ...], grad: Tensor) -> list[Tensor]:
    """The output and the gradients that are asked for."""
    args = asking(args, needs)
    out = run(args)
    leaves = [args[at] for at in needs if args[at] is not None]
    grads = torch.autograd.grad(out, leaves, grad) if leaves else ()
    return [out.detach(), *grads]


def check(call: Call) -> None:
    """Raise AssertionError where a result is wrong."""
    closed, turned, grad = arguments(call)
    torch.set_num_threads(call.threads)
    came = outputs(turned, call.needs, grad)
    torch.set_num_threads(1)
    assert_same_bits([came[0]], [check_ffn(turned, ANY)], "output with and without gradients")
    if len(came) > 1:
        judge_gradients(came[1:], asking(turned, call.needs), grad, ANY)
    untouched = torch.ones(call.shape.tokens, dtype=torch.bool)
    listed = turned[1][int(turned[2][0]) : int(turned[2][-1])].long()
    untouched[listed // call.shape.top_k] = False
    zeros = came[0][untouched]
    assert_same_bits([zeros], [torch.zeros_like(zeros)], "tokens without a local slot")
    assert came[0].dtype == call.dtype
    assert wide(call.dtype) == turned[3].dtype
    if call.again:
        torch.set_num_threads(1 + call.threads % 4)
        again = outputs(closed, call.needs, grad.clone())
        if summed_alike(turned, closed):
            assert_same_bits(again, came, "closed memory")
            return
        pair = (of_many_rows(each, turned, call.needs) for each in (again, came))
        assert_same_bits(*pair, "closed memory, many rows")
        assert_same_bits(outputs(turned, call.needs, grad), came, "other threads")
        check_ffn(closed, ANY)
        if len(again) > 1:
            judge_gradients(again[1:], asking(closed, call.needs), grad, ANY)


def attempt(seed: int) -> bool:
    """Whether a call is right; says what is wrong where it is not."""
    call = draw(seed)
    try:
        check(call)
    except Exception as error:
        words: Any = str(error).strip() or repr(error)
        print(f"FAILED --only {seed}: {call}\n  {type(error).__name__}: {words}", flush=True)
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20000, help="how many (20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the run (0)")
    parser.add_argument("--only", type=int, help="the seed of a single call")
    parser.add_argument("--most", type=int, default=10, help="stop after so many failures (10)")
    options = parser.parse_args(arguments)
    threads, started = torch.get_num_threads(), time.monotonic()
    first = options.seed * SEEDS_PER_RUN
    seeds = [options.only] if options.only is not None else range(first, first + options.calls)
    if options.only is not None:
        print(draw(options.only))
    done = failures = 0
    try:
        with poison_memory():
            for seed in seeds:
                failures += not attempt(seed)
                done += 1
                if failures >= options.most:
                    break
    finally:
        torch.set_num_threads(threads)
    print(f"{done} calls, {failures} failed, {time.monotonic() - started:.0f} s")
    return 1 if failures or not done else 0


if __name__ == "__main__":
    sys.exit(main())
