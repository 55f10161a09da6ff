"""`myriad pyper`: text in, a mixture out; called again, it goes on."""

import json
import signal
import time

import pytest
import torch

from myriad.checkpoint import load, read_json
from myriad.train import session
from myriad.train.record import CLOCK_FIELDS, read_records

SMALL = ["model.layers=1", "model.d_model=16", "model.heads=2", "model.context=32", "batch.tokens=128"]
SMALL += ["budget.steps=12", "evaluation.every=6", "data.tokenizer=bytes", "data.validation=0.2"]
SMALL += ["train.precision=float32"]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for n in range(60):
        words = ("sail tide wave ", "oven spoon flour ")[n % 2]
        (tmp_path / "texts" / f"{n:02}").write_text(words * 30)
    return tmp_path / "texts"


def call(myriad, texts, *more):
    return myriad("pyper", texts, *SMALL, "--experts", 2, "--out", texts.parent / "out", *more)


@pytest.mark.parametrize("routing", ["posterior", "cluster"])
def test_everything_is_made_once(myriad, texts, routing, monkeypatch):
    result = call(myriad, texts, "--routing", routing)
    assert result.code == 0, result.err
    out = texts.parent / "out"
    assert load(out / "mixture").config.experts == 2
    figures = json.loads((out / "figures.json").read_text())["found"]
    assert len(figures) == 5
    for part in ("on its domain", "typical tokens", "% against the best single expert"):
        assert part in result.out
    monkeypatch.setattr(session, "train", None)  # nothing is trained or measured again
    monkeypatch.setattr("myriad.analysis.pyper.measure_run", None)
    again = call(myriad, texts, "--routing", routing)
    assert (again.code, again.out) == (0, result.out)


def test_experts_start_from_a_seed_that_takes_a_share_of_their_training(myriad, texts):
    result = call(myriad, texts, "--seed-share", 0.25, "optim.frozen=[embedding]")
    assert result.code == 0, result.err
    out = texts.parent / "out"
    runs = [read_json(out / name / "run.json") for name in ("seed-all", "experts/expert-0", "experts/expert-1")]
    assert [run["budget"]["steps"] for run in runs] == [6, 9, 9]
    assert [run["init"] for run in runs] == [None, str(out / "seed-all"), str(out / "seed-all")]
    weights = [load(out / name).embedding.weight for name in ("seed-all", "experts/expert-0", "experts/expert-1")]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_one_stopped_amid_its_seed_says_how_to_go_on(server, texts):
    words = ["pyper", texts, *SMALL, "budget.steps=400", "--experts", 2, "--out", texts.parent / "out"]
    process = server.start(*words, "--seed-share", "0.5")
    metrics = texts.parent / "out" / "seed-all" / "metrics.jsonl"
    stopped = stop_amid(process, metrics)
    assert "--seed-share 0.5" in stopped.out
    assert not (texts.parent / "out" / "experts" / "expert-0").exists()


@pytest.mark.parametrize("share", [1, -0.1])
def test_a_share_that_is_none_is_refused(myriad, texts, share):
    result = call(myriad, texts, "--seed-share", share)
    assert (result.code, result.out) == (2, "")
    assert "seed_share" in result.err


def test_a_killed_one_goes_on(myriad, texts, monkeypatch):
    from myriad.analysis import pyper as module

    def fails(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(module, "mix", fails)
    assert call(myriad, texts).code == 1
    monkeypatch.undo()
    monkeypatch.chdir(texts.parent)
    result = call(myriad, texts)
    assert result.code == 0, result.err
    assert "finished before" in result.err


def test_one_that_ctrl_c_stopped_amid_an_expert_goes_on_to_the_same_figures(server, texts):
    words = ["pyper", texts, *SMALL, "budget.steps=40", "checkpoint.every=3", "--experts", 2, "--out"]
    undisturbed, out = texts.parent / "undisturbed", texts.parent / "out"
    assert server.run(*words, undisturbed).code == 0
    process = server.start(*words, out)
    second = out / "experts" / "expert-1" / "metrics.jsonl"
    stopped = stop_amid(process, second)
    assert f"{second.parent}: saved (SIGINT at step " in stopped.out
    assert "; to continue: myriad pyper " in stopped.out
    assert max(record["step"] for record in read_records(second)) < 40
    assert not (out / "mixture").exists()
    result = server.run(*words, out)
    assert result.code == 0, result.err
    assert read_json(out / "figures.json")["found"] == read_json(undisturbed / "figures.json")["found"]
    assert told(second) == told(undisturbed / "experts" / "expert-1" / "metrics.jsonl")


def stop_amid(process, metrics):
    """Send Ctrl-C once a run has a figure, and wait for the command to end well."""
    until = time.monotonic() + 120
    while not [*read_records(metrics)]:
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send(signal.SIGINT)
    stopped = process.wait()
    assert stopped.code == 0, stopped.err
    return stopped


def told(metrics):
    return [{name: record[name] for name in record.keys() - CLOCK_FIELDS} for record in read_records(metrics)]


def test_experts_that_choose_are_refused_before_anything_is_made(myriad, texts):
    result = call(myriad, texts, "--routing", "expert_choice")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("myriad: --routing: expert_choice has a router, which is trained after mixing")
    assert result.err.endswith("use posterior or cluster here\n")
    assert not (texts.parent / "out").exists()


def test_faults_are_one_line(myriad, texts):
    assert call(myriad, texts).code == 0
    other = call(myriad, texts, "--seed", 1)
    assert other.code == 2
    assert "holds another mixture (clusters.seed: 1 instead of 0)" in other.err
    result = myriad("pyper", texts / "00", *SMALL, "--experts", 2, "--out", texts.parent / "two")
    assert result.code == 2
    assert "1 document in train cannot make 2 clusters" in result.err
