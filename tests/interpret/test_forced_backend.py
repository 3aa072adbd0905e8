"""Operators as they are dispatched when Triton is forced: schemas, fakes, gradients of a layer.

The backend is chosen when the package is imported, hence a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from ppmoe_ops._library import OPERATORS

SERVED = sorted(
    name
    for name, op in OPERATORS.items()
    if op.triton
    and op.triton.split(":")[0].rpartition(".")[2]
    in ("expert_index", "rows", "route", "router_losses")
)

SCRIPT = """
import itertools, json, sys
import torch
from ppmoe_ops._backends import choices
from ppmoe_ops._library import OPERATORS
torch.manual_seed(3)
names, ops = sys.argv[1].split(), torch.ops.ppmoe_ops
for name in names:
    assert choices()[name]["cpu"].backend == "triton", choices()[name]
    samples = OPERATORS[name].samples(torch.device("cpu"), torch.float32)
    for args, options in itertools.islice(samples, 3):
        torch.library.opcheck(
            OPERATORS[name].overload, args, options, test_utils=("test_schema", "test_faketensor")
        )

def layer(logits, x, index, route, take, merge, losses):
    weights, ids = route(logits, 3)
    slots, _ = index(ids, 2, 4)
    balance, z = losses(logits, ids)
    return merge(torch.tanh(take(x, slots, 3)), slots, weights).square().sum() + balance + z

def plain_index(ids, first, local):
    return OPERATORS["expert_index"].reference(ids, first, local)

def plain_route(logits, k):
    ids = logits.topk(k).indices
    return logits.gather(1, ids).softmax(-1), ids

def plain_take(x, slots, k):
    return x[slots.clamp(min=0).long() // k] * (slots >= 0).unsqueeze(-1)

def plain_merge(rows, slots, weights):
    listed = slots >= 0
    slot = slots[listed].long()
    rows = rows[listed] * weights.flatten()[slot].unsqueeze(-1)
    return rows.new_zeros(weights.size(0), rows.size(1)).index_add(0, slot // 3, rows)

def plain_losses(logits, ids):
    shares = torch.bincount(ids.flatten(), minlength=8) / ids.numel()
    balance = 8 * (shares * logits.softmax(-1).mean(0)).sum()
    return balance, logits.logsumexp(-1).square().mean()

ours = (ops.expert_index, ops.route, ops.slice_rows, ops.merge_rows, ops.router_losses)
plain = (plain_index, plain_route, plain_take, plain_merge, plain_losses)
leaves = torch.randn(21, 8, requires_grad=True), torch.randn(21, 10, requires_grad=True)
results = []
for functions in (ours, plain):
    out = layer(*leaves, *functions)
    results.append([out, *torch.autograd.grad(out, leaves)])
for got, expected in zip(*results, strict=True):
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)
print(json.dumps(names))
"""


def test_forced_triton_serves_every_operator_and_its_gradient() -> None:
    assert len(SERVED) == 9
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PPMOE_OPS_")}
    path = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, " ".join(SERVED)],
        env={**kept, "PPMOE_OPS_BACKEND": "triton", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout) == SERVED
