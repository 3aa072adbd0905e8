"""Helpers to test operators with, ours or yours: an error rule, dtype casts, poisoned memory."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# What float64 results may differ by, in eps: there is nothing wider to measure them against, so
# only the order of sums is allowed for.
FLOAT64_EPS = 32.0

_M_PERTURB = -6  # mallopt's name for the byte that fresh memory is filled with
_fill_byte: int | None = None


def assert_error_rule(
    actual: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0, name: str = "result"
) -> None:
    """Check that a result is about as near to the exact one as plain PyTorch's is.

    The rule is max|actual - exact| <= factor * max|plain - exact| + eps(dtype) * max|exact|. For
    float64 results it is max|actual - exact| <= 16 * factor * eps * max|exact| instead. Where
    `plain` is NaN or infinite `actual` must be the same, and finite everywhere else.

    Args:
        actual: the result under test.
        plain: the plain composition's result, in the dtype of `actual`.
        exact: the same in float64, from the same (already rounded) inputs.
        factor: 2 for results, 3 for gradients.
        name: what to call the result in the message.

    Raises:
        AssertionError: naming the worst element, its three values and the bound.

    Example:
        >>> import torch
        >>> from ppmoe_ops.testing import assert_error_rule
        >>> x = torch.randn(8).bfloat16()
        >>> assert_error_rule(x.exp(), x.exp(), x.double().exp())
    """
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, plain has {plain.dtype}"
    for other, what in ((plain, "plain"), (exact, "exact")):
        assert actual.shape == other.shape, (
            f"{name}: shape {tuple(actual.shape)}, {what} has {tuple(other.shape)}"
        )
    if actual.numel() == 0:
        return
    actual, plain, exact = actual.detach(), plain.detach(), exact.detach()
    finite = plain.isfinite()
    same = torch.where(
        finite, actual.isfinite(), (actual == plain) | (actual.isnan() & plain.isnan())
    )
    if not same.all():
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(
            f"{name}{list(at)}: {actual[at].item()}, plain PyTorch gives {plain[at].item()} "
            f"({int((~same).sum())} of {actual.numel()} elements differ in being finite)"
        )
    measured = finite & exact.isfinite()
    if not measured.any():
        return
    reference = exact.double().masked_fill(~measured, 0)
    error = (actual.double() - reference).masked_fill(~measured, 0).abs()
    plain_error = (plain.double() - reference).masked_fill(~measured, 0).abs().max().item()
    scale = reference.abs().max().item()
    eps = torch.finfo(actual.dtype).eps
    if actual.dtype == torch.float64:
        bound = FLOAT64_EPS / 2 * factor * eps * scale
    else:
        bound = factor * plain_error + eps * scale
    worst = int(error.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert error.flatten()[worst].item() <= bound, (
        f"{name}{list(at)}: {actual[at].item()!r}, plain {plain[at].item()!r}, "
        f"exact {exact[at].item()!r}: error {error.max().item():.3g} > {bound:.3g} "
        f"({factor:g} * plain's largest error {plain_error:.3g} + eps {eps:.3g} * {scale:.3g}; "
        f"{int((error > bound).sum())} of {error.numel()} elements beyond)"
    )


def cast_sample(sample: Any, dtype: torch.dtype) -> Any:
    """Copy arguments with every floating-point tensor and dtype replaced by `dtype`.

    Tuples, lists and dicts are walked; everything else is passed on. Copies are leaves that ask for
    a gradient where the originals did.

    Example:
        >>> import torch
        >>> from ppmoe_ops.testing import cast_sample
        >>> x, ids, k = cast_sample((torch.ones(2), torch.arange(2), 3), torch.float64)
        >>> x.dtype, ids.dtype, k
        (torch.float64, torch.int64, 3)
    """
    if isinstance(sample, (tuple, list)):
        return type(sample)(cast_sample(each, dtype) for each in sample)
    if isinstance(sample, dict):
        return {name: cast_sample(value, dtype) for name, value in sample.items()}
    if isinstance(sample, torch.dtype) and sample.is_floating_point:
        return dtype
    if isinstance(sample, Tensor) and sample.is_floating_point():
        return sample.detach().to(dtype, copy=True).requires_grad_(sample.requires_grad)
    return sample


@contextlib.contextmanager
def poison_memory(byte: int = 0xFF) -> Iterator[None]:
    """Fill memory that is allocated inside the block, so that reading it unwritten shows.

    Two fills, since neither reaches everything. `torch.use_deterministic_algorithms` fills what
    torch's own functions leave empty: NaN, and the largest integer. It does not reach tensors that
    a kernel allocates through the stable ABI, nor a kernel's scratch memory; those come from
    malloc, which glibc's `mallopt` makes return memory full of `byte`. 0xFF is NaN in every
    floating-point dtype and -1 in every integer one; 0x7F tells an integer result that was never
    written from a -1 that was.

    Where malloc is not glibc's (AddressSanitizer has options of its own for this) only the first
    fill happens.

    Example:
        >>> import torch
        >>> from ppmoe_ops.testing import poison_memory
        >>> with poison_memory():
        ...     print(torch.empty(2))
        tensor([nan, nan])
    """
    global _fill_byte
    outer, deterministic = _fill_byte, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    _fill_byte = byte
    _perturb(byte)
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fills
        _fill_byte = outer
        _perturb(outer)


def _perturb(byte: int | None) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # glibc fills with the complement of the low byte; the bit above it turns 0xFF's 0 on.
        mallopt(_M_PERTURB, 0 if byte is None else 0x100 | (byte ^ 0xFF))
