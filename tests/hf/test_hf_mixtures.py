"""Mixtures of whole transformers in transformers: their own cache in `generate`, whatever the search."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import myriad
from myriad.ffn import DenseConfig
from myriad.hf import MyriadForCausalLM, generate_text, open_model
from myriad.models import ClusterRouting, ExpertRouting, PosteriorRouting, TransformerConfig, TransformerExpertsConfig

END = 256
PROMPTS = torch.randint(END, (2, 5), generator=torch.Generator().manual_seed(3))
ROUTINGS: dict[str, ExpertRouting] = {
    "posterior": PosteriorRouting(),
    "top-k": PosteriorRouting(top_k=2),
    "cluster": ClusterRouting(top_k=2, features=6, prompt_tokens=8),  # picked in the middle of what is generated
    "early cluster": ClusterRouting(top_k=1, features=6, prompt_tokens=2),
}


@pytest.fixture(scope="module", params=ROUTINGS)
def run(request, run_writer, tmp_path_factory) -> Path:
    expert = TransformerConfig(layers=1, d_model=16, heads=2, ffns={"dense": DenseConfig(d_hidden=16)})
    config = TransformerExpertsConfig(
        vocab_size=257, context=32, experts=3, expert=expert, routing=ROUTINGS[request.param]
    )
    torch.manual_seed(0)
    model = config.build().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return run_writer(tmp_path_factory.mktemp("mixtures") / "run", model)


@pytest.fixture(scope="module")
def model(run) -> MyriadForCausalLM:
    return AutoModelForCausalLM.from_pretrained(run)


def test_it_opens_with_all_its_tensors_and_one_experts_sizes(run, model):
    loaded = myriad.load(run)
    assert model.model.state_dict().keys() == loaded.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(PROMPTS).logits, loaded(PROMPTS).logits)
    config = model.config
    assert (config.vocab_size, config.max_position_embeddings, config.hidden_size) == (257, 32, 16)
    assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (1, 2, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_beams": 3, "top_k": 20},
    ],
)
def test_a_cache_and_none_generate_the_same(model, options):
    def made(use_cache: bool) -> torch.Tensor:
        torch.manual_seed(4)
        return model.generate(PROMPTS, max_new_tokens=10, eos_token_id=None, use_cache=use_cache, **options)

    assert torch.equal(made(True), made(False))


def test_generation_makes_and_returns_the_models_own_cache(model):
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(PROMPTS, max_new_tokens=4, **options)
    assert type(first.past_key_values) is type(model.model.new_cache())
    assert first.past_key_values.get_seq_length() == 8  # the last one made was not read
    further = model.generate(first.sequences, max_new_tokens=5, past_key_values=first.past_key_values, **options)
    assert torch.equal(further.sequences, model.generate(PROMPTS, max_new_tokens=9, **options).sequences)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(model, beams):
    options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 9, "eos_token_id": None, "pad_token_id": END}
    lengths = (11, 2, 6)
    prompts = torch.randint(END, (3, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.stack([torch.arange(11) >= 11 - length for length in lengths])
    together = model.generate(torch.where(mask, prompts, END), attention_mask=mask.long(), **options)
    for row, length in enumerate(lengths):
        alone = model.generate(prompts[row : row + 1, -length:], **options)
        assert torch.equal(together[row, 11:], alone[0, length:])


def test_text_is_streamed_and_a_seed_reproduces_it(run):
    opened, pieces = open_model(run), []
    (made,) = generate_text(opened, "ab", seed=1, max_tokens=12, stream=pieces.append)
    assert "".join(pieces) == made.text
    assert generate_text(opened, "ab", seed=1, max_tokens=12) == [made]
    assert generate_text(opened, "ab", temperature=0, max_tokens=99)[0].stopped in ("context", "end")


def test_a_cache_of_transformers_is_refused(model):
    with pytest.raises(ValueError, match="a cache of its own"):
        model(PROMPTS, past_key_values=DynamicCache(config=model.config))
