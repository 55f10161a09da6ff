"""Commands on a run folder of a mixture of whole transformers."""

import json
from pathlib import Path

import pytest

from myriad import checkpoint
from myriad.ffn import DenseConfig
from myriad.models import ClusterRouting, ExpertRouting, PosteriorRouting, TransformerConfig, TransformerExpertsConfig
from myriad.train import fit
from myriad.train.run import BudgetConfig
from tiny import tiny_run

ROUTINGS: dict[str, ExpertRouting] = {
    "posterior": PosteriorRouting(),
    "cluster": ClusterRouting(top_k=1, features=4, prompt_tokens=8),
}


@pytest.fixture(scope="module", params=ROUTINGS)
def run(request, store, tmp_path_factory) -> Path:
    expert = TransformerConfig(layers=1, d_model=16, heads=2, ffns={"dense": DenseConfig(d_hidden=16)})
    model = TransformerExpertsConfig(context=32, experts=3, expert=expert, routing=ROUTINGS[request.param])
    folder = tmp_path_factory.mktemp("experts") / "run"
    fit(tiny_run(store, model=model, budget=BudgetConfig(steps=6)), folder)
    return folder


def test_it_trains_resumes_and_is_measured(myriad, run, store, tmp_path):
    figures = tmp_path / "figures.json"
    result = myriad("eval", run, "--json", figures)
    assert (result.code, result.err) == (0, "")
    record = json.loads(figures.read_text())
    assert record["tokens"] > 1000
    assert record["bits_per_byte"] < 8
    again = checkpoint.load(run / "checkpoints" / "00000006")
    assert type(again) is type(checkpoint.load(run))
    fit(tiny_run(store, model=again.config, budget=BudgetConfig(steps=8)), run, resume=True)
    assert (run / "checkpoints" / "00000008").is_dir()


def test_it_generates(myriad, run):
    result = myriad("generate", run, "--prompt", "the cat", "--max-tokens", 5, "--temperature", 0)
    assert result.code == 0, result.err


def test_inspect_shows_how_the_text_is_shared(myriad, run, tmp_path):
    result = myriad("inspect", run, "--tokens", 640, "--out", tmp_path)
    assert (result.code, result.err) == (0, "")
    assert "experts" in result.out
    (layer,) = json.loads((tmp_path / "routing.json").read_text())["layers"]
    assert (layer["name"], layer["experts"]) == ("experts", 3)
    assert (tmp_path / "report.html").exists()
