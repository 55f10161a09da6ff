"""Presets are what their names say, and twins cost what their twins cost; nothing large is allocated to tell."""

import pytest
import torch

from myriad import presets
from myriad.config import ConfigError, validate
from myriad.data.store import Store
from myriad.ffn import DenseConfig, PEERConfig, StackConfig
from myriad.models import (
    ChosenTransformers,
    ExpertChoiceRouting,
    ModelConfig,
    TransformerConfig,
    TransformerExpertsConfig,
)
from myriad.train import RunConfig, fit, with_overrides

TWINS = [
    ("demo-peer", "demo-dense"),
    ("demo-token-choice", "demo-dense"),
    ("demo-expert-choice", "demo-dense"),
    ("demo-product-key-memory", "demo-dense"),
    ("demo-memory-plus", "demo-dense"),
    ("peer-256x256", "dense-256x256"),
    ("peer-512x512", "dense-512x512"),
    ("enwik8-peer", "enwik8-dense"),
]


def any_model_of(name: str) -> ModelConfig:
    model = presets.get(name).model
    return model if model.vocab_size else model.with_vocabulary(4096)


def model_of(name: str) -> TransformerConfig:
    model = any_model_of(name)
    assert isinstance(model, TransformerConfig)
    return model


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_a_valid_input_and_says_what_it_is(name):
    run = presets.get(name)
    raw = run.model_dump(mode="json")
    assert validate(RunConfig, raw) == run
    assert with_overrides(raw, ["budget.steps=3"]).budget.steps == 3
    assert run.data.source
    assert presets.describe(name).endswith(".")


@pytest.mark.parametrize("name", presets.names())
def test_the_model_has_the_parameters_that_its_cost_says(name):
    model = any_model_of(name)
    with torch.device("meta"):  # sizes without memory
        built = model.build()
    assert sum(parameter.numel() for parameter in built.parameters()) == model.cost().parameters


@pytest.mark.parametrize(("sparse", "dense"), TWINS)
def test_twins_cost_the_same_and_differ_in_nothing_but_their_layers(sparse, dense):
    mine, theirs = model_of(sparse).cost().flops, model_of(dense).cost().flops
    assert mine == pytest.approx(theirs, rel=1e-3)
    ffns = {"ffns", "pattern", "tables"}
    assert model_of(sparse).model_dump(exclude=ffns) == model_of(dense).model_dump(exclude=ffns)
    assert presets.get(sparse).model_dump(exclude={"model"}) == presets.get(dense).model_dump(exclude={"model"})


@pytest.mark.parametrize("name", ["demo-product-key-memory", "demo-memory-plus"])
def test_the_demos_memories_cost_what_its_peer_does_to_the_last_operation(name):
    assert model_of(name).cost().flops == model_of("demo-peer").cost().flops


@pytest.mark.parametrize("name", ["peer-256x256", "peer-512x512"])
def test_the_seeds_models_have_8_layers_8_heads_and_width_256(name):
    model = model_of(name)
    assert (model.layers, model.heads, model.d_model, model.vocab_size) == (8, 8, 256, 50257)
    data = presets.get(name).data
    assert (data.source, data.tokenizer) == ("Salesforce/wikitext:wikitext-103-raw-v1", "gpt2")


def test_peer_256x256_has_256x256_experts_in_every_block():
    model = model_of("peer-256x256")
    (peer,) = model.ffns.values()
    assert isinstance(peer, PEERConfig)
    assert (peer.experts, peer.heads, peer.experts_per_head) == (256 * 256, 8, 16)
    assert len(model.placement) == 8


def test_peer_512x512_has_two_layers_of_512x512_experts_in_each_block_and_2_2_billion_parameters():
    model = model_of("peer-512x512")
    (stack,) = model.ffns.values()
    assert isinstance(stack, StackConfig)
    assert [layer.experts for layer in stack.layers if isinstance(layer, PEERConfig)] == [512 * 512] * 2
    assert 2.15e9 < model.cost().parameters < 2.25e9


def test_peer_paper_has_a_million_experts_in_the_middle_block_alone():
    model = model_of("peer-paper")
    assert [name == "peer" for name in model.placement] == [False] * 4 + [True] + [False] * 3
    peer = model.ffns["peer"]
    assert isinstance(peer, PEERConfig)
    assert peer.experts == 1024**2


def test_pyper_has_eight_experts_of_one_and_a_half_billion_parameters_that_choose():
    model = any_model_of("pyper-8x1.5b")
    assert isinstance(model, TransformerExpertsConfig)
    assert isinstance(model.routing, ExpertChoiceRouting)
    assert model.experts == 8
    with torch.device("meta"):
        built = model.build()
    assert isinstance(built, ChosenTransformers)
    for expert in built.experts:
        assert sum(parameter.numel() for parameter in expert.parameters()) == pytest.approx(1.5e9, rel=0.05)
    assert model.cost().parameters == pytest.approx(12e9, rel=0.05)


@pytest.mark.parametrize(("mixture", "alone"), [("pyper-8x1.5b", "pyper-expert-1.5b"), ("pyper-demo", "pyper-expert")])
def test_pypers_experts_are_dense_transformers_with_gelu(mixture, alone):
    model = any_model_of(mixture)
    assert isinstance(model, TransformerExpertsConfig)
    for expert in (model.expert, model_of(alone)):
        assert expert.ffns == {"dense": DenseConfig(activation="gelu")}
        assert expert.key_value_heads == expert.heads
    run = presets.get(alone)
    assert run.budget.epochs
    assert run.early_stopping.patience
    assert run.optim.warmup


def test_pypers_expert_of_the_large_size_is_one_of_the_mixtures_with_embeddings():
    model = any_model_of("pyper-8x1.5b")
    assert isinstance(model, TransformerExpertsConfig)
    assert model.whole_expert == model_of("pyper-expert-1.5b")
    assert model.whole_expert.cost().parameters == pytest.approx(1.5e9, rel=0.05)


def test_a_token_of_the_pyper_demo_goes_through_as_many_blocks_as_its_expert_has():
    model = any_model_of("pyper-demo")
    assert isinstance(model, TransformerExpertsConfig)
    assert isinstance(model.routing, ExpertChoiceRouting)
    assert model.routing.trunk_layers + model.expert.layers == model_of("pyper-expert").layers


def test_enwik8_is_cut_where_everyone_cuts_it():
    assert presets.get("enwik8-peer").data.split_bytes == (90_000_000, 5_000_000, 5_000_000)


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'peer-256x256'"):
        presets.get("peer-265x256")


def test_the_wikitext_presets_train_on_files_of_the_hubs_schema(tmp_path):
    """Rows are lines, as in Salesforce/wikitext: a heading of the first level begins an article."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra `data`")
    import pyarrow

    article = ["", " = The {} cat = \n", "", " It sat on the mat , and sat . \n", " = = Its hat = = \n", " None . \n"]
    folder = tmp_path / "wikitext-103-raw-v1"
    folder.mkdir()
    for name, articles in {
        "test-00000-of-00001": range(1),
        "train-00000-of-00002": range(20),
        "train-00001-of-00002": range(20, 40),
        "validation-00000-of-00001": range(5),
    }.items():
        rows = [line.format(number) for number in articles for line in article]
        parquet.write_table(pyarrow.table({"text": rows}), folder / f"{name}.parquet")
    words = [f"data.source={folder}", "data.tokenizer=bytes", "model.layers=1", "model.ffns.peer.experts=256"]
    words += ["model.context=64", "batch.tokens=256", "batch.micro_tokens=null", "budget.epochs=null", "budget.steps=2"]
    run = with_overrides(presets.get("peer-256x256").model_dump(mode="json"), words)
    assert fit(run, tmp_path / "runs" / "one").step == 2
    (folder_of_store,) = (tmp_path / "runs" / "data").iterdir()
    splits = Store.open(folder_of_store).index.splits
    assert {name: split.documents for name, split in splits.items()} == {"train": 40, "validation": 5, "test": 1}
