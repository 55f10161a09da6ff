"""What a session does with a folder, its data and its checkpoints, beyond the plain course of the loop."""

import json
import os
import signal

import pytest
import torch

from myriad import checkpoint
from myriad.cli.train import resolve_run
from myriad.config import ConfigError, RunError
from myriad.data import DataError
from myriad.data.store import Store
from myriad.evaluate import Perplexity
from myriad.train import fit, loop
from myriad.train.optim import OptimConfig
from myriad.train.record import Silent, read_records
from myriad.train.run import BudgetConfig, CheckpointConfig, DataConfig, EarlyStoppingConfig
from tiny import tiny_run


class Notes(Silent):
    """A display that keeps what it is told, and may act on it."""

    def __init__(self, at_step: int = 0, act=lambda: None) -> None:
        self.notes: list[str] = []
        self.at_step, self.act = at_step, act

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show(self, record) -> None:
        if record["kind"] == "train" and record["step"] == self.at_step:
            self.act()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_folder_resumes_with_the_settings_last_used(store, tmp_path):
    """The folder shows the best weights, whose settings may be older than the newest checkpoint's."""
    fit(tiny_run(store, budget=BudgetConfig(steps=8)), tmp_path / "run")
    longer = tiny_run(store, budget=BudgetConfig(steps=40))
    assert not fit(longer, tmp_path / "run", resume=True, display=Notes(9, stop)).finished
    again, _ = resolve_run(str(tmp_path / "run"), [])
    assert again.budget.steps == 40
    assert fit(again, tmp_path / "run", resume=True).step == 40


def test_a_signal_between_two_steps_saves(store, tmp_path, monkeypatch):
    save_is_due = loop._save_is_due

    def signal_after_the_question(job) -> bool:
        answer = save_is_due(job)
        if job.progress.step == 6:
            stop()
        return answer

    monkeypatch.setattr(loop, "_save_is_due", signal_after_the_question)
    outcome = fit(tiny_run(store), tmp_path / "run")
    assert (outcome.step, outcome.finished) == (6, False)
    assert checkpoint.list_checkpoints(tmp_path / "run")[-1].name == "00000006"


@pytest.mark.parametrize("damage", ["emptied", "deleted"])
def test_damaged_best_weights_do_not_keep_a_run_from_going_on(store, tmp_path, damage):
    kept = CheckpointConfig(keep=2)
    fit(tiny_run(store, checkpoint=kept), tmp_path / "run")
    newest, older = (checkpoint.list_checkpoints(tmp_path / "run")[n] for n in (-1, -2))
    state = json.loads((newest / "training" / "state.json").read_text())
    state["progress"] |= {"best_step": int(older.name), "best_loss": 0.1}
    (newest / "training" / "state.json").write_text(json.dumps(state))
    manifest = checkpoint.Manifest.read(newest / "manifest.json")
    files = manifest.files | {"training/state.json": checkpoint.hash_file(newest / "training" / "state.json")}
    manifest.model_copy(update={"files": files}).write(newest / "manifest.json")
    (older / "manifest.json").write_text("{}")
    if damage == "deleted":
        (older / "manifest.json").unlink()
    display = Notes()
    outcome = fit(tiny_run(store, budget=BudgetConfig(steps=16)), tmp_path / "run", resume=True, display=display)
    assert outcome.step == 16
    assert any("best weights are lost" in note for note in display.notes)
    assert checkpoint.load(tmp_path / "run")


def test_a_validation_that_is_not_finite_is_never_the_best(store, tmp_path, monkeypatch):
    losses = iter([float("nan"), 3.0, float("inf")])
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: Perplexity(next(losses), 10, 2, 10, 32, 32))
    patient = EarlyStoppingConfig(patience=3)
    outcome = fit(tiny_run(store, early_stopping=patient), tmp_path / "run")
    assert outcome.best_loss == 3.0
    shown = [record["best"] for record in read_records(tmp_path / "run" / "metrics.jsonl") if "best" in record]
    assert shown == [False, True, False]


def test_a_flipped_bit_in_the_data_is_noticed(store, tmp_path):
    import shutil

    shutil.copytree(store.path, tmp_path / "store")
    shard = tmp_path / "store" / "validation-00000.bin"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"validation-00000.bin"):
        fit(tiny_run(store, data=DataConfig(path=str(tmp_path / "store"))), tmp_path / "run")


def test_other_data_are_refused_on_resume_but_a_moved_store_is_not(store, tmp_path):
    import shutil

    fit(tiny_run(store), tmp_path / "run")
    shutil.copytree(store.path, tmp_path / "moved")
    moved = tiny_run(store, data=DataConfig(path=str(tmp_path / "moved")), budget=BudgetConfig(steps=13))
    assert fit(moved, tmp_path / "run", resume=True).step == 13


def test_a_source_that_changed_is_not_trained_on_unnoticed(store, tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    run = tiny_run(store, data=DataConfig(source=str(tmp_path / "text.txt")), budget=BudgetConfig(steps=2))
    fit(run, tmp_path / "runs" / "one")
    (tmp_path / "text.txt").write_text(text + "more\n")
    with pytest.raises(DataError, match="has changed since"):
        fit(run, tmp_path / "runs" / "two")
    (made,) = (tmp_path / "runs" / "data").iterdir()
    assert Store.open(made)


def test_lack_of_memory_says_what_the_model_needs(store, tmp_path, monkeypatch):
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("myriad.train.session.build_optimizer", exhausted)
    with pytest.raises(RunError, match=r"out of memory: the model has [\d,]+ parameters"):
        fit(tiny_run(store), tmp_path / "run")


def test_kernels_are_recorded_and_kept(store, tmp_path):
    fit(tiny_run(store, budget=BudgetConfig(steps=2)), tmp_path / "run", kernel="reference")
    fit(tiny_run(store, budget=BudgetConfig(steps=3)), tmp_path / "run", resume=True)
    sessions = [json.loads(line) for line in (tmp_path / "run" / "sessions.jsonl").read_text().splitlines()]
    assert len(sessions) == 2
    assert all(set(session["kernels"].values()) == {"reference (asked for)"} for session in sessions)


def test_a_store_that_shrinks_under_training_ends_the_run_in_one_line_and_keeps_its_checkpoint(store, tmp_path):
    import shutil

    shutil.copytree(store.path, tmp_path / "store")
    shard = tmp_path / "store" / "train-00000.bin"
    run = tiny_run(store, data=DataConfig(path=str(tmp_path / "store")))
    with pytest.raises(DataError, match=r"train-00000\.bin: damaged \(it has become shorter"):
        fit(run, tmp_path / "run", display=Notes(6, lambda: os.truncate(shard, 10)))
    assert checkpoint.list_checkpoints(tmp_path / "run")[-1].name == "00000004"
    shutil.copyfile(store.path / "train-00000.bin", shard)
    assert fit(run, tmp_path / "run", resume=True).step == 12


def test_a_run_with_frozen_parameters_resumes_with_the_same_bits(store, tmp_path):
    run = tiny_run(store, optim=OptimConfig(lr=1e-2, schedule="constant", frozen=["embedding", "blocks.0"]))
    fit(run, tmp_path / "whole")
    fit(run.model_copy(update={"budget": BudgetConfig(steps=8)}), tmp_path / "parts")
    fit(run, tmp_path / "parts", resume=True)
    whole, parts = (tmp_path / name / "checkpoints" / "00000012" for name in ("whole", "parts"))
    for file in ("model.safetensors", "training/optimizer.safetensors"):
        one, other = checkpoint.read_tensors(whole / file), checkpoint.read_tensors(parts / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    moments = checkpoint.read_tensors(whole / "training" / "optimizer.safetensors")
    assert any(".blocks.1." in name for name in moments)
    assert not any(".embedding." in name or ".blocks.0." in name for name in moments)


def test_what_is_not_there_to_be_frozen_is_refused_before_anything_is_written(store, tmp_path):
    run = tiny_run(store)
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"frozen": ["trunk"]})})
    with pytest.raises(ConfigError, match=r"optim.frozen: .*'trunk'"):
        fit(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
