"""Weights from the experts' own likelihoods, held to Bayes' rule written out."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from myriad.config import ConfigError, validate
from myriad.ffn import DenseConfig
from myriad.models import (
    KVCache,
    LanguageModel,
    ModelConfig,
    PosteriorRouting,
    TransformerConfig,
    TransformerExpertsConfig,
)
from myriad.models.loss import chunked_logsumexp

IDS = torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(2))
DENSE = {"dense": DenseConfig(d_hidden=8)}


def config_of(routing: PosteriorRouting | None = None, **options) -> TransformerExpertsConfig:
    sizes = {"layers": 1, "d_model": 8, "heads": 2, "ffns": DENSE}
    expert = TransformerConfig(**{**sizes, **options.pop("expert", {})})
    settings = {"vocab_size": 50, "context": 32, "experts": 4, "expert": expert, "routing": routing}
    return TransformerExpertsConfig(**{**settings, "routing": routing or PosteriorRouting(), **options})


def built(config: TransformerExpertsConfig, dtype: torch.dtype = torch.float64, spread: float = 0.3) -> LanguageModel:
    torch.manual_seed(0)
    model = config.build().to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += spread * torch.randn_like(parameter)
    return model


def by_hand(
    model: LanguageModel, ids: Tensor, top_k: int | None = None, document_start: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log weights (B, S, E) and log probabilities (B, S, V), position by position."""
    log_p_BSVE = torch.stack([expert(ids).logits.log_softmax(-1) for expert in model.experts], dim=-1)
    log_joint_BE = model.log_prior.expand(len(ids), -1)
    weights: list[Tensor] = []
    for at in range(ids.shape[1]):
        if at:
            log_joint_BE = log_joint_BE + log_p_BSVE[torch.arange(len(ids)), at - 1, ids[:, at]]
        if document_start is not None:
            log_joint_BE = torch.where((ids[:, at] == document_start).unsqueeze(1), model.log_prior, log_joint_BE)
        kept_BE = log_joint_BE.clone()
        if top_k is not None:
            kept_BE[kept_BE < kept_BE.topk(top_k).values[:, -1:]] = -torch.inf
        weights.append(kept_BE.log_softmax(dim=-1))
    log_w_BSE = torch.stack(weights, dim=1)
    return log_w_BSE, (log_p_BSVE + log_w_BSE.unsqueeze(2)).logsumexp(dim=-1)


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
@pytest.mark.parametrize("expert", [{}, {"tie_embeddings": False}])
@torch.no_grad()
def test_it_is_bayes_rule(top_k, expert):
    model = built(config_of(PosteriorRouting(top_k=top_k), expert=expert))
    model.log_prior.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]).log())  # no two alike: nothing to choose at random
    log_w_BSE, expected_BSV = by_hand(model, IDS, top_k)
    output = model(IDS, with_routing=True)
    assert (output.logits - expected_BSV).abs().max() < 1e-9
    assert (output.logits.exp().sum(-1) - 1).abs().max() < 1e-9
    ((routing,),) = output.routing
    assert routing.experts == 4
    assert routing.ids.shape == (3, 24, top_k or 4)
    shown_BSE = torch.zeros_like(log_w_BSE).scatter(-1, routing.ids, routing.weights)
    assert (shown_BSE - log_w_BSE.exp()).abs().max() < 1e-6
    assert (routing.weights.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("pieces", [[24], [1, 7, 1, 15], [1] * 24], ids=str)
@torch.no_grad()
def test_a_document_is_weighed_by_itself(pieces):
    model = built(config_of(PosteriorRouting(document_start=7)))
    model.log_prior.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]).log())
    ids = IDS.clone()
    ids[0, [3, 9]], ids[1, [0, 8, 9]], ids[2] = 7, 7, ids[2].where(ids[2] != 7, 8)
    _, expected_BSV = by_hand(model, ids, document_start=7)
    cache = model.new_cache()
    logits_BSV = torch.cat([model(piece, cache=cache).logits for piece in ids.split(pieces, dim=1)], dim=1)
    assert (logits_BSV - expected_BSV).abs().max() < 1e-9
    _, without_BSV = by_hand(model, ids)
    assert (logits_BSV - without_BSV)[:2].abs().max() > 1e-3
    assert (logits_BSV - without_BSV)[2].abs().max() < 1e-9


@torch.no_grad()
def test_padding_begins_no_document():
    model = built(config_of(PosteriorRouting(document_start=7)))
    ids, mask = IDS.clone(), torch.ones_like(IDS, dtype=torch.bool)
    ids[:, 10:12], mask[:, 10:12] = 7, False
    ids[:, :10], ids[:, 12:] = ids[:, :10].where(ids[:, :10] != 7, 8), ids[:, 12:].where(ids[:, 12:] != 7, 8)
    ((routing,),) = model(ids, mask=mask, with_routing=True).routing
    ((other,),) = model(ids.where(mask, 9), mask=mask, with_routing=True).routing
    assert torch.equal(routing.weights[mask], other.weights[mask])


def test_a_start_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValidationError, match=r"routing\.document_start = 50 is no token of vocab_size = 50"):
        config_of(PosteriorRouting(document_start=50))


@torch.no_grad()
def test_the_prior_alone_weighs_the_first_token_and_experts_that_are_the_same():
    model = built(config_of())
    model.log_prior.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]).log())
    for expert in list(model.experts)[1:]:
        expert.load_state_dict(model.experts[0].state_dict())
    ((routing,),) = model(IDS, with_routing=True).routing
    assert torch.allclose(routing.weights[..., 0], torch.tensor(0.7, dtype=torch.float64), rtol=1e-6)
    model = built(config_of())
    ((routing,),) = model(IDS[:, :1], with_routing=True).routing
    assert torch.allclose(routing.weights, torch.tensor(0.25, dtype=torch.float64))


def learned(alphabet: Tensor) -> LanguageModel:
    """A small transformer that has learned to expect the tokens of one alphabet."""
    torch.manual_seed(int(alphabet[0]))
    model = TransformerConfig(vocab_size=50, context=32, layers=1, d_model=8, heads=2, ffns=DENSE).build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(25):
        ids = alphabet[torch.randint(len(alphabet), (4, 17))]
        optimizer.zero_grad()
        model(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
        optimizer.step()
    return model


def test_the_text_finds_the_expert_that_knows_it_and_the_mixture_is_nearly_as_good():
    model = config_of(experts=2).build().eval()
    alphabets = [torch.arange(0, 20), torch.arange(25, 45)]
    for expert, alphabet in zip(model.experts, alphabets, strict=True):
        expert.load_state_dict(learned(alphabet).state_dict())
    for number, alphabet in enumerate(alphabets):
        ids = alphabet[torch.randint(len(alphabet), (4, 32))]
        with torch.no_grad():
            output = model(ids[:, :-1], targets=ids[:, 1:], with_routing=True)
            losses = [float(expert(ids[:, :-1], targets=ids[:, 1:]).loss) for expert in model.experts]
        ((routing,),) = output.routing
        assert (routing.ids[:, 5:, 0] == number).all()
        assert (routing.weights[:, -1, 0] > 0.99).all()
        # Of each text, Bayes' mixture loses at most log(experts) against the expert that suits it.
        assert output.loss < losses[number] + 4 * math.log(2) + 1e-3
        assert losses[1 - number] > losses[number] + 8 * math.log(2)


@torch.no_grad()
def test_long_texts_lose_no_digits_in_float32():
    """Log likelihoods of thousands of nats, and weights that hang on their differences."""
    config = config_of(context=2000, expert={"layers": 1})
    wide, narrow = built(config, spread=0.02), built(config, torch.float32, spread=0.02)
    narrow.load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())
    ids = torch.randint(50, (1, 2000))
    one, other = (model(ids, targets=ids, with_routing=True) for model in (wide, narrow))
    assert torch.allclose(one.loss.float(), other.loss, rtol=1e-5)
    weights = [
        torch.zeros(1, 2000, 4).scatter(-1, r.ids, r.weights.float()) for ((r,),) in (one.routing, other.routing)
    ]
    assert (weights[0] - weights[1]).abs().max() < 2e-3
    assert 0.01 < weights[0][0, 1000].max() < 1


def test_gradients_are_right_through_the_posterior_too(monkeypatch):
    monkeypatch.setattr("myriad.models.loss.LOGITS_PER_CHUNK", 7 * 3)  # chunks of 3 tokens
    monkeypatch.setattr("myriad.models.loss.LEAST_TOKENS_PER_CHUNK", 1)
    for top_k in (None, 1):
        config = config_of(PosteriorRouting(top_k=top_k), vocab_size=7, experts=2, expert={"d_model": 4})
        model = built(config)
        model.log_prior.copy_(torch.tensor([0.6, 0.4]).log())
        names = [name for name, _ in model.named_parameters()]
        values = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
        ids = torch.randint(7, (2, 6))

        def loss(*values, model=model, names=names, ids=ids):
            state = dict(zip(names, values, strict=True))
            targets = ids.roll(-1, 1).index_fill(1, torch.tensor([2]), -1)
            return torch.func.functional_call(model, state, (ids,), {"targets": targets}).loss

        assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_the_loss_holds_one_chunk_of_logits(monkeypatch):
    """With a large vocabulary, no tensor that is made or kept has a number for each token and word."""
    monkeypatch.setattr("myriad.models.loss.LOGITS_PER_CHUNK", 4000 * 8)
    monkeypatch.setattr("myriad.models.loss.LEAST_TOKENS_PER_CHUNK", 1)
    model = config_of(vocab_size=4000, context=64).build().train()
    ids = torch.randint(4000, (4, 64))

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for each in made if isinstance(made, tuple | list) else [made]:
                if isinstance(each, Tensor):
                    Sizes.largest = max(Sizes.largest, each.numel())
            return made

    with Sizes():
        model(ids, targets=ids).loss.backward()
    assert Sizes.largest == 4000 * 8  # a chunk of 8 tokens, or an embedding of width 8; all would be 4000 * 256
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_normalizer_in_chunks_is_that_of_all_logits(monkeypatch):
    monkeypatch.setattr("myriad.models.loss.LOGITS_PER_CHUNK", 11 * 4)
    monkeypatch.setattr("myriad.models.loss.LEAST_TOKENS_PER_CHUNK", 1)
    x_TD = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(chunked_logsumexp(x_TD, weight_VD), (x_TD @ weight_VD.T).logsumexp(1))
    assert torch.autograd.gradcheck(chunked_logsumexp, (x_TD, weight_VD))
    assert chunked_logsumexp(x_TD[:0], weight_VD).shape == (0,)


@torch.no_grad()
def test_padding_is_no_evidence():
    """Neither its tokens nor what follows it directly: what stands in it changes nothing."""
    model = built(config_of())
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[:, 8:11] = False
    changed = torch.where(mask, IDS, (IDS + 1) % 50)
    one, other = (model(ids, mask=mask).logits[mask] for ids in (IDS, changed))
    assert (one - other).abs().max() < 1e-9
    assert (model(IDS).logits[mask] - one).abs().max() > 1e-3


def test_a_cache_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="new_cache"):
        built(config_of())(IDS, cache=KVCache())


def raw(**options) -> dict:
    return {"kind": "transformer_experts", "vocab_size": 50, "context": 32, "experts": 4, **options}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert": {"kind": "transformer", "context": 64}}, "expert.context = 64 is not the mixture's context = 32"),
        ({"expert": {"kind": "transformer", "vocab_size": 9}}, "expert.vocab_size = 9 is not the mixture's vocab_size"),
        ({"routing": {"kind": "posterior", "top_k": 5}}, "routing.top_k = 5 exceeds experts = 4"),
        ({"routing": {"kind": "cluster", "top_k": 5}}, "routing.top_k = 5 exceeds experts = 4"),
        ({"routing": {"kind": "posteriori"}}, "did you mean 'posterior'"),
        ({"routing": {"kind": "cluster", "temperature": 0}}, "routing.temperature: expected greater than 0"),
        ({"experts": 1}, "experts: expected greater than or equal to 2"),
        ({"expert": {"kind": "transformer", "heads": 3}}, "expert: d_model = 256 is not a multiple of heads = 3"),
    ],
)
def test_settings_that_do_not_fit_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        validate(ModelConfig, raw(**options))


def test_the_experts_vocabulary_and_context_are_the_mixtures():
    config = validate(ModelConfig, {"kind": "transformer_experts", "context": 64})
    assert isinstance(config, TransformerExpertsConfig)
    assert config.routing == PosteriorRouting()
    assert config.expert.context == 64
    known = config.with_vocabulary(300)
    assert known.whole_expert.vocab_size == 300
    same = {"kind": "transformer", "vocab_size": 50, "context": 32}
    assert validate(ModelConfig, raw(expert=same)) == validate(ModelConfig, raw())
    assert validate(ModelConfig, raw(expert=same)).whole_expert == TransformerConfig(vocab_size=50, context=32)
