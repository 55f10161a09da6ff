"""Transformers' generation with a model whose experts choose: its cache changes nothing, beams and padding included."""

import pytest
import torch
from torch import Tensor

from myriad.hf import MyriadConfig, MyriadForCausalLM
from myriad.models import ExpertChoiceRouting, TransformerConfig, TransformerExpertsConfig


@pytest.fixture(scope="module")
def model() -> MyriadForCausalLM:
    torch.manual_seed(0)
    config = TransformerExpertsConfig(
        vocab_size=50,
        context=32,
        experts=4,
        expert=TransformerConfig(layers=2, d_model=16, heads=2),
        routing=ExpertChoiceRouting(trunk_layers=1, capacity_factor=2),
    )
    model = MyriadForCausalLM(MyriadConfig(model=config.model_dump(mode="json"))).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.model.train().after_step(model.model(torch.randint(50, (4, 32))).loads)
    return model.eval()


def continued(model: MyriadForCausalLM, ids: Tensor, **options) -> Tensor:
    torch.manual_seed(1)
    options = {"attention_mask": torch.ones_like(ids), **options}  # else transformers takes every zero for padding
    return model.generate(ids, max_new_tokens=12, pad_token_id=0, eos_token_id=None, **options)


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 2}, {"do_sample": False, "num_beams": 3}],
    ids=str,
)
def test_the_cache_changes_nothing(model, options):
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(2))
    with_cache = continued(model, ids, use_cache=True, **options)
    assert torch.equal(with_cache, continued(model, ids, use_cache=False, **options))
    assert len(with_cache.unique()) > 5


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_on_the_left_changes_nothing(model, use_cache):
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    found = continued(model, ids, attention_mask=mask, do_sample=False, use_cache=use_cache)
    assert torch.equal(found[0, 2:], continued(model, ids[:1, 2:], do_sample=False)[0])
    assert torch.equal(found[1], continued(model, ids[1:], do_sample=False)[0])
