"""The Triton launchers of expert slicing against a plain loop over experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from ppmoe_ops._library import OPERATORS  # noqa: E402
from ppmoe_ops.kernels.expert_slice import grouped_linear as kernels  # noqa: E402
from ppmoe_ops.testing import assert_error_rule, cast_sample  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNELS = (
    kernels._grouped_linear_kernel,
    kernels._grouped_linear_weight_gradient_kernel,
    kernels._grouped_linear_bias_gradient_kernel,
)

# R, N, K_in and offsets.
SHAPES = {
    "experts without rows": (9, 5, 7, [0, 3, 3, 8]),
    "all rows on one expert": (70, 33, 17, [0, 0, 70, 70]),
    "rows of no expert at both ends": (40, 64, 128, [7, 20, 33]),
    "primes over several tiles": (97, 71, 131, [0, 13, 60, 97]),
    "one row": (1, 1, 1, [0, 1]),
    "no rows": (0, 4, 3, [0, 0]),
    "no experts": (5, 4, 3, [0]),
    "no outputs": (5, 0, 3, [0, 5]),
    "no inputs": (5, 4, 0, [0, 5]),
}


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """Names of the kernels that were launched."""
    names: list[str] = []
    hooks = []
    for kernel in KERNELS:
        name = kernel.fn.__name__
        hooks.append(lambda *_, _name=name, **__: names.append(_name))
        kernel.add_pre_run_hook(hooks[-1])
    yield names
    for kernel, hook in zip(KERNELS, hooks, strict=True):
        kernel.pre_run_hooks.remove(hook)


def loop(rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = rows.new_zeros(rows.size(0), weight.size(1))
    bounds = offsets.tolist()
    for expert, (low, high) in enumerate(itertools.pairwise(bounds)):
        out[low:high] = rows[low:high] @ weight[expert].T
        if bias is not None:
            out[low:high] += bias[expert]
    return out


def loop_backward(
    grad: Tensor, rows: Tensor, offsets: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_rows, grad_weight = torch.zeros_like(rows), rows.new_zeros(weight.shape)
    grad_bias = rows.new_zeros(weight.shape[:2])
    bounds = offsets.tolist()
    for expert, (low, high) in enumerate(itertools.pairwise(bounds)):
        grad_rows[low:high] = grad[low:high] @ weight[expert]
        grad_weight[expert] = grad[low:high].T @ rows[low:high]
        grad_bias[expert] = grad[low:high].sum(0)
    return grad_rows, grad_weight, grad_bias


def check_error(got: Any, plain: Callable[..., Any], factor: float, *args: Tensor | None) -> None:
    """The error rule against the loop, run in this dtype and in float64."""
    expected = plain(*args)
    exact = plain(*cast_sample(args, torch.float64))
    if isinstance(got, Tensor):
        got, expected, exact = (got,), (expected,), (exact,)
    for ours, theirs, truth in zip(got, expected, exact, strict=True):
        assert_error_rule(ours, theirs, truth, factor)


def inputs(
    shape: tuple[int, int, int, list[int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, width_out, width_in, bounds = shape
    rows = torch.randn(count, width_in).to(dtype)
    weight = torch.randn(len(bounds) - 1, width_out, width_in).to(dtype)
    bias = torch.randn(len(bounds) - 1, width_out).to(dtype)
    return rows, torch.tensor(bounds, dtype=torch.int32), weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward(shape: tuple[int, int, int, list[int]], dtype: torch.dtype) -> None:
    rows, offsets, weight, bias = inputs(shape, dtype)
    # Rows of no expert must not reach a result, and their results must be zero.
    rows[: offsets[0]] = torch.nan
    rows[offsets[-1] :] = torch.nan
    for given in (bias, None):
        got = kernels.grouped_linear(rows, offsets, weight, given)
        check_error(got, loop, 2, rows, offsets, weight, given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_backward(shape: tuple[int, int, int, list[int]], dtype: torch.dtype) -> None:
    rows, offsets, weight, _ = inputs(shape, dtype)
    grad = torch.randn(rows.size(0), weight.size(1)).to(dtype)
    for tensor in (rows, grad):
        tensor[: offsets[0]] = torch.nan
        tensor[offsets[-1] :] = torch.nan
    got = kernels.grouped_linear_backward(grad, rows, offsets, weight, True, True, True)
    check_error(got, loop_backward, 3, grad, rows, offsets, weight)


@pytest.mark.parametrize("load", ["few", "some", "many", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_configuration(load: str, dtype: torch.dtype) -> None:
    count = {"few": 20, "some": 120, "many": 200, "unaligned": 60}[load]
    widths = (100, 70) if load == "unaligned" else (112, 80)
    rows, offsets, weight, bias = inputs((count, *widths, [0, 11, count - 3]), dtype)
    columns = kernels.LINEAR[dtype.itemsize]
    assert kernels.choose(kernels.LINEAR, 2, rows, weight) is columns[load]
    got = kernels.grouped_linear(rows, offsets, weight, bias)
    check_error(got, loop, 2, rows, offsets, weight, bias)
    grad = torch.randn(count, widths[0]).to(dtype)
    grads = kernels.grouped_linear_backward(grad, rows, offsets, weight, True, True, True)
    check_error(grads, loop_backward, 3, grad, rows, offsets, weight)


def test_more_row_tiles_than_a_band() -> None:
    bounds = [3, 20, 21, 40, 60, 60, 75, 90, 95, 120, 150, 170, 188]
    rows, offsets, weight, bias = inputs((190, 144, 32, bounds), torch.float32)
    launch = kernels.linear_launch(rows, offsets, weight, bias, rows.new_empty(190, 144))
    assert launch.programs > 2 * kernels.BAND * (144 // launch.config.block_n)
    got = kernels.grouped_linear(rows, offsets, weight, bias)
    check_error(got, loop, 2, rows, offsets, weight, bias)


def test_more_experts_than_a_program_looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "EXPERTS_AT_ONCE", 4)
    rows, offsets, weight, bias = inputs((40, 6, 5, [1, 1, 4, 4, 9, 20, 33, 33, 39]), torch.float32)
    got = kernels.grouped_linear(rows, offsets, weight, bias)
    check_error(got, loop, 2, rows, offsets, weight, bias)


def test_strided_inputs() -> None:
    rows = torch.randn(60, 46).T
    weight = torch.randn(2, 33, 120).transpose(1, 2)[:, ::2, :]
    weight = weight[:, :50, :].expand(2, 50, 33)
    rows = torch.randn(46, 66)[:, ::2]
    bias = torch.randn(50, 2).T
    offsets = torch.tensor([1, 9, 30, 9, 46, 0], dtype=torch.int32)[::2]
    grad = torch.ones(()).expand(46, 50)
    got = kernels.grouped_linear(rows, offsets, weight, bias)
    check_error(got, loop, 2, rows, offsets, weight, bias)
    grads = kernels.grouped_linear_backward(grad, rows, offsets, weight, True, True, True)
    check_error(grads, loop_backward, 3, grad, rows, offsets, weight)


def test_only_what_is_needed_is_launched(launches: list[str]) -> None:
    rows, offsets, weight, bias = inputs((9, 5, 7, [0, 3, 3, 8]), torch.float32)
    grad = torch.randn(9, 5)
    kernels.grouped_linear(rows, offsets, weight, bias)
    assert launches == ["_grouped_linear_kernel"]
    expected = {
        (True, False, False): ["_grouped_linear_kernel"],
        (False, True, False): ["_grouped_linear_weight_gradient_kernel"],
        (False, False, True): ["_grouped_linear_bias_gradient_kernel"],
        (False, False, False): [],
    }
    for needs, names in expected.items():
        launches.clear()
        grads = kernels.grouped_linear_backward(grad, rows, offsets, weight, *needs)
        assert launches == names
        for got, need, shape in zip(
            grads, needs, (rows.shape, weight.shape, weight.shape[:2]), strict=True
        ):
            assert got.shape == (shape if need else (0,))
    launches.clear()
    kernels.grouped_linear(rows[:0], offsets * 0, weight, bias)
    assert launches == []


def test_the_order_of_programs_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    # A store past an expert's last row would be made good by the program that comes after it.
    from triton.runtime.interpreter import interpreter_builder

    forwards = interpreter_builder.set_grid_idx

    def backwards(x: int, y: int, z: int) -> None:
        forwards(interpreter_builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    rows, offsets, weight, bias = inputs(SHAPES["primes over several tiles"], torch.float32)
    grad = torch.randn(97, 71)
    got = kernels.grouped_linear(rows, offsets, weight, bias)
    check_error(got, loop, 2, rows, offsets, weight, bias)
    grads = kernels.grouped_linear_backward(grad, rows, offsets, weight, True, True, True)
    check_error(grads, loop_backward, 3, grad, rows, offsets, weight)


def test_same_bits_twice() -> None:
    rows, offsets, weight, bias = inputs(SHAPES["primes over several tiles"], torch.float16)
    grad = torch.randn(97, 71).half()

    def run() -> list[Tensor]:
        out = kernels.grouped_linear(rows, offsets, weight, bias)
        args = (grad, rows, offsets, weight, True, True, True)
        return [out, *kernels.grouped_linear_backward(*args)]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bounds", [[0, 99, 40], [-5, 10, 40], [30, 10, 40], [40, 2**31 - 1, -9]])
def test_bad_offsets_stay_inside_the_tensors(bounds: list[int]) -> None:
    # The interpreter reads and writes real memory: guards around each tensor must survive.
    guard = 4096
    arena = torch.full((40 * 8 + 2 * guard,), 7.0)
    out = arena[guard:-guard].view(40, 8)
    rows, weight = torch.randn(40, 5), torch.randn(2, 8, 5)
    offsets = torch.tensor(bounds, dtype=torch.int32)
    launch = kernels.linear_launch(rows, offsets, weight, None, out)
    launch.run(rows.device)
    assert bool((arena[:guard] == 7).all())
    assert bool((arena[-guard:] == 7).all())
    kernels.grouped_linear_backward(out, rows, offsets, weight, False, True, True)


def test_synchronising_check_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPMOE_OPS_CHECK", "1")
    rows, weight = torch.randn(4, 5), torch.randn(2, 8, 5)
    with pytest.raises(IndexError, match=r"offsets holds 5; allowed: 0 to 4"):
        kernels.grouped_linear(rows, torch.tensor([0, 2, 5], dtype=torch.int32), weight)
    with pytest.raises(ValueError, match=r"offsets holds 1 after 2"):
        kernels.grouped_linear(rows, torch.tensor([0, 2, 1], dtype=torch.int32), weight)


def test_bad_arguments_raise_in_the_words_of_the_reference() -> None:
    rows, offsets, weight, bias = inputs((9, 5, 7, [0, 3, 3, 8]), torch.float32)
    calls: list[tuple[Any, ...]] = [
        (rows[0], offsets, weight, bias),
        (rows.int(), offsets, weight, bias),
        (rows, offsets.long(), weight, bias),
        (rows, offsets[1:], weight, bias),
        (rows, offsets, weight[:, :, 1:], bias),
        (rows, offsets, weight.half(), bias),
        (rows, offsets, weight, bias[:, 1:]),
    ]
    for call in calls:
        with pytest.raises(ValueError) as expected:  # noqa: PT011
            OPERATORS["grouped_linear"].reference(*call)
        with pytest.raises(ValueError) as got:  # noqa: PT011
            kernels.grouped_linear(*call)
        assert str(got.value) == str(expected.value)
