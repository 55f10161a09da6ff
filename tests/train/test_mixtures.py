"""Runs of mixtures: what they remember beside their weights survives, and adds up over micro-batches."""

import pytest
import torch

from myriad import checkpoint
from myriad.config import ConfigError
from myriad.data.stream import Stream
from myriad.ffn import ExpertChoiceConfig, FFNConfig, StackConfig, TokenChoiceConfig
from myriad.ffn.expert_choice import ExpertChoice
from myriad.ffn.token_choice import TokenChoice
from myriad.hf import generate_text, open_model
from myriad.train import fit
from myriad.train.optim import OptimConfig
from myriad.train.record import CLOCK_FIELDS, read_records
from myriad.train.run import BatchConfig, BudgetConfig, RunConfig, TrainConfig
from tiny import tiny_model, tiny_run

TOKENS = TokenChoiceConfig(experts=4, d_expert=16, router="sigmoid", balance_bias=0.01, capacity_factor=1.5)
EXPERTS = ExpertChoiceConfig(experts=4, d_expert=16)
BY_THRESHOLDS = ExpertChoiceConfig(experts=4, d_expert=16, threshold_after=2, max_experts_per_token=2)
MIXTURES = {"tokens": TOKENS, "experts": EXPERTS, "thresholds": BY_THRESHOLDS}


def run_of(store, *names: str, **options) -> RunConfig:
    ffns: dict[str, FFNConfig] = {name: MIXTURES[name] for name in names}
    model = tiny_model(layers=len(names), ffns=ffns, pattern=list(names))
    optim = OptimConfig(lr=1e-2, warmup=2, schedule="constant")
    return tiny_run(store, model=model, optim=optim, **{"budget": BudgetConfig(steps=6), **options})


def figures(folder) -> list[dict]:
    records = read_records(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in CLOCK_FIELDS} for record in records]


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures") / "whole"
    fit(run_of(store, *MIXTURES), folder)
    return folder


def test_a_run_resumed_is_the_run_that_was_never_stopped(store, whole, tmp_path):
    fit(run_of(store, *MIXTURES, budget=BudgetConfig(steps=3)), tmp_path / "run")
    fit(run_of(store, *MIXTURES), tmp_path / "run", resume=True)
    last = [checkpoint.load(folder / "checkpoints" / "00000006").state_dict() for folder in (whole, tmp_path / "run")]
    assert all(torch.equal(value, last[1][name]) for name, value in last[0].items())
    assert figures(tmp_path / "run")[-1]["loss"] == figures(whole)[-1]["loss"]


def test_what_they_remember_has_moved_and_is_in_the_checkpoint(whole):
    model = checkpoint.load(whole / "checkpoints" / "00000006")
    tokens, experts, thresholds = (block.ffn for block in model.blocks)
    assert isinstance(tokens, TokenChoice)
    assert tokens.balance_bias.abs().sum() > 0
    for layer in (experts, thresholds):
        assert isinstance(layer, ExpertChoice)
        assert int(layer.thresholds.steps) == 6
        assert (layer.thresholds.value != 0.25).all()
    assert not experts.causal_in_training()
    assert thresholds.causal_in_training()


def test_the_aux_loss_is_on_record_and_the_model_generates(whole):
    assert all(record["aux_loss"] > 0 for record in figures(whole) if record["kind"] == "train")
    opened = open_model(whole)
    text = generate_text(opened, "the cat", max_tokens=8, temperature=0)
    assert text == generate_text(opened, "the cat", max_tokens=8, temperature=0)


def test_activation_checkpointing_changes_nothing(store, whole, tmp_path):
    fit(
        run_of(store, *MIXTURES, train=TrainConfig(precision="float32", activation_checkpointing=True)),
        tmp_path / "run",
    )
    assert figures(tmp_path / "run") == figures(whole)


def test_micro_batches_add_up(store, tmp_path, monkeypatch):
    """The counts of a step are those of its tokens; thresholds move to the mean of the micro-batches' cutoffs."""
    loads = []
    after_step = {kind: kind.after_step for kind in (TokenChoice, ExpertChoice)}
    for kind, original in after_step.items():
        monkeypatch.setattr(kind, "after_step", lambda self, load, f=original: (loads.append(load), f(self, load)))
    batch = BatchConfig(tokens=256, micro_tokens=64)
    fit(run_of(store, "tokens", "experts", batch=batch, budget=BudgetConfig(steps=1)), tmp_path / "run")
    counts, cutoffs = loads
    assert int(counts["counts"].sum()) == 2 * 256
    assert int(cutoffs["tokens"]) == 256

    run = run_of(store, "tokens", "experts")
    torch.manual_seed(run.seed)
    model = run.model.with_vocabulary(store.index.vocab_size).build()
    ids, targets = Stream(store.split("train").tokens, 32, run.seed).batch(0, 8)
    parts = [model(i, targets=t).loads for i, t in zip(ids.split(2), targets.split(2), strict=True)]
    for layer, mine in enumerate((counts, cutoffs)):
        for name, value in mine.items():
            assert torch.allclose(value, sum(part[layer][name] for part in parts))


def test_fewer_tokens_than_experts_take_are_refused_before_anything_is_written(store, tmp_path):
    many = ExpertChoiceConfig(experts=128, capacity_factor=1, d_expert=4)
    for ffn in (many, StackConfig(layers=[many])):
        model = tiny_model(ffns={"many": ffn}, pattern=["many"])
        run = tiny_run(store, model=model, batch=BatchConfig(tokens=256, micro_tokens=64))
        with pytest.raises(ConfigError, match=r"batch: 64 tokens computed at once.*expert_choice takes, which is 128"):
            fit(run, tmp_path / "run")
        assert not (tmp_path / "run").exists()
