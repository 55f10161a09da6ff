"""The config that transformers reads."""

import pytest
from transformers import AutoConfig

from myriad.config import ConfigError
from myriad.ffn import DenseConfig
from myriad.hf import MyriadConfig
from myriad.models import TransformerConfig

SIZES = TransformerConfig(
    vocab_size=300, context=64, layers=3, d_model=48, heads=4, kv_heads=2, head_dim=10, ffns={"dense": DenseConfig()}
)


def test_sizes_are_those_of_the_model():
    config = MyriadConfig(model=SIZES.model_dump(mode="json"))
    assert (config.vocab_size, config.max_position_embeddings, config.hidden_size) == (300, 64, 48)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (3, 4, 2)
    assert config.head_dim == 10
    assert config.tie_word_embeddings is False


def test_a_config_without_arguments_is_valid():
    assert MyriadConfig().vocab_size == 257


@pytest.mark.parametrize("model", [SIZES.model_dump(mode="json"), MyriadConfig().model])
def test_the_file_holds_our_settings_whole_even_where_they_are_the_defaults(tmp_path, model):
    MyriadConfig(model=model, eos_token_id=5).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MyriadConfig)
    assert config.model == model
    assert config.eos_token_id == 5


def test_a_misspelt_setting_is_named():
    with pytest.raises(ConfigError, match="did you mean 'layers'"):
        MyriadConfig(model={"kind": "transformer", "layer": 3})
