"""Reading PSLT checkpoints: what is in them beside parameters, and what is wrong with them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BUFFERS = ("relative_position_index", "attn_mask")
_PROFILER = ("total_ops", "total_params")
_CONTAINERS = ("model", "state_dict")
_PREFIXES = ("module.", "backbone.")


def drop_entries_without_use(
    state: MutableMapping[str, Any], prefix: str, *, without_head: bool
) -> None:
    """Remove what a PSLT does not hold: index and mask buffers, and what a profiler left behind.

    Args:
        state: changed in place.
        prefix: of the entries that are looked at.
        without_head: remove the classifier and the norm before it too.
    """
    useless = (*_BUFFERS, *_PROFILER)
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        headed = without_head and name.startswith(("norm.", "head."))
        if name.rpartition(".")[2] in useless or headed:
            del state[key]


def load_pslt_checkpoint(model: nn.Module, source: Mapping[str, Any] | str | Path) -> None:
    """Load a checkpoint of the authors, or one of this package, into a PSLT.

    Skipped are the buffers `relative_position_index` and `attn_mask`, which the operators do not
    need, entries `total_ops` and `total_params`, which a profiler left in the authors' files, and
    classifiers where the model gives features.

    Args:
        model: a `PSLT`, not fused.
        source: a state dict, one inside a mapping as "model" or "state_dict", or the path of a
            file with either. Names may begin with "module." or "backbone.".

    Raises:
        ValueError: naming all entries that are missing, unexpected or of another shape; nothing
            is loaded then.

    Example:
        >>> import torch
        >>> from ppmoe_models import PSLT, load_pslt_checkpoint
        >>> model = PSLT(12, num_classes=2, depths=(1, 1))
        >>> state = {**model.state_dict(), "norm.total_ops": torch.zeros(1)}
        >>> load_pslt_checkpoint(model, {"model": state})
        >>> del state["head.bias"]
        >>> load_pslt_checkpoint(model, state)
        Traceback (most recent call last):
        ...
        ValueError: load_pslt_checkpoint: missing: head.bias
    """
    state = _state_dict(source)
    drop_entries_without_use(state, "", without_head=getattr(model, "features_only", False))
    own = model.state_dict()
    shapes = [
        f"{name} has shape {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    complaints = [
        _complaint("missing", (name for name in own if name not in state)),
        _complaint("unexpected", (name for name in state if name not in own)),
        _complaint("of another shape", shapes),
    ]
    if any(complaints):
        raise ValueError("load_pslt_checkpoint: " + "; ".join(filter(None, complaints)))
    model.load_state_dict(state)


def _complaint(what: str, names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return f"{what}: {listed}" if listed else ""


def _state_dict(source: Mapping[str, Any] | str | Path) -> dict[str, Tensor]:
    found: Any = source
    if not isinstance(source, Mapping):
        # Training scripts store their arguments beside the model.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(source, map_location="cpu", weights_only=True)
    for name in _CONTAINERS:
        if isinstance(found.get(name), Mapping):
            found = found[name]
            break
    state = dict(found)
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
