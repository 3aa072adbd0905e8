"""Problems of ladder attention: each operator by itself, the attention core, the ladder core.

A row is checked against the operator's reference in float64; what the rule measures its error by is
the plain composition in the dtype of the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ppmoe_ops._library import OPERATORS
from ppmoe_ops.ops.ladder_attention.windows import edges

from . import gate, ladder_inputs, targets
from . import plain_ladder_attention as plain
from .harness import AUTOGRAD, OPERATOR, Baseline, Problem
from .inputs import build
from .ladder_inputs import Maps
from .plain_ladder_attention import Form, Grid

SLOW = "slow baselines"
Products = Literal["forward", "backward", "step"]
FORWARD = ("window_attention", "ladder_attention", "ladder_ffn", "pixel_adaptive_fusion",
           "ladder_block")  # fmt: skip
# Attention of a forward is two products; how many times as much the contracts count.
_ATTENTION = {
    "window_attention": 1.0,
    "window_attention_backward": 2.5,
    "ladder_attention": 1.0,
    "ladder_attention_backward": 3.0,
}


def masked_flops(work: Maps, shift: int) -> int:
    """Of the two products of one branch's attention: what whole windows have and maps have not."""
    parts = [high - low for low, high in pairwise(edges(work.side, work.window, shift))]
    pairs = sum(each * each for each in parts) ** 2
    return 4 * work.batch * work.width * (work.side**2 * work.window**2 - pairs)


def grid(work: Maps, form: Form, shift: int | None = None) -> Grid:
    """How the baselines cut the maps."""
    return Grid(work.side, work.heads, work.window, work.shift if shift is None else shift, form)


def grids(work: Maps, form: Form) -> tuple[Grid, ...]:
    """Those of the branches of a block."""
    return tuple(grid(work, form, shift) for shift in work.steps)


def peers(make: Callable[[Form], Baseline], slow: bool) -> tuple[list[Baseline], dict[str, str]]:
    """Both forms, with `slow` compiled too; those that are left out, and why."""
    names: dict[str, Form] = {targets.MANUAL: "manual", targets.SDPA: "sdpa"}
    found = [dataclasses.replace(make(form), name=name) for name, form in names.items()]
    compiled = [
        dataclasses.replace(each, name=f"torch.compile of {each.name}", compile=True)
        for each in found
    ]
    if slow:
        return found + compiled, {}
    return found, {each.name: too_slow() for each in compiled}


def too_slow() -> str:
    """Why a baseline is in the full set alone."""
    return f"it takes long to compile: see the case '{SLOW}' of the full set"


def _agree(operator: str, args: tuple[Any, ...], rival: Baseline, came: Any) -> gate.Verdict:
    exact = gate.outputs(OPERATORS[operator].reference(*gate.in_float64(args)))
    ordinary = gate.outputs(rival.call()())
    if operator == "window_attention_backward":
        ordinary = [*ordinary[0].chunk(3, -1), ordinary[1]]
    found = [each for each in gate.outputs(came) if each.numel()]
    exact = [each for each in exact if each.numel()]
    if operator == "ladder_ffn":
        training = rival.args[-1]
        given = [each.float() for each in args[11:13]]
        ordinary += plain.ffn_statistics(*rival.args) if training else given
        ordinary[1:] = [each.to(came[1].dtype) for each in ordinary[1:]]
    factor = 3.0 if operator.endswith("_backward") else 2.0
    return gate.agree(found, ordinary, exact, factor)


def problem(operator: str, work: Maps, device: torch.device, slow: bool = False) -> Problem:
    """One operator by itself, forward or backward."""
    args = build(operator, work, device)
    forward = operator.removesuffix("_backward")
    inputs = args if forward == operator else build(forward, work, device)
    derivative: dict[str, Any] = {}
    if forward != operator:
        derivative = {"wrt": _plain_wrt(forward, work), "grads": args[:1]}
    make = partial(_MAKE[forward], work, inputs, **derivative)
    left_out: dict[str, str] = {}
    if forward in ("ladder_ffn", "pixel_adaptive_fusion"):
        baselines = make()
    else:
        baselines, left_out = peers(make, slow)
    missing = masked_flops(work, work.shift) * _ATTENTION.get(operator, 0.0)
    if operator == "ladder_block":
        missing = sum(masked_flops(work, shift) for shift in work.steps)
    nominal = OPERATORS[operator].flops(*args)
    fair = Baseline(AUTOGRAD, OPERATORS[forward].overload, inputs, _wrt(forward, work), args[:1])
    return Problem(
        args,
        (*_products(forward, inputs, "backward" if derivative else "forward"), *baselines),
        fair if derivative else None,
        check=partial(_agree, operator, args, baselines[0]),
        flops=nominal - int(missing),
        nominal=nominal if missing else 0,
        left_out=left_out,
    )


def _wrt(forward: str, work: Maps) -> tuple[int, ...]:
    """The operator's arguments that get a gradient."""
    counts = {"window_attention": 4, "ladder_attention": 9, "ladder_ffn": 11,
              "pixel_adaptive_fusion": 7}  # fmt: skip
    missing = forward == "ladder_attention" and not work.later
    return tuple(at for at in range(counts.get(forward, 0)) if at != 1 or not missing)


def _plain_wrt(forward: str, work: Maps) -> tuple[int, ...]:
    """The same of the plain composition's."""
    if forward == "window_attention":
        return (0, 1)
    after = 2 if forward == "ladder_attention" else 0
    return tuple(at if at < 2 else at + after for at in _wrt(forward, work))


def _window(work: Maps, args: tuple[Any, ...], form: Form, **derivative: Any) -> Baseline:
    g, table = grid(work, form), args[3]
    fused, mask = torch.cat(args[:3], -1), g.mask(table)
    if derivative:
        return Baseline("", plain.window_attention_learnt, (fused, table, mask, g), **derivative)
    return Baseline("", plain.window_attention, (fused, g.bias(table, mask), g))


def _branch(work: Maps, args: tuple[Any, ...], form: Form, **derivative: Any) -> Baseline:
    g, table = grid(work, form), args[6]
    mask = g.mask(table)
    if derivative:
        return Baseline("", plain.branch_learnt, (*args[:2], g, mask, *args[2:9]), **derivative)
    bias = g.bias(table, mask)
    return Baseline("", plain.branch, (*args[:2], g, *args[2:6], bias, *args[7:9]))


def _ffn(work: Maps, args: tuple[Any, ...], **derivative: Any) -> list[Baseline]:
    given = (*args[:13], work.training)
    return [
        Baseline("1x1 convolutions", plain.ffn_convolutions, given, **derivative),
        Baseline("linear layers", plain.ffn_linears, given, **derivative),
    ]


def _fusion(work: Maps, args: tuple[Any, ...], **derivative: Any) -> list[Baseline]:
    return [Baseline("linear layers", plain.fusion, args, **derivative)]


def _block(work: Maps, args: tuple[Any, ...], form: Form) -> Baseline:
    x, given = args[0], list(args[1])
    borders = []
    for index, g in enumerate(grids(work, form)):
        table = given[16 * index + 4]
        borders.append(plain.border(given[16 * index + 13], work.side))
        given[16 * index + 4] = g.bias(table, g.mask(table))
    return Baseline("", plain.block, (x, *given, tuple(borders), grids(work, form)))


_MAKE: dict[str, Callable[..., Any]] = {
    "window_attention": _window,
    "ladder_attention": _branch,
    "ladder_ffn": _ffn,
    "pixel_adaptive_fusion": _fusion,
    "ladder_block": _block,
}


def _products(forward: str, args: tuple[Any, ...], kind: Products) -> Iterator[Baseline]:
    """The dense products of an operator, those of its attention left out."""
    if forward == "window_attention":
        return
    if forward == "ladder_attention":
        pairs = [args[0], args[4], args[0], args[7]]
    elif forward == "ladder_ffn":
        pairs = [args[0], args[3], args[0], args[7]]
    elif forward == "pixel_adaptive_fusion":
        pairs = _fusion_pairs(*args)
    else:
        pairs = _block_pairs(args[0], args[1])
    yield dense(pairs, kind)


def _fusion_pairs(x: Tensor, w1: Tensor, _b1: Tensor, w2: Tensor, _b2: Tensor, wp: Tensor,
                  _bp: Tensor) -> list[Tensor]:  # fmt: skip
    return [x, w1, x[..., : w1.size(0)], w2, x, wp]


def _block_pairs(x: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
    pairs = []
    for index, part in enumerate(x.chunk(3, -1)):
        for weight in (2, 5, 9, 14):
            pairs += [part, given[16 * index + weight]]
    return pairs + _fusion_pairs(x, *given[48:])


def dense(pairs: Sequence[Tensor], kind: Products) -> Baseline:
    """Products of maps and weights, of their backward, or of both."""
    given = [each.flatten(0, 2).contiguous() if each.dim() == 4 else each for each in pairs]
    flops = sum(
        2 * rows.numel() * weight.size(0)
        for rows, weight in zip(given[::2], given[1::2], strict=True)
    )
    functions = {"forward": plain.products, "backward": plain.products_backward,
                 "step": plain.products_step}  # fmt: skip
    if kind == "backward":
        outs = [torch.ones_like(each) for each in plain.products(*given)]
        triples = zip(outs, given[::2], given[1::2], strict=True)
        given = [each for triple in triples for each in triple]
    return Baseline(
        targets.GEMMS,
        functions[kind],
        tuple(given),
        same_result=False,
        dense=True,
        flops={"forward": 1, "backward": 2, "step": 3}[kind] * flops,
    )


def window_core(work: Maps, device: torch.device, slow: bool = False) -> Problem:
    """Attention of whole windows, which baselines find cut and apart from each other."""
    args = build("window_attention", work, device)
    cut = grid(work, "manual")
    q, k, v = (cut.cut(each, 1)[0] for each in args[:3])
    bias = cut.bias(args[3])

    def make(form: Form) -> Baseline:
        return Baseline("", _core_form, (q, k, v, bias, form))

    baselines, left_out = peers(make, slow)
    if slow:
        # The bias is given: with a table to gather it from, there is no template for a CPU.
        baselines.append(Baseline(targets.FLEX, plain.flex, (q, k, v, bias[0]), compile=True))
    else:
        left_out[targets.FLEX] = too_slow()
    flat = [each.flatten(0, 1) for each in (q, k, v)]
    scores = torch.softmax(torch.bmm(flat[0], flat[1].transpose(1, 2)), -1)
    products = Baseline(
        targets.GEMMS, plain.batched, (*flat, scores), same_result=False, dense=True
    )

    def check(came: Tensor) -> gate.Verdict:
        exact: Tensor = OPERATORS["window_attention"].reference(*gate.in_float64(args))
        ordinary = cut.join(baselines[0].call()())
        return gate.agree([came], [ordinary], [exact], 2.0)

    return Problem(args, (products, *baselines), check=check, left_out=left_out)


def _core_form(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, form: Form) -> Tensor:
    return plain.attend(q, k, v, bias, form)


def ladder_core(work: Maps, device: torch.device, slow: bool = False) -> Problem:
    """Three branches without FFNs and the fusion, forward."""
    args = ladder_inputs.core(work, device)

    def make(form: Form) -> Baseline:
        given = list(args)
        for index, g in enumerate(grids(work, form)):
            table = given[7 * index + 5]
            given[7 * index + 5] = g.bias(table, g.mask(table))
        return Baseline("", plain.core, (*given, grids(work, form)))

    baselines, left_out = peers(make, slow)
    ours = Baseline(OPERATOR, plain.core_fused, (*args, grids(work, "manual")))
    return Problem(
        args,
        (dense(_core_pairs(args), "forward"), *baselines),
        timed=ours,
        check=partial(_check_core, baselines[0], 0),
        left_out=left_out,
        **_core_costs(work, args),
    )


def ladder_core_step(work: Maps, device: torch.device, slow: bool = False) -> Problem:
    """The same with the backward: gradients of x and all parameters, tables included."""
    args = ladder_inputs.core(work, device)
    grad = ladder_inputs.core(dataclasses.replace(work, seed=work.seed + 1), device)[0]
    derivative: dict[str, Any] = {"wrt": tuple(range(len(args))), "grads": (grad,), "step": True}

    def make(form: Form) -> Baseline:
        cuts = grids(work, form)
        masks = tuple(each.mask(args[0]) for each in cuts)
        return Baseline("", plain.core_learnt, (*args, masks, cuts), **derivative)

    baselines, left_out = peers(make, slow)
    ours = Baseline(OPERATOR, plain.core_fused, (*args, grids(work, "manual")), **derivative)
    kept = {each.name: each.saved_bytes() for each in (ours, *baselines) if not each.compile}
    return Problem(
        args,
        (dense(_core_pairs(args), "step"), *baselines),
        timed=ours,
        check=partial(_check_core, baselines[0], len(args)),
        left_out=left_out,
        kept=kept,
        **_core_costs(work, args, 3),
    )


def _core_pairs(args: tuple[Any, ...]) -> list[Tensor]:
    x, *given = args
    pairs = []
    for index, part in enumerate(x.chunk(3, -1)):
        pairs += [part, given[7 * index + 2], part, given[7 * index + 5]]
    return pairs + _fusion_pairs(x, *given[21:])


def _core_costs(work: Maps, args: tuple[Any, ...], times: int = 1) -> dict[str, Any]:
    """FLOPs are those of the forward, `times` over; bytes are those of the operators' contracts."""
    x, *given = args
    branch, fusion = OPERATORS["ladder_attention"], OPERATORS["pixel_adaptive_fusion"]
    calls: list[tuple[Any, tuple[Any, ...]]] = [(fusion, (x, *given[21:]))]
    for index, part in enumerate(x.chunk(3, -1)):
        own = given[7 * index : 7 * index + 7]
        calls.append((branch, (part, part if index else None, *own, None, *work.grid)))
    nominal = times * sum(op.flops(*each) for op, each in calls)
    missing = times * sum(masked_flops(work, shift) for shift in work.steps)
    return {
        "flops": nominal - missing,
        "nominal": nominal if missing else 0,
        "nbytes": times * sum(op.nbytes(*each) for op, each in calls),
        "composed": True,
    }


def _check_core(rival: Baseline, gradients: int, came: Any) -> gate.Verdict:
    wide = dataclasses.replace(
        rival,
        args=gate.in_float64(rival.args),
        grads=tuple(each.double() for each in rival.grads),
    )
    found, ordinary, exact = (gate.outputs(each) for each in (came, rival.call()(), wide.call()()))
    verdict = gate.agree(found[:1], ordinary[:1], exact[:1], 2.0)
    if not verdict.passed or not gradients:
        return verdict
    return gate.agree_in_norm(found[1:], ordinary[1:], exact[1:])
