"""The expert layer as a GPU runs it: graphs, streams, bits, bad input, memory, sanitizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from .ffn import ALL, CUDA, OPS, call, everything, problem, replaced

pytest.importorskip("triton")

from ppmoe_ops.kernels.expert_slice.configs import ACTIVATION_GRADIENT, INTO

from .processes import check_sanitized, run_python

MIB = 1 << 20


def layer_inputs(tokens: int = 200) -> tuple[Tensor, ...]:
    """x, logits, weights and biases of experts 4 to 11 of 16."""
    x, *_ = problem((tokens, 64, 96, 4, 16, 4, 8))
    w_in, b_in, w_out, b_out = problem((tokens, 64, 96, 4, 16, 4, 8))[4:8]
    return x, torch.randn(tokens, 16, device=CUDA), w_in, b_in, w_out, b_out


def layer(x: Tensor, logits: Tensor, *experts: Tensor) -> Tensor:
    weights, ids = OPS.route(logits, 4)
    slots, offsets = OPS.expert_index(ids, 4, experts[0].size(0))
    out: Tensor = OPS.expert_ffn(x, slots, offsets, weights, *experts, "swiglu")
    return out


def step(*tensors: Tensor, run: Callable[..., Tensor] = layer) -> tuple[Tensor, ...]:
    """The layer, and its gradients to all inputs for a gradient like x."""
    leaves = [each.detach().requires_grad_() for each in tensors]
    out = run(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, tensors[0])


def assert_same(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_graph_capture_and_replay() -> None:
    args = layer_inputs()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*args)
    for _ in range(3):
        fresh = layer_inputs()
        for static, new in zip(args, fresh, strict=True):
            static.copy_(new)
        graph.replay()
        assert_same(captured, step(*fresh))


def test_compiles_without_a_break() -> None:
    args = layer_inputs()
    assert_same(step(*args, run=torch.compile(layer, fullgraph=True)), step(*args))


def test_side_stream() -> None:
    later, now = layer_inputs(), layer_inputs()
    expected = step(*later)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        # What is launched on another stream than this one does not wait, and reads old values.
        torch.cuda._sleep(50_000_000)
        for static, new in zip(now, later, strict=True):
            static.copy_(new)
        got = step(*now)
    side.synchronize()
    assert_same(got, expected)


def test_nothing_waits_for_the_gpu() -> None:
    args = layer_inputs()
    step(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [40, 6000])
def test_same_bits_every_time(tokens: int, dtype: torch.dtype) -> None:
    args = problem((tokens, 96, 80, 3, 8, 1, 6), dtype)
    first = everything(args)
    for _ in range(5):
        assert_same(first, everything(args))


@pytest.mark.parametrize("tokens", [60, 3000])
def test_bad_slots_act_as_minus_one(tokens: int) -> None:
    args = problem((tokens, 48, 64, 4, 8, 0, 8), torch.float32)
    bad, good = args[1].clone(), args[1].clone()
    at = torch.tensor([0, 17, 100, 4 * tokens - 1], device=CUDA)
    values = (4 * tokens, -2, 2**31 - 1, -(2**31))
    bad[at] = torch.tensor(values, device=CUDA, dtype=torch.int32)
    good[at] = -1
    one, other = (everything(replaced(args, slots=slots)) for slots in (bad, good))
    assert_same(one, other)
    unlisted = args[1][at].long()
    assert bool((one[2].view(-1)[unlisted] == 0).all())  # gradients of their routing weights
    # An expert's bias is no one's output where no slot asks for it.
    weights = args[3].clone()
    weights.view(-1)[unlisted] = 0
    expected = everything(replaced(args, weights=weights))[0]
    torch.testing.assert_close(one[0], expected, rtol=1e-5, atol=1e-5)


LARGEST = 2**31 - 1


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 99, 40, 80, 200],
        [-5, 10, 40, 60, 80],
        [70, 50, 30, 10, 0],
        [0, 80, 0, 80, 0],
        [LARGEST, -LARGEST, LARGEST, 0, -9],
        [0, 0, 0, 0, LARGEST],
    ],
)
def test_bad_offsets_do_no_harm(bounds: list[int]) -> None:
    args = problem((40, 48, 64, 2, 4, 0, 4), torch.float32)
    offsets = torch.tensor(bounds, device=CUDA, dtype=torch.int32)
    results = everything(replaced(args, offsets=offsets))
    if CUDA.type == "cuda":
        torch.cuda.synchronize()
    assert [each.shape for each in results[1:]] == [
        each.shape for each in (args[0], args[3], *args[4:8])
    ]
    # What came before is right again after: nothing was left behind.
    assert all(bool(each.isfinite().all()) for each in everything(args))


def test_tensors_of_two_devices_are_refused() -> None:
    args = problem((40, 48, 64, 2, 4, 0, 4))
    for at, name in ((1, "slots"), (2, "offsets"), (3, "weights"), (4, "w_in"), (7, "b_out")):
        given = (*args[:at], args[at].cpu(), *args[at + 1 :])
        with pytest.raises(ValueError, match=f"expert_ffn: {name} is on cpu; expected cuda"):
            call("expert_ffn_forward", *given, False)


def grown(run: Callable[[], Any]) -> int:
    """Bytes by which a call raises what tensors hold at once."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    peak = torch.cuda.max_memory_allocated() - before
    del results
    return peak


def test_peak_memory() -> None:
    """What the launchers allocate and no more: every tensor is a multiple of 2 MiB, or small."""
    tokens, hidden, width, top_k, local, size = 8192, 512, 768, 2, 8, 2
    args = problem((tokens, hidden, width, top_k, 8, 0, local))
    x, slots, offsets, weights, w_in, b_in, w_out, b_out, activation = args
    rows = tokens * top_k
    out, pre = tokens * hidden * size, rows * 2 * width * size
    act, result = rows * width * size, rows * hidden * size

    def plan(block_m: int) -> int:
        return slots.nbytes + 4 * (3 * (rows // block_m + local) + 1)

    into, inner = (table[size]["many"] for table in (INTO, ACTIVATION_GRADIENT))
    dots = weights.element_size() * rows * (-(-width // inner.block_n) + 1)
    grads = sum(each.nbytes for each in (x, weights, w_in, b_in, w_out, b_out))
    saved = call("expert_ffn_forward", *args, True)[1]
    given = (x, x, slots, offsets, weights, w_in, w_out, b_out, saved, activation)
    for name, run, most in (
        (
            "forward, saved",
            lambda: call("expert_ffn_forward", *args, True),
            out + pre + act + result + plan(into.block_m),
        ),
        (
            "forward alone",
            lambda: call("expert_ffn_forward", *args, False),
            out + act + result + plan(into.block_m),
        ),
        (
            "backward",
            lambda: call("expert_ffn_backward", *given, *ALL),
            # Gradients of the pre-activation, of the rows, and the weighted activation.
            grads + pre + result + act + dots + plan(inner.block_m),
        ),
    ):
        came = grown(run)
        print(f"{name}: {came / MIB:.1f} MiB of {most / MIB:.1f} allocated; X, pre-activation and "
              f"outputs are {(x.nbytes + pre + out) / MIB:.1f}")  # fmt: skip
        assert came <= most + MIB, name


SYNCHRONISING_CHECK = """
import torch, ppmoe_ops
x, w = torch.ones(2, 3, device="cuda"), torch.ones(2, 3, 3, device="cuda")
weights = torch.ones(2, 2, device="cuda")
for listed, bounds in (
    ([0, 4, 1, 2], [0, 2, 4]), ([0, 1, 2, 3], [0, 5, 4]), ([0, 0, 1, 2], [0, 2, 4])
):
    slots, offsets = (torch.tensor(e, dtype=torch.int32, device="cuda") for e in (listed, bounds))
    try:
        ppmoe_ops.expert_ffn(x, slots, offsets, weights, w, None, w, None)
    except (IndexError, ValueError) as error:
        print(error)
"""


def test_the_synchronising_check_raises() -> None:
    run = run_python(SYNCHRONISING_CHECK, PPMOE_OPS_CHECK="1")
    assert run.stdout.splitlines() == [
        "expert_ffn: slots holds 4; allowed: 0 to 3",
        "expert_ffn: offsets holds 5; allowed: 0 to 4 (T * min(K, L))",
        "expert_ffn: slots holds 0 twice; allowed: each slot once",
    ], run.stderr


SANITIZED = """
import os, torch, ppmoe_ops
ops = torch.ops.ppmoe_ops
for name in os.environ["DTYPES"].split():
    for tokens, hidden, width in ((37, 64, 96), (2100, 19, 21)):
        ids = torch.rand(tokens, 9).argsort(-1)[:, :4].cuda()
        slots, offsets = ops.expert_index(ids, 2, 5)
        def tensor(*shape):
            return torch.randn(*shape).to(getattr(torch, name)).cuda()
        x, weights = tensor(tokens, hidden), torch.rand(tokens, 4).cuda()
        w_in, b_in = tensor(5, 2 * width, hidden), tensor(5, 2 * width)
        w_out, b_out = tensor(5, hidden, width), tensor(5, hidden)
        tensors = x, slots, offsets, weights, w_in
        for bad in {False, os.environ["BAD"] == "1"}:
            if bad:
                slots[0], slots[1] = 2**31 - 1, -7
                offsets[2], offsets[4] = 10**9, -3
            out, pre = ops.expert_ffn_forward(*tensors, b_in, w_out, b_out, "swiglu", True)
            ops.expert_ffn_backward(x, *tensors, w_out, b_out, pre, "swiglu", *[True] * 6)
torch.cuda.synchronize()
print("done")
"""


# The copy engine also reads rows past an expert's last, which no one has written and nothing
# stores, and its barriers are not what racecheck follows: those two watch loads by pointers. Rows
# that bad offsets leave out are not written either.
@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [
        ("memcheck", "float32 bfloat16"),
        ("synccheck", "float32 bfloat16"),
        ("racecheck", "float32"),
        ("initcheck", "float32"),
    ],
)
def test_compute_sanitizer(kind: str, dtypes: str) -> None:
    bad = "0" if kind == "initcheck" else "1"
    check_sanitized(SANITIZED, kind, DTYPES=dtypes, BAD=bad)
