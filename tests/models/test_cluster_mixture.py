"""Weights from a text's beginning, held to counts and vectors written out; and who reads what."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from myriad.ffn import DenseConfig
from myriad.models import ClusterRouting, Clusters, KVCache, LanguageModel, TransformerConfig, TransformerExpertsConfig

IDS = torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(2))


def built(dtype: torch.dtype = torch.float64, **routing) -> LanguageModel:
    settings = {"features": 6, "prompt_tokens": 8, "temperature": 0.3, **routing}
    expert = TransformerConfig(layers=1, d_model=8, heads=2, ffns={"dense": DenseConfig(d_hidden=8)})
    config = TransformerExpertsConfig(
        vocab_size=50, context=32, experts=4, expert=expert, routing=ClusterRouting(**settings)
    )
    torch.manual_seed(0)
    model = config.build().to(dtype).eval()
    model.clusters.idf.copy_(1 + torch.rand(50))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def features(clusters: Clusters, ids_S: Tensor) -> Tensor:
    """As scikit-learn has them: TF-IDF, normalised, projected, normalised."""
    tfidf_V = torch.bincount(ids_S, minlength=50) * clusters.idf
    return F.normalize(clusters.components @ (tfidf_V / tfidf_V.norm()), dim=0)


def by_hand(model: LanguageModel, ids: Tensor) -> Tensor:
    """Log weights (B, S, E), position by position."""
    routing, rows = model.routing, []
    for ids_S in ids:
        for at in range(len(ids_S)):
            seen = ids_S[: min(at + 1, routing.prompt_tokens)]
            distances_E = (features(model.clusters, seen) - model.clusters.centers).square().sum(1)
            log_w_E = -distances_E / routing.temperature
            log_w_E[log_w_E < log_w_E.topk(routing.top_k).values[-1]] = -torch.inf
            rows.append(log_w_E.log_softmax(0))
    return torch.stack(rows).unflatten(0, ids.shape)


@pytest.mark.parametrize("routing", [{}, {"top_k": 1}, {"top_k": 4}, {"prompt_tokens": 1}, {"prompt_tokens": 99}])
@torch.no_grad()
def test_weights_follow_the_beginning_of_a_text_and_then_stay(routing):
    model = built(**routing)
    log_w_BSE = by_hand(model, IDS)
    log_p_BSVE = torch.stack([expert(IDS).logits.log_softmax(-1) for expert in model.experts], dim=-1)
    output = model(IDS, with_routing=True)
    assert (output.logits - (log_p_BSVE + log_w_BSE.unsqueeze(2)).logsumexp(-1)).abs().max() < 1e-9
    ((found,),) = output.routing
    shown_BSE = torch.zeros_like(log_w_BSE).scatter(-1, found.ids, found.weights)
    assert (shown_BSE - log_w_BSE.exp()).abs().max() < 1e-6
    picked = shown_BSE[:, model.routing.prompt_tokens - 1 :]
    assert (picked == picked[:, :1]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_features_of_every_beginning_are_running_sums(dtype):
    clusters = Clusters(50, 6, 4).to(dtype)
    clusters.idf.copy_(1 + torch.rand(50))
    projections_SF = clusters.project(IDS[0]).cumsum(0)
    for at in range(24):
        expected = (features(clusters, IDS[0, : at + 1]) - clusters.centers).square().sum(1)
        assert torch.allclose(clusters.squared_distances(projections_SF[at]), expected, atol=1e-5)
    nothing = clusters.squared_distances(torch.zeros(6, dtype=dtype))
    assert torch.allclose(nothing, torch.ones(4, dtype=dtype), atol=1e-5)


def tokens_read(model: LanguageModel) -> list[int]:
    """Counts the tokens that each expert reads from now on."""
    counts = [0] * len(model.experts)

    def count(number: int):
        def hook(module, inputs) -> None:
            counts[number] += inputs[0].shape[0] * inputs[0].shape[1]

        return hook

    for number, expert in enumerate(model.experts):
        expert.blocks[0].register_forward_pre_hook(count(number))
    return counts


@torch.no_grad()
def test_the_picked_experts_alone_read_on():
    model = built()
    picks = by_hand(model, IDS)[:, -1].isfinite()
    counts, cache = tokens_read(model), model.new_cache()
    model(IDS[:, :7], cache=cache)
    assert counts == [3 * 7] * 4
    for at in range(7, 24):
        model(IDS[:, at : at + 1], cache=cache)
    expected = (21 + 17 * picks.sum(0)).tolist()
    assert counts == expected
    assert sum(expected) == 4 * 21 + 2 * 3 * 17
    counts[:] = [0] * 4
    model(IDS)  # one pass reads as little
    assert counts == expected
    assert [len(own._buffers[0][0]) if own._buffers else 0 for own in cache.experts] == picks.sum(0).tolist()


def test_in_training_every_expert_reads_everything():
    model = built().train()
    counts = tokens_read(model)
    model(IDS, targets=IDS).loss.backward()
    assert counts == [3 * 24] * 4
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_padding_does_not_count_among_the_tokens_that_pick():
    model = built()
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[:, 2:5] = False
    changed = torch.where(mask, IDS, (IDS + 1) % 50)
    one, other = (model(ids, mask=mask, with_routing=True) for ids in (IDS, changed))
    assert (one.logits - other.logits)[mask].abs().max() < 1e-9
    ((shown,),) = one.routing
    ((expected,),) = model(IDS[:, mask[0]], with_routing=True).routing
    assert torch.equal(shown.ids[:, mask[0]], expected.ids)


def test_a_cache_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="new_cache"):
        built()(IDS, cache=KVCache())
