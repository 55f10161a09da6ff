import json
import math
from pathlib import Path

import pytest

from myriad import checkpoint
from myriad.data.prepare import Recipe, prepare
from myriad.data.store import Store, hash_of_hashes
from myriad.evaluate import Perplexity, evaluate
from myriad.ffn import ExpertChoiceConfig
from myriad.train import fit
from myriad.train.run import BudgetConfig
from tiny import tiny_model, tiny_run

KEYS = {
    "token_perplexity",
    "word_perplexity",
    "bits_per_byte",
    "loss",
    "tokens",
    "words",
    "bytes",
    "context",
    "stride",
    "split",
    "data_sha256",
}


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "run"
    fit(tiny_run(store, model=tiny_model(layers=1, d_model=16), budget=BudgetConfig(steps=8)), folder)
    return folder


def measured(run: Path, store: Store, *splits: str, **options) -> Perplexity:
    model = checkpoint.load(run)
    return evaluate(model, [store.split(name) for name in splits], end_id=store.index.end_id, **options)


def read(path: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_json_has_exactly_the_promised_keys_and_the_librarys_figures(myriad, run, store, tmp_path):
    result = myriad("eval", run, "--json", tmp_path / "new" / "figures.json")
    assert (result.code, result.err) == (0, "")
    found = read(tmp_path / "new" / "figures.json")
    assert found.keys() == KEYS
    expected = measured(run, store, "validation")
    assert found == {
        **expected.record(),
        "split": "validation",
        "data_sha256": store.split("validation").sha256,
    }
    assert found["token_perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / found["bytes"] / math.log(2))
    assert found["words"] == store.split("validation").words
    assert (found["context"], found["stride"]) == (32, 16)


def test_what_is_printed_is_what_is_written(myriad, run, tmp_path):
    printed = dict(line.split() for line in myriad("eval", run, "--json", tmp_path / "j.json").out.splitlines())
    written = read(tmp_path / "j.json")
    assert printed.keys() == KEYS
    for name, value in written.items():
        if isinstance(value, float):
            assert float(printed[name]) == pytest.approx(value, rel=1e-5)
        else:
            assert printed[name] == str(value)


def test_all_splits_together_count_every_target_of_each(myriad, run, store, tmp_path):
    figures = {}
    for split in ("train", "validation", "all"):
        assert myriad("eval", run, "--split", split, "--stride", 32, "--json", tmp_path / split).code == 0
        figures[split] = read(tmp_path / split)
    parts = [figures["train"], figures["validation"]]
    for name in ("tokens", "words", "bytes"):
        assert figures["all"][name] == sum(part[name] for part in parts)
    nats = sum(part["loss"] * part["tokens"] for part in parts)
    assert figures["all"]["loss"] == pytest.approx(nats / figures["all"]["tokens"], rel=1e-6)
    assert figures["all"]["data_sha256"] == hash_of_hashes(part["data_sha256"] for part in parts)


def test_context_and_stride_are_used_and_reported(myriad, run, store, tmp_path):
    losses = set()
    for words, context, stride in (
        (("--context", 8), 8, 4),
        (("--context", 8, "--stride", 8), 8, 8),
        (("--stride", 1), 32, 1),
    ):
        assert myriad("eval", run, *words, "--json", tmp_path / "j.json").code == 0
        found = read(tmp_path / "j.json")
        assert (found["context"], found["stride"]) == (context, stride)
        assert found["loss"] == measured(run, store, "validation", context=context, stride=stride).loss
        assert found["tokens"] == measured(run, store, "validation").tokens
        losses.add(found["loss"])
    assert len(losses) == 3


def test_another_store_of_the_same_tokenizer_can_be_named(myriad, run, store, tmp_path):
    (tmp_path / "other.txt").write_text("one two three\n" * 400)
    other = prepare(Recipe(source=tmp_path / "other.txt", tokenizer="bytes"), tmp_path / "other")
    assert myriad("eval", run, "--data", other.path, "--json", tmp_path / "j.json").code == 0
    found = read(tmp_path / "j.json")
    assert found["data_sha256"] == other.split("validation").sha256 != store.split("validation").sha256
    assert found["loss"] == measured(run, other, "validation").loss


def test_a_checkpoint_can_be_measured_as_a_run(myriad, run, tmp_path):
    newest = checkpoint.list_checkpoints(run)[0]
    assert myriad("eval", newest, "--json", tmp_path / "j.json").code == 0
    assert read(tmp_path / "j.json").keys() == KEYS


def test_a_text_without_spaces_gives_valid_json(myriad, run, tmp_path):
    """One word of thousands of bytes: its perplexity exceeds every float."""
    (tmp_path / "wall.txt").write_text("abcdefgh" * 2000)
    wall = prepare(Recipe(source=tmp_path / "wall.txt", tokenizer="bytes"), tmp_path / "wall")
    assert myriad("eval", run, "--data", wall.path, "--split", "train", "--json", tmp_path / "j.json").code == 0
    found = read(tmp_path / "j.json")
    assert found["word_perplexity"] is None
    assert found["bits_per_byte"] > 0


def test_evaluating_changes_nothing_in_the_run_folder(myriad, run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert myriad("eval", run).code == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_training_view_is_marked_as_no_measure_of_quality(myriad, store, tmp_path):
    ffns = {"choice": ExpertChoiceConfig(experts=4, d_expert=16)}
    model = tiny_model(layers=1, d_model=16, ffns=ffns, pattern=["choice"])
    fit(tiny_run(store, model=model, budget=BudgetConfig(steps=4)), tmp_path / "run")
    assert myriad("eval", tmp_path / "run", "--json", tmp_path / "causal.json").code == 0
    result = myriad("eval", tmp_path / "run", "--training-view", "--json", tmp_path / "seen.json")
    assert result.code == 0
    first = result.out.splitlines()[0]
    assert first.split(maxsplit=1) == ["view", "training: sees later tokens, no measure of quality"]
    causal, seen = read(tmp_path / "causal.json"), read(tmp_path / "seen.json")
    assert causal.keys() == KEYS
    assert seen.keys() == KEYS | {"view"}
    assert "no measure of quality" in seen["view"]
    assert seen["loss"] != causal["loss"]


def test_a_causal_model_has_no_training_view(myriad, run, tmp_path):
    result = myriad("eval", run, "--training-view", "--json", tmp_path / "j.json")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "chooses experts causally in training" in result.err
    assert not (tmp_path / "j.json").exists()
