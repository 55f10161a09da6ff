"""The demo of a mixture on a small text: the same path as `myriad demo pyper`, in seconds."""

import json
import re

import pytest

from myriad.analysis.pyper_dense import AgainstDense, Domain
from myriad.checkpoint import load, read_json
from myriad.cli.demo_pyper import EXPERTS, summary
from myriad.data.clusters import ClusterEntry
from myriad.evaluate import Perplexity
from myriad.presets import get
from myriad.train import session

NAMES = ("sail", "oven", "chess", "violin", "glacier", "orchid", "turbine", "ledger")
SMALL = ["model.layers=1", "model.d_model=16", "model.heads=2", "model.context=32", "batch.tokens=64"]
SMALL += ["budget.steps=2", "evaluation.every=2", "data.tokenizer=bytes", "data.document_start=null"]


@pytest.fixture
def texts(tmp_path):
    for split, files in (("train", 24), ("validation", 8), ("test", 8)):
        (tmp_path / "texts" / split).mkdir(parents=True)
        for n in range(files):
            name = NAMES[n % len(NAMES)]
            (tmp_path / "texts" / split / f"{n:02}.txt").write_text(f"{name} {name.upper()} {name[::-1]}\n" * 12)
    return tmp_path / "texts"


def test_the_demo_sets_a_mixture_against_a_dense_model_of_the_same_compute(myriad, texts, monkeypatch):
    out = texts.parent / "demo"
    words = ["demo", "pyper", f"data.source={texts}", *SMALL, "--out", out]
    told = myriad(*words)
    assert told.code == 0, told.err
    assert load(out / "mixture").config.experts == EXPERTS
    runs = [read_json(out / "experts" / f"expert-{n}" / "run.json") for n in range(EXPERTS)]
    dense = read_json(out / "dense-all" / "run.json")
    seed = read_json(out / "seed-all" / "run.json")
    assert [run["budget"]["steps"] for run in (seed, dense)] == [EXPERTS, 2 * EXPERTS]
    assert all(run["budget"]["steps"] == 1 for run in runs)
    assert all(run["model"] == dense["model"] for run in runs)
    assert all(run["init"] == str(out / "seed-all") for run in runs)
    rows = [line.split() for line in told.out.splitlines() if re.match(r" *(\d|everything) ", line)]
    assert [row[0] for row in rows] == [*map(str, range(EXPERTS)), "everything"]
    assert rows[-1][1] == f"{2 * EXPERTS * 64:,}"
    figures = read_json(out / "figures.json")["found"]
    assert rows[0][3] == f"{bits(figures['mixture on 0']):.4f}"
    outcome = json.loads((out / "dense-all" / "outcome.json").read_text())
    assert rows[-1][-1] == f"{bits(outcome['held_out']):.4f}"
    monkeypatch.setattr(session, "train", None)  # nothing is trained or measured again
    monkeypatch.setattr("myriad.analysis.pyper.measure_run", None)
    again = myriad(*words)
    assert again.code == 0, again.err
    assert again.out.splitlines()[:-1] == told.out.splitlines()[:-1]


def bits(held_out: dict) -> float:
    return Perplexity(**{name: value for name, value in held_out.items() if name != "split"}).bits_per_byte


def test_experts_that_may_stop_early_are_refused_before_anything_is_made(myriad, tmp_path):
    result = myriad("demo", "pyper", "early_stopping.patience=2", "--out", tmp_path / "demo")
    assert (result.code, result.out) == (2, "")
    assert result.err == "myriad: early_stopping.patience: an expert would not spend its budget; set it to null\n"
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("mixture", "verdict"),
    [(1.9, "the mixture is ahead of the dense model by 5.0 %"), (2.5, "the mixture does not win: the dense model is")],
)
def test_the_summary_says_who_is_ahead_and_how_the_domains_are_divided(tiny_trial, mixture, verdict):
    figures, dense = found(mixture), found(2.0)
    entry = ClusterEntry(name="0", documents={}, tokens={}, typical=[])
    domains = [
        Domain(entry, dense, figures, dense, [0.9, 0.1]),
        Domain(entry.model_copy(update={"name": "1"}), dense, figures, dense, [0.7, 0.3]),
    ]
    division, said = summary(AgainstDense("test", [tiny_trial] * 2, tiny_trial, domains, figures, dense))
    assert said.startswith(verdict)
    assert "own expert 60% of the weight on average (by chance 50.0%), least in domain 1 (30%); in 1 of 2" in division


@pytest.fixture
def tiny_trial():
    from myriad.analysis.compare.plan import Trial

    return Trial("dense", "all", get("pyper-demo-expert"), 1.0, None)


def found(bits_per_byte: float) -> Perplexity:
    from math import log

    return Perplexity(bits_per_byte * log(2), tokens=1000, words=100, bytes=1000, context=32, stride=32)
