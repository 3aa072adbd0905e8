"""What the tuned models have to know of a backbone: its features, its sizes and its blocks.

A backbone is any module that takes images [B, C, H, W]: of transformers, timm (made with
`num_classes=0`), torchvision (its classifier replaced by `nn.Identity()`) or plain.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

POOLINGS = ("auto", "cls", "mean")
CLASS_TOKENS = ("cls_token", "class_token")
# Where transformers, timm and torchvision keep their blocks, and our own backbone.
_BLOCKS = ("blocks", "layers", "encoder.layer", "encoder.layers", "encoder.stages", "stages")

Replace = Callable[[Tensor], Tensor]


def has_class_token(backbone: nn.Module) -> bool:
    """Whether the first token stands for the image.

    Example:
        >>> has_class_token(nn.Linear(2, 2))
        False
    """
    return any(name.endswith(CLASS_TOKENS) for name, _ in backbone.named_parameters())


def pooled(found: Any, pooling: str, class_token: bool) -> Tensor:
    """[B, d] from what a backbone returns.

    Args:
        found: a tensor [B, d], [B, T, d] or [B, C, H, W], or an object or dict of transformers
            with `pooler_output` or `last_hidden_state`.
        pooling: of tokens: "cls" takes the first, "mean" the mean of all; "auto" takes
            `pooler_output` if there is one, else the class token if there is one, else the mean.
        class_token: whether there is one.

    Raises:
        ValueError: something else was returned.

    Example:
        >>> pooled(torch.ones(2, 3, 4, 4), "auto", False).shape
        torch.Size([2, 3])
    """
    if not isinstance(found, Tensor):
        named = found if isinstance(found, dict) else getattr(found, "__dict__", {})
        first = named.get("pooler_output") if pooling == "auto" else None
        out = named.get("last_hidden_state") if first is None else first
        if out is None:
            raise ValueError(
                f"LION: backbone returns a {type(found).__name__} without pooler_output and "
                "last_hidden_state; expected one of these or a tensor (a classifier of "
                "transformers has its backbone as base_model; features= can be any function)"
            )
        found = out
    if found.dim() == 4:
        return found.mean((2, 3))
    if found.dim() == 3:
        first_token = class_token if pooling == "auto" else pooling == "cls"
        return found[:, 0] if first_token else found.mean(1)
    if found.dim() != 2:
        raise ValueError(
            f"LION: features are {list(found.shape)}; expected [B, d], [B, T, d] or [B, C, H, W]"
        )
    return found


def image_channels(backbone: nn.Module) -> int:
    """Channels of the images that a backbone takes: those of its first convolution, else 3.

    Example:
        >>> image_channels(nn.Conv2d(1, 4, 3))
        1
    """
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def image_side(backbone: nn.Module) -> int:
    """Pixels a side of the images that a backbone takes: `image_size` of it or its `config`.

    Example:
        >>> image_side(nn.Conv2d(1, 4, 3))
        224
    """
    for name in ("config.image_size", "image_size", "img_size", "patch_embed.img_size"):
        try:
            side = operator.attrgetter(name)(backbone)
        except AttributeError:
            continue
        return int(side[-1] if isinstance(side, Sequence) else side)
    return 224


def token_blocks(backbone: nn.Module, op: str) -> list[nn.Module]:
    """The blocks of a transformer, or the stages of another backbone, in order.

    Raises:
        ValueError: they are not where the known libraries have them.

    Example:
        >>> from ppmoe_models.lion_small import SmallViT
        >>> len(token_blocks(SmallViT(depth=2), "example"))
        2
    """
    for name in _BLOCKS:
        try:
            found = operator.attrgetter(name)(backbone)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList | nn.Sequential) and len(found):
            return list(found)
    raise ValueError(
        f"{op}: backbone is a {type(backbone).__name__} without a list of blocks; expected one "
        f"named {', '.join(_BLOCKS)}, or blocks="
    )


@contextmanager
def replaced_inputs(changes: Sequence[tuple[nn.Module, Replace]]) -> Iterator[None]:
    """Inside, each module gets its first argument as its function returns it."""

    def change(replace: Replace) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if given:
                return (replace(given[0]), *given[1:]), named
            name = next(iter(named))
            return given, {**named, name: replace(named[name])}

        return hook

    with ExitStack() as stack:
        for module, replace in changes:
            handle = module.register_forward_pre_hook(change(replace), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def replaced_outputs(changes: Sequence[tuple[nn.Module, Replace]]) -> Iterator[None]:
    """Inside, each module returns what its function makes of its result, the first of a tuple."""

    def change(replace: Replace) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            return (replace(out[0]), *out[1:]) if isinstance(out, tuple) else replace(out)

        return hook

    with ExitStack() as stack:
        for module, replace in changes:
            stack.callback(module.register_forward_hook(change(replace)).remove)
        yield


def shapes_of(
    run: Callable[[Tensor], Any], backbone: nn.Module, example: Tensor, blocks: Sequence[nn.Module]
) -> tuple[Any, list[torch.Size], list[torch.Size]]:
    """What `run` returns for images, and what each block gets and returns: shapes."""
    before: list[torch.Size] = []
    after: list[torch.Size] = []

    def note(into: list[torch.Size]) -> Replace:
        def keep(x: Tensor) -> Tensor:
            into.append(x.shape)
            return x

        return keep

    inputs = [(block, note(before)) for block in blocks]
    outputs = [(block, note(after)) for block in blocks]
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad(), replaced_inputs(inputs), replaced_outputs(outputs):
            return run(example), before, after
    finally:
        for module, mode in modes.items():
            module.training = mode
