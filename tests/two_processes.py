"""DTensor rules on two gloo processes; run by its test in test_transforms.py."""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import ppmoe_ops

T, H, E, K, N = 6, 8, 4, 2, 10


def problem() -> dict[str, Any]:
    """The same on every rank."""
    torch.manual_seed(11)
    logits = torch.randn(T, E)
    weights, experts = torch.ops.ppmoe_ops.route(logits, K)
    slots, offsets = torch.ops.ppmoe_ops.expert_index(experts, 0, E)
    return {
        "logits": logits,
        "x": torch.randn(T, H),
        "slots": slots,
        "offsets": offsets,
        "weights": weights,
        "rows": torch.randn(T * K, H),
        "weight": torch.randn(E, N, H),
        "bias": torch.randn(E, N),
        "grad": torch.randn(T, H),
    }


def work(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    ppmoe_ops.enable_dtensor()
    mesh = init_device_mesh("cpu", (2,))
    values = problem()
    ops = torch.ops.ppmoe_ops
    whole, rows, columns = Replicate(), Shard(0), Shard(1)

    def shard(name: str, placement: Any) -> Tensor:
        return distribute_tensor(values[name], mesh, [placement])

    def compare(came: Any, wanted: Any, *placements: Any) -> None:
        came = [came] if isinstance(came, Tensor) else came
        wanted = [wanted] if isinstance(wanted, Tensor) else wanted
        for one, other, placement in zip(came, wanted, placements, strict=True):
            assert one.placements == (placement,), (one.placements, placement)
            torch.testing.assert_close(one.full_tensor(), other)

    v = values
    slots, offsets = shard("slots", whole), shard("offsets", whole)
    # A token's route depends on no other token.
    compare(ops.route(shard("logits", rows), K), ops.route(v["logits"], K), rows, rows)
    # Rows are copied and added per column.
    x = shard("x", columns)
    compare(ops.slice_rows(x, slots, K), ops.slice_rows(v["x"], v["slots"], K), columns)
    merged = ops.merge_rows(v["rows"], v["slots"], v["weights"])
    rows_ = shard("rows", columns)
    compare(ops.merge_rows(rows_, slots, shard("weights", whole)), merged, columns)
    backward = ops.merge_rows_backward(v["grad"], v["rows"], v["slots"], v["weights"])
    came = ops.merge_rows_backward(shard("grad", columns), rows_, slots, shard("weights", whole))
    compare(came, backward, columns, Partial())
    # Expert weights may be cut along their outputs, or along their inputs with a sum to follow.
    full = ops.grouped_linear(v["rows"], v["offsets"], v["weight"], v["bias"])
    cut = (shard("rows", whole), offsets, shard("weight", columns), shard("bias", columns))
    compare(ops.grouped_linear(*cut), full, columns)
    partial = ops.grouped_linear(rows_, offsets, shard("weight", Shard(2)))
    compare(partial, ops.grouped_linear(v["rows"], v["offsets"], v["weight"]), Partial())
    # What has no rule for its placement is gathered first.
    came = ops.expert_index(
        distribute_tensor(torch.arange(T * K).view(T, K) % E, mesh, [rows]), 1, 2
    )
    compare(came, ops.expert_index(torch.arange(T * K).view(T, K) % E, 1, 2), whole, whole)
    dist.destroy_process_group()


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(port,), nprocs=2)


if __name__ == "__main__":
    main()
