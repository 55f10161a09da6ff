import json
import shutil
from pathlib import Path

import pytest

from myriad import checkpoint
from myriad.analysis.inspection import inspect_run
from myriad.analysis.measure import open_run
from myriad.data.prepare import Recipe, prepare
from myriad.ffn import DenseConfig
from myriad.train import fit
from myriad.train.run import BudgetConfig
from tiny import tiny_model, tiny_run

FILES = {"report.html", "routing.json", "usage.png", "weights.png", "entropy.png", "overlap.png"}


def train(store, folder: Path, **model) -> Path:
    options = {"layers": 1, "d_model": 16, **model}
    fit(tiny_run(store, model=tiny_model(**options), budget=BudgetConfig(steps=8)), folder)
    return folder


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Path:
    return train(store, tmp_path_factory.mktemp("inspect") / "run")


@pytest.fixture
def no_figures(monkeypatch):
    """Saves the time of drawing where a test is not about the figures."""

    def draw(content, path=None, **looks):
        if path is not None:
            path.write_bytes(b"a figure")
        return b"a figure"

    for name in ("expert_usage", "weight_by_rank", "router_entropy", "head_overlap"):
        monkeypatch.setattr(f"myriad.analysis.inspection_report.{name}", draw)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(result, *parts):
    assert (result.code, result.out) == (2, ""), result.err
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("myriad: ")
    assert all(part in result.err for part in parts), result.err


def test_a_trained_run_from_end_to_end(myriad, run, tmp_path):
    before = files(run)
    result = myriad("inspect", run, "--tokens", 640, "--seed", 2, "--out", tmp_path / "a" / "b")
    assert (result.code, result.err) == (0, "")
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == FILES
    assert files(run) == before
    found = inspect_run(open_run(run), limit=640, seed=2)
    written = json.loads((tmp_path / "a" / "b" / "routing.json").read_text())
    command = written.pop("command")
    assert written == json.loads(json.dumps(found.record()))
    assert command == f"myriad inspect {run} --split validation --tokens 640 --seed 2"
    assert written["checkpoint"] == checkpoint.list_checkpoints(run)[-1].name
    (layer,) = found.layers
    for part in ("block 0", "640 tokens of the validation split", f"{layer.usage.unevenness:.3f}", " 64 "):
        assert part in result.out
    assert str(layer.specialties[0].expert) in result.out
    assert found.word(layer.specialties[0].tokens[0].token) in result.out


@pytest.mark.usefixtures("no_figures")
def test_without_a_folder_the_report_goes_into_the_run(myriad, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    before = files(copy)
    assert myriad("inspect", copy, "--tokens", 64, "--split", "train").code == 0
    after = files(copy)
    assert {path.relative_to(copy / "inspect").name for path in after.keys() - before.keys()} == FILES
    assert {path: after[path] for path in before} == before
    assert json.loads((copy / "inspect" / "routing.json").read_text())["split"] == "train"
    assert myriad("eval", copy).code == 0


@pytest.mark.usefixtures("no_figures")
def test_a_run_in_training_is_read_from_its_last_checkpoint(myriad, run, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    for folder in (tmp_path / "run", run / "checkpoints" / "00000008"):
        assert myriad("inspect", folder, "--tokens", 64, "--out", tmp_path / "out").code == 0
        assert json.loads((tmp_path / "out" / "routing.json").read_text())["checkpoint"] == "00000008"


@pytest.mark.usefixtures("no_figures")
def test_a_hugging_face_folder_needs_a_store(myriad, run, store, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(run / name, folder / name)
    assert_refused(myriad("inspect", folder), "does not say what it was trained on; name a store with --data")
    result = myriad("inspect", folder, "--data", store.path, "--tokens", 64, "--out", tmp_path / "out")
    assert result.code == 0
    found = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert found["checkpoint"] is found["config"] is None
    assert found["command"].endswith(f"--data {store.path}")


def test_a_model_without_routed_layers_is_one_line_and_makes_no_folder(myriad, store, tmp_path):
    run = train(store, tmp_path / "dense", ffns={"dense": DenseConfig()}, pattern=["dense"])
    assert_refused(myriad("inspect", run), f"{run}: the model has no routed layers")
    assert not (run / "inspect").exists()


def test_another_tokenizer_is_refused(myriad, run, text, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    other = prepare(Recipe(source=tmp_path / "text.txt", tokenizer="bpe:257"), tmp_path / "other")
    assert_refused(myriad("inspect", run, "--data", other.path), "made with another tokenizer than")
    larger = prepare(Recipe(source=tmp_path / "text.txt", tokenizer="bpe:300"), tmp_path / "larger")
    assert_refused(myriad("inspect", run, "--data", larger.path), "vocabulary of 300 exceeds")


BAD = {
    "a missing split": (["--split", "test"], "has no split 'test'"),
    "no tokens": (["--tokens", 0], "tokens: expected at least 1, found 0"),
    "a negative seed": (["--seed", -1], "seed: expected at least 0, found -1"),
    "a store that is not there": (["--data", "none"], "none: no store here"),
    "a folder that is a file": (["--out", "file"], "--out: file cannot be written"),
    "a folder below a file": (["--out", "file/below"], "--out: file/below cannot be written"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(myriad, run, tmp_path, monkeypatch, name):
    words, part = BAD[name]
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("dear")
    before = files(run)
    assert_refused(myriad("inspect", run, *words), part)
    assert files(run) == before
    assert [path.name for path in Path().iterdir()] == ["file"]
    assert Path("file").read_text() == "dear"


def test_folders_that_hold_no_run_are_refused(myriad, tmp_path):
    assert_refused(myriad("inspect", tmp_path), f"{tmp_path}: holds no model")
    assert_refused(myriad("inspect", tmp_path / "none"), "none: no such run folder")
    assert list(tmp_path.iterdir()) == []


def test_a_text_shorter_than_a_window_is_refused(myriad, run, tmp_path):
    (tmp_path / "text.txt").write_text("short\n" * 20)
    short = prepare(Recipe(source=tmp_path / "text.txt", tokenizer="bytes"), tmp_path / "short")
    assert_refused(myriad("inspect", run, "--data", short.path, "--out", tmp_path / "out"), "needs 33 or more")
    assert not (tmp_path / "out").exists()
