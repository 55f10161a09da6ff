import pytest
import torch

from myriad.config import ConfigError
from myriad.evaluate import causal_view, check_causality, evaluate, future_leak, training_view
from myriad.ffn import DenseConfig, ExpertChoiceConfig
from myriad.models import LanguageModel, build
from tiny import tiny_model

IDS = torch.randint(257, (2, 24), generator=torch.Generator().manual_seed(0))


def model_of(ffn, **options) -> LanguageModel:
    torch.manual_seed(0)
    options = {"vocab_size": 257, "layers": 1, "d_model": 16, **options}
    return build(tiny_model(ffns={"ffn": ffn}, pattern=["ffn"], **options))


def test_the_training_view_sees_the_future_and_the_causal_one_does_not():
    model = model_of(ExpertChoiceConfig(experts=4)).eval()
    check_causality(model, IDS)
    assert future_leak(model, IDS, 12) < 1e-5
    with training_view(model):
        assert future_leak(model, IDS, 12) > 1e-4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("view", [causal_view, training_view])
def test_a_view_lasts_for_the_while(view, training):
    model = model_of(ExpertChoiceConfig(experts=4)).train(training)
    with pytest.raises(KeyboardInterrupt), view(model):
        raise KeyboardInterrupt
    assert all(module.training == training for module in model.modules())


def test_the_training_view_drops_nothing():
    """Only the choice of experts is training's: dropout would make the figure another one each time."""
    model = model_of(ExpertChoiceConfig(experts=4), dropout=0.5)
    with training_view(model), torch.no_grad():
        assert torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("ffn", [DenseConfig(), ExpertChoiceConfig(experts=4, threshold_after=1)])
def test_there_is_none_where_training_is_causal(ffn):
    model = model_of(ffn)
    if isinstance(ffn, ExpertChoiceConfig):
        model.after_step(model(IDS).loads)
    with pytest.raises(ConfigError, match="causally in training"), training_view(model):
        pass
    assert model.training


def test_the_two_views_are_two_figures(store):
    model = model_of(ExpertChoiceConfig(experts=4))
    splits = [store.split("validation")]
    options = {"end_id": store.index.end_id, "limit": 500}
    causal = evaluate(model, splits, **options)
    assert causal == evaluate(model, splits, view=causal_view, **options)
    seen = evaluate(model, splits, view=training_view, **options)
    assert seen.tokens == causal.tokens
    assert seen.loss != causal.loss
