"""Fixed-point problems with a known answer, and their gradients by dense algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = Callable[[Tensor], Tensor]
EXACT: dict[str, Any] = {"rtol": 1e-13, "max_iter": 400}


class Layer:
    """f(z) = tanh(z W + u) over rows; `norm` is the spectral norm of W."""

    def __init__(
        self,
        samples: int = 4,
        width: int = 5,
        norm: float = 0.6,
        dtype: torch.dtype = torch.float64,
        seed: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weight = random(width, width)
        weight = weight * (norm / torch.linalg.matrix_norm(weight, 2))
        self.weight = weight.to(dtype).requires_grad_()
        self.u = random(samples, width).to(dtype).requires_grad_()
        self.grad = random(samples, width).to(dtype)  # of the solution
        self.start = torch.zeros(samples, width, dtype=dtype)
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(z @ self.weight + self.u)

    def gradients(self, x: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(x, [self.weight, self.u], self.grad, **options)

    def jacobians(self, z: Tensor) -> Tensor:
        """[B, d, d], J[b, i, j] = d f_i / d z_j."""
        slope = 1 - torch.tanh(z @ self.weight + self.u).square()
        return (slope[:, :, None] * self.weight.T).detach()

    def pulled(self, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """w^T df/dW and w^T df/du at z."""
        slope = 1 - torch.tanh(z @ self.weight + self.u).square()
        return (z.T @ (w * slope)).detach(), (w * slope).detach()


def iterated(f: State, z: Tensor, steps: int = 500) -> Tensor:
    for _ in range(steps):
        z = f(z)
    return z


def unrolled_gradients(layer: Layer, steps: int = 500) -> tuple[Tensor, ...]:
    return layer.gradients(iterated(layer, layer.start, steps))


def exact_adjoint(layer: Layer, z: Tensor) -> Tensor:
    eye = torch.eye(z.size(1), dtype=z.dtype)
    turned = layer.jacobians(z).transpose(1, 2)
    return torch.linalg.solve(eye - turned, layer.grad[:, :, None])[:, :, 0]


def assert_all_close(
    came: tuple[Tensor, ...], wanted: tuple[Tensor, ...], atol: float, rtol: float = 0
) -> None:
    for one, other in zip(came, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=rtol)
