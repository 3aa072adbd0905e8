"""The implicit layers of LION: the identity that they use, norms, contraction, gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppmoe_models.lion_layers import (
    SLOPES,
    ImplicitConv,
    ImplicitMLP,
    contraction_scale,
    conv_norm_bound,
    matrix_norm,
)

ACTIVATIONS: dict[str, Any] = {
    "tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu,
    "sigmoid": torch.sigmoid, "leaky_relu": F.leaky_relu,
}  # fmt: skip


def in_all_dimensions(layer: ImplicitMLP, u: Tensor, steps: int = 400) -> Tensor:
    """The fixed point of z = W2 act(W1 z + P u + b1) + b2 by plain iteration on z itself."""
    act = ACTIVATIONS[layer.activation]
    norm = SLOPES[layer.activation] * matrix_norm(layer.w1 @ layer.w2)
    w1 = layer.w1 * min(1.0, 0.95 / norm.item())
    c = F.layer_norm(u, u.shape[-1:]) @ layer.inject.T + layer.b1
    z = u.new_zeros(len(u), layer.w2.size(0))
    for _ in range(steps):
        z = act(z @ w1.T + c) @ layer.w2.T + layer.b2
    return z


@pytest.mark.parametrize("activation", list(SLOPES))
@pytest.mark.parametrize("size", [1.0, 4.0])
def test_the_bottleneck_solves_the_equation_in_all_dimensions(activation: str, size: float) -> None:
    layer = ImplicitMLP(24, 10, 6, activation=activation, rtol=1e-12, max_iter=200).double()
    with torch.no_grad():
        layer.w1.mul_(size)
        layer.w2.mul_(size)
        u = torch.randn(5, 10, dtype=torch.float64)
        z, solve = layer(u)
    assert solve.converged.all()
    torch.testing.assert_close(z, in_all_dimensions(layer, u), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "newton"])
def test_solvers_agree(solver: str) -> None:
    layer = ImplicitMLP(24, 24, 6, solver=solver, rtol=1e-6, max_iter=100)
    u = torch.randn(5, 24)
    with torch.no_grad():
        z, solve = layer(u)
        expected = in_all_dimensions(layer, u)
    assert solve.converged.all()
    assert (solve.steps >= 1).all()
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)


def test_slopes_are_the_largest_of_the_activations() -> None:
    x = torch.linspace(-6, 6, 200001, dtype=torch.float64)
    for name, act in ACTIVATIONS.items():
        largest = torch.diff(act(x)).max() / (x[1] - x[0])
        assert largest <= SLOPES[name] + 1e-9, name
        assert largest >= SLOPES[name] - 1e-4, name


def dense(weight: Tensor, side: int) -> Tensor:
    """The matrix of a 3x3 convolution with zero padding on images of side x side."""
    channels = weight.size(1)
    units = torch.eye(channels * side * side, dtype=weight.dtype).view(-1, channels, side, side)
    return F.conv2d(units, weight, padding=1).flatten(1).T


@pytest.mark.parametrize("r", [1, 3])
def test_the_bound_of_a_convolution_holds_and_is_close(r: int) -> None:
    for seed in range(5):
        weight = torch.randn(r, r, 3, 3, generator=torch.Generator().manual_seed(seed)).double()
        bound = conv_norm_bound(weight)
        norms = [matrix_norm(dense(weight, side)) for side in (1, 4, 9)]
        assert norms[0] <= norms[1] <= norms[2] <= bound
        # The norm on the grid is below that of the whole plane, which large images come near.
        assert bound <= 1.25 * norms[2]


def test_the_bound_has_the_gradient_of_the_norm() -> None:
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(conv_norm_bound(weight), weight)
    direction = torch.randn_like(weight)
    ahead, behind = (conv_norm_bound(weight + step * direction).item() for step in (1e-5, -1e-5))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)


def test_scales_touch_only_what_is_too_large() -> None:
    norm = torch.tensor([0.0, 0.3, 0.95, 3.8], requires_grad=True)
    scale = contraction_scale(norm, 0.95)
    torch.testing.assert_close(scale.detach(), torch.tensor([1.0, 1.0, 1.0, 0.25]))
    scale.sum().backward()
    assert norm.grad is not None
    assert norm.grad.isfinite().all()
    assert norm.grad[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("activation", list(SLOPES))
def test_large_weights_converge_after_contraction(activation: str) -> None:
    torch.manual_seed(3)
    conv = ImplicitConv(2, 4, activation=activation, max_iter=200)
    mlp = ImplicitMLP(12, 12, 4, activation=activation, max_iter=200)
    with torch.no_grad():
        for layer in (conv, mlp):
            for name in ("w1", "w2", "inject"):
                getattr(layer, name).mul_(20)
        _, of_images = conv(torch.randn(3, 2, 7, 5))
        _, of_rows = mlp(torch.randn(9, 12))
        a, _ = mlp.cell(torch.randn(1, 12))
    assert of_images.converged.all()
    assert of_rows.converged.all()
    assert SLOPES[activation] * matrix_norm(a) == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_the_convolutional_bottleneck_is_a_contraction(activation: str) -> None:
    layer = ImplicitConv(2, 4, activation=activation).double()
    with torch.no_grad():
        layer.w2.mul_(30)
        act, w1, w2 = ACTIVATIONS[activation], layer.contracted_w1(), layer.w2
        u = torch.randn(1, 2, 6, 6, dtype=torch.float64)

        def f(z: Tensor) -> Tensor:
            hidden = act(torch.einsum("rc,bchw->brhw", w1, z)
                         + torch.einsum("rc,bchw->brhw", layer.inject, u)
                         + layer.b1.view(-1, 1, 1))  # fmt: skip
            hidden = act(F.conv2d(hidden, w2, layer.b2, padding=1))
            return F.conv2d(hidden, layer.w3[..., None, None], layer.b3)

        points = [torch.randn_like(u) * scale for scale in (0.01, 0.1, 1, 10)]
        for one, other in itertools.pairwise(points):
            assert (f(one) - f(other)).norm() <= 0.95 * (one - other).norm()
        z, solve = layer(u)
        assert solve.converged.all()
        assert (f(z) - z).norm() <= 0.95 * 1e-3 * f(z).norm() * 1.1
        assert solve.relative.item() <= 1e-3


def test_without_contraction_nothing_is_scaled() -> None:
    conv, mlp = ImplicitConv(1, 2, contraction=None), ImplicitMLP(6, 6, 2, contraction=None)
    with torch.no_grad():
        for layer in (conv, mlp):
            layer.w1.mul_(100)
    assert conv.contracted_w1() is conv.w1
    torch.testing.assert_close(mlp.cell(torch.randn(2, 6))[0], mlp.w1 @ mlp.w2)


@pytest.mark.parametrize(
    ("make", "u", "scaled"),
    [
        (lambda: ImplicitMLP(5, 3, 2, rtol=1e-13, max_iter=300), (2, 3), 1.0),
        (lambda: ImplicitMLP(5, 3, 2, rtol=1e-13, max_iter=300), (2, 3), 6.0),
        (lambda: ImplicitConv(1, 2, rtol=1e-13, max_iter=300), (1, 1, 2, 3), 1.0),
        (lambda: ImplicitConv(1, 2, rtol=1e-13, max_iter=300), (1, 1, 2, 3), 6.0),
    ],
)
def test_gradients_of_all_parameters_and_the_input(
    make: Any, u: tuple[int, ...], scaled: float
) -> None:
    torch.manual_seed(5)
    layer = make().double()
    with torch.no_grad():
        layer.w1.mul_(scaled)
        layer.w2.mul_(scaled)
    given = torch.randn(u, dtype=torch.float64, requires_grad=True)
    names = list(dict(layer.named_parameters()))
    values = [each.detach().requires_grad_() for each in layer.parameters()]

    def run(given: Tensor, *values: Tensor) -> Tensor:
        out = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (given,))
        assert isinstance(out, tuple)
        result: Tensor = out[0]
        return result

    assert torch.autograd.gradcheck(run, (given, *values), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("r", [1, 8, 16])
def test_parameter_counts(channels: int, r: int) -> None:
    conv = sum(each.numel() for each in ImplicitConv(channels, r).parameters())
    own = 9 * r * r + 2 * channels * r + 2 * r + channels
    assert conv == own + r * channels
    if channels == 3:
        assert own == 9 * r * r + 8 * r + 3
    mlp = sum(each.numel() for each in ImplicitMLP(48, 20, r).parameters())
    assert mlp == 2 * 48 * r + r + 48 + r * 20


def test_autocast_and_narrow_parameters() -> None:
    layer, u = ImplicitMLP(12, 12, 4), torch.randn(3, 12)
    z, _ = layer(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(u)[0], z)
    narrow, solve = layer.to(torch.bfloat16)(u.to(torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert solve.converged.all()
    torch.testing.assert_close(narrow.float(), z, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImplicitConv(1, 0), "input_width is 0; allowed: 1 to 64"),
        (lambda: ImplicitConv(1, 65), "input_width is 65; allowed: 1 to 64"),
        (lambda: ImplicitMLP(4, 4, 257), "representation_width is 257; allowed: 1 to 256"),
        (lambda: ImplicitMLP(4, 4, activation="cos"), "activation is 'cos'; allowed: tanh, relu"),
        (lambda: ImplicitMLP(4, 4, contraction=1.0), "contraction is 1.0; allowed: None, or above"),
        (lambda: ImplicitMLP(4, 4, contraction=math.nan), "contraction is nan; allowed: None"),
    ],
)
def test_what_is_not_allowed(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
