"""One test per duty of an operator's contract, for every operator that is registered."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import ppmoe_ops
from ppmoe_ops import _backends, ops
from ppmoe_ops._library import OPERATORS, Operator, register
from ppmoe_ops.testing import cast_sample

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PUBLIC = sorted(ops.__all__)
SECTIONS = (
    "Args:",
    "Returns:",
    "Raises:",
    "Gradient:",
    "Saved for backward:",
    "Source:",
    "Example:",
)
OPERATOR = pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)


def samples(op: Operator, dtype: torch.dtype = torch.float32) -> list[tuple[Any, dict[str, Any]]]:
    return list(op.samples(CPU, dtype))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)


@OPERATOR
def test_contract_is_complete(op: Operator) -> None:
    assert op.family
    assert (ROOT / "ppmoe_ops" / "ops" / op.family).exists()
    for name in ("reference", "fake", "flops", "nbytes", "samples"):
        assert callable(getattr(op, name)), name
    assert len(samples(op)) >= 2
    assert (op.backward is None) == (op.setup_context is None)
    assert sum((op.backward is not None, op.no_derivative is not None, op.composite)) <= 1
    if op.backward is not None or op.composite:
        assert op.saved_bytes is not None
    if op.backward is not None:
        assert f"{op.name.removesuffix('_forward')}_backward" in OPERATORS
    if op.name.endswith("_backward"):
        assert op.no_derivative is not None
    if op.composite:
        assert f"{op.name}_forward" in OPERATORS


@OPERATOR
def test_benchmark_times_it(op: Operator) -> None:
    assert op.benchmark
    source = (ROOT / "bench" / f"{op.benchmark}.py").read_text()
    assert op.name.removesuffix("_forward") in source


@OPERATOR
def test_sizes_are_symbolic(op: Operator) -> None:
    assert torch.Tag.pt2_compliant_tag in op.overload.tags
    for argument in op.overload._schema.arguments:
        # An `int` would make torch.compile start again for every value.
        assert " int" not in f" {argument}".replace("SymInt", ""), str(argument)


@OPERATOR
def test_compiled_kernel_serves_the_cpu(op: Operator) -> None:
    if op.composite:
        assert op.name not in _backends.choices()
        return
    choice = _backends.choices()[op.name]["cpu"]
    assert choice.backend == "cpp", choice.missing
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.qualname, "CPU")


def test_every_compiled_kernel_belongs_to_an_operator() -> None:
    registered = (ROOT / "csrc" / "cpu").rglob("*.cpp")
    names = {
        line.split('"')[1]
        for source in registered
        for line in source.read_text().splitlines()
        if line.strip().startswith("m.impl(")
    }
    assert names == {op.name for op in OPERATORS.values() if not op.composite}


@OPERATOR
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fake_has_the_shapes_dtypes_and_strides_of_the_result(
    op: Operator, dtype: torch.dtype
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for args, options in samples(op, dtype):
        real = list(tensors(op.overload(*args, **options)))
        with FakeTensorMode() as mode:
            fake_args, fake_options = tree_map_only(Tensor, mode.from_tensor, (args, options))
            fake = list(tensors(op.overload(*fake_args, **fake_options)))
        for came, said in zip(real, fake, strict=True):
            assert came.shape == said.shape
            assert came.dtype == said.dtype
            assert came.stride() == said.stride()


@OPERATOR
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(op: Operator, dtype: torch.dtype) -> None:
    for args, options in samples(op, dtype):
        torch.library.opcheck(op.overload, args, options)


@OPERATOR
def test_opcheck_without_gradients(op: Operator) -> None:
    for args, options in samples(op):
        plain = [e.detach() if isinstance(e, Tensor) else e for e in args]
        torch.library.opcheck(op.overload, tuple(plain), options)


@OPERATOR
def test_flops_are_counted_by_its_formula(op: Operator) -> None:
    for args, options in samples(op):
        with FlopCounterMode(display=False) as counter:
            op.overload(*args, **options)
        assert counter.get_total_flops() == op.flops(*args, **options)


def test_flops_of_grouped_linear_are_those_of_its_products() -> None:
    rows, weight = torch.randn(12, 5, requires_grad=True), torch.randn(2, 7, 5, requires_grad=True)
    offsets = torch.tensor([0, 4, 12], dtype=torch.int32)
    with FlopCounterMode(display=False) as ours:
        ppmoe_ops.grouped_linear(rows, offsets, weight).sum().backward()
    with FlopCounterMode(display=False) as theirs:
        for low, high, each in ((0, 4, weight[0]), (4, 12, weight[1])):
            (rows[low:high] @ each.T).sum().backward()
    assert ours.get_total_flops() == theirs.get_total_flops() == 3 * 2 * 12 * 5 * 7


@OPERATOR
def test_bytes_are_at_least_those_of_the_results(op: Operator) -> None:
    for args, options in samples(op):
        # What `expert_ffn` saves is counted with its forward operator alone.
        apart = op.composite and op.name != "expert_ffn"
        whole = OPERATORS[f"{op.name}_forward"] if apart else op
        results = list(tensors(whole.overload(*args, **options)))
        nbytes = op.nbytes(*args, **options)
        assert isinstance(nbytes, int)
        assert nbytes >= sum(each.nbytes for each in results if each.dim() == 2)
        read = sum(each.nbytes for each in tensors(list(args)))
        assert nbytes <= read + sum(each.nbytes for each in results) + 64


def measured_saved_bytes(op: Operator, args: Any, options: Any) -> int:
    """What autograd keeps after a call, beyond the storages of its inputs and outputs."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = op.overload(*args, **options)
    for each in [*tensors(list(args)), *tensors(list(options.values())), *tensors(result)]:
        kept.pop(each.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@OPERATOR
def test_saved_bytes(op: Operator) -> None:
    if op.saved_bytes is None:
        return
    for args, options in samples(op):
        if op.name.endswith("_forward"):
            # Its own outputs are what the composite over it saves.
            assert measured_saved_bytes(op, args, options) == 0
        else:
            reserved = op.reserved_bytes or op.saved_bytes
            assert measured_saved_bytes(op, args, options) == reserved(*args, **options)
            assert op.saved_bytes(*args, **options) <= reserved(*args, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_reserved_memory_is_touched_where_something_is_saved(
    activation: str, dtype: torch.dtype
) -> None:
    op = OPERATORS["expert_ffn_forward"]
    tokens, hidden, width, top_k, local = 300, 8, 12, 2, 4
    inner = width * 2 if activation == "swiglu" else width
    slots, offsets = ppmoe_ops.expert_index(torch.rand(tokens, 16).argsort(-1)[:, :top_k], 3, local)
    args = (
        torch.randn(tokens, hidden).to(dtype), slots, offsets, torch.rand(tokens, top_k),
        torch.randn(local, inner, hidden).to(dtype), None,
        torch.randn(local, hidden, width).to(dtype), None, activation, True,
    )  # fmt: skip
    # Memory that nobody wrote is full of NaN here, see conftest.py.
    pre = op.overload(*args)[1]
    assert op.saved_bytes is not None
    assert op.reserved_bytes is not None
    assert pre.untyped_storage().nbytes() == op.reserved_bytes(*args)
    touched = int((~pre.isnan()).sum()) * pre.element_size()
    assert touched == op.saved_bytes(*args) == int(offsets[-1]) * inner * pre.element_size()
    assert touched < op.reserved_bytes(*args) / 2


def test_saved_inputs_are_those_that_the_docstring_names() -> None:
    def saved(out: Tensor) -> list[int]:
        node = out.grad_fn
        assert node is not None
        return [each.data_ptr() for each in node.saved_tensors if each is not None]

    logits = torch.randn(6, 8, requires_grad=True)
    for score, renormalize, keeps in (
        ("softmax", True, False), ("softmax", False, True),
        ("sigmoid", True, True), ("sigmoid", False, True),
    ):  # fmt: skip
        weights, experts = ppmoe_ops.route(logits, 2, score, renormalize)
        expected = {weights.data_ptr(), experts.data_ptr()} | (
            {logits.data_ptr()} if keeps else set()
        )
        assert set(saved(weights)) == expected


def test_saved_inputs_of_expert_ffn_are_those_that_the_docstring_names() -> None:
    for args, options in OPERATORS["expert_ffn"].samples(CPU, torch.float32):
        x, slots, offsets, weights, w_in, _, w_out, b_out, _ = args
        if not x.numel() or not w_in.numel():
            continue  # empty tensors have no address to tell them by
        node = ppmoe_ops.expert_ffn(*args, **options).grad_fn
        assert node is not None
        kept = [x, slots, offsets, weights, w_in, w_out, *([] if b_out is None else [b_out])]
        saved = {each.data_ptr() for each in node.saved_tensors if each is not None}
        pointers = {each.data_ptr() for each in kept}
        assert pointers <= saved
        assert len(saved - pointers) == 1  # the pre-activation


def test_flops_of_expert_ffn_are_those_of_its_products() -> None:
    ids = torch.rand(6, 5).argsort(-1)[:, :2]
    slots, offsets = ppmoe_ops.expert_index(ids, 0, 5)
    x, weights = torch.randn(6, 4, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    w_in, w_out = (torch.randn(5, *n, requires_grad=True) for n in ((14, 4), (4, 7)))
    with FlopCounterMode(display=False) as ours:
        out = ppmoe_ops.expert_ffn(x, slots, offsets, weights, w_in, None, w_out, None, "swiglu")
        out.sum().backward()
    total = torch.zeros(())
    with FlopCounterMode(display=False) as theirs:
        for expert in range(5):
            rows = x[slots[offsets[expert] : offsets[expert + 1]].long() // 2]
            gate, up = (rows @ w_in[expert].T).chunk(2, -1)
            total = total + (torch.nn.functional.silu(gate) * up @ w_out[expert].T).sum()
        total.backward()
    assert ours.get_total_flops() == theirs.get_total_flops() == 3 * 2 * 12 * 4 * (14 + 7)


# Dtypes of results under autocast to bfloat16, by operator; float32 inputs.
AUTOCAST: dict[str, list[torch.dtype]] = {
    "route": [torch.float32, torch.int32],
    "router_losses": [torch.float32, torch.float32],
    "router_losses_forward": [torch.float32] * 4,
    "slice_rows": [torch.bfloat16],
    "merge_rows": [torch.bfloat16],
    "grouped_linear": [torch.bfloat16],
    "equilibrium_conv_cell": [torch.float32, torch.int32, torch.float32],
    "expert_ffn": [torch.bfloat16],
    "expert_ffn_forward": [torch.bfloat16] * 2,
    "window_attention": [torch.bfloat16],
    "ladder_attention": [torch.bfloat16],
    "ladder_ffn": [torch.bfloat16, torch.float32, torch.float32],
    "pixel_adaptive_fusion": [torch.bfloat16],
    "ladder_block": [torch.bfloat16],
}


@OPERATOR
def test_autocast(op: Operator) -> None:
    args, options = samples(op)[0]
    with torch.autocast("cpu", torch.bfloat16):
        results = list(tensors(op.overload(*args, **options)))
    if op.autocast is None:
        plain = list(tensors(op.overload(*args, **options)))
        assert [each.dtype for each in results] == [each.dtype for each in plain]
        return
    assert [each.dtype for each in results] == AUTOCAST[op.name]


@pytest.mark.parametrize("name", ["route", "router_losses"])
def test_autocast_widens_half_precision_for_the_router(name: str) -> None:
    args, options = next(iter(OPERATORS[name].samples(CPU, torch.bfloat16)))
    with torch.autocast("cpu", torch.bfloat16):
        results = list(tensors(OPERATORS[name].overload(*args, **options)))
    wide = cast_sample(args, torch.float32)
    for came, wanted in zip(
        results, tensors(OPERATORS[name].overload(*wide, **options)), strict=True
    ):
        assert torch.equal(came, wanted)


def test_autocast_keeps_routing_weights_and_float64() -> None:
    slots = torch.tensor([1, 0, 3, -1], dtype=torch.int32)
    rows, weights = torch.randn(4, 6), torch.rand(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = ppmoe_ops.merge_rows(rows, slots, weights)
        double = ppmoe_ops.merge_rows(rows.double(), slots, weights.double())
    assert torch.equal(out, ppmoe_ops.merge_rows(rows.bfloat16(), slots, weights))
    assert double.dtype == torch.float64


def test_gradients_flow_through_autocast() -> None:
    rows = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(1, 3, 6, requires_grad=True)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ppmoe_ops.grouped_linear(rows, offsets, weight)
    out.float().sum().backward()
    assert rows.grad is not None
    assert weight.grad is not None
    assert rows.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", PUBLIC)
def test_public_function(name: str) -> None:
    function = getattr(ppmoe_ops, name)
    op = OPERATORS[name]
    doc = inspect.getdoc(function) or ""
    missing = [section for section in SECTIONS if section not in doc]
    assert not missing
    arguments = [argument.name for argument in op.overload._schema.arguments]
    assert list(inspect.signature(function).parameters) == arguments
    described = doc.split("Args:")[1].split("Returns:")[0]
    assert [each for each in arguments if f"{each}:" not in described] == []
    args, options = samples(op)[0]
    for came, wanted in zip(
        tensors(function(*args, **options)), tensors(op.overload(*args, **options)), strict=True
    ):
        assert torch.equal(came, wanted)


def test_every_operator_is_public_or_belongs_to_one() -> None:
    for name in OPERATORS:
        base = name.removesuffix("_backward").removesuffix("_forward")
        assert base in PUBLIC
        assert base in ppmoe_ops.__all__


def modules() -> list[str]:
    found = [each.name for each in pkgutil.walk_packages(ppmoe_ops.__path__, "ppmoe_ops.")]
    contracts = [name for name in found if name.startswith("ppmoe_ops.ops")]
    return ["ppmoe_ops", "ppmoe_ops.testing", "ppmoe_ops._sharding", *contracts]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in finder.find(module, name):
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_function_has_an_example_that_runs(name: str) -> None:
    examples = doctest.DocTestFinder(recurse=False).find(getattr(ppmoe_ops, name), name)
    assert sum(len(each.examples) for each in examples) >= 2


def test_an_operator_is_registered_once() -> None:
    with pytest.raises(ValueError, match="route is registered twice"):
        register(OPERATORS["route"])
