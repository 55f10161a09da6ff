"""A model's config as transformers wants it: our own, carried whole, and the sizes read from it."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from myriad.config import validate
from myriad.data.tokenizer import BYTES_VOCAB_SIZE
from myriad.models import ModelConfig, TransformerConfig, TransformerExpertsConfig


def _read(name: str) -> property:
    """A read-only size: nothing is stored twice, so that `config.json` cannot contradict itself."""

    def value(config: "MyriadConfig") -> int:
        return getattr(_transformer(config.language_model), name)

    return property(value, doc=f"`{name}` of the language model; of a mixture of transformers, one expert's.")


def _transformer(model: ModelConfig) -> ModelConfig:
    return model.whole_expert if isinstance(model, TransformerExpertsConfig) else model


class MyriadConfig(PreTrainedConfig):
    """What `config.json` of a run folder holds.

    Attributes:
        model: the settings of a `ModelConfig`. Without any: a small transformer over bytes, because transformers
            makes configs without arguments, to compare with.

    Raises:
        ConfigError: settings that are no model's.
    """

    model_type = "myriad"
    keys_to_ignore_at_inference = ["past_key_values"]

    model: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    """Not transformers' concern: a tied embedding is one parameter of our model, and one key of its state."""

    vocab_size = _read("vocabulary")
    hidden_size = _read("d_model")
    num_hidden_layers = _read("layers")
    num_attention_heads = _read("heads")
    num_key_value_heads = _read("key_value_heads")
    head_dim = _read("head_width")
    max_position_embeddings = _read("context")

    def __post_init__(self, **kwargs: Any) -> None:
        if self.model is None:
            self.model = TransformerConfig(vocab_size=BYTES_VOCAB_SIZE).model_dump(mode="json")
        validate(ModelConfig, self.model)
        super().__post_init__(**kwargs)

    @property
    def language_model(self) -> ModelConfig:
        """Our config."""
        return validate(ModelConfig, self.model)
