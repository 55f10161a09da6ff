import json
import math

import numpy as np
import pytest
import torch

from myriad.analysis.routing import LayerUsage, batches, expected_unevenness, usage
from myriad.data import DataError
from myriad.ffn import DenseConfig, PEERConfig, StackConfig
from myriad.models import TransformerConfig

PEER = PEERConfig(experts=16, heads=2, experts_per_head=4, d_key=8)


def layer(counts, weights=None, squares=None):
    counts = torch.tensor(counts)
    weights = counts.double() if weights is None else torch.tensor(weights, dtype=torch.float64)
    return LayerUsage("block 0", 10, counts, weights, float(weights.sum()) if squares is None else squares)


def model(ffns, pattern, layers=2):
    torch.manual_seed(0)
    config = TransformerConfig(layers=layers, d_model=16, heads=2, context=8, vocab_size=32, ffns=ffns, pattern=pattern)
    return config.build()


def some_ids(rows=3):
    return torch.randint(32, (rows, 8), generator=torch.Generator().manual_seed(1))


def test_uniform_usage_has_no_unevenness():
    assert layer([5, 5, 5, 5]).unevenness == pytest.approx(0, abs=1e-12)


def test_one_expert_alone_has_the_unevenness_of_log_n():
    assert layer([0, 7, 0, 0]).unevenness == pytest.approx(math.log(4))


def test_unevenness_follows_the_weights_and_not_the_counts():
    found = layer([1, 1, 1], weights=[0.5, 0.25, 0.25])
    by_hand = 0.5 * math.log(0.5 * 3) + 2 * 0.25 * math.log(0.25 * 3)
    assert found.unevenness == pytest.approx(by_hand)


def test_without_any_weight_the_unevenness_is_unknown():
    found = layer([0, 0])
    assert math.isnan(found.unevenness)
    assert math.isnan(found.chance_unevenness)
    assert found.top(3) == []


def test_shares_and_dead_experts():
    found = layer([3, 0, 1, 0])
    assert (found.draws, found.used, found.dead, found.share_used) == (4, 2, 2, 0.5)
    assert found.chance_share_used == pytest.approx(1 - 0.75**4)
    assert found.top(9) == [(0, 0.75), (2, 0.25)]


def test_chance_figures_agree_with_uniform_draws():
    experts, draws = 1000, 3000
    ids = torch.randint(experts, (draws,), generator=torch.Generator().manual_seed(0))
    found = layer(torch.bincount(ids, minlength=experts).tolist())
    assert found.share_used == pytest.approx(found.chance_share_used, rel=0.03)
    assert found.unevenness == pytest.approx(found.chance_unevenness, rel=0.1)


def test_chance_unevenness_counts_unequal_weights_as_fewer_draws():
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (5000,), generator=random)
    weights = torch.rand(5000, generator=random, dtype=torch.float64) ** 3
    sums = torch.bincount(ids, weights, minlength=1000)
    found = layer(torch.bincount(ids, minlength=1000).tolist(), sums.tolist(), float(weights.square().sum()))
    assert found.unevenness == pytest.approx(found.chance_unevenness, rel=0.15)
    assert found.chance_unevenness > 1.5 * expected_unevenness(5)


def test_expected_unevenness_joins_its_limit():
    assert expected_unevenness(100) == pytest.approx(expected_unevenness(100.001), rel=0.01)
    assert expected_unevenness(1e-4) == pytest.approx(math.log(1e4), rel=0.01)


def test_usage_counts_what_the_model_routed():
    peer = model({"dense": DenseConfig(), "peer": PEER}, ["dense", "peer"])
    parts = [some_ids(), some_ids(2)]
    (found,) = usage(peer, parts)
    assert found.name == "block 1"
    assert found.tokens == 5 * 8
    assert found.draws == 5 * 8 * 2 * 4
    assert float(found.weights.sum()) == pytest.approx(5 * 8 * 2)  # softmax: every head's weights add up to one
    with torch.no_grad():
        routings = [peer.eval()(ids, with_routing=True).routing[1][0] for ids in parts]
    expected = sum(torch.bincount(routing.ids.flatten(), minlength=16) for routing in routings)
    assert torch.equal(found.counts, expected)
    assert found.squares == pytest.approx(sum(float(routing.weights.square().sum()) for routing in routings))


def test_usage_keeps_the_mode_and_the_state():
    peer = model({"peer": PEER}, ["peer"])
    before = {name: value.clone() for name, value in peer.state_dict().items()}
    usage(peer.train(), [some_ids()])
    assert peer.training
    assert all(torch.equal(value, before[name]) for name, value in peer.state_dict().items())


def test_several_routed_layers_of_a_block_have_names_of_their_own():
    stacked = model({"stack": StackConfig(layers=[PEER, DenseConfig(), PEER])}, ["stack"], layers=1)
    assert [found.name for found in usage(stacked, [some_ids()])] == ["block 0.0", "block 0.1"]


def test_a_model_without_routed_layers_has_no_usage():
    assert usage(model({"dense": DenseConfig()}, ["dense"]), [some_ids()]) == []


def test_an_expert_with_a_weight_of_zero_is_not_used():
    relu = model({"peer": PEER.model_copy(update={"router": "relu"})}, ["peer"], layers=1)
    (found,) = usage(relu, [some_ids()])
    assert found.draws < found.tokens * 8
    assert torch.equal(found.counts > 0, found.weights > 0)


def test_record_is_json():
    record = json.loads(json.dumps(layer([3, 0, 1, 0]).record()))
    assert record["dead"] == 2
    assert record["tokens"] == 10
    assert record["top"][0] == {"expert": 0, "share": 0.75}


def test_batches_are_windows_of_the_text_and_none_comes_twice():
    tokens = np.arange(1003, dtype=np.uint16)
    found = torch.cat(list(batches(tokens, 10, limit=500)))
    assert found.shape == (50, 10)
    assert len(set(found[:, 0].tolist())) == 50
    assert torch.equal(found - found[:, :1], torch.arange(10).expand(50, -1))


def test_batches_stop_where_the_text_does():
    assert sum(ids.numel() for ids in batches(np.arange(2001, dtype=np.uint16), 2, limit=10**9)) == 2000


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="needs 11"):
        list(batches(np.arange(5, dtype=np.uint16), 10, limit=100))
