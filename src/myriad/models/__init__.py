"""Language models: configs that build them, and modules that return values."""

from myriad.models.base import Cache, LanguageModel, LayerCache, LMOutput, ModelConfig
from myriad.models.cache import KVCache
from myriad.models.chosen_transformers import ChosenTransformers, ExpertChoiceRouting, from_seed
from myriad.models.cluster_mixture import ClusterRouting
from myriad.models.clusters import Clusters
from myriad.models.posterior import PosteriorRouting
from myriad.models.transformer import Transformer, TransformerConfig
from myriad.models.transformer_experts import ExpertRouting, TransformerExpertsConfig


def build(config: ModelConfig) -> LanguageModel:
    """Make the model of a config, with freshly initialised parameters.

    Raises:
        ConfigError: the vocabulary size is not known.
    """
    return config.build()


def kinds() -> list[str]:
    """The kinds of models that a config can name."""
    return sorted(ModelConfig.kinds)


__all__ = [
    "Cache",
    "ChosenTransformers",
    "ClusterRouting",
    "Clusters",
    "ExpertChoiceRouting",
    "ExpertRouting",
    "KVCache",
    "LMOutput",
    "LanguageModel",
    "LayerCache",
    "ModelConfig",
    "PosteriorRouting",
    "Transformer",
    "TransformerConfig",
    "TransformerExpertsConfig",
    "build",
    "from_seed",
    "kinds",
]
