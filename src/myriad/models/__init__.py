"""Language models: configs that build them, and modules that return values."""

from myriad.models.base import Cache, LanguageModel, LMOutput, ModelConfig
from myriad.models.cache import KVCache
from myriad.models.transformer import Transformer, TransformerConfig


def build(config: ModelConfig) -> LanguageModel:
    """Make the model of a config, with freshly initialised parameters.

    Raises:
        ConfigError: the vocabulary size is not known.
    """
    return config.build()


__all__ = [
    "Cache",
    "KVCache",
    "LMOutput",
    "LanguageModel",
    "ModelConfig",
    "Transformer",
    "TransformerConfig",
    "build",
]
