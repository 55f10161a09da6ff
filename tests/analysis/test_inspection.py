import json
import math

import pytest
import torch

from myriad.analysis.inspection import inspect_layers, inspect_run, refuse_unrouted
from myriad.analysis.measure import OpenedRun
from myriad.analysis.routing import usage
from myriad.config import ConfigError
from myriad.data import DataError
from myriad.ffn import DenseConfig, PEERConfig, Routing, StackConfig
from myriad.models import LMOutput, TransformerConfig
from tiny import tiny_model

PEER = PEERConfig(experts=16, heads=2, experts_per_head=4, d_key=8)
VOCABULARY = 6


class Planted(torch.nn.Module):
    """A model whose only layer gives token t expert t of 8 and expert 7 to every other token, the rest padding."""

    config = TransformerConfig(vocab_size=VOCABULARY, context=8)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids, *, targets, with_routing):
        assert with_routing
        assert not self.training
        often = (torch.arange(ids.numel()) % 2).view(ids.shape).double()
        experts = torch.stack((ids, torch.full_like(ids, 7), torch.full_like(ids, -1)), dim=-1)
        weights = torch.stack((torch.ones_like(often), often, torch.zeros_like(often)), dim=-1)
        planted = Routing(experts, weights, 8)
        return LMOutput(None, None, None, torch.zeros(()), ({},), ((planted,),))

    def layer_name(self, index):
        return f"block {index}"


def some_ids(rows=3, context=8, vocabulary=VOCABULARY):
    return torch.randint(vocabulary, (rows, context), generator=torch.Generator().manual_seed(1))


def model(ffns, layers=2):
    torch.manual_seed(0)
    sizes = {"layers": layers, "d_model": 16, "heads": 2, "context": 8, "vocab_size": VOCABULARY}
    return TransformerConfig(**sizes, ffns=ffns, pattern=list(ffns)).build()


def test_the_tokens_of_planted_experts_are_found():
    planted, parts = Planted().train(), [some_ids(), some_ids(1)]
    (layer,) = inspect_layers(planted, lambda: parts)
    assert planted.training
    tokens = torch.cat(parts).flatten()
    assert layer.usage.draws == len(tokens) + len(tokens) // 2
    assert layer.specialties[0].expert == 7
    assert {each.expert for each in layer.specialties} == {7, *tokens.tolist()}
    for expert, share, best in layer.specialties[1:]:
        own = tokens.tolist().count(expert)
        assert share == own / layer.usage.draws
        assert best == [(expert, 1.0, pytest.approx(len(tokens) / own))]
    assert layer.heads.heads == 1
    assert layer.heads.mean_entropy == pytest.approx(math.log(2) / 2)


def test_every_routed_layer_is_looked_at():
    stacked = model({"stack": StackConfig(layers=[PEER, DenseConfig(), PEER]), "peer": PEER, "dense": DenseConfig()}, 3)
    layers = inspect_layers(stacked, lambda: [some_ids()])
    assert [layer.name for layer in layers] == ["block 0.0", "block 0.1", "block 1"]
    for layer, alone in zip(layers, usage(stacked, [some_ids()]), strict=True):
        assert torch.equal(layer.usage.counts, alone.counts)
        assert torch.equal(layer.usage.weights, alone.weights)
        assert (layer.heads.heads, layer.heads.slots, layer.heads.experts) == (2, 4, 16)
        assert float(layer.heads.shared.diag().sum()) * layer.usage.tokens == layer.usage.draws
        assert [each.expert for each in layer.specialties] == [each.expert for each in layer.usage.top(8)]


def test_a_model_without_routed_layers_is_refused():
    with pytest.raises(ConfigError, match="twin: the model has no routed layers"):
        refuse_unrouted(model({"dense": DenseConfig()}), "twin")
    refuse_unrouted(model({"peer": PEER}), "peer")


@pytest.fixture
def opened(store, tmp_path):
    """Of a folder that says nothing of the run."""
    torch.manual_seed(0)
    built = tiny_model(layers=1, d_model=16).with_vocabulary(store.index.vocab_size).build()
    return OpenedRun(tmp_path / "run", tmp_path, built, store)


def test_a_seed_names_the_windows(opened, store):
    first, again, other = (inspect_run(opened, limit=320, seed=seed).record() for seed in (3, 3, 4))
    assert first == again
    assert first["layers"] != other["layers"]
    assert (first["tokens"], first["context"], first["seed"], first["split"]) == (320, 32, 3, "validation")
    assert first["data_sha256"] == store.split("validation").sha256
    assert first["checkpoint"] is first["config"] is first["run_seed"] is None


def test_a_short_split_is_read_whole_and_progress_ends_at_the_total(opened, store):
    reported = []
    found = inspect_run(opened, limit=10**12, progress=lambda tokens, total: reported.append((tokens, total)))
    assert found.tokens == (len(store.split("validation").tokens) - 1) // 32 * 32
    assert {total for _, total in reported} == {2 * found.tokens}
    assert sum(tokens for tokens, _ in reported) == 2 * found.tokens


def test_the_record_holds_all_figures_and_is_json(opened):
    found = inspect_run(opened, limit=320)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    (layer,) = record["layers"]
    (figures,) = found.layers
    for name in ("used", "dead", "share_used", "chance_share_used", "unevenness", "chance_unevenness", "draws"):
        assert layer[name] == getattr(figures.usage, name)
    assert layer["by_head"]["entropy"] == figures.heads.entropy.tolist()
    assert (layer["mean_shared"], layer["mean_shared_by_chance"], layer["mean_shared_elsewhere"]) == pytest.approx(
        figures.heads.overlap()
    )
    assert [each["expert"] for each in layer["top"]] == [each.expert for each in figures.specialties]
    for each in layer["top"][0]["tokens"]:
        assert each.keys() == {"token", "text", "share", "lift"}
        assert each["text"] == chr(each["token"])  # tokens of the store are bytes


def test_what_is_not_finite_becomes_null(opened):
    broken = inspect_run(opened, limit=32)
    broken.layers[0].heads.entropy[0] = math.nan
    record = json.loads(json.dumps(broken.record(), allow_nan=False))
    assert record["layers"][0]["by_head"]["entropy"][0] is None


def test_what_cannot_be_is_refused(opened):
    with pytest.raises(ConfigError, match="tokens: expected at least 1, found 0"):
        inspect_run(opened, limit=0)
    with pytest.raises(ConfigError, match="seed: expected at least 0, found -1"):
        inspect_run(opened, seed=-1)
    with pytest.raises(DataError, match="has no split 'test'"):
        inspect_run(opened, "test")
