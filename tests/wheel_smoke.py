"""Runs in an environment that holds the wheel and torch alone, outside the source tree.

`check_wheel.py` copies this file to an empty folder and runs it there; it imports nothing from the
source tree.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch

import ppmoe_ops
from ppmoe_ops import info


def installed_elsewhere() -> None:
    """The package is the installed one, and nothing of the source tree came along at top level."""
    package = Path(ppmoe_ops.__file__).resolve()
    assert package.is_relative_to(Path(sys.prefix).resolve()), package
    for name in ("kernels", "bench", "tests", "csrc", "ops"):
        assert importlib.util.find_spec(name) is None, f"the wheel installs a top-level {name}"
    assert importlib.metadata.version("ppmoe_ops") == ppmoe_ops.__version__
    assert (package.parent / "py.typed").is_file()
    assert importlib.import_module("ppmoe_ops.benchmarks").__file__
    assert importlib.util.find_spec("ppmoe_ops.kernels.expert_slice.grouped_linear") is not None
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("ppmoe_ops.kernels.expert_slice.grouped_linear")


def compiled_kernels(expected: str) -> None:
    """Every operator is served by `expected` on the CPU, and `info` says so."""
    facts = info.collect()
    if expected == "cpp":
        assert len(facts["build"]["summary"]) == 5, facts["build"]
        assert facts["cpu"]["in_use"] in facts["cpu"]["built"], facts["cpu"]
    for name, entry in facts["operators"].items():
        if "composite_of" not in entry:
            assert entry["cpu"]["backend"] == expected, (name, entry)
    if expected == "cpp" and Path(ppmoe_ops.__file__).with_name("_C_cuda.so").is_file():
        # Loads without a GPU and without a CUDA build of torch.
        assert facts["operators"]["slice_rows"]["cuda"]["backend"] == "cuda", facts["operators"]
    assert ppmoe_ops.__version__ in info.report(facts)


def expert_layer(tokens: int, experts: int, hidden: int, top_k: int) -> None:
    """Every operator forward and backward, against the same layer as one dense product."""
    x = torch.randn(tokens, hidden, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(hidden, experts, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(experts, hidden, hidden, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(experts, hidden, dtype=torch.float64, requires_grad=True)
    inputs = (x, gate, weight, bias)

    logits = x @ gate
    weights, ids = ppmoe_ops.route(logits, top_k)
    balance, z = ppmoe_ops.router_losses(logits, ids)
    slots, offsets = ppmoe_ops.expert_index(ids, 0, experts)
    rows = ppmoe_ops.slice_rows(x, slots, top_k)
    rows = ppmoe_ops.grouped_linear(rows, offsets, weight, bias)
    y = ppmoe_ops.merge_rows(rows, slots, weights)
    loss = y.square().mean() + 0.1 * balance + 0.1 * z
    found = torch.autograd.grad(loss, inputs)

    logits = x @ gate
    best = logits.topk(top_k, -1)
    share = torch.zeros_like(logits).scatter(1, best.indices, best.values.softmax(-1))
    everywhere = torch.einsum("th,enh->ten", x, weight) + bias
    dense = torch.einsum("te,ten->tn", share, everywhere)
    counts = torch.bincount(best.indices.flatten(), minlength=experts) / best.indices.numel()
    dense_balance = experts * (counts * logits.softmax(-1).mean(0)).sum()
    dense_z = logits.logsumexp(-1).square().mean()
    dense_loss = dense.square().mean() + 0.1 * dense_balance + 0.1 * dense_z
    expected = torch.autograd.grad(dense_loss, inputs)

    assert torch.equal(best.indices, ids.long())
    torch.testing.assert_close(y, dense)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def main() -> None:
    """Run all checks; the argument is the backend that must serve CPU tensors."""
    torch.manual_seed(0)
    expected = sys.argv[1]
    installed_elsewhere()
    compiled_kernels(expected)
    expert_layer(tokens=37, experts=8, hidden=24, top_k=3)
    print(f"smoke test passed: {len(info.collect()['operators'])} operators by {expected}")


if __name__ == "__main__":
    main()
