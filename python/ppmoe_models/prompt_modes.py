"""Ways of tuning a pre-trained image backbone, behind one function.

| mode | trained beside the classifier's (d + 1) K | how many |
| --- | --- | --- |
| `linear` | nothing | 0 |
| `full` | the backbone | all of it |
| `bias` | the backbone's biases | all of them |
| `adapter` | a bottleneck behind each of L blocks | L (2dr + r + d) |
| `vpt_shallow` | p tokens before the first block | p d |
| `vpt_deep` | p tokens before each of L blocks | L p d |
| `lion` | two implicit layers, of C channels and of d features | 9r^2 + 3Cr + 2r + C + 3dr + r + d + 2 |
| `lion_image` | the same, the second fed by the image, pooled to 4 x 4 | C 16 r in place of dr |
"""  # noqa: E501

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ppmoe_models.lion import LION
from ppmoe_models.prompt_modes_base import TunedModel
from ppmoe_models.prompt_modes_vpt import VPT, AdapterTuning, BiasTuning, FullTuning

_MADE_BY: dict[str, Any] = {
    "linear": TunedModel,
    "full": FullTuning,
    "bias": BiasTuning,
    "adapter": AdapterTuning,
    "vpt_shallow": VPT,
    "vpt_deep": partial(VPT, deep=True),
    "lion": LION,
    "lion_image": partial(LION, representation_prompt="image"),
}
MODES = tuple(_MADE_BY)


def build(mode: str, backbone: nn.Module, num_classes: int, **options: Any) -> TunedModel:
    """A model that is tuned in one of the ways above; with equal seeds all have one classifier.

    Args:
        mode: one of `MODES`.
        backbone: any that takes images; not copied, and "full" and "bias" train it in place.
        num_classes: K.
        options: of the mode's class: `TunedModel`, `FullTuning`, `BiasTuning`, `AdapterTuning`
            (`width`), `VPT` (`tokens`), `LION` (for both modes).

    Raises:
        ValueError: no such mode, or options or a backbone that the mode does not go with.

    Example:
        >>> from ppmoe_models.lion_small import SmallViT
        >>> for mode in MODES:
        ...     print(mode, build(mode, SmallViT(32, depth=2), 5).parameter_counts().nominal)
        linear 165
        full 18053
        bias 805
        adapter 1269
        vpt_shallow 325
        vpt_deep 485
        lion 2368
        lion_image 2112
    """
    if mode not in _MADE_BY:
        raise ValueError(f"build: mode is '{mode}'; allowed: {', '.join(MODES)}")
    made: TunedModel = _MADE_BY[mode](backbone, num_classes, **options)
    return made
