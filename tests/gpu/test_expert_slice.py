"""Expert slicing on a GPU: parity, streams, graphs, determinism, bad input, compute-sanitizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ppmoe_ops._backends import choices
from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import assert_error_rule, cast_sample

from .processes import check_sanitized, run_python

CUDA = torch.device("cuda")
OPS = torch.ops.ppmoe_ops
CUDA_OPS = (
    "expert_index",
    "slice_rows",
    "slice_rows_backward",
    "merge_rows",
    "merge_rows_backward",
)

TRITON_OPS = ("grouped_linear", "grouped_linear_backward")
HALF_AND_FULL = (torch.float32, torch.bfloat16, torch.float16)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def detached(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.detach() if isinstance(each, Tensor) else each for each in args)


def check(name: str, args: tuple[Any, ...]) -> None:
    """One call against the reference on the same device, and against float64."""
    operator = OPERATORS[name]
    args = detached(args)
    got = outputs(operator.overload(*args))
    plain = outputs(operator.reference(*args))
    exact = outputs(operator.reference(*cast_sample(args, torch.float64)))
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        assert ours.device.type == "cuda"
        if ours.is_floating_point():
            assert_error_rule(ours, theirs, truth, 3 if name.endswith("_backward") else 2, name)
        else:
            assert torch.equal(ours, theirs)


def ids_of(tokens: int, top_k: int, experts: int) -> Tensor:
    return torch.rand(tokens, experts, device=CUDA).argsort(-1)[:, :top_k].contiguous()


def layer_inputs(
    tokens: int = 96, top_k: int = 4, experts: int = 16, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, ...]:
    """x, ids, weight and routing weights of a small layer."""
    x = torch.randn(tokens, 64, device=CUDA, dtype=dtype)
    weight = torch.randn(experts // 2, 64, 64, device=CUDA, dtype=dtype)
    return x, ids_of(tokens, top_k, experts), weight, torch.rand(tokens, top_k, device=CUDA)


def layer(x: Tensor, ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Index, slice, multiply and merge, for the experts from 4 on."""
    slots, offsets = OPS.expert_index(ids, 4, weight.size(0))
    rows = OPS.slice_rows(x, slots, ids.size(1))
    return OPS.merge_rows(OPS.grouped_linear(rows, offsets, weight, None), slots, scale)


def plain_layer(x: Tensor, ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for expert in range(weight.size(0)):
        share = (scale * (ids == expert + 4)).sum(-1, keepdim=True)
        out = out + share * (x @ weight[expert].T)
    return out.to(x.dtype)


def test_the_kernels_are_there() -> None:
    for name in CUDA_OPS:
        assert choices()[name]["cuda"].backend == "cuda", choices()[name]["cuda"].missing
    for name in TRITON_OPS:
        assert choices()[name]["cuda"].backend == "triton", choices()[name]["cuda"].missing


@pytest.mark.parametrize("dtype", [*HALF_AND_FULL, torch.float64])
@pytest.mark.parametrize("name", [*CUDA_OPS, *TRITON_OPS])
def test_parity_on_the_samples(name: str, dtype: torch.dtype) -> None:
    for args, _ in OPERATORS[name].samples(CUDA, dtype):
        check(name, args)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "first", "local"),
    [
        (16, 8, 128, 0, 128),
        (512, 8, 128, 0, 128),
        (513, 8, 128, 32, 32),
        (8192, 8, 128, 0, 128),
        (8192, 8, 256, 64, 32),
        (4000, 3, 2000, 100, 1500),
        (150_000, 8, 64, 0, 64),
    ],
)
def test_expert_index(
    dtype: torch.dtype, tokens: int, top_k: int, experts: int, first: int, local: int
) -> None:
    ids = torch.randint(-1, experts, (tokens, top_k), device=CUDA, dtype=dtype)
    check("expert_index", (ids, first, local))
    check("expert_index", (torch.full_like(ids, first), first, local))


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("hidden", [1, 7, 8, 96, 2048, 2056, 7168])
def test_rows(hidden: int, dtype: torch.dtype) -> None:
    slots, _ = OPS.expert_index(ids_of(300, 6, 24), 3, 12)
    x, rows = (torch.randn(n, hidden, device=CUDA, dtype=dtype) for n in (300, 1800))
    weights = torch.rand(300, 6, device=CUDA)
    check("slice_rows", (x, slots, 6))
    check("slice_rows_backward", (rows, slots, 6))
    rows[slots < 0] = torch.nan
    check("merge_rows", (rows, slots, weights))
    check("merge_rows_backward", (x, rows.nan_to_num(), slots, weights))


def test_more_slots_than_one_block_inverts() -> None:
    slots, _ = OPS.expert_index(ids_of(5000, 4, 16), 0, 11)
    rows = torch.randn(20000, 40, device=CUDA)
    check("merge_rows", (rows, slots, torch.rand(5000, 4, device=CUDA)))


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("widths", [(64, 64), (256, 320), (71, 131), (784, 528)])
@pytest.mark.parametrize("load", [4, 50, 300])
def test_grouped_linear(dtype: torch.dtype, widths: tuple[int, int], load: int) -> None:
    experts, (width_out, width_in) = 6, widths
    ends = torch.rand(experts, device=CUDA).cumsum(0)
    ends = (ends / ends[-1] * experts * load).int()
    offsets = torch.cat([ends.new_tensor([3]), ends.clamp(min=3)])
    offsets[3] = offsets[2]
    rows = torch.randn(experts * load + 5, width_in, device=CUDA, dtype=dtype)
    weight = torch.randn(experts, width_out, width_in, device=CUDA, dtype=dtype)
    bias = torch.randn(experts, width_out, device=CUDA, dtype=dtype)
    grad = torch.randn(rows.size(0), width_out, device=CUDA, dtype=dtype)
    check("grouped_linear", (rows, offsets, weight, bias))
    check("grouped_linear_backward", (grad, rows, offsets, weight, True, True, True))


def test_gradients_of_a_layer() -> None:
    x, ids, weight, scale = layer_inputs(dtype=torch.float32)

    def gradients(run: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [each.detach().requires_grad_(each.is_floating_point()) for each in tensors]
        out = run(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return torch.autograd.grad(out, wanted, torch.ones_like(out))

    got = gradients(layer, x, ids, weight, scale)
    plain = gradients(plain_layer, x, ids, weight, scale)
    exact = gradients(plain_layer, *cast_sample((x, ids, weight, scale), torch.float64))
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        assert_error_rule(ours, theirs, truth, 3)


def test_compiles_without_a_break() -> None:
    args = layer_inputs()
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(*args), layer(*args))


def test_graph_capture_and_replay() -> None:
    args = layer_inputs()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            layer(*args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(*args)
    for _ in range(3):
        fresh = layer_inputs()
        for static, new in zip(args, fresh, strict=True):
            static.copy_(new)
        graph.replay()
        assert torch.equal(captured, layer(*fresh))


def test_side_stream() -> None:
    later, now = layer_inputs(), layer_inputs()
    expected = layer(*later)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        # What is launched on another stream than this one does not wait, and reads old values.
        torch.cuda._sleep(50_000_000)
        for static, new in zip(now, later, strict=True):
            static.copy_(new)
        got = layer(*now)
    side.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", [*CUDA_OPS, *TRITON_OPS])
def test_same_bits_every_time(name: str) -> None:
    for args, _ in OPERATORS[name].samples(CUDA, torch.bfloat16):
        args = detached(args)
        first = outputs(OPERATORS[name].overload(*args))
        for _ in range(3):
            again = outputs(OPERATORS[name].overload(*args))
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_bad_slots_act_as_minus_one() -> None:
    slots, _ = OPS.expert_index(ids_of(60, 4, 8), 0, 8)
    bad, good = slots.clone(), slots.clone()
    at = torch.tensor([0, 17, 100, 239], device=CUDA)
    bad[at] = torch.tensor([240, -2, 2**31 - 1, -(2**31)], device=CUDA, dtype=torch.int32)
    good[at] = -1
    x, rows = torch.randn(60, 32, device=CUDA), torch.randn(240, 32, device=CUDA)
    weights = torch.rand(60, 4, device=CUDA)
    for name, before, after in (
        ("slice_rows", (x,), (4,)),
        ("slice_rows_backward", (rows,), (4,)),
        ("merge_rows", (rows,), (weights,)),
        ("merge_rows_backward", (x, rows), (weights,)),
    ):
        got = outputs(getattr(OPS, name)(*before, bad, *after))
        expected = outputs(getattr(OPS, name)(*before, good, *after))
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("bounds", [[0, 99, 40], [-5, 10, 40], [30, 10, 40], [2**31 - 1, 0, -9]])
def test_bad_offsets_do_no_harm(bounds: list[int]) -> None:
    rows = torch.randn(40, 64, device=CUDA)
    weight = torch.randn(2, 64, 64, device=CUDA)
    offsets = torch.tensor(bounds, device=CUDA, dtype=torch.int32)
    OPS.grouped_linear(rows, offsets, weight, None)
    OPS.grouped_linear_backward(rows, rows, offsets, weight, True, True, True)
    torch.cuda.synchronize()


def test_tensors_of_two_devices_are_refused() -> None:
    slots = torch.zeros(4, dtype=torch.int32)
    rows, weights = torch.randn(4, 8, device=CUDA), torch.rand(2, 2, device=CUDA)
    with pytest.raises(ValueError, match="slots is on another device"):
        OPS.merge_rows(rows, slots, weights)


SYNCHRONISING_CHECK = """
import torch, ppmoe_ops
x = torch.ones(2, 3, device="cuda")
for listed in ([0, 4, -1, -1], [0, -2, -1, -1]):
    try:
        ppmoe_ops.slice_rows(x, torch.tensor(listed, dtype=torch.int32, device="cuda"), 2)
    except IndexError as error:
        print(error)
"""


def test_the_synchronising_check_raises() -> None:
    run = run_python(SYNCHRONISING_CHECK, PPMOE_OPS_CHECK="1")
    assert run.stdout.splitlines() == [
        "slice_rows: slots holds 4; allowed: -1 to 3",
        "slice_rows: slots holds -2; allowed: -1 to 3",
    ], run.stderr


SANITIZED = """
import torch, ppmoe_ops
ops = torch.ops.ppmoe_ops
for tokens, top_k, hidden in ((7, 3, 19), (1200, 4, 16)):
    ids = torch.randint(-1, 9, (tokens, top_k)).cuda()
    slots, offsets = ops.expert_index(ids, 2, 5)
    x = torch.randn(tokens, hidden).cuda()
    rows = ops.slice_rows(x, slots, top_k)
    weights = torch.rand(tokens, top_k).cuda()
    ops.slice_rows_backward(rows, slots, top_k)
    ops.merge_rows(rows, slots, weights)
    ops.merge_rows_backward(x, rows, slots, weights)
    slots[0] = 2**31 - 1
    ops.merge_rows(rows, slots, weights)
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize("kind", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(kind: str) -> None:
    check_sanitized(SANITIZED, kind)
