"""Whatever is wrong with the input: one clear line or few on stderr, exit code 2, no traceback, nothing lost.

A fault during a run is exit code 1.
"""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from calling import Result, call_in_a_fresh_process
from myriad import checkpoint
from myriad.data.prepare import Recipe, prepare
from myriad.data.store import Store
from myriad.train import fit, loop
from myriad.train.run import BudgetConfig
from tiny import tiny_model, tiny_run


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad-input") / "run"
    fit(tiny_run(store, model=tiny_model(layers=1, d_model=16), budget=BudgetConfig(steps=4)), folder)
    return folder


@pytest.fixture(scope="module")
def words_store(text, tmp_path_factory) -> Store:
    """A store of another tokenizer, with a larger vocabulary."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text(text)
    return prepare(Recipe(source=folder / "text.txt", tokenizer="bpe:300"), folder / "store")


@pytest.fixture(scope="module")
def settings(store) -> dict:
    return tiny_run(store, model=tiny_model(layers=1, d_model=16)).model_dump(mode="json")


@pytest.fixture
def config(settings, tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def damaged(run, tmp_path) -> Path:
    """A copy of the run in which every file of weights is short of its end."""
    copy = tmp_path / "damaged"
    shutil.copytree(run, copy)
    for path in copy.rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    return copy


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def assert_refused(result: Result, *parts: str, code: int = 2, lines: int = 1) -> None:
    assert result.code == code, result.err
    said = result.err.splitlines()
    assert len(said) == lines, result.err
    for line in said:
        assert line.startswith("myriad: "), result.err
        assert len(line) < 1000
    for part in parts:
        assert part in result.err
    assert result.out == ""


# Settings


OVERRIDES = {
    "a misspelt section": (["modle.layers=2"], "modle: unknown key; did you mean 'model'?"),
    "a misspelt key": (["optim.tabel_lr=1"], "optim.tabel_lr: unknown key; did you mean 'table_lr'?"),
    "a misspelt key of a layer": (
        ["model.ffns.peer.expert=4"],
        "model.ffns.peer.expert: unknown key; did you mean 'experts'?",
    ),
    "an unknown kind": (["model.ffns.peer.kind=per"], "model.ffns.peer.kind: unknown kind 'per'; did you mean 'peer'?"),
    "a kind that is no word": (["model.ffns.peer.kind=[]"], "model.ffns.peer.kind: unknown kind []"),
    "a layer that is not there": (["model.pattern=[pear]"], "pear"),
    "a wrong type": (["model.layers=many"], "model.layers: expected a valid integer", 'found "many"'),
    "a number out of range": (["optim.lr=-1"], "optim.lr: expected greater than 0, found -1"),
    "infinity": (["optim.lr=.inf"], "optim.lr: expected a finite number"),
    "a fraction of a step": (["budget.steps=1.5"], "budget.steps: expected a valid integer"),
    "a yes for a word": (["train.precision=off"], "train.precision", "put the word in quotes"),
    "a misspelt word": (["train.precision=bfloat"], "train.precision", "did you mean 'bfloat16'?"),
    "two budgets": (["budget.steps=3", "budget.tokens=4"], "budget.steps and budget.tokens: only one"),
    "no budget": (["budget=null"], "budget: expected"),
    "two places of data": (["data.path=a", "data.source=b"], "data.path and data.source: only one"),
    "a key below a value": (["seed.x=1"], "seed.x: seed is a plain value and holds no 'x'"),
    "an index that is no number": (["model.pattern.x=peer"], "model.pattern.x: 'x' is not an index"),
    "a word without a value": (["seed"], "'seed': expected key.path=value"),
    "an empty path": (["=3"], "'=3': expected key.path=value"),
    "a value that is not YAML": (["out=[1"], "'out=[1': the value is not YAML"),
    "a date that cannot be": (["out=2024-13-45"], "'out=2024-13-45': the value is not YAML"),
    "a value nested too deeply": (["out=" + "[" * 900], "the value is not YAML"),
    "a batch that windows do not fill": (["batch.tokens=100"], "batch", "model.context = 32"),
    "experts that are no square": (["model.ffns.peer.experts=10"], "experts", "9"),
    "heads that do not divide": (["model.heads=3"], "heads"),
    "a vocabulary that does not fit": (["model.vocab_size=100"], "model.vocab_size: 100", "vocabulary of 257"),
    "an unknown kernel": (["--kernels", "nope"], "kernels 'nope' are not available", "reference"),
    "a store that is not there": (["data.path=none"], "none: no store here"),
    "a source that is not there": (["data.source=none.txt"], "none.txt: no such file or folder"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_train_refuses_settings_that_cannot_be(myriad, config, tmp_path, monkeypatch, name):
    words, *parts = OVERRIDES[name]
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert_refused(myriad("train", config, "out=run", "--quiet", *words), *parts)
    assert contents(tmp_path) == before


def test_two_budgets_in_one_file_are_refused(myriad, settings, tmp_path):
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings | {"budget": {"steps": 1, "tokens": 2}}))
    assert_refused(myriad("train", tmp_path / "two.yaml"), "budget: expected exactly one of", "found steps and tokens")


def test_every_fault_of_a_file_has_its_line(myriad, settings, tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(settings | {"sede": 1, "optmi": {}, "bugdet": {}}))
    result = myriad("config", "show", tmp_path / "bad.yaml")
    assert_refused(result, "sede: unknown key; did you mean 'seed'?", "'optim'", "'budget'", lines=3)


FILES = {
    "a list": (b"- a\n- b\n", "expected a mapping of settings, found list"),
    "nothing": (b"", "expected a mapping of settings, found NoneType"),
    "a word": (b"hello", "expected a mapping of settings, found str"),
    "binary garbage": (bytes(range(256)) * 4, "cannot be read"),
    "control characters": (b"a: \x00\x01\x02", "not YAML"),
    "half of a mapping": (b"model: {context: 3", "not YAML"),
    "a Python object": (b"model: !!python/object/apply:os.system ['touch pwned']", "not YAML"),
    "an impossible date": (b"out: 2024-13-45", "not YAML"),
    "an endless nest": (b"[" * 20_000, "not YAML"),
    "a mapping that holds itself": (b"model: &a\n  ffns: *a\n", "model"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verb", [("train",), ("config", "show")])
def test_a_file_that_holds_no_settings_is_refused(myriad, tmp_path, monkeypatch, name, verb):
    content, part = FILES[name]
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_bytes(content)
    result = myriad(*verb, "config.yaml")
    assert_refused(result, part, lines=max(1, len(result.err.splitlines())))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("verb", [("train",), ("config", "show")])
def test_a_target_that_is_nothing_is_refused_with_the_nearest_preset(myriad, tmp_path, verb):
    assert_refused(myriad(*verb, "demo-per"), "'demo-per': neither a preset, a file nor a run folder", "'demo-peer'")
    assert_refused(myriad(*verb, tmp_path / "none.yaml"), f"{tmp_path / 'none.yaml'}: no such file")
    assert_refused(myriad(*verb, tmp_path), f"{tmp_path / 'run.json'}: no such file")


# Text and stores


SOURCES = {
    "a missing file": (None, "no such file or folder"),
    "an empty text": (b"", "holds no text"),
    "text that is not UTF-8": (b"caf\xe9 \xff\xfe\n" * 50, "UTF-8"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_prepare_refuses_text_that_is_none(myriad, tmp_path, name):
    content, part = SOURCES[name]
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    words = [tmp_path / "text.txt", "--tokenizer", "bytes", "--out", tmp_path / "store"]
    assert_refused(myriad("data", "prepare", *words), str(tmp_path / "text.txt"), part)
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else ["text.txt"])


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:", "bpe:x", "bpe:-5", "bpe:10", "none.json", "text.txt"])
def test_prepare_refuses_a_tokenizer_that_is_none(myriad, tmp_path, monkeypatch, text, tokenizer):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text)
    assert_refused(myriad("data", "prepare", "text.txt", "--tokenizer", tokenizer, "--out", "store"))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_prepare_overwrites_nothing(myriad, tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    before = contents(tmp_path)
    for out in ("mine", "text.txt"):
        words = [tmp_path / "text.txt", "--tokenizer", "bytes", "--out", tmp_path / out]
        assert_refused(myriad("data", "prepare", *words), f"{tmp_path / out}: exists and is not an empty folder")
    assert contents(tmp_path) == before


def test_a_damaged_store_is_refused(myriad, config, store, tmp_path):
    copy = tmp_path / "copy"
    for file, content in (("index.json", b"{}"), ("train-00000.bin", b"x"), ("tokenizer.json", b"{}")):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(store.path, copy)
        (copy / file).write_bytes(content)
        assert_refused(myriad("train", config, f"data.path={copy}", f"out={tmp_path / 'run'}"), file, "damaged")
    (copy / "index.json").unlink()
    assert_refused(myriad("train", config, f"data.path={copy}", f"out={tmp_path / 'run'}"), f"{copy}: no store here")
    assert not (tmp_path / "run").exists()


def test_a_run_without_validation_text_is_refused(myriad, config, store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    train_alone = {"train": store.index.splits["train"]}
    store.index.model_copy(update={"splits": train_alone}).write(copy)
    result = myriad("train", config, f"data.path={copy}", f"out={tmp_path / 'run'}")
    assert_refused(result, f"{copy}: has no split 'validation' (it has train)")
    assert not (tmp_path / "run").exists()


# Runs


def test_a_folder_that_holds_a_run_is_not_overwritten(myriad, config, run):
    before = contents(run)
    assert_refused(myriad("train", config, f"out={run}"), f"{run}: already holds a run; --resume continues it")
    assert_refused(myriad("train", run), f"{run}: already holds a run")
    assert_refused(myriad("train", run, "--resume", "seed=5"), "seed", "5 instead of 0")
    assert contents(run) == before


def test_resuming_on_other_data_is_refused(myriad, run, tmp_path):
    (tmp_path / "other.txt").write_text("another text\n" * 500)
    other = prepare(Recipe(source=tmp_path / "other.txt", tokenizer="bytes"), tmp_path / "other")
    assert_refused(myriad("train", run, "--resume", f"data.path={other.path}"), "data")


def test_an_out_that_is_a_file_is_refused(myriad, config, tmp_path):
    (tmp_path / "file").write_text("dear")
    result = myriad("train", config, f"out={tmp_path / 'file'}")
    assert_refused(result, str(tmp_path / "file"), code=result.code)
    assert result.code in (1, 2)
    assert (tmp_path / "file").read_text() == "dear"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(myriad, config, tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "sealed").mkdir(mode=0o500)
    assert_refused(myriad("train", config, f"out={tmp_path / 'sealed' / 'run'}"), "sealed", code=1)
    words = [tmp_path / "text.txt", "--tokenizer", "bytes", "--out", tmp_path / "sealed" / "store"]
    assert_refused(myriad("data", "prepare", *words), "sealed")


def test_a_damaged_run_is_refused_by_every_verb_and_left_as_it_is(myriad, damaged):
    before = contents(damaged)
    weights = "checkpoints/00000004/model.safetensors: damaged"
    assert_refused(myriad("eval", damaged), f"{damaged}/{weights}")
    assert_refused(myriad("generate", damaged, "--prompt", "a"), f"{damaged}/{weights}")
    resumed = myriad("train", damaged, "--resume", "--quiet")
    assert_refused(resumed, "none of its checkpoints is intact")
    assert contents(damaged) == before


@pytest.mark.parametrize("name", ["index.json", "run.json"])
def test_a_run_whose_own_description_is_damaged_is_refused(myriad, run, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for path in copy.rglob(name):
        path.write_bytes(path.read_bytes()[:-30])
    for words in (("eval", copy), ("generate", copy, "--prompt", "a")):
        assert_refused(myriad(*words), f"{name}: damaged")


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_folders_that_hold_no_run_are_refused(myriad, tmp_path, verb):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    assert_refused(myriad(verb, tmp_path / "empty"), "empty: holds no model")
    assert_refused(myriad(verb, tmp_path / "none"), "none: no such run folder")
    assert_refused(myriad(verb, tmp_path / "other"), "other/config.json", "not a model of Myriad")


EVALUATIONS = {
    "a missing split": (["--split", "test"], "has no split 'test'"),
    "a context too large": (["--context", 33], "context: expected 1 to 32"),
    "no context": (["--context", 0], "context: expected 1 to 32"),
    "a stride too large": (["--context", 8, "--stride", 9], "stride: expected 1 to 8"),
    "no stride": (["--stride", 0], "stride: expected 1 to 32"),
    "a store that is not there": (["--data", "none"], "none: no store here"),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_eval_refuses_what_cannot_be(myriad, run, tmp_path, monkeypatch, name):
    words, part = EVALUATIONS[name]
    monkeypatch.chdir(tmp_path)
    assert_refused(myriad("eval", run, *words, "--json", "figures.json"), part)
    assert not Path("figures.json").exists()


def test_eval_refuses_a_store_of_another_tokenizer_or_vocabulary(myriad, run, words_store, tmp_path, text):
    assert_refused(myriad("eval", run, "--data", words_store.path), "vocabulary of 300 exceeds")
    (tmp_path / "text.txt").write_text(text[::-1])
    one = prepare(Recipe(source=tmp_path / "text.txt", tokenizer="bpe:300"), tmp_path / "one")
    fit(tiny_run(words_store, model=tiny_model(layers=1, d_model=16), budget=BudgetConfig(steps=1)), tmp_path / "run")
    assert_refused(myriad("eval", tmp_path / "run", "--data", one.path), "made with another tokenizer")


def test_eval_of_a_run_whose_store_is_gone_asks_for_one(myriad, text, settings, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    store = prepare(Recipe(source=tmp_path / "text.txt", tokenizer="bytes"), tmp_path / "store")
    fit(tiny_run(store, model=tiny_model(layers=1, d_model=16), budget=BudgetConfig(steps=1)), tmp_path / "run")
    shutil.rmtree(store.path)
    assert_refused(myriad("eval", tmp_path / "run"), f"{store.path}: the store that", "name one with --data")


GENERATIONS = {
    "no top_p": (["--top-p", 0], "top_p: expected more than 0 and at most 1, found 0"),
    "too large a top_p": (["--top-p", 1.5], "top_p: expected more than 0 and at most 1, found 1.5"),
    "a top_p that is no number": (["--top-p", "nan"], "top_p: expected"),
    "a negative temperature": (["--temperature", -1], "temperature: expected a finite number of at least 0, found -1"),
    "an infinite temperature": (["--temperature", "inf"], "temperature: expected a finite number"),
    "a negative top_k": (["--top-k", -1], "top_k: expected at least 0, found -1"),
    "no tokens": (["--max-tokens", 0], "max_tokens: expected at least 1, found 0"),
    "a negative seed": (["--seed", -1], "seed: expected"),
    "too long a prompt": (["--prompt", "x" * 40], "a prompt of 41 tokens leaves no room"),
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_generate_refuses_what_cannot_be(myriad, run, name):
    words, part = GENERATIONS[name]
    assert_refused(myriad("generate", run, *words), part)


USAGE = [
    ["eval"],
    ["eval", "RUN", "--split", "tset"],
    ["eval", "RUN", "--context", "many"],
    ["generate", "RUN", "--temprature", "1"],
    ["data", "prepare", "text.txt"],
    ["nothing"],
]


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_words_that_the_command_line_does_not_know_are_usage_errors(myriad, words):
    result = myriad(*words)
    assert result.code == 2
    assert "Usage: " in result.err
    assert "Traceback" not in result.err + result.out


def test_an_import_that_fails_is_refused(myriad, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert_refused(myriad("--import", "no_such_module", "presets"), "--import no_such_module: No module named")


# Faults during a run


def test_a_loss_that_stays_infinite_is_code_1_and_keeps_the_last_checkpoint(myriad, config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert myriad("train", config, "budget.steps=4", f"out={run}").code == 0
    monkeypatch.setattr(loop, "clip_gradients", lambda parameters, largest: __import__("torch").tensor(float("nan")))
    before = (run / "model.safetensors").read_bytes()
    result = myriad("train", run, "--resume", "budget.steps=40", "train.max_skipped=3", "--quiet")
    assert_refused(result, "stopped at step 7", "not finite in 3 updates in a row", code=1)
    assert (run / "model.safetensors").read_bytes() == before
    checkpoint.load(run)


def test_a_full_disk_is_code_1_and_the_run_goes_on_when_there_is_room(myriad, config, tmp_path):
    import resource

    run = tmp_path / "run"
    assert myriad("train", config, "budget.steps=4", f"out={run}").code == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for largest in (1000, 5000, 20_000):  # of bytes in a file: `config.json`, then the weights, then the moments fail
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
        try:
            result = myriad("train", run, "--resume", "budget.steps=8", "--quiet")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_refused(result, "File too large", code=1)
        assert [int(folder.name) for folder in checkpoint.list_checkpoints(run)] == [4]
        checkpoint.load(run)
    assert myriad("train", run, "--resume", "budget.steps=8", "--quiet").code == 0
    assert [int(folder.name) for folder in checkpoint.list_checkpoints(run)] == [4, 8]


# As a user sees it


def test_the_real_command_says_one_line_and_no_library_adds_its_own(run, tmp_path):
    """The command that loads the most libraries."""
    words = ("generate", run, "--prompt", "x" * 40)
    assert_refused(call_in_a_fresh_process(*words, cwd=tmp_path), "leaves no room")
    assert list(tmp_path.iterdir()) == []
