"""Routing on a GPU: parity, ties, NaN, graphs, determinism, bad input, compute-sanitizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_slice.slicing import check_route
from torch import Tensor

from ppmoe_ops._backends import choices
from ppmoe_ops._library import OPERATORS
from ppmoe_ops.testing import assert_error_rule, cast_sample

from .processes import check_sanitized

CUDA = torch.device("cuda")
OPS = torch.ops.ppmoe_ops
NAMES = ("route", "route_backward", "router_losses_forward", "router_losses_backward")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAN, INF = float("nan"), float("inf")
# T, E, K of known models, of every width of kernel, and beyond what a warp's registers hold.
SHAPES = (
    (8192, 128, 8),
    (8192, 8, 2),
    (8192, 16, 4),
    (4096, 32, 4),
    (4096, 64, 6),
    (4096, 160, 6),
    (8192, 256, 8),
    (2048, 384, 8),
    (2048, 512, 10),
    (300, 700, 5),
    (300, 60, 40),
    (1, 128, 8),
    (17, 13, 3),
)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def check(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """One call against the reference on the same device, and against float64."""
    operator = OPERATORS[name]
    got = outputs(operator.overload(*args))
    plain = outputs(operator.reference(*args))
    exact = outputs(operator.reference(*cast_sample(args, torch.float64)))
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        assert ours.device.type == "cuda"
        # A scalar of the reference may be right by chance.
        factor = 8.0 if ours.dim() == 0 else 3.0 if name.endswith("_backward") else 2.0
        assert_error_rule(ours, theirs, truth, factor, name)
    return got


def logits_of(tokens: int, experts: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(tokens, experts, device=CUDA) * 3).to(dtype)


def options_of(choice: str, experts: int) -> dict[str, Any]:
    bias = torch.randn(experts, device=CUDA)
    return {
        "softmax": {},
        "raw": {"renormalize": False, "scale": 0.5},
        "bias": {"selection_bias": bias, "scale": 2.5},
        "sigmoid": {"score": "sigmoid"},
        "groups": {
            "score": "sigmoid", "selection_bias": bias, "groups": 8, "top_groups": 4, "scale": 2.5,
        },
    }[choice]  # fmt: skip


def test_the_kernels_are_there() -> None:
    for name in NAMES:
        assert choices()[name]["cuda"].backend == "cuda", choices()[name]["cuda"].missing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES[1:])
def test_parity_on_the_samples(name: str, dtype: torch.dtype) -> None:
    for args, _ in OPERATORS[name].samples(CUDA, dtype):
        check(name, tuple(e.detach() if isinstance(e, Tensor) else e for e in args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", ["softmax", "raw", "bias", "sigmoid", "groups"])
def test_route(choice: str, dtype: torch.dtype) -> None:
    for tokens, experts, top_k in SHAPES:
        if choice != "groups" or (experts % 8 == 0 and top_k <= experts // 2):
            logits = logits_of(tokens, experts, dtype)
            check_route((logits, top_k), options_of(choice, experts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [8, 16, 48, 128, 500, 512, 900])
def test_ties_go_to_the_lower_ids(experts: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(64, experts, device=CUDA, dtype=dtype)
    logits[1::2, 1::2] = -0.0
    _, ids = OPS.route(logits, 8)
    assert torch.equal(ids, torch.arange(8, device=CUDA, dtype=torch.int32).expand(64, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", ["softmax", "raw", "bias", "sigmoid", "groups"])
def test_non_finite_logits(choice: str, dtype: torch.dtype) -> None:
    for experts in (16, 128, 600):
        logits = logits_of(8, experts, dtype)
        logits[0, 3] = NAN
        logits[1] = NAN
        logits[2, 5] = INF
        logits[3] = -INF
        logits[4, 1:] = -INF
        logits[5, 0], logits[5, 1], logits[5, 2] = NAN, INF, -INF
        check_route((logits, 5), options_of(choice, experts))


def test_strided_and_unaligned_logits() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        big = torch.randn(300, 300, device=CUDA).to(dtype)
        for logits in (big[:, 3:131], big[:, 8:136], big[:, ::2], big.t(), big[:1].expand(9, 300)):
            check_route((logits, 8))
            check_route((logits, 8), options_of("bias", logits.size(1)))
            ids = torch.randint(-1, 300, (logits.size(0), 4), device=CUDA)
            check("router_losses_forward", (logits, ids))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_route_backward(score: str, renormalize: bool, dtype: torch.dtype) -> None:
    for tokens, experts, top_k in SHAPES:
        logits = logits_of(tokens, experts, dtype)
        weights, ids = OPS.route(logits, top_k, score, renormalize, None, 1, 1, 1.5)
        kept = logits if score == "sigmoid" or not renormalize else None
        grad = torch.randn_like(weights)
        check(
            "route_backward",
            (grad, weights, ids, kept, experts, dtype, score, renormalize, 1.5),
        )


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_router_losses(dtype: torch.dtype, ids: torch.dtype) -> None:
    for tokens, experts, top_k in (*SHAPES, (70_000, 16, 2), (100, 3000, 4)):
        logits = logits_of(tokens, experts, dtype)
        chosen = torch.randint(-1, experts + 1, (tokens, top_k), device=CUDA).to(ids)
        _, _, shares, lse = check("router_losses_forward", (logits, chosen))
        grads = torch.randn(2, device=CUDA, dtype=lse.dtype)
        check("router_losses_backward", (grads[0], grads[1], logits, shares, lse))


def test_empty_inputs() -> None:
    logits = torch.empty(0, 8, device=CUDA)
    weights, ids = OPS.route(logits, 3)
    assert weights.shape == ids.shape == (0, 3)
    balance, z = OPS.router_losses(logits, ids)
    assert (balance.item(), z.item()) == (0.0, 0.0)


def step(logits: Tensor) -> tuple[Tensor, ...]:
    """Choice, losses and all gradients."""
    weights, ids = OPS.route(logits, 8, "sigmoid", True, None, 8, 4)
    balance, z, shares, lse = OPS.router_losses_forward(logits, ids)
    grad = OPS.route_backward(
        weights, weights, ids, logits, logits.size(1), logits.dtype, "sigmoid", True, 1.0
    )
    return weights, ids, balance, z, grad, OPS.router_losses_backward(z, z, logits, shares, lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_capture_and_replay(dtype: torch.dtype) -> None:
    logits = logits_of(2000, 128, dtype)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(logits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(logits)
    for _ in range(3):
        logits.copy_(logits_of(2000, 128, dtype))
        graph.replay()
        for one, other in zip(captured, step(logits), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype: torch.dtype) -> None:
    logits = logits_of(5000, 256, dtype)
    first = step(logits)
    for _ in range(5):
        assert all(torch.equal(*pair) for pair in zip(first, step(logits), strict=True))


def test_nothing_waits_for_the_gpu() -> None:
    logits = logits_of(256, 64, torch.bfloat16)
    step(logits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ids_that_are_no_experts_write_nothing() -> None:
    weights = torch.rand(100, 4, device=CUDA)
    ids = torch.randint(-(2**31), 2**31 - 1, (100, 4), device=CUDA).int()
    ids[:, 0] = 5
    logits = torch.randn(100, 9, device=CUDA)
    for score, renormalize in (("softmax", True), ("softmax", False), ("sigmoid", True)):
        grad = OPS.route_backward(
            weights, weights, ids, logits, 9, torch.float32, score, renormalize, 1.0
        )
        assert grad.isfinite().all()


def test_tensors_of_two_devices_are_refused() -> None:
    logits = torch.randn(4, 8, device=CUDA)
    with pytest.raises(ValueError, match="selection_bias is on another device"):
        OPS.route(logits, 2, "sigmoid", True, torch.zeros(8))
    with pytest.raises(ValueError, match="experts is on another device"):
        OPS.router_losses(logits, torch.zeros(4, 2, dtype=torch.int32))


SANITIZED = """
import torch, ppmoe_ops
ops = torch.ops.ppmoe_ops
for tokens, experts, top_k in ((33, 8, 2), (70, 128, 8), (9, 500, 6), (5, 600, 3), (7, 60, 40)):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = torch.randn(tokens, experts).to(dtype).cuda()
        groups = 4 if top_k <= experts // 2 else 1
        for score, renormalize in (("softmax", True), ("softmax", False), ("sigmoid", True)):
            for limit in {1, groups}:
                weights, ids = ops.route(
                    logits, top_k, score, renormalize, None, limit, max(1, limit // 2)
                )
            ops.route_backward(
                weights, weights, ids, logits, experts, dtype, score, renormalize, 1.0
            )
        balance, z, shares, lse = ops.router_losses_forward(logits, ids)
        ops.router_losses_backward(balance, z, logits, shares, lse)
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize("kind", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(kind: str) -> None:
    check_sanitized(SANITIZED, kind)
