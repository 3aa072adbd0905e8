"""`nn.Module`s over the operators of `ppmoe_ops`, and a language model that uses them.

`python -m ppmoe_models.train_lm` trains the model on text that is on every machine.
"""

from ppmoe_models.feed_forward import FeedForward
from ppmoe_models.language_model import LanguageModel, LanguageModelConfig, LanguageModelOutput
from ppmoe_models.ppmoe_layer import MoELosses, PPMoELayer

__all__ = [
    "FeedForward",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelOutput",
    "MoELosses",
    "PPMoELayer",
]
