"""The family under torch's transforms: compiled graphs, export, autocast, FLOP counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ladder import Args, Shape, plain_branch, plain_ffn, plain_fusion, rolled_attention, run
from ladder_problems import attention_args, block_args, branch_args, ffn_args, fusion_args
from ladder_rule import all_results, asking, assert_equal_bits, differentiable, outputs_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import ppmoe_ops
from ppmoe_ops._library import OPERATORS

# Batches and maps. What is compiled is the first, whose sizes are unlike all others in a call.
MAPS = ((6, 14, 17), (3, 9, 19), (5, 21, 8), (7, 10, 33))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, and an error instead of compiling the same code again."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def at(sizes: tuple[int, int, int], head_dim: int = 8) -> Shape:
    return Shape(*sizes, 2, head_dim, (4, 3), (1, -1))


Make = Callable[[tuple[int, int, int]], tuple[str, Args]]
CALLS: dict[str, Make] = {
    "window_attention": lambda m: ("window_attention", asking(attention_args(at(m)))),
    "window_attention_frozen": lambda m: (
        "window_attention", asking(attention_args(at(m), bias=False, scale=0.5), ["q"])
    ),
    "window_attention_without_gradients": lambda m: ("window_attention", attention_args(at(m))),
    "ladder_attention_own": lambda m: (
        "ladder_attention", asking(branch_args(at(m), value=False, scaled=True))
    ),
    "ladder_attention_given": lambda m: ("ladder_attention", asking(branch_args(at(m)))),
    "ladder_ffn_evaluation": lambda m: ("ladder_ffn", asking(ffn_args((*m, 12), scaled=True))),
    "ladder_ffn_training": lambda m: (
        "ladder_ffn", asking(ffn_args((*m, 12), training=True, running=False))
    ),
    "pixel_adaptive_fusion": lambda m: ("pixel_adaptive_fusion", asking(fusion_args((*m, 12), 5))),
    "ladder_block": lambda m: ("ladder_block", block_args(at(m))),
}  # fmt: skip


def outputs_and_gradients(function: Callable[..., Any], args: Args) -> list[Tensor]:
    outputs = outputs_of(function(*args.values()))
    leaves = [each for each in args.values() if isinstance(each, Tensor) and each.requires_grad]
    if not leaves:
        return outputs
    return [*outputs, *torch.autograd.grad(outputs[0].square().sum(), leaves)]


def assert_same(came: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(came, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", CALLS)
def test_one_compilation_serves_every_batch_and_map(name: str, fresh_compiler: None) -> None:
    op = CALLS[name](MAPS[0])[0]
    function = getattr(ppmoe_ops, op)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for sizes in MAPS:
        _, args = CALLS[name](sizes)
        assert_same(outputs_and_gradients(compiled, args), outputs_and_gradients(function, args))
        graphs.append(counter.frame_count)
    # A float argument makes Dynamo start the same frame over once.
    assert graphs == graphs[:1] * len(MAPS)


class Branch(nn.Module):
    """A ladder branch in training form."""

    def __init__(self, shape: Shape, value: bool) -> None:
        super().__init__()
        self.shape = shape
        args = {**branch_args(shape, value=value), **ffn_args(shape.map, running=True)}
        self.names = ("ln_w", "ln_b", "w_in", "b_in", "bias_table", "w_out", "b_out")
        self.feed = ("ln_w", "ln_b", "w1", "b1", "dw_w", "dw_b", "w2", "b2", "bn_w", "bn_b")
        for name in {*self.names, *self.feed}:
            self.register_parameter(name, nn.Parameter(args[name]))
        self.register_buffer("running_mean", args["running_mean"])
        self.register_buffer("running_var", args["running_var"])

    def forward(self, x: Tensor, value: Tensor | None) -> Tensor:
        tensors = [getattr(self, name) for name in self.names]
        shape = self.shape
        z = ppmoe_ops.ladder_attention(
            x, value, *tensors, None, shape.heads, shape.window, shape.shift
        )
        tensors = [getattr(self, name) for name in self.feed]
        running = (self.running_mean, self.running_var)
        return ppmoe_ops.ladder_ffn(z, *tensors, *running, None, self.training)[0]


class Block(nn.Module):
    """All operators of the family that have a derivative."""

    def __init__(self, head_dim: int = 8) -> None:
        super().__init__()
        shapes = [
            Shape(1, 2, 2, 2, head_dim, (4, 3), shift) for shift in ((0, 0), (1, 1), (-1, -1))
        ]
        self.branches = nn.ModuleList(
            Branch(shape, value=number > 0) for number, shape in enumerate(shapes)
        )
        fusion = fusion_args((1, 6 * head_dim))
        self.fusion = nn.ParameterList(value for name, value in fusion.items() if name != "x")

    def forward(self, x: Tensor) -> Tensor:
        value, outputs = None, []
        for part, branch in zip(x.chunk(3, -1), self.branches, strict=True):
            value = branch(part, value)
            outputs.append(value)
        return ppmoe_ops.pixel_adaptive_fusion(torch.cat(outputs, -1), *self.fusion)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_whole_block_in_one_graph(training: bool, fresh_compiler: None) -> None:
    block = Block().train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for sizes in MAPS:
        x = torch.randn(*sizes, 48, requires_grad=True)
        leaves = [x, *block.parameters()]
        came, wanted = compiled(x), block(x)
        torch.testing.assert_close(came, wanted)
        grads = [torch.autograd.grad(each.square().mean(), leaves) for each in (came, wanted)]
        assert_same(list(grads[0]), list(grads[1]))
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * len(MAPS)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_export_with_a_dynamic_batch_and_map(training: bool, tmp_path: Path) -> None:
    block = Block().train(training)
    sizes = [torch.export.Dim(name, min=2, max=512) for name in ("batch", "height", "width")]
    program = torch.export.export(
        block, (torch.randn(2, 9, 11, 48),), dynamic_shapes=(dict(enumerate(sizes)),)
    )
    targets = {str(node.target) for node in program.graph.nodes}
    for name in ("ladder_attention", "ladder_ffn", "pixel_adaptive_fusion"):
        assert f"ppmoe_ops.{name}.default" in targets
    path = tmp_path / "block.pt2"
    torch.export.save(program, path)
    for loaded in (program.module(), torch.export.load(path).module()):
        for shape in MAPS[1:]:
            x = torch.randn(*shape, 48)
            torch.testing.assert_close(loaded(x), block(x))


class Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.params = nn.ParameterList(block_args(at(MAPS[0]))["params"]).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return ppmoe_ops.ladder_block(x, list(self.params), 2, (4, 3), (1, -1))


def test_export_of_the_folded_block() -> None:
    block = Folded()
    sizes = [torch.export.Dim(name, min=2, max=512) for name in ("batch", "height", "width")]
    program = torch.export.export(
        block, (torch.randn(2, 9, 11, 48),), dynamic_shapes=(dict(enumerate(sizes)),)
    )
    for shape in MAPS[1:]:
        x = torch.randn(*shape, 48)
        torch.testing.assert_close(program.module()(x), block(x))


def test_errors_are_found_while_tracing(fresh_compiler: None) -> None:
    compiled = torch.compile(ppmoe_ops.window_attention, fullgraph=True, backend="eager")
    maps = [torch.randn(1, 4, 4, 16) for _ in range(3)]
    with pytest.raises(Exception, match=r"window_attention: shift \(rows\) is 2; allowed: -1 to 1"):
        compiled(*maps, None, 2, 2, 2)


# What autocast leaves in float32.
KEPT = {
    "window_attention": {"bias_table"},
    "ladder_attention": {"ln_w", "ln_b", "bias_table", "row_scale"},
    "ladder_ffn": {"ln_w", "ln_b", "bn_w", "bn_b", "running_mean", "running_var", "row_scale"},
    "pixel_adaptive_fusion": set(),
}


def under_autocast(op: str) -> tuple[Args, Args]:
    """Arguments in float32, and what autocast to bfloat16 makes of them."""
    args = {
        "window_attention": lambda: attention_args(at(MAPS[0])),
        "ladder_attention": lambda: branch_args(at(MAPS[0]), scaled=True),
        "ladder_ffn": lambda: ffn_args((2, 5, 6, 12), training=True, scaled=True),
        "pixel_adaptive_fusion": lambda: fusion_args((2, 5, 6, 12)),
    }[op]()
    narrow = {
        name: value.bfloat16() if isinstance(value, Tensor) and name not in KEPT[op] else value
        for name, value in args.items()
    }
    return args, narrow


@pytest.mark.parametrize("op", KEPT)
def test_autocast_keeps_norms_and_tables(op: str) -> None:
    args, narrow = under_autocast(op)
    with torch.autocast("cpu", torch.bfloat16):
        came = outputs_of(run(op, args))
        double = outputs_of(run(op, {
            name: value.double() if isinstance(value, Tensor) else value
            for name, value in args.items()
        }))  # fmt: skip
    for one, other in zip(came, outputs_of(run(op, narrow)), strict=True):
        assert_equal_bits(one, other)
    assert came[0].dtype == torch.bfloat16
    assert double[0].dtype == torch.float64


@pytest.mark.parametrize("op", KEPT)
def test_gradients_through_autocast(op: str) -> None:
    args, narrow = under_autocast(op)
    leaves = asking(args)
    with torch.autocast("cpu", torch.bfloat16):
        out = outputs_of(run(op, leaves))[0]
    names = differentiable(args)
    grad = torch.randn(out.shape).to(out.dtype)
    came = torch.autograd.grad(out, [leaves[name] for name in names], grad)
    wanted = all_results(op, narrow, grad)
    for name, one in zip(names, came, strict=True):
        assert one.dtype == torch.float32
        assert_equal_bits(one, wanted[name].float(), name)


def test_autocast_of_the_block() -> None:
    args = block_args(at(MAPS[0]))
    with torch.autocast("cpu", torch.bfloat16):
        came = run("ladder_block", args)
    kept = {branch + part for branch in (0, 16, 32) for part in (0, 1, 4, 7, 8)}
    params = [each if at in kept else each.bfloat16() for at, each in enumerate(args["params"])]
    narrow = {**args, "x": args["x"].bfloat16(), "params": params}
    assert came.dtype == torch.bfloat16
    assert_equal_bits(came, run("ladder_block", narrow))


def test_autocast_inside_a_compiled_function(fresh_compiler: None) -> None:
    args = attention_args(at(MAPS[0]))

    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ppmoe_ops.window_attention(q, k, v, table, 2, (4, 3), (1, -1))

    tensors = [args[name] for name in ("q", "k", "v", "bias_table")]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert compiled(*tensors).dtype == torch.bfloat16
    assert torch.equal(compiled(*tensors), function(*tensors))


def counted(function: Callable[..., Any], args: Args) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args.values())
    return int(counter.get_total_flops())


@pytest.mark.parametrize("shift", [(0, 0), (3, 3)], ids=["unshifted", "shifted"])
def test_flops_are_those_of_whole_windows(shift: tuple[int, int]) -> None:
    shape = Shape(2, 14, 14, 4, 24, (7, 7), shift)
    args = attention_args(shape)
    # Every window has its four times 49 by 49 scores, shifted or not.
    nominal = 2 * 4 * 2 * 4 * 49 * 49 * 24 * 2
    assert counted(OPERATORS["window_attention"].overload, args) == nominal
    assert counted(rolled_attention, args) == nominal


def test_flops_are_those_of_the_compositions_products() -> None:
    shape = Shape(2, 14, 14, 4, 24, (7, 7))
    calls: list[tuple[str, Args, Callable[..., Any]]] = [
        ("ladder_attention", branch_args(shape, value=False), plain_branch),
        ("ladder_attention", branch_args(shape), plain_branch),
        ("ladder_ffn", ffn_args((2, 14, 14, 96)), plain_ffn),
        ("ladder_ffn", ffn_args((2, 14, 14, 96), training=True), plain_ffn),
        ("pixel_adaptive_fusion", fusion_args((2, 14, 14, 288)), plain_fusion),
    ]
    for op, args, plain in calls:
        assert counted(OPERATORS[op].overload, args) == counted(plain, args), op


def test_flops_of_a_block_are_those_that_the_paper_counts() -> None:
    """Multiply-adds of stage 3 and stage 4 at 224 px, in millions."""
    stages = (((14, 14), 4, 24, (3, 3), 10, 674.55), ((7, 7), 8, 24, (0, 0), 3, 193.31))
    for size, heads, head_dim, shift, blocks, wanted in stages:
        args = block_args(Shape(1, *size, heads, head_dim, (7, 7), shift))
        came = counted(OPERATORS["ladder_block"].overload, args) * blocks / 2e6
        assert abs(came - wanted) < 0.001 * wanted


@pytest.mark.parametrize("op", KEPT)
def test_flops_of_a_training_step(op: str) -> None:
    """Two products for each of the forward's, and what is computed again."""
    args = asking(under_autocast(op)[0])
    forward = counted(OPERATORS[op].overload, args)
    with FlopCounterMode(display=False) as counter:
        outputs_of(run(op, args))[0].sum().backward()
    assert 3 * forward <= counter.get_total_flops() <= 5 * forward
