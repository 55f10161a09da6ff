"""`myriad mix`: experts in, a folder that the other commands open."""

import pytest

from myriad.data.cluster import cluster
from myriad.data.clusters import ClusterOptions
from myriad.data.prepare import Recipe, prepare
from myriad.ffn import DenseConfig
from myriad.models import TransformerConfig
from myriad.train import fit
from myriad.train.run import BudgetConfig, DataConfig
from tiny import tiny_run

MODEL = TransformerConfig(context=32, layers=1, d_model=16, heads=2, ffns={"dense": DenseConfig(d_hidden=16)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store, its clusters, and an expert trained on each."""
    folder = tmp_path_factory.mktemp("mix")
    (folder / "texts").mkdir()
    for n in range(40):
        words = ("sail tide wave ", "oven spoon flour ")[n % 2]
        (folder / "texts" / f"{n:02}").write_text(words * 30)
    store = prepare(Recipe(source=folder / "texts", validation=0.2), folder / "store")
    made = cluster(store, folder / "clusters", ClusterOptions(clusters=2, features=7))
    for number in range(2):
        data = DataConfig(path=str(made.store_path(number)))
        run = tiny_run(store, model=MODEL, data=data, budget=BudgetConfig(steps=8))
        fit(run, folder / f"{number}")
    return folder


@pytest.mark.parametrize("routing", ["posterior", "cluster"])
def test_eval_generate_and_inspect_open_a_mixture(myriad, folder, tmp_path, routing):
    out = tmp_path / "mixture"
    words = [folder / "0", folder / "1", "--routing", routing, "--clusters", folder / "clusters", "--top-k", 1]
    result = myriad("mix", *words, "--out", out)
    assert result.code == 0, result.err
    assert result.out.startswith(f"{out}: 2 experts, ")
    result = myriad("eval", out)
    assert result.code == 0, result.err
    assert "bits_per_byte" in result.out
    result = myriad("generate", out, "--prompt", "sail", "--max-tokens", 4)
    assert result.code == 0, result.err
    result = myriad("inspect", out)
    assert result.code == 0, result.err


def test_faults_are_one_line(myriad, folder, tmp_path):
    runs = [folder / "0", folder / "1"]
    faults = [
        ([*runs, "--routing", "posteriors"], "--routing: unknown kind 'posteriors'; did you mean 'posterior'?"),
        ([*runs, "--routing", "cluster"], "--clusters: missing; routing by clusters needs"),
        ([*runs, "--routing", "cluster", "--clusters", folder / "0"], f"{folder / '0'}: no clusters here"),
        ([folder / "0", folder / "2", "--routing", "posterior"], f"{folder / '2'}: no such run folder"),
        ([*runs, "--routing", "posterior", "--data", folder / "9"], f"{folder / '9'}: no store here"),
        ([*runs, "model.layers=3", "--routing", "posterior"], "model.layers: not a setting of the routing"),
        ([*runs, "routing.topk=3", "--routing", "posterior"], "topk: unknown key; did you mean 'top_k'?"),
    ]
    for words, message in faults:
        result = myriad("mix", *words, "--out", tmp_path / "mixture")
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"myriad: {message}"), result.err
        assert not (tmp_path / "mixture").exists()
