"""Data parallelism on two gloo processes; run by its test in test_equilibrium_transforms.py."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ppmoe_ops import equilibrium

B, D = 6, 5


class Twice(nn.Module):
    """One equilibrium layer, used twice in one graph."""

    def __init__(self, backward: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(D, D, dtype=torch.float64)
        with torch.no_grad():
            self.inner.weight.mul_(0.8)
        self.backward_mode = backward

    def solved(self, u: Tensor) -> Tensor:
        options = {"backward": self.backward_mode, "phantom_steps": 3}
        x, _ = equilibrium(
            lambda z: torch.tanh(self.inner(z) + u),
            torch.zeros_like(u),
            rtol=1e-12,
            max_iter=200,
            **options,  # type: ignore[arg-type]
        )
        return x

    def forward(self, u: Tensor) -> Tensor:
        return self.solved(self.solved(u) + u)


def work(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    batch = torch.randn(B, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for backward in ("ift", "phantom", "jfb"):
        alone = Twice(backward)
        alone(batch).square().mean().backward()
        shared = DistributedDataParallel(Twice(backward))
        for _ in range(2):  # the reducer must be ready again after a backward
            shared.zero_grad()
            shared(batch[rank::2]).square().mean().backward()
        for one, other in zip(shared.module.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-9, rtol=0)
    dist.destroy_process_group()


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(work, args=(port,), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
