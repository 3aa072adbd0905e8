"""`nn.Module`s over the operators of `ppmoe_ops`, and a language model that uses them.

`python -m ppmoe_models.train_lm` trains the model on text that is on every machine,
`python -m ppmoe_models.train_pslt` a small PSLT on hand-written digits, and
`python -m ppmoe_models.train_lion` tunes a frozen backbone with LION and in other ways.
"""

from ppmoe_models.feed_forward import FeedForward
from ppmoe_models.language_model import LanguageModel, LanguageModelConfig, LanguageModelOutput
from ppmoe_models.lion import LION
from ppmoe_models.lion_pruning import LotteryTicket
from ppmoe_models.ppmoe_layer import MoELosses, PPMoELayer
from ppmoe_models.pslt import PSLT, pslt_large, pslt_tiny
from ppmoe_models.pslt_checkpoint import load_pslt_checkpoint
from ppmoe_models.pslt_small import SmallPSLT
from ppmoe_models.swin import restore_attention, use_window_attention

__all__ = [
    "LION",
    "PSLT",
    "FeedForward",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelOutput",
    "LotteryTicket",
    "MoELosses",
    "PPMoELayer",
    "SmallPSLT",
    "load_pslt_checkpoint",
    "pslt_large",
    "pslt_tiny",
    "restore_attention",
    "use_window_attention",
]
