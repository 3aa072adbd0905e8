"""Cases of `expert_ffn`: forward, forward and backward together, and decode.

The operator's side and its baselines start at the router's ids and weights: `expert_index` is in
the time. R ranks hold E / R experts each, and the first of them is measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ppmoe_ops._library import OPERATORS

from . import gate, targets
from . import plain_expert_ffn as plain
from .harness import AUTOGRAD, OPERATOR, Baseline, Case, Function, Problem
from .inputs import FINE_GRAINED, Model, Routing, Workload, build, expert_ids

Kind = Literal["forward", "forward+backward", "decode"]
SLOW = "slow baselines"
# A weight is read again after as many bytes of others, several times a last-level cache.
ROTATED_BYTES = 256 << 20
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


def problem(operator: str, work: Workload, device: torch.device) -> Problem:
    """The problem of one of the three operators, called as it is."""
    if operator == "expert_ffn":
        return _forward(work, device)
    if operator == "expert_ffn_backward":
        return _backward(work, device)
    args = build(operator, work, device)
    # What is kept for a backward is a part of the time, so leaves need gradients here too.
    leaves = [
        each.detach().requires_grad_(each.is_floating_point()) for each in _plain_args(work, args)
    ]
    baselines, left_out = _peers(work, tuple(leaves))
    return Problem(args, baselines, flops=executed_flops(args), left_out=left_out)


def _backward(work: Workload, device: torch.device) -> Problem:
    backward = build("expert_ffn_backward", work, device)
    args = forward_args(backward)
    derivative: dict[str, Any] = {"wrt": (0, 2, 3, 4), "grads": backward[:1]}
    baselines, left_out = _peers(work, _plain_args(work, args), **derivative)
    derivative["wrt"] = (0, 3, 4, 6)
    forward = OPERATORS["expert_ffn_forward"].overload
    return Problem(
        backward,
        baselines,
        Baseline(AUTOGRAD, forward, (*args, True), **derivative),
        flops=2 * executed_flops(args),
        left_out=left_out,
    )


def forward_args(backward: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `expert_ffn` in those of its backward; the models have no biases."""
    _, x, slots, offsets, weights, w_in, w_out, b_out, _, activation, *_ = backward
    return x, slots, offsets, weights, w_in, None, w_out, b_out, activation


def executed_flops(args: tuple[Any, ...]) -> int:
    """Of a forward: the contract counts as many slots as can be local, this those that are."""
    offsets, w_in, w_out = args[2], args[4], args[6]
    return int(2 * int(offsets[-1]) * w_in.size(2) * (w_in.size(1) + w_out.size(2)))


def _plain_args(work: Workload, args: tuple[Any, ...], ids: Tensor | None = None) -> Any:
    """Arguments of the baselines; their weights are in the dtype of `x`, which favours them."""
    x, weights, w_in, w_out = args[0], args[3], args[4], args[6]
    near = (expert_ids(work) if ids is None else ids).to(x.device).long() - work.first_expert
    foreign = (near < 0) | (near >= work.local)
    near = near.masked_fill(foreign, work.local)
    return x, near, weights.masked_fill(foreign, 0).to(x.dtype), w_in, w_out


def layer_args(work: Workload, args: tuple[Any, ...], ids: Tensor | None = None) -> Any:
    x, weights, w_in, w_out = args[0], args[3], args[4], args[6]
    ids = expert_ids(work) if ids is None else ids
    return x, ids.to(x.device), weights, w_in, w_out, work.first_expert


def _functions(
    work: Workload, slow: bool, step: bool
) -> tuple[dict[str, Function], dict[str, str]]:
    """Baselines that compute the same, and those that are left out, with the reason."""
    found: dict[str, Function] = {targets.LOOP: plain.loop}
    left_out: dict[str, str] = {}
    theirs = {targets.EAGER: "eager", targets.GROUPED: "grouped_mm"}
    missing = plain.why_no_transformers()
    for name, implementation in theirs.items():
        if missing:
            left_out[name] = missing
        elif name == targets.EAGER and work.local < work.model.experts:
            left_out[name] = "it raises on ids of other ranks' experts"
        elif name == targets.EAGER and step and not slow:
            left_out[name] = f"seconds a call: see the case '{SLOW}' of the full set"
        elif name == targets.EAGER or not slow:
            found[name] = plain.transformers_experts(implementation, work.local)
    if slow and work.dtype != BFLOAT16:
        left_out[targets.COMPILED_GROUPED] = "torch.compile takes grouped_mm in bfloat16 alone"
    elif slow:
        # Shapes of earlier rows count towards a limit, past which compiling stops without a word.
        torch.compiler.reset()
        found[targets.COMPILED_GROUPED] = torch.compile(plain.grouped, dynamic=False)
    return found, left_out


def _peers(
    work: Workload, args: Any, *, slow: bool = False, turns: Any = (), **derivative: Any
) -> tuple[tuple[Baseline, ...], dict[str, str]]:
    functions, left_out = _functions(work, slow, bool(derivative))
    baselines = tuple(
        Baseline(name, function, args, turns=turns, **derivative)
        for name, function in functions.items()
    )
    return baselines, left_out


def _dense(args: tuple[Any, ...], grad: Tensor | None = None) -> Baseline:
    """Dense products of equal FLOPs, as one expert over all local slots."""
    x, offsets, w_in, w_out = args[0], args[2], args[4], args[6]
    count = int(offsets[-1])

    def rows(source: Tensor) -> Tensor:
        return source.repeat(math.ceil(count / source.size(0)), 1)[:count]

    given = (rows(x), x.new_ones(count, w_out.size(2)), w_in[0], w_out[0])
    marks: dict[str, Any] = {"same_result": False, "dense": True}
    if grad is None:
        return Baseline(targets.DENSE, plain.dense, given, **marks)
    return Baseline(targets.DENSE, plain.dense_step, (*given, rows(grad)), **marks)


def _yardsticks(work: Workload, args: tuple[Any, ...], **derivative: Any) -> Iterator[Baseline]:
    """The operator itself on work that should take as long."""
    marks: dict[str, Any] = {"same_result": False, **derivative}
    if work.routing != "balanced" and work.local == work.model.experts:
        even = dataclasses.replace(work, routing="balanced")
        yield Baseline(targets.BALANCED, plain.layer, layer_args(even, args), **marks)
    if work.dtype == FLOAT16 and not derivative:
        wide = [each.float() if isinstance(each, Tensor) else each for each in args]
        yield Baseline(targets.IN_FLOAT32, plain.layer, layer_args(work, tuple(wide)), **marks)


def _forward(work: Workload, device: torch.device, slow: bool = False) -> Problem:
    args = build("expert_ffn", work, device)
    baselines, left_out = _peers(work, _plain_args(work, args), slow=slow)
    return Problem(
        args,
        (_dense(args), *baselines, *_yardsticks(work, args)),
        timed=Baseline(OPERATOR, plain.layer, layer_args(work, args)),
        flops=executed_flops(args),
        left_out=left_out,
    )


def _step(work: Workload, device: torch.device, slow: bool = False) -> Problem:
    """Forward and backward together, with gradients of x, the routing weights and the experts'."""
    backward = build("expert_ffn_backward", work, device)
    args = forward_args(backward)
    derivative: dict[str, Any] = {"wrt": (0, 2, 3, 4), "grads": backward[:1], "step": True}
    baselines, left_out = _peers(work, _plain_args(work, args), slow=slow, **derivative)
    costs = (OPERATORS["expert_ffn_forward"].nbytes(*args, True),
             OPERATORS["expert_ffn_backward"].nbytes(*backward))  # fmt: skip
    return Problem(
        args,
        (_dense(args, backward[0]), *baselines, *_yardsticks(work, args, **derivative)),
        timed=Baseline(OPERATOR, plain.layer, layer_args(work, args), **derivative),
        check=partial(check_step, args, backward),
        flops=3 * executed_flops(args),
        nbytes=sum(costs),
        left_out=left_out,
    )


def check_step(args: tuple[Any, ...], backward: tuple[Any, ...], came: Any) -> gate.Verdict:
    out, grad_x, grad_weights, grad_w_in, grad_w_out = came
    verdict = gate.check("expert_ffn", args, out)
    if not verdict.passed:
        return verdict
    # Gradients of biases are not asked for, and are then empty.
    none = out.new_empty(0)
    grads = (grad_x, grad_weights, grad_w_in, none, grad_w_out, none)
    return gate.check("expert_ffn_backward", backward, grads)


def _decode(work: Workload, device: torch.device, slow: bool = False) -> Problem:
    """Few tokens, every call with other ids and other weights, which no cache holds.

    Ids are a balanced batch cut into calls, so that an expert comes back after all the others; the
    sets of weights are as many as it takes for `ROTATED_BYTES` to lie between.
    """
    model, tokens = work.model, work.tokens
    pieces = max(1, work.local // (tokens * model.top_k))
    every = expert_ids(dataclasses.replace(work, tokens=tokens * pieces)).split(tokens)
    args = list(build("expert_ffn", work, device))
    args[1], args[2] = torch.ops.ppmoe_ops.expert_index(every[0].to(device), 0, work.local)
    expert_bytes = (args[4][0].numel() + args[6][0].numel()) * work.dtype.itemsize
    sets = max(2, math.ceil(ROTATED_BYTES / (expert_bytes * work.local)))
    weights = [(args[4], args[6])]
    weights += [(args[4].clone(), args[6].clone()) for _ in range(sets - 1)]
    turns = [(*args[:4], w_in, None, w_out) for _ in range(pieces) for w_in, w_out in weights]
    ids = [piece for piece in every for _ in range(sets)]

    def dealt(make: Callable[..., Any]) -> list[Any]:
        return [make(work, each, chosen) for each, chosen in zip(turns, ids, strict=True)]

    ours, theirs = dealt(layer_args), dealt(_plain_args)
    baselines, left_out = _peers(work, theirs[0], slow=slow, turns=tuple(theirs[1:]))
    return Problem(
        tuple(args),
        baselines,
        timed=Baseline(OPERATOR, plain.layer, ours[0], turns=tuple(ours[1:])),
        flops=executed_flops(tuple(args)),
        read=int((args[2][1:] > args[2][:-1]).sum()) * expert_bytes,
        left_out=left_out,
    )


_BUILDERS = {"forward": _forward, "forward+backward": _step, "decode": _decode}


def case(
    kind: Kind,
    tokens: int,
    dtype: torch.dtype,
    ranks: int = 1,
    routing: Routing = "balanced",
    *,
    slow: bool = False,
    quick: bool = False,
    headline: str = "",
    model: Model = FINE_GRAINED,
) -> Case:
    """One case; `slow` has the baselines that take seconds a call or to compile."""
    local = model.experts // ranks
    work = Workload(model, tokens, dtype, routing, local_experts=local)
    parts = [model.name, f"T={tokens}", f"R={ranks}", kind]
    parts += [routing] * (routing != "balanced") + [SLOW] * slow
    name = str(dtype).removeprefix("torch.")
    return Case(
        operator="expert_ffn",
        label=" ".join(parts),
        dtype=name,
        build=partial(_BUILDERS[kind], work, slow=slow),
        scaled=work.scaled,
        quick=quick,
        headline=headline,
        target="" if slow else _target(kind, work, ranks, name),
    )


def _target(kind: Kind, work: Workload, ranks: int, dtype: str) -> str:
    if kind == "decode":
        many = dtype == "bfloat16" and work.tokens * work.model.top_k >= 4 * work.local
        return f"decode {dtype}" + ", four rows an expert" * many
    if work.routing != "balanced":
        return "routing" if ranks == 1 else ""
    return f"{kind} R={ranks} {dtype}"


def quick_cases() -> Iterator[Case]:
    """One of each kind that has a target."""
    quick = partial(case, quick=True)
    for dtype in (FLOAT32, BFLOAT16):
        name = str(dtype).removeprefix("torch.")
        yield quick("forward", 2048, dtype, headline=f"expert FFN, {name}")
        yield quick("forward", 2048, dtype, 4, headline=f"expert FFN, one rank of 4, {name}")
        yield quick("forward+backward", 1024, dtype, headline=f"expert FFN and backward, {name}")
        yield quick("forward+backward", 1024, dtype, 4)
    yield quick("decode", 1, BFLOAT16, headline="expert FFN, one token, bfloat16")
    yield quick("decode", 16, FLOAT32)
    yield quick("decode", 32, BFLOAT16)
    yield quick("forward", 512, FLOAT16)
    yield quick("forward", 2048, BFLOAT16, routing="zipf")


def full_cases() -> Iterator[Case]:
    """All ranks, routings and data types."""
    kinds: tuple[tuple[Kind, int], ...] = (("forward", 2048), ("forward+backward", 1024))
    routings: tuple[Routing, ...] = ("balanced", "zipf", "one_expert")
    for dtype in (FLOAT32, BFLOAT16):
        for kind, tokens in kinds:
            for ranks in (1, 2, 4, 8):
                for routing in routings:
                    yield case(kind, tokens, dtype, ranks, routing)
                # What is slow: to compile in bfloat16, and eager's backward over all experts.
                if dtype == BFLOAT16 or (kind == "forward+backward" and ranks == 1):
                    yield case(kind, tokens, dtype, ranks, slow=True)
    for kind, tokens in kinds:
        for ranks in (1, 4):
            yield case(kind, tokens, FLOAT16, ranks)
    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        for tokens in (1, 4, 16, 32):
            yield case("decode", tokens, dtype)
