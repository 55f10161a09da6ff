import json
import math
import os
import signal
import threading

import pytest
import torch
from pydantic import ValidationError

from myriad import checkpoint
from myriad.analysis.measure import measure_run, open_run
from myriad.config import ConfigError, RunError
from myriad.evaluate import evaluate
from myriad.ffn import DenseConfig, PEERConfig, ProductKeyMemoryConfig, TableConfig
from myriad.models import Transformer
from myriad.train import fit
from myriad.train.loop import due
from myriad.train.optim import OptimConfig
from myriad.train.record import CLOCK_FIELDS, Silent, read_records
from myriad.train.run import BatchConfig, BudgetConfig, CheckpointConfig, EarlyStoppingConfig, TrainConfig
from myriad.train.signals import first_signal
from tiny import tiny_model, tiny_run


def records(folder, kind: str | None = None) -> list[dict]:
    found = [
        {name: value for name, value in record.items() if name not in CLOCK_FIELDS}
        for record in read_records(folder / "metrics.jsonl")
    ]
    return [record for record in found if kind in (None, record["kind"])]


def same_weights(one, other) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_due():
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]


def test_a_run_learns_and_leaves_a_whole_folder(store, tmp_path):
    run = tiny_run(store, budget=BudgetConfig(steps=60))
    outcome = fit(run, tmp_path / "run")
    assert outcome.finished
    train, validation = records(tmp_path / "run", "train"), records(tmp_path / "run", "validation")
    assert [record["step"] for record in train] == list(range(1, 61))
    assert [record["step"] for record in validation] == list(range(4, 61, 4))
    assert train[0]["loss"] == pytest.approx(math.log(257), rel=0.05)
    assert validation[-1]["loss"] < 0.6 * train[0]["loss"]
    model = checkpoint.load(tmp_path / "run")
    best = min(record["loss"] for record in validation)
    found = evaluate(model, [store.split("validation")], end_id=256, stride=32, limit=512)
    assert found.loss == pytest.approx(best, rel=1e-6) == outcome.best_loss
    session = json.loads((tmp_path / "run" / "sessions.jsonl").read_text())
    assert session["config"] == run.model_copy(update={"model": model.config}).digest()
    assert session["data"]["train"] == store.split("train").sha256


def test_the_same_run_gives_the_same_numbers_and_another_seed_does_not(store, tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        fit(tiny_run(store, seed=seed), tmp_path / name)
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert records(tmp_path / "a") != records(tmp_path / "c")


def test_micro_batches_change_nothing_but_rounding(store, tmp_path):
    model = tiny_model(ffns={"d": DenseConfig()}, pattern=["d"])  # PEER's batch norm sees micro-batches
    for name, micro in [("whole", None), ("split", 64)]:
        fit(tiny_run(store, model=model, batch=BatchConfig(tokens=256, micro_tokens=micro)), tmp_path / name)
    for one, other in zip(records(tmp_path / "whole"), records(tmp_path / "split"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"compile": True}])
def test_run_time_choices_change_nothing_but_rounding(store, tmp_path, options):
    peer = PEERConfig(experts=64**2, heads=2, experts_per_head=2, d_key=8)
    sparse = tiny_model(layers=1, ffns={"p": peer}, pattern=["p"])
    run = tiny_run(store, budget=BudgetConfig(steps=3), model=sparse)
    fit(run, tmp_path / "plain")
    fit(run.model_copy(update={"train": TrainConfig(precision="float32", **options)}), tmp_path / "other")
    for one, other in zip(records(tmp_path / "plain"), records(tmp_path / "other"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_more_than_k_squared_experts_are_used_in_training(store, tmp_path):
    """The error of a published implementation: at most k * k experts were ever gathered."""
    peer = PEERConfig(experts=32**2, heads=2, experts_per_head=2, d_key=8)
    fit(tiny_run(store, model=tiny_model(ffns={"p": peer}, pattern=["p"])), tmp_path / "run")
    fresh = tiny_run(store, model=tiny_model(ffns={"p": peer}, pattern=["p"], vocab_size=257))
    torch.manual_seed(fresh.seed)
    before, after = fresh.model.build(), checkpoint.load(tmp_path / "run")
    for one, other in zip(before.blocks, after.blocks, strict=True):
        moved = (one.ffn.experts_up != other.ffn.experts_up).any(dim=1).sum().item()
        assert moved > 20 * 2**2


class StopsAfter(Silent):
    """A display that sends this process a signal after a step, as a user would."""

    def __init__(self, step: int, number: signal.Signals, times: int = 1) -> None:
        self.step, self.number, self.times = step, number, times

    def show(self, record) -> None:
        if record["kind"] == "train" and record["step"] == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_signal_saves_and_resuming_changes_nothing(store, tmp_path, number, dropout):
    run = tiny_run(store, model=tiny_model(dropout=dropout))
    fit(run, tmp_path / "whole")
    stopped = fit(run, tmp_path / "stopped", display=StopsAfter(6, number))
    assert not stopped.finished
    assert stopped.step == 6
    assert f"{number.name} at step 6" in stopped.reason
    assert fit(run, tmp_path / "stopped", resume=True).finished
    assert records(tmp_path / "whole") == records(tmp_path / "stopped")
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_sent_to_a_process_and_at_once_to_its_group_is_one(store, tmp_path):
    run = tiny_run(store)
    stopped = fit(run, tmp_path / "stopped", display=StopsAfter(6, signal.SIGTERM, times=2))
    assert stopped.step == 6


def test_a_second_signal_acts_as_ever(monkeypatch):
    monkeypatch.setattr("myriad.train.signals.SAME_SIGNAL", 0.0)
    delivered = []
    with first_signal(delivered.append):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert delivered == [signal.SIGINT]


def test_bfloat16_tables_learn_are_saved_and_resumed_bit_for_bit(store, tmp_path):
    peer = PEERConfig(experts=32**2, heads=2, experts_per_head=2, d_key=8, table_dtype="bfloat16")
    run = tiny_run(store, model=tiny_model(ffns={"p": peer}, pattern=["p"]))
    fit(run, tmp_path / "whole")
    fit(run, tmp_path / "stopped", display=StopsAfter(6, signal.SIGTERM))
    fit(run, tmp_path / "stopped", resume=True)
    losses = [record["loss"] for record in records(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    whole, stopped = checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "stopped")
    for (name, one), other in zip(whole.named_parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == (torch.bfloat16 if "experts_" in name else torch.float32)


def test_bfloat16_weights_learn_are_saved_and_resumed_bit_for_bit(store, tmp_path):
    run = tiny_run(store, optim=OptimConfig(lr=1e-2, warmup=5, weights="bfloat16"), train=TrainConfig())
    fit(run, tmp_path / "whole")
    fit(run, tmp_path / "stopped", display=StopsAfter(6, signal.SIGTERM))
    fit(run, tmp_path / "stopped", resume=True)
    assert records(tmp_path / "whole") == records(tmp_path / "stopped")
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    losses = [record["loss"] for record in records(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    assert {value.dtype for value in checkpoint.load(tmp_path / "whole").parameters()} == {torch.bfloat16}
    session = json.loads((tmp_path / "whole/sessions.jsonl").read_text())
    assert session["precision"] == "bfloat16"
    moments = checkpoint.read_tensors(tmp_path / "whole/checkpoints/00000012/training/optimizer.safetensors")
    wide = [name for name, value in moments.items() if value.dtype != torch.bfloat16]
    assert [name for name in wide if "experts_" not in name] == []  # a table's second moment is one number a row
    assert measure_run(tmp_path / "whole").perplexity.loss < losses[0]
    assert open_run(tmp_path / "whole").model(torch.arange(8).view(1, 8)).logits.dtype == torch.float32


def test_products_in_float32_of_bfloat16_weights_are_refused(store):
    with pytest.raises(ValidationError, match=r"train.precision = float32: with optim.weights = bfloat16"):
        tiny_run(store, optim=OptimConfig(weights="bfloat16"))


@pytest.mark.parametrize("side", [8, 64])  # gradients of all rows, and of those in use
def test_shared_tables_learn_are_saved_and_resumed_bit_for_bit(store, tmp_path, side):
    rows = {"memories": side**2, "heads": 1, "memories_per_head": 4, "d_key": 8}
    ffns = {"m": ProductKeyMemoryConfig.memory_plus(**rows, table="values")}
    model = tiny_model(ffns=ffns, pattern=["m"], tables={"values": TableConfig(rows=side**2)})
    run = tiny_run(store, model=model, batch=BatchConfig(tokens=512, micro_tokens=256))
    fit(run, tmp_path / "whole")
    fit(run, tmp_path / "stopped", display=StopsAfter(6, signal.SIGTERM))
    fit(run, tmp_path / "stopped", resume=True)
    assert records(tmp_path / "whole") == records(tmp_path / "stopped")
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    losses = [record["loss"] for record in records(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    moments = checkpoint.read_tensors(tmp_path / "whole/checkpoints/00000012/training/optimizer.safetensors")
    assert [name for name in moments if "values" in name] == [
        "exp_avg.tables.values.values",
        "exp_avg_sq.tables.values.values",
    ]


def test_signals_are_left_alone_outside_the_main_thread(store, tmp_path):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(fit(tiny_run(store), tmp_path / "run")))
    thread.start()
    thread.join()
    assert outcomes[0].finished


def test_early_stopping(store, tmp_path):
    patient = EarlyStoppingConfig(patience=2, min_delta=100.0)
    outcome = fit(tiny_run(store, early_stopping=patient, budget=BudgetConfig(steps=40)), tmp_path / "run")
    assert outcome.finished
    assert outcome.step == 12
    assert outcome.reason == "early stop"
    index = json.loads((tmp_path / "run" / "index.json").read_text())
    losses = {record["step"]: record["loss"] for record in records(tmp_path / "run", "validation")}
    assert int(index["checkpoint"]) == int(index["best"]) == min(losses, key=losses.get)
    assert (
        fit(tiny_run(store, early_stopping=patient, budget=BudgetConfig(steps=40)), tmp_path / "run", resume=True).step
        == 12
    )


def test_best_and_newest_checkpoints_are_kept(store, tmp_path):
    run = tiny_run(store, budget=BudgetConfig(steps=20), checkpoint=CheckpointConfig(every=5, keep=2))
    fit(run, tmp_path / "run")
    kept = [folder.name for folder in checkpoint.list_checkpoints(tmp_path / "run")]
    assert kept[-1] == "00000020"
    assert len(kept) <= 3


def test_a_loss_that_is_not_finite_is_skipped_counted_and_stops_the_run(store, tmp_path, monkeypatch):
    plain = Transformer.forward

    def explosive(self, ids, **options):
        output = plain(self, ids, **options)
        return output._replace(loss=output.loss * float("nan")) if self.training else output

    fit(tiny_run(store, budget=BudgetConfig(steps=4)), tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    monkeypatch.setattr(Transformer, "forward", explosive)
    run = tiny_run(store, budget=BudgetConfig(steps=40), train=TrainConfig(precision="float32", max_skipped=3))
    with pytest.raises(RunError, match="not finite in 3 updates in a row"):
        fit(run, tmp_path / "run", resume=True)
    assert [record["skipped"] for record in records(tmp_path / "run", "train")] == [0, 0, 0, 0, 1, 2, 3]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_one_bad_gradient_only_skips_its_update(store, tmp_path, monkeypatch):
    plain, calls = Transformer.after_step, []
    monkeypatch.setattr(Transformer, "after_step", lambda self, loads: (calls.append(1), plain(self, loads)))
    from myriad.train import loop

    clip = loop.clip_gradients
    steps = iter(range(1, 100))

    def poisoned(parameters, largest):
        norm = clip(parameters, largest)
        return norm * float("inf") if next(steps) == 3 else norm

    monkeypatch.setattr(loop, "clip_gradients", poisoned)
    assert fit(tiny_run(store), tmp_path / "run").finished
    assert records(tmp_path / "run", "train")[-1]["skipped"] == 1
    assert len(calls) == 11


def test_a_folder_that_holds_a_run_is_not_overwritten(store, tmp_path):
    fit(tiny_run(store), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="already holds a run; --resume"):
        fit(tiny_run(store), tmp_path / "run")
    other = tiny_run(store, optim=tiny_run(store).optim.model_copy(update={"lr": 0.5}))
    with pytest.raises(ConfigError, match=r"optim: not as in the run .*lr: 0.5 instead of 0.01"):
        fit(other, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_finished_run_goes_on_with_a_larger_budget(store, tmp_path):
    fit(tiny_run(store), tmp_path / "run")
    outcome = fit(tiny_run(store, budget=BudgetConfig(steps=16)), tmp_path / "run", resume=True)
    assert outcome.step == 16
    assert [record["step"] for record in records(tmp_path / "run", "train")] == list(range(1, 17))


def test_a_source_is_prepared_beside_the_run(store, tmp_path, text):
    from myriad.train.run import DataConfig

    (tmp_path / "text.txt").write_text(text)
    data = DataConfig(source=str(tmp_path / "text.txt"), tokenizer="bpe:300")
    settings = tiny_run(store, data=data, budget=BudgetConfig(steps=2))
    assert settings.model.vocab_size == 300
    assert fit(settings, tmp_path / "runs" / "one").finished
    assert len(list((tmp_path / "runs" / "data").iterdir())) == 1
    assert fit(settings, tmp_path / "runs" / "two").finished
    assert len(list((tmp_path / "runs" / "data").iterdir())) == 1


def test_a_vocabulary_that_does_not_fit_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match=r"model.vocab_size: 100, but .* has a vocabulary of 257"):
        fit(tiny_run(store, model=tiny_model(vocab_size=100)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
