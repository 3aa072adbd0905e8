"""Plain-PyTorch equilibrium layers, and torchdeq's solvers on them: what ours are measured against.

All stop where |f(z) - z| <= rtol |f(z)| for every sample, and return f of the last point. torchdeq
is optional; without it its columns say so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ppmoe_ops

Map = Callable[[Tensor], Tensor]
SOLVERS = ("fixed_point_iter", "anderson", "broyden")
# torchdeq's Broyden begins with zeros for as many terms as it may take steps.
BROYDEN_STEPS = 30
INSTALLED = importlib.util.find_spec("torchdeq") is not None
ABSENT = "torchdeq is not installed (pip install torchdeq==0.1.0)"
ACTIVATIONS: dict[str, Map] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}


def norms(z: Tensor) -> Tensor:
    """[B], the 2-norm of each sample."""
    return z.flatten(1).norm(dim=1)


def loop(f: Map, z: Tensor, rtol: float, max_iter: int) -> Tensor:
    """Plain iteration, until all samples have converged."""
    with torch.no_grad():
        for _ in range(max_iter):
            image = f(z)
            done = (norms(image - z) <= rtol * norms(image)).all()
            z = image
            if done:
                break
    return z


def newton(a: Tensor, c: Tensor, rtol: float, max_iter: int) -> Tensor:
    """Newton's method on x = tanh(A x + c), batched."""
    x, eye = torch.zeros_like(c), torch.eye(a.size(0), dtype=a.dtype, device=a.device)
    for _ in range(max_iter):
        image = torch.tanh(x @ a.T + c)
        gap = image - x
        if (norms(gap) <= rtol * norms(image)).all():
            return image
        x = x + torch.linalg.solve(eye - (1 - image * image).unsqueeze(2) * a, gap)
    return image


def implicit(f: Map, z0: Tensor, rtol: float, max_iter: int, adjoint: float) -> Tensor:
    """`loop`, and a backward that solves v = J^T v + g by it, to a tolerance of its own."""
    z = f(loop(f, z0, rtol, max_iter))
    at = z.detach().requires_grad_()
    image = f(at)

    def solve(grad: Tensor) -> Tensor:
        def back(v: Tensor) -> Tensor:
            return torch.autograd.grad(image, at, v, retain_graph=True)[0] + grad

        return loop(back, grad, adjoint, max_iter)

    z.register_hook(solve)
    return z


def torchdeq(name: str, f: Map, z0: Tensor, rtol: float, max_iter: int, mode: str = "rel",
             **options: Any) -> Tensor:  # fmt: skip
    """One of torchdeq's solvers, called by itself."""
    solver = importlib.import_module("torchdeq.solver").get_solver(name)
    with torch.no_grad():
        z, _, _ = solver(f, z0, max_iter=max_iter, tol=rtol, stop_mode=mode, **options)
    assert isinstance(z, Tensor)
    return z


def torchdeq_implicit(name: str, f: Map, z0: Tensor, rtol: float, max_iter: int,
                      adjoint: float) -> Tensor:  # fmt: skip
    """The same solver forward and backward, through torchdeq's module."""
    make = importlib.import_module("torchdeq").get_deq
    deq = make(
        f_solver=name, b_solver=name, ift=True, f_max_iter=max_iter, b_max_iter=max_iter,
        f_tol=rtol, b_tol=adjoint, f_stop_mode="rel", b_stop_mode="rel",
    )  # fmt: skip
    states, _ = deq(f, z0)
    z = states[-1]
    assert isinstance(z, Tensor)
    return z


def solved(how: str, f: Map, z0: Tensor, rtol: float, max_iter: int, adjoint: float) -> Tensor:
    """f's fixed point by `how`: `loop` or a solver of torchdeq.

    adjoint: tolerance of a backward; 0 where none is wanted.
    """
    if how == "broyden":
        max_iter = min(max_iter, BROYDEN_STEPS)
    if adjoint:
        solve = implicit if how == "loop" else partial(torchdeq_implicit, how)
        return solve(f, z0, rtol, max_iter, adjoint)
    return loop(f, z0, rtol, max_iter) if how == "loop" else torchdeq(how, f, z0, rtol, max_iter)


def cell_map(a: Tensor, c: Tensor, activation: str = "tanh") -> Map:
    """x -> act(A x + c)."""
    act = ACTIVATIONS[activation]
    return lambda x: act(torch.addmm(c, x, a.T))


def cell(a: Tensor, c: Tensor, activation: str, how: str, rtol: float, max_iter: int) -> Tensor:
    """`equilibrium_cell` by a batched loop or Newton's method, halves in float32."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    f, zero = cell_map(a.to(wide), c.to(wide), activation), torch.zeros_like(c, dtype=wide)
    if how == "newton":
        x = newton(a.to(wide), c.to(wide), rtol, max_iter)
    else:
        x = solved(how, f, zero, rtol, max_iter, 0.0)
    return x.to(a.dtype)


def cell_adjoint(
    grad: Tensor, a: Tensor, c: Tensor, x: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """`equilibrium_cell_backward` by batched dense solves, halves in float32."""
    if a.dtype in (torch.bfloat16, torch.float16):
        grad_a, grad_c = cell_adjoint(grad.float(), a.float(), c.float(), x.float(), activation)
        return grad_a.to(a.dtype), grad_c.to(a.dtype)
    pre = torch.addmm(c, x, a.T).requires_grad_()
    with torch.enable_grad():
        slope = torch.autograd.grad(ACTIVATIONS[activation](pre).sum(), pre)[0].unsqueeze(2)
    eye = torch.eye(a.size(0), dtype=a.dtype, device=a.device)
    v = torch.linalg.solve(eye - slope * a.T, slope * grad.unsqueeze(2)).squeeze(2)
    return v.T @ x, v


def mix(
    f: Tensor, z: Tensor, dg: Tensor, df: Tensor, before: Sequence[Tensor], kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """`anderson_mix` by batched products: the next points, and the residuals.

    before: g and f of the last step; `kept` is where those of this one go.
    """
    g = f - z
    torch.sub(g, before[0], out=dg[:, 0])
    torch.sub(f, before[1], out=df[:, 0])
    kept[0].copy_(g)
    kept[1].copy_(f)
    gram = torch.bmm(dg, dg.transpose(1, 2))
    gram.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6)
    gamma = torch.linalg.solve(gram, torch.bmm(dg, g.unsqueeze(2)))
    return torch.baddbmm(f.unsqueeze(1), gamma.transpose(1, 2), df, alpha=-1).squeeze(1), norms(g)


def prompt_map(u: Tensor, inject: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Map:
    """z -> W2 tanh(W1 z + P u + b1) + b2; what u adds is computed here, once."""
    c = F.linear(u, inject, b1)
    return lambda z: F.linear(torch.tanh(torch.addmm(c, z, w1.T)), w2, b2)


def prompt(
    how: str, rtol: float, max_iter: int, adjoint: float, u: Tensor, *weights: Tensor
) -> Tensor:
    """The prompt layer in d dimensions."""
    return solved(how, prompt_map(u, *weights), torch.zeros_like(u), rtol, max_iter, adjoint)


def folded(
    how: str, rtol: float, max_iter: int, adjoint: float, u: Tensor, inject: Tensor, w1: Tensor,
    b1: Tensor, w2: Tensor, b2: Tensor,
) -> Tensor:  # fmt: skip
    """The same in r dimensions: by `equilibrium_cell` where `how` is `ours`, or by a loop."""
    a, c = w1 @ w2, F.linear(u, inject, torch.addmv(b1, w1, b2))
    if how == "ours":
        x, _, _ = ppmoe_ops.equilibrium_cell(a, c, rtol=rtol, max_iter=max_iter)
    else:
        x = solved(how, cell_map(a, c), torch.zeros_like(c), rtol, max_iter, adjoint)
    return F.linear(x, w2, b2)


def images_map(
    u: Tensor, w_u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor
) -> Map:
    """The convolutional cell on maps; what u adds is computed here, once."""
    inject = F.conv2d(u, w_u[:, :, None, None], b1)

    def f(z: Tensor) -> Tensor:
        hidden = torch.tanh(F.conv2d(z, w1[:, :, None, None]) + inject)
        hidden = torch.tanh(F.conv2d(hidden, w2, b2, padding=1))
        return F.conv2d(hidden, w3[:, :, None, None], b3)

    return f


def images(
    how: str, rtol: float, max_iter: int, adjoint: float, u: Tensor, *weights: Tensor
) -> Tensor:
    """The layer on images, by `how`: `ours` is `ppmoe_ops.equilibrium` on the same f.

    Halves are solved in float32 and rounded.
    """
    if u.dtype in (torch.bfloat16, torch.float16):
        wide = (each.float() for each in (u, *weights))
        return images(how, rtol, max_iter, adjoint, *wide).to(u.dtype)
    f, z0 = images_map(u, *weights), u.new_zeros(u.size(0), weights[-1].size(0), *u.shape[2:])
    if how != "ours":
        return solved(how, f, z0, rtol, max_iter, adjoint)
    backward = ppmoe_ops.SolverOptions(rtol=adjoint, max_iter=max_iter)
    with torch.set_grad_enabled(adjoint > 0):
        z, _ = ppmoe_ops.equilibrium(f, z0, rtol=rtol, max_iter=max_iter, backward_options=backward)
    return z


def images_f(times: int, u: Tensor, *weights: Tensor) -> Tensor:
    """f so many times and nothing else: what no solver can be faster than."""
    f, z = images_map(u, *weights), u.new_zeros(u.size(0), weights[-1].size(0), *u.shape[2:])
    with torch.no_grad():
        for _ in range(times):
            z = f(z)
    return z


def images_adjoint(
    rtol: float, max_iter: int, grad: Tensor, z: Tensor, u: Tensor, *weights: Tensor
) -> tuple[Tensor, ...]:
    """`equilibrium_conv_cell_backward` by plain iteration over autograd's transposed layers."""
    if u.dtype in (torch.bfloat16, torch.float16):
        given = (each.float() for each in (grad, z, u, *weights))
        return tuple(each.to(u.dtype) for each in images_adjoint(rtol, max_iter, *given))
    leaves = [each.detach().requires_grad_() for each in (u, *weights)]
    at = z.detach().requires_grad_()
    with torch.enable_grad():
        image = images_map(*leaves)(at)

    def back(v: Tensor) -> Tensor:
        return torch.autograd.grad(image, at, v, retain_graph=True)[0] + grad

    return torch.autograd.grad(image, leaves, loop(back, grad, rtol, max_iter))


def images_fused(rtol: float, max_iter: int, u: Tensor, *weights: Tensor) -> Tensor:
    """The same through `equilibrium_conv_cell`."""
    solve: Callable[..., tuple[Tensor, Tensor, Tensor]] = ppmoe_ops.equilibrium_conv_cell
    return solve(u, *weights, rtol=rtol, max_iter=max_iter)[0]


def symmetric(seed: int, norm: float, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """W, symmetric and of that 2-norm, and a small x [batch, size]: z -> tanh(W z + x)."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(size, size, generator=generator)
    w = (w + w.T) / 2
    w *= norm / torch.linalg.matrix_norm(w, 2)
    return w, 0.1 * torch.randn(batch, size, generator=generator)


class Counted:
    """f with its calls, and the samples in them, counted."""

    def __init__(self, f: Map) -> None:
        self._f = f
        self.calls = 0
        self.samples = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        self.samples += z.size(0)
        return self._f(z)


def largest_residual(f: Map, z: Tensor, mode: str = "rel") -> float:
    """Of all samples, at `z`: |f(z) - z|, or that relative to |f(z)|."""
    with torch.no_grad():
        image = f(z)
        size = norms(image - z)
        return float((size / norms(image) if mode == "rel" else size).max())


def symmetric_map(w: Tensor, x: Tensor) -> Map:
    """z -> tanh(W z + x)."""
    return lambda z: torch.tanh(torch.addmm(x, z, w))


def stacked(norms: Sequence[float], size: int) -> tuple[Tensor, Tensor]:
    """`symmetric` once for each of `norms`: W [B, size, size] and x [B, size]."""
    pairs = [symmetric(seed, norm, 1, size) for seed, norm in enumerate(norms)]
    return torch.stack([w for w, _ in pairs]), torch.cat([x for _, x in pairs])


def stacked_map(w: Tensor, x: Tensor) -> Map:
    """z -> tanh(W_b z_b + x_b) with a matrix for each sample."""
    return lambda z: torch.tanh(torch.baddbmm(x.unsqueeze(2), w, z.unsqueeze(2)).squeeze(2))
