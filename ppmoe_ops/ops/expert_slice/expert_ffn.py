"""`expert_ffn`: the feed-forward networks of all local experts, from tokens to tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ppmoe_ops import _checks as check
from ppmoe_ops._library import Autocast, Operator, Sample, register
from ppmoe_ops.ops.expert_slice.activations import ACTIVATIONS, GATED, activate


def expert_ffn(
    x: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """Run every token through its local experts and add their weighted outputs up.

    out[t] = sum over the local slots (t, k) with expert e of
    weights[t, k] * (w_out[e] @ act(w_in[e] @ x[t] + b_in[e]) + b_out[e]).
    Slots of other ranks cost nothing; a token without a local slot gets exact zeros, so that one
    all-reduce over the ranks completes the layer.

    Args:
        x: [T, H] float32, bfloat16, float16 or float64; any strides.
        slots: [T*K] int32 from `expert_index`: slot numbers t * K + k, each at most once.
        offsets: [L+1] int32 from `expert_index`: slots[offsets[e] : offsets[e+1]] are those of
            expert e. At most T * min(K, L) slots are local, as the experts of a token differ.
        weights: [T, K] float32 (float64 for float64 x).
        w_in: [L, F, H] in the dtype of `x`, or [L, 2F, H] for a gated activation, the gate's half
            first; any strides.
        b_in: [L, F] (gated: [L, 2F]) in the dtype of `x`, or None.
        w_out: [L, H, F] in the dtype of `x`; any strides.
        b_out: [L, H] in the dtype of `x`, or None.
        activation: gelu, gelu_tanh, relu, silu, or with a gate swiglu (silu(gate) * up), geglu
            (gelu(gate) * up).

    Returns:
        [T, H] in the dtype of `x`. Products and the sum over choices are accumulated in float32
        (float64 for float64); the activation is rounded to the dtype of `x` between the products.
        Choices are added in the order of their experts on the CPU, of k on a GPU, where each
        weighted output is rounded to the dtype of `x` before. On the CPU, with K <= 2 and float32
        or float64, the parts of several ranks add up to the bits of one rank's output.

    Raises:
        ValueError: a shape, dtype or activation that is not as above; on the CPU, offsets that
            decrease or a slot that is listed twice.
        IndexError: on the CPU, an offset outside [0, T * min(K, L)] or a listed slot outside
            [0, T*K).

    Gradient: to `x`, `weights`, `w_in`, `b_in`, `w_out` and `b_out`.
    Saved for backward: F (gated: 2F) elements of the dtype of `x` for each local slot, the
    pre-activation (T * min(K, L) rows are reserved; row i belongs to slots[i], and those of local
    slots alone are touched); keeps
    `x`, `slots`, `offsets`, `weights`, `w_in`, `w_out` and `b_out` alive. Outputs of single experts
    are not kept: the gradient of a routing weight is <activation, gradient of the activation>.

    Source: PPMoE (arXiv 2304.11414) sections 3.3.2 and 3.3.3; gated units: arXiv 2002.05202.

    Example:
        >>> import torch, ppmoe_ops
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> slots, offsets = ppmoe_ops.expert_index(torch.tensor([[1], [0]]), 0, 2)
        >>> w_in = torch.tensor([[[1.0]], [[10.0]]])
        >>> w_out = torch.ones(2, 1, 1)
        >>> ppmoe_ops.expert_ffn(
        ...     x, slots, offsets, torch.tensor([[0.5], [1.0]]), w_in, None, w_out, None, "relu"
        ... ).tolist()
        [[5.0], [2.0]]
    """
    return EXPERT_FFN.overload(x, slots, offsets, weights, w_in, b_in, w_out, b_out, activation)


def check_ffn(
    op: str,
    x: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
) -> None:
    check.choice(op, "activation", activation, ACTIVATIONS)
    check.dim(op, "x", x, "T, H")
    check.dtype(op, "x", x, check.FLOATS)
    check.dim(op, "weights", weights, "T, K")
    check.dtype(op, "weights", weights, (wide_dtype(x),), "for this x")
    check.size(op, "weights", "T", weights.size(0), x.size(0), "as x")
    check.between(op, "T*K", weights.numel(), 0, 2**31 - 1, "slots are int32")
    check.dim(op, "slots", slots, "T*K")
    check.dtype(op, "slots", slots, (torch.int32,))
    check.size(op, "slots", "T*K", slots.size(0), weights.numel(), "T times K of weights")
    check.dim(op, "w_out", w_out, "L, H, F")
    check.dtype(op, "w_out", w_out, (x.dtype,), "as x")
    check.size(op, "w_out", "H", w_out.size(1), x.size(1), "as x")
    check.dim(op, "w_in", w_in, "L, F, H")
    check.dtype(op, "w_in", w_in, (x.dtype,), "as x")
    check.size(op, "w_in", "L", w_in.size(0), w_out.size(0), "as w_out")
    if activation in GATED:
        check.size(op, "w_in", "2F", w_in.size(1), 2 * w_out.size(2), f"{activation}, as w_out")
    else:
        check.size(op, "w_in", "F", w_in.size(1), w_out.size(2), "as w_out")
    check.size(op, "w_in", "H", w_in.size(2), x.size(1), "as x")
    if b_out is not None:
        check.dim(op, "b_out", b_out, "L, H")
        check.dtype(op, "b_out", b_out, (x.dtype,), "as x")
        check.size(op, "b_out", "L", b_out.size(0), w_out.size(0), "as w_out")
        check.size(op, "b_out", "H", b_out.size(1), x.size(1), "as x")
    check.dim(op, "offsets", offsets, "L+1")
    check.dtype(op, "offsets", offsets, (torch.int32,))
    check.size(op, "offsets", "L+1", offsets.size(0), w_out.size(0) + 1, "L of w_out plus 1")


def check_forward(
    x: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
) -> None:
    op = "expert_ffn"
    check_ffn(op, x, slots, offsets, weights, w_in, w_out, b_out, activation)
    if b_in is not None:
        axis = "2F" if activation in GATED else "F"
        check.dim(op, "b_in", b_in, f"L, {axis}")
        check.dtype(op, "b_in", b_in, (x.dtype,), "as x")
        check.size(op, "b_in", "L", b_in.size(0), w_in.size(0), "as w_in")
        check.size(op, "b_in", axis, b_in.size(1), w_in.size(1), "as w_in")


def read_groups(op: str, slots: Tensor, offsets: Tensor, rows: int) -> list[Tensor]:
    """The slots of each expert, checked."""
    bounds = [int(bound) for bound in offsets.tolist()]
    for bound in bounds:
        if not 0 <= bound <= rows:
            raise IndexError(f"{op}: offsets holds {bound}; allowed: 0 to {rows} (T * min(K, L))")
    for low, high in pairwise(bounds):
        if low > high:
            raise ValueError(
                f"{op}: offsets holds {high} after {low}; allowed: values that do not decrease"
            )
    listed = slots[bounds[0] : bounds[-1]].long()
    bad = listed[(listed < 0) | (listed >= slots.numel())]
    if bad.numel():
        raise IndexError(f"{op}: slots holds {int(bad[0])}; allowed: 0 to {slots.numel() - 1}")
    if torch.unique(listed).numel() != listed.numel():
        seen: set[int] = set()
        for slot in listed.tolist():
            if slot in seen:
                raise ValueError(f"{op}: slots holds {slot} twice; allowed: each slot once")
            seen.add(slot)
    return [slots[low:high].long() for low, high in pairwise(bounds)]


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def reserved_rows(weights: Tensor, w_out: Tensor) -> int:
    """T * min(K, L), the most slots that can be local."""
    return weights.size(0) * torch.sym_min(weights.size(1), w_out.size(0))


def _reference_forward(
    x: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    check_forward(x, slots, offsets, weights, w_in, b_in, w_out, b_out, activation)
    reserved = reserved_rows(weights, w_out)
    groups = read_groups("expert_ffn", slots, offsets, reserved)
    wide = wide_dtype(x)
    pre = x.new_zeros(reserved if save else 0, w_in.size(1))
    out = x.new_zeros(x.shape, dtype=wide)
    first = int(offsets[0])
    for expert, group in enumerate(groups):
        last = first + group.numel()
        token = group // max(weights.size(1), 1)
        hidden = x[token].to(wide) @ w_in[expert].to(wide).T
        if b_in is not None:
            hidden = hidden + b_in[expert]
        if save:
            pre[first:last] = hidden.to(x.dtype)
        row = activate(hidden, activation).to(x.dtype).to(wide) @ w_out[expert].to(wide).T
        if b_out is not None:
            row = row + b_out[expert]
        out.index_add_(0, token, row * weights.reshape(-1)[group].unsqueeze(-1))
        first = last
    return out.to(x.dtype), pre


def _fake_forward(
    x: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    check_forward(x, slots, offsets, weights, w_in, b_in, w_out, b_out, activation)
    rows = reserved_rows(weights, w_out) if save else 0
    return x.new_empty(x.shape), x.new_empty((rows, w_in.size(1)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, slots, offsets, weights, w_in, _, w_out, b_out, activation, save = inputs
    pre = output[1]
    ctx.mark_non_differentiable(pre)
    ctx.activation = activation
    ctx.saved = save
    ctx.save_for_backward(x, slots, offsets, weights, w_in, w_out, b_out, pre)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if not ctx.saved:
        raise RuntimeError("expert_ffn_forward: save is False; allowed for a derivative: True")
    x, slots, offsets, weights, w_in, w_out, b_out, pre = ctx.saved_tensors
    asked = ctx.needs_input_grad
    needs = (asked[0], *asked[3:8])
    grads = torch.ops.ppmoe_ops.expert_ffn_backward.default(
        grad, x, slots, offsets, weights, w_in, w_out, b_out, pre, ctx.activation, *needs
    )
    needed = (each if need else None for each, need in zip(grads, needs, strict=True))
    grad_x, grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out = needed
    return (
        grad_x, None, None, grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out, None, None
    )  # fmt: skip


def _composite(
    x: Tensor,
    slots: Tensor,
    offsets: Tensor,
    weights: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    floats = (x, weights, w_in, b_in, w_out, b_out)
    save = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in floats
    )
    args = (x, slots, offsets, weights, w_in, b_in, w_out, b_out)
    out: Tensor = EXPERT_FFN_FORWARD.overload(*args, activation, save)[0]
    return out


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """T, H, F, K, the first local expert and L of 8 experts; biases with every other one."""
    cases = (
        (6, 5, 7, 2, 0, 8, "gelu"),
        (9, 16, 12, 3, 2, 3, "swiglu"),
        (5, 8, 8, 1, 0, 1, "relu"),
        (7, 6, 4, 8, 0, 8, "geglu"),
        (4, 5, 3, 2, 0, 8, "silu"),
        (0, 4, 6, 2, 0, 4, "gelu_tanh"),
        (3, 4, 6, 2, 0, 0, "gelu"),
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    for index, (tokens, hidden, width, top_k, first, local, activation) in enumerate(cases):
        ids = torch.rand(tokens, 8, device=device).argsort(-1)[:, :top_k]
        slots, offsets = torch.ops.ppmoe_ops.expert_index(ids, first, local)
        weights = torch.rand(tokens, top_k, device=device, dtype=wide).requires_grad_()
        inner = 2 * width if activation in GATED else width
        b_in, b_out = (None, None) if index % 2 else (tensor(local, inner), tensor(local, hidden))
        w_in, w_out = tensor(local, inner, hidden), tensor(local, hidden, width)
        x = tensor(tokens, hidden)
        yield (x, slots, offsets, weights, w_in, b_in, w_out, b_out, activation), {}


def _samples_forward(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    # Every slot is local: the rows that are reserved for others hold nothing to compare.
    for args, _ in samples(device, dtype):
        if int(args[2][-1]) == reserved_rows(args[3], args[6]):
            yield (*args, True), {}


def flops(x: Tensor, slots: Tensor, offsets: Tensor, weights: Tensor, w_in: Tensor,
          b_in: Tensor | None, w_out: Tensor, *_: Any, **__: Any) -> int:  # fmt: skip
    # Shapes alone, so that the count also works on traced tensors: as many slots as can be local.
    rows = reserved_rows(weights, w_out)
    return 2 * rows * x.size(1) * (w_in.size(1) + w_out.size(2))


def _nbytes(x: Tensor, slots: Tensor, offsets: Tensor, weights: Tensor, w_in: Tensor,
            b_in: Tensor | None, w_out: Tensor, *_: Any, **__: Any) -> int:  # fmt: skip
    """Tokens that have a local slot, weights of the experts that are hit, and the result."""
    listed = slots[int(offsets[0]) : int(offsets[-1])]
    tokens = int(torch.unique(listed // max(weights.size(1), 1)).numel())
    hit = int((offsets[1:] > offsets[:-1]).sum())
    matrices = hit * x.size(1) * (w_in.size(1) + w_out.size(2))
    moved = (tokens + x.size(0)) * x.size(1) + matrices
    return moved * x.element_size() + 8 * listed.numel()


def _nbytes_forward(*args: Any) -> int:
    x, _, offsets, _, w_in = args[:5]
    saved = _saved_bytes(x, None, offsets, None, w_in) if args[-1] else 0
    return _nbytes(*args[:-1]) + saved


def _saved_bytes(x: Tensor, slots: Any, offsets: Tensor, weights: Any, w_in: Tensor,
                 *_: Any, **__: Any) -> int:  # fmt: skip
    return int(offsets[-1] - offsets[0]) * w_in.size(1) * x.element_size()


def _reserved_bytes(x: Tensor, slots: Tensor, offsets: Tensor, weights: Tensor, w_in: Tensor,
                    b_in: Tensor | None, w_out: Tensor, *_: Any, **__: Any) -> int:  # fmt: skip
    return reserved_rows(weights, w_out) * w_in.size(1) * x.element_size()


_ARGUMENTS = (
    "Tensor x, Tensor slots, Tensor offsets, Tensor weights, Tensor w_in, Tensor? b_in, "
    "Tensor w_out, Tensor? b_out"
)

EXPERT_FFN_FORWARD = register(
    Operator(
        name="expert_ffn_forward",
        family="expert_slice",
        schema=f"({_ARGUMENTS}, str activation, bool save) -> (Tensor out, Tensor pre)",
        reference=_reference_forward,
        fake=_fake_forward,
        flops=flops,
        nbytes=_nbytes_forward,
        saved_bytes=_saved_bytes,
        reserved_bytes=_reserved_bytes,
        samples=_samples_forward,
        setup_context=_setup_context,
        backward=_backward,
        autocast=Autocast("region", keep=("weights",)),
        triton="ppmoe_ops.kernels.expert_slice.expert_ffn:expert_ffn_forward",
        benchmark="bench_expert_slice",
    )
)

EXPERT_FFN = register(
    Operator(
        name="expert_ffn",
        family="expert_slice",
        schema=f'({_ARGUMENTS}, str activation="gelu") -> Tensor',
        reference=_composite,
        fake=_composite,
        composite=True,
        flops=flops,
        nbytes=_nbytes,
        saved_bytes=_saved_bytes,
        reserved_bytes=_reserved_bytes,
        samples=samples,
        autocast=Autocast("region", keep=("weights",)),
        benchmark="bench_expert_slice",
    )
)
