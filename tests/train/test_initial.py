"""Runs that start from the weights of a model that was trained before."""

import json
import os
import shutil
import signal

import pytest
import torch

from myriad.checkpoint import CheckpointError, load, write_model
from myriad.config import ConfigError
from myriad.data.prepare import prepare
from myriad.data.recipe import Recipe
from myriad.data.store import Store
from myriad.data.tokenizer import FILE_NAME
from myriad.ffn import DenseConfig
from myriad.models import ExpertChoiceRouting, PosteriorRouting, TransformerExpertsConfig
from myriad.train import fit
from myriad.train.initial import initial_model
from myriad.train.mix import mix
from myriad.train.optim import OptimConfig
from myriad.train.record import Silent
from myriad.train.run import BudgetConfig
from tiny import tiny_model, tiny_run

MODEL = tiny_model(ffns={"dense": DenseConfig(d_hidden=32)}, pattern=["dense"])


@pytest.fixture
def seed(store, tmp_path):
    fit(tiny_run(store, model=MODEL, budget=BudgetConfig(steps=3)), tmp_path / "seed")
    return tmp_path / "seed"


def from_seed(store, folder, **options):
    defaults = {"init": str(folder), "budget": BudgetConfig(steps=2), "model": MODEL}
    return tiny_run(store, **defaults | options)


def same(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def frozen_all_but(prefix, model):
    return OptimConfig(frozen=[name for name, _ in model.named_parameters() if not name.startswith(prefix)])


def test_a_run_starts_from_the_weights_it_names(store, seed, tmp_path):
    weights = load(seed).state_dict()
    run = from_seed(store, seed, seed=9)
    assert same(first_weights(run, store), weights)
    only = frozen_all_but("norm", load(seed))
    fit(from_seed(store, seed, optim=only), tmp_path / "run")
    found = load(tmp_path / "run").state_dict()
    moved = {name for name, value in found.items() if not torch.equal(value, weights[name])}
    assert moved == {"norm.weight"}


def first_weights(run, store):
    run = run.model_copy(update={"model": run.model.with_vocabulary(store.index.vocab_size)})
    return initial_model(run, store.path / FILE_NAME).state_dict()


def test_the_record_names_the_weights(store, seed, tmp_path):
    fit(from_seed(store, seed), tmp_path / "run")
    (session,) = [json.loads(line) for line in (tmp_path / "run" / "sessions.jsonl").read_text().splitlines()]
    assert session["init"] == {"path": str(seed), "digest": json.loads((seed / "index.json").read_text())["digest"]}


def test_a_run_that_goes_on_needs_its_seed_no_longer(store, seed, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(from_seed(store, seed, budget=BudgetConfig(steps=4)), whole)
    run = from_seed(store, seed, budget=BudgetConfig(steps=4))
    assert not fit(run, parts, display=StopAt(2)).finished
    shutil.rmtree(seed)
    assert fit(run, parts, resume=True).finished
    assert same(load(whole).state_dict(), load(parts).state_dict())


class StopAt(Silent):
    def __init__(self, step):
        self.step = step

    def show(self, record):
        if record["kind"] == "train" and record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def mixture_of(run, experts=2, trunk_layers=1, **options):
    """The config of a mixture whose trunk and experts together have a run's blocks."""
    whole = run.model
    expert = whole.model_copy(update={"layers": whole.layers - trunk_layers})
    routing = ExpertChoiceRouting(trunk_layers=trunk_layers, **options)
    sizes = {"context": whole.context, "vocab_size": whole.vocab_size, "experts": experts}
    return TransformerExpertsConfig(**sizes, expert=expert, routing=routing)


def test_a_transformer_grows_into_experts_that_choose(store, seed, tmp_path):
    run = from_seed(store, seed)
    grown = run.model_copy(update={"model": mixture_of(run)})
    first = first_weights(grown, store)
    theirs = load(seed).state_dict()
    assert torch.equal(first["trunk.0.ffn.up.weight"], theirs["blocks.0.ffn.up.weight"])
    for expert in range(2):
        assert torch.equal(first[f"experts.{expert}.0.ffn.up.weight"], theirs["blocks.1.ffn.up.weight"])
    assert fit(grown, tmp_path / "grown").finished


def test_a_mixture_goes_on_from_its_own_folder_router_first(store, seed, tmp_path):
    """The way of a mixture whose experts were grown apart: its router is fresh, and is trained before the rest."""
    shared = ["embedding", "blocks.0", "norm"]
    for number in range(2):
        run = from_seed(store, seed, optim=OptimConfig(frozen=shared), seed=number)
        fit(run, tmp_path / str(number))
    mix([tmp_path / "0", tmp_path / "1"], tmp_path / "mixture", ExpertChoiceRouting(trunk_layers=1), data=store.path)
    mixed = load(tmp_path / "mixture")
    only = frozen_all_but("router", mixed)
    fit(from_seed(store, tmp_path / "mixture", model=mixed.config, optim=only), tmp_path / "routed")
    before, after = mixed.state_dict(), load(tmp_path / "routed").state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"router", "router_norm", "thresholds"}


def test_a_mixture_names_its_own_text_and_no_settings_of_its_experts_training(store, seed, tmp_path):
    for number in range(2):
        fit(from_seed(store, seed, optim=OptimConfig(frozen=["embedding"]), seed=number), tmp_path / str(number))
    mix([tmp_path / "0", tmp_path / "1"], tmp_path / "mixture", PosteriorRouting(), data=store.path)
    run = json.loads((tmp_path / "mixture" / "run.json").read_text())
    assert run["init"] is None
    assert run["optim"]["frozen"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, r"init: .*seed: model\.layers: 2 instead of 3"),
        ({"heads": 4}, r"init: .*seed: model\.head_dim: 16 instead of 8"),
        ({"qk_norm": True}, r"init: .*seed: model\.qk_norm: false instead of true"),
    ],
    ids=str,
)
def test_weights_of_another_shape_are_refused_by_name(store, seed, tmp_path, change, message):
    run = from_seed(store, seed)
    other = run.model_copy(update={"model": tiny_model(**run.model.model_dump() | change)})
    with pytest.raises(ConfigError, match=message):
        fit(other, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_context_and_dropout_may_differ_from_the_seeds(store, seed, tmp_path):
    run = from_seed(store, seed)
    model = run.model.model_copy(update={"context": run.model.context // 2, "dropout": 0.1})
    assert fit(run.model_copy(update={"model": model}), tmp_path / "run").finished


def test_mixtures_that_do_not_grow_from_one_model_are_refused(store, seed, tmp_path):
    run = from_seed(store, seed)
    chosen = mixture_of(run)
    whole = chosen.model_copy(update={"routing": PosteriorRouting(), "expert": run.model})
    with pytest.raises(ConfigError, match=r"init: .*seed: routing: a seed grows into expert_choice alone"):
        fit(run.model_copy(update={"model": whole}), tmp_path / "run")
    more = chosen.model_copy(update={"routing": ExpertChoiceRouting(trunk_layers=2)})
    with pytest.raises(ConfigError, match=r"init: .*seed: has 2 blocks"):
        fit(run.model_copy(update={"model": more}), tmp_path / "run")


def test_a_seed_of_another_tokenizer_is_refused(seed, tmp_path):
    (tmp_path / "other.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 500)
    prepare(Recipe(source=str(tmp_path / "other.txt"), tokenizer="bpe:258", validation=0.2), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"init: .*seed: was trained with another tokenizer than that of .*other"):
        fit(from_seed(Store.open(tmp_path / "other"), seed), tmp_path / "run")


def test_a_seed_that_is_missing_damaged_or_broken_is_refused(store, seed, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such run folder"):
        fit(from_seed(store, tmp_path / "nowhere"), tmp_path / "run")
    model = load(seed)
    model.norm.weight.data[0] = float("nan")
    (tmp_path / "broken").mkdir()
    write_model(tmp_path / "broken", model, None, None)
    with pytest.raises(CheckpointError, match=r"broken: the weights are broken \(norm.weight"):
        fit(from_seed(store, tmp_path / "broken"), tmp_path / "run")
    (seed / "model.safetensors").resolve().write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="seed"):
        fit(from_seed(store, seed), tmp_path / "run")
