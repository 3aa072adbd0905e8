"""`nn.Module`s over the operators of `ppmoe_ops`, and a language model that uses them.

`python -m ppmoe_models.train_lm` trains the model on text that is on every machine, and
`python -m ppmoe_models.train_pslt` a small PSLT on hand-written digits.
"""

from ppmoe_models.feed_forward import FeedForward
from ppmoe_models.language_model import LanguageModel, LanguageModelConfig, LanguageModelOutput
from ppmoe_models.ppmoe_layer import MoELosses, PPMoELayer
from ppmoe_models.pslt import PSLT, pslt_large, pslt_tiny
from ppmoe_models.pslt_checkpoint import load_pslt_checkpoint
from ppmoe_models.pslt_small import SmallPSLT
from ppmoe_models.swin import restore_attention, use_window_attention

__all__ = [
    "PSLT",
    "FeedForward",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelOutput",
    "MoELosses",
    "PPMoELayer",
    "SmallPSLT",
    "load_pslt_checkpoint",
    "pslt_large",
    "pslt_tiny",
    "restore_attention",
    "use_window_attention",
]
