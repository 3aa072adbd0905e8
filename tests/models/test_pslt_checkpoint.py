"""Reading the authors' checkpoints: what is skipped, and what is complained about."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from pslt_pair import images, plain_pslt, unsettle
from torch import Tensor, nn

from ppmoe_models import PSLT, load_pslt_checkpoint

OPTIONS: dict[str, Any] = {"depths": (1, 1), "num_classes": 3}


def theirs() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and its checkpoint as the authors' have them: buffers, and a profiler's entries."""
    model = plain_pslt.PlainPSLT(dim=12, **OPTIONS).eval()
    unsettle(model)
    state = dict(model.state_dict())
    assert state["layers.0.blocks.0.blocks.1.attn_mask"].shape == (4, 49, 49)
    assert state["layers.1.blocks.0.blocks.0.attn.relative_position_index"].shape == (49, 49)
    names = ("", "norm.", "layers.0.blocks.0.blocks.1.attn.softmax.", "patch_embed.proj.1.")
    for name in names:
        state[f"{name}total_ops"] = state[f"{name}total_params"] = torch.zeros(1)
    return model, state


@pytest.mark.parametrize("form", ["mapping", "model", "prefix", "file", "load_state_dict"])
def test_their_checkpoints_load(form: str, tmp_path: Path) -> None:
    plain, state = theirs()
    ours = PSLT(12, **OPTIONS).eval()
    if form == "mapping":
        load_pslt_checkpoint(ours, state)
    elif form == "model":
        load_pslt_checkpoint(ours, {"epoch": 3, "model": state})
    elif form == "prefix":
        load_pslt_checkpoint(ours, {"state_dict": {f"module.{k}": v for k, v in state.items()}})
    elif form == "file":
        torch.save({"model": state, "args": Namespace(lr=1.0)}, tmp_path / "best.pth")
        load_pslt_checkpoint(ours, tmp_path / "best.pth")
    else:
        ours.load_state_dict(state)
    x = images(1, 3, 96, 64, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    assert "layers.0.blocks.0.blocks.1.attn_mask" in state, "the caller's mapping is left alone"


def test_a_backbone_takes_a_classifiers_checkpoint() -> None:
    plain, state = theirs()
    for backbone in (load_pslt_checkpoint, lambda model, given: model.load_state_dict(given)):
        ours = PSLT(12, features_only=True, depths=(1, 1)).eval()
        backbone(ours, state)
        x = images(1, 3, 64, 96, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), plain.features(x))


def test_inside_another_model() -> None:
    _, state = theirs()
    detector = nn.ModuleDict({"backbone": PSLT(12, features_only=True, depths=(1, 1))})
    detector["neck"] = nn.Linear(2, 2)
    whole = {f"backbone.{name}": each for name, each in state.items()}
    whole.update({f"neck.{name}": each for name, each in detector["neck"].state_dict().items()})
    detector.load_state_dict(whole)


def test_everything_wrong_is_named_at_once() -> None:
    _, state = theirs()
    ours = PSLT(12, **OPTIONS)
    before = {name: each.clone() for name, each in ours.state_dict().items()}
    del state["conv_layers.0.se.fc1.bias"]
    del state["layers.0.blocks.0.pointconv.weight"]
    state["layers.0.blocks.0.pointconv.scale"] = torch.zeros(1)
    state["head.weight"] = torch.zeros(1000, 192)
    with pytest.raises(ValueError, match="load_pslt_checkpoint") as found:
        load_pslt_checkpoint(ours, state)
    assert str(found.value) == (
        "load_pslt_checkpoint: missing: conv_layers.0.se.fc1.bias, "
        "layers.0.blocks.0.pointconv.weight; unexpected: layers.0.blocks.0.pointconv.scale; "
        "of another shape: head.weight has shape [1000, 192], expected [3, 192]"
    )
    after = ours.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "nothing is loaded"


def test_round_trip() -> None:
    first, second = PSLT(12, **OPTIONS), PSLT(12, **OPTIONS)
    unsettle(first)
    load_pslt_checkpoint(second, first.state_dict())
    for name, each in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], each), name
    plain = plain_pslt.PlainPSLT(dim=12, **OPTIONS)
    missing, unexpected = plain.load_state_dict(first.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.endswith(("attn_mask", "relative_position_index")) for name in missing)
