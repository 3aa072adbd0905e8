"""Drawn shapes, strides and routings: every operator against its composition."""

from __future__ import annotations

import dataclasses
import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slicing import (
    DTYPES,
    call,
    check_gradients,
    check_result,
    check_route,
    index_of,
    plain_grouped_linear,
    plain_merge,
    plain_slice,
    wide,
)
from torch import Tensor

# Zero, one, primes, and both sides of the vector lengths.
COUNTS = st.sampled_from([0, 1, 2, 3, 5, 7, 11, 12, 13, 16, 17, 23])
WIDTHS = st.sampled_from([0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 64, 65, 97])
DTYPE = st.sampled_from(DTYPES)

drawn = settings(
    deadline=None,
    max_examples=600 if os.environ.get("PPMOE_OPS_FULL") == "1" else 60,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@dataclasses.dataclass(frozen=True)
class Routing:
    """Choices of T tokens among E experts, of which some are local."""

    ids: Tensor
    experts: int
    first: int
    local: int


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    tokens, experts = draw(COUNTS), draw(st.sampled_from([1, 2, 3, 5, 8, 17]))
    top_k = draw(st.integers(1, experts))
    first = draw(st.integers(0, experts))
    local = draw(st.integers(0, experts + 2))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top_k]
    kind = draw(st.sampled_from(["drawn", "one expert", "none for the first", "dropped"]))
    if kind == "one expert":
        # The first choice is the same for all; a token's other choices differ from it.
        ids = torch.arange(top_k).expand(tokens, top_k)
    elif kind == "none for the first":
        ids = torch.where(ids == first, -1, ids)
    elif kind == "dropped":
        ids = torch.where(torch.rand(tokens, top_k) < 0.3, -1, ids)
    return Routing(ids.to(draw(st.sampled_from([torch.int32, torch.int64]))), experts, first, local)


@st.composite
def matrices(draw: st.DrawFn, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, width] at a drawn offset and with drawn strides."""
    offset, step = draw(st.integers(0, 3)), draw(st.integers(1, 2))
    if draw(st.booleans()):
        return torch.randn(offset + step * width, rows).to(dtype)[offset::step][:width].t()
    return torch.randn(rows, offset + step * width).to(dtype)[:, offset::step][:, :width]


@given(routings())
@drawn
def test_expert_index(routing: Routing) -> None:
    slots, offsets = call("expert_index", (routing.ids, routing.first, routing.local))
    expected = index_of(routing.ids, routing.first, routing.local)
    assert torch.equal(slots, expected[0])
    assert torch.equal(offsets, expected[1])


@given(routings(), WIDTHS, DTYPE, st.data())
@drawn
def test_slice_and_merge(
    routing: Routing, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    tokens, top_k = routing.ids.shape
    slots, _ = call("expert_index", (routing.ids, routing.first, routing.local))
    x = data.draw(matrices(tokens, width, dtype)).requires_grad_()
    assert torch.equal(call("slice_rows", (x, slots, top_k)), plain_slice(x, slots, top_k))
    check_gradients(lambda *args: call("slice_rows", args), plain_slice, (x, slots, top_k))
    rows = data.draw(matrices(tokens * top_k, width, dtype)).requires_grad_()
    weights = data.draw(matrices(tokens, top_k, wide(dtype))).requires_grad_()
    check_result("merge_rows", (rows, slots, weights), plain_merge)
    check_gradients(lambda *args: call("merge_rows", args), plain_merge, (rows, slots, weights))


@given(routings(), WIDTHS, WIDTHS, DTYPE, st.booleans(), st.data())
@drawn
def test_grouped_linear(
    routing: Routing, width: int, out: int, dtype: torch.dtype, biased: bool, data: st.DataObject
) -> None:
    _, offsets = call("expert_index", (routing.ids, routing.first, routing.local))
    offsets = offsets + (shift := data.draw(st.integers(0, 3)))
    count = routing.ids.numel() + shift
    rows = data.draw(matrices(count, width, dtype)).requires_grad_()
    weight = data.draw(matrices(routing.local * out, width, dtype))
    weight = weight.unflatten(0, (routing.local, out)).requires_grad_()
    bias = torch.randn(routing.local, out).to(dtype).requires_grad_() if biased else None
    args = (rows, offsets, weight, bias)
    check_result("grouped_linear", args, plain_grouped_linear)
    check_gradients(lambda *args: call("grouped_linear", args), plain_grouped_linear, args)


@given(
    COUNTS,
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 5, 8, 16, 19, 24]),
    DTYPE,
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
    st.booleans(),
    st.data(),
)
@drawn
def test_route(
    tokens: int,
    groups: int,
    size: int,
    dtype: torch.dtype,
    score: str,
    renormalize: bool,
    biased: bool,
    data: st.DataObject,
) -> None:
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(top_groups * size, 20)))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    logits = data.draw(matrices(tokens, groups * size, dtype))
    bias = torch.randn(groups * size) if biased else None
    check_route((logits, top_k, score, renormalize, bias, groups, top_groups, 1.5))
