"""`myriad compare` on a small text: figures, files, resuming, and what it refuses."""

import csv
import io
import json
import re
import shlex
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from comparing import write_list

from calling import Result
from myriad import presets
from myriad.analysis.compare import conduct
from myriad.cli import main
from myriad.cli.compare import resolve_contenders
from myriad.config import ConfigError
from myriad.data.prepare import Recipe, prepare
from myriad.train import loop
from myriad.train.record import read_records

CLOCK = {"tokens_per_second", "seconds", "peak_bytes", "sessions", "command"}
BUDGETS = ("--budget", "1.5e8flops", "--budget", "3e8flops")


class NoCurve:
    """In place of the learning curve of each run, whose drawing takes longer than these runs."""

    def __init__(self, *_: object) -> None: ...
    def log(self, record: object) -> None: ...
    def close(self) -> None: ...


def no_figure(content: object, path: Path | None = None, **looks: object) -> bytes:
    return b"a figure"


@pytest.fixture(autouse=True)
def plain_figures(monkeypatch):
    """Saves the time of drawing; one plot is drawn in the comparison below."""
    monkeypatch.setattr(conduct, "LearningCurve", NoCurve)
    monkeypatch.setattr("myriad.analysis.plots.loss_against_flops", no_figure)
    monkeypatch.setattr("myriad.analysis.compare.page.loss_against_flops", no_figure)
    monkeypatch.setattr("myriad.analysis.report.expert_usage", no_figure)


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory) -> Path:
    """Holds the files of a small comparison."""
    folder = tmp_path_factory.mktemp("compare")
    write_list(folder, store)
    return folder


@pytest.fixture(scope="module")
def compared(folder) -> tuple[Path, Result]:
    """A comparison on two budgets over two seeds, and what it said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct, "LearningCurve", NoCurve)
        patch.setattr("myriad.analysis.compare.page.loss_against_flops", no_figure)
        patch.setattr("myriad.analysis.report.expert_usage", no_figure)
        words = ["compare", str(folder / "list.yaml"), *BUDGETS, "--seeds", "2", "--out", str(folder / "out")]
        patch.setattr(sys, "argv", ["myriad", *words])
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code
    assert code in (0, None), err.getvalue()
    return folder / "out", Result(0, out.getvalue(), err.getvalue())


def figures(out: Path) -> dict:
    """All that a comparison found, without what the clock and the machine say."""

    def strip(tree):
        if isinstance(tree, dict):
            return {key: strip(value) for key, value in tree.items() if key not in CLOCK}
        return [strip(value) for value in tree] if isinstance(tree, list) else tree

    return strip(json.loads((out / "results.json").read_text()))


def test_it_leaves_a_table_a_plot_a_report_and_every_config(compared, folder):
    out, said = compared
    names = {"results.md", "results.csv", "results.json", "report.html", "loss-against-flops.png", "plan.json"}
    assert names <= {path.name for path in out.iterdir()}
    assert {path.stem for path in (out / "configs").iterdir()} == {"peer", "dense"}
    assert (out / "loss-against-flops.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["contender"], row["budget"]) for row in rows] == [
        ("peer", "1.5e8flops"),
        ("dense", "1.5e8flops"),
        ("peer", "3e8flops"),
        ("dense", "3e8flops"),
    ]
    for row in rows:
        assert float(row["bits_per_byte"]) > 0
        assert float(row["bits_per_byte_deviation"]) > 0
        assert float(row["tokens_per_second"]) > 0
        assert row["seeds"] == "2"
        assert row["reference"] == "dense"
    page = (out / "report.html").read_text()
    for row in rows:
        bits, deviation = float(row["bits_per_byte"]), float(row["bits_per_byte_deviation"])
        cell = f'<td class="decisive">{bits:.4f} ± {deviation:.4f}</td>'
        assert re.search(rf'<th scope="row">{row["contender"]}</th>\s*{cell}', page)
    for run in json.loads((out / "results.json").read_text())["runs"]:
        assert run["config"] in page
    assert "<script" not in page
    assert "1.5e8flops per run" in page
    assert "bits per byte" in said.out
    assert "vs dense" in said.out
    assert said.err.count("of held-out text\n") == 8


def test_equal_compute_buys_each_its_tokens(compared):
    standings = json.loads((compared[0] / "results.json").read_text())["standings"]
    for one in standings:
        budget = float(one["budget"].removesuffix("flops"))
        step = 3 * one["flops_per_token"] * 128
        assert budget <= one["training_flops"] < budget + step
    peer, dense = standings[:2]
    assert peer["routing_share"] > 0 == dense["routing_share"]
    assert peer["flops_per_token"] != dense["flops_per_token"]
    assert peer["training_tokens"] != dense["training_tokens"]


def test_runs_of_one_seed_see_the_same_windows_and_each_budget_has_its_own_schedule(compared):
    runs = compared[0] / "runs"
    lr = {}
    for budget in ("1.5e8flops", "3e8flops"):
        records = list(read_records(runs / f"dense-{budget}-seed1" / "metrics.jsonl"))
        lr[budget] = [record["lr"] for record in records if record["kind"] == "train"]
    assert len(lr["1.5e8flops"]) < len(lr["3e8flops"])
    assert all(rates[-1] < 0.3 * max(rates) for rates in lr.values())
    settings = json.loads((runs / "peer-3e8flops-seed1" / "run.json").read_text())
    assert settings["seed"] == 1


def test_called_again_it_trains_nothing_anew(compared, folder, myriad, monkeypatch):
    out, _ = compared
    before = figures(out)
    monkeypatch.setattr(conduct, "fit", None)
    monkeypatch.setattr(conduct, "measure_run", None)
    said = myriad("compare", folder / "list.yaml", *BUDGETS, "--seeds", 2, "--out", out)
    assert said.code == 0, said.err
    assert said.err.count("(finished before)") == 8
    assert figures(out) == before


def test_seeds_can_be_added_later_and_what_is_finished_stays(compared, folder, myriad, tmp_path, monkeypatch):
    step, out, trained = loop.train_step, tmp_path / "out", set()
    shutil.copytree(compared[0], out)

    def notes(job):
        trained.add(job.folder.name)
        return step(job)

    monkeypatch.setattr(loop, "train_step", notes)
    said = myriad("compare", folder / "list.yaml", *BUDGETS, "--seeds", 3, "--out", out)
    assert said.code == 0, said.err
    assert trained == {f"{name}-{budget}-seed2" for name in ("peer", "dense") for budget in BUDGETS[1::2]}
    before, after = figures(compared[0])["runs"], figures(out)["runs"]
    assert len(after) == 12
    assert [run for run in after if run["seed"] < 2] == before
    assert "over 3 seeds" in said.out


class Killed(BaseException):
    """Ends the process at once, as nothing catches it."""


def test_a_killed_comparison_goes_on_to_the_same_figures(compared, folder, myriad, tmp_path, monkeypatch):
    step, out, name = loop.train_step, tmp_path / "out", "dense-1.5e8flops-seed0"
    words = ("compare", folder / "list.yaml", "--budget", "1.5e8flops", "--seeds", 1, "--out", out)

    def kills(job):
        if job.folder.name == name and job.progress.step == 5:
            raise Killed
        return step(job)

    monkeypatch.setattr(loop, "train_step", kills)
    monkeypatch.setattr(sys, "argv", ["myriad", *map(str, words)])
    with pytest.raises(Killed):
        main()
    assert not (out / "results.json").exists()
    monkeypatch.setattr(loop, "train_step", step)
    said = myriad(*words)
    assert said.code == 0, said.err
    assert "peer-1.5e8flops-seed0: " in said.err
    assert said.err.count("(finished before)") == 1
    assert f"resuming {out / 'runs' / name} from step 4" in said.err
    whole = {(run["name"], run["budget"], run["seed"]): run for run in figures(compared[0])["runs"]}
    found = figures(out)["runs"]
    assert len(found) == 2
    for run in found:
        assert run == whole[run["name"], run["budget"], run["seed"]]


def test_a_signal_saves_and_says_how_to_go_on(folder, myriad, tmp_path, monkeypatch):
    step, out = loop.train_step, tmp_path / "out"
    calls = []

    def stops(job):
        calls.append(job)
        if len(calls) == 9:
            job.stop_signal = "SIGTERM"
        return step(job)

    monkeypatch.setattr(loop, "train_step", stops)
    said = myriad("compare", folder / "list.yaml", "--seeds", 1, "--out", out)
    assert said.code == 0, said.err
    assert f"{out / 'runs' / 'dense-768tokens-seed0'}: saved (SIGTERM at step 3); to continue: " in said.out
    line = shlex.split(said.out.split("to continue: ")[1])
    assert line == ["myriad", "compare", str(folder / "list.yaml"), "--seeds", "1", "--out", str(out)]
    again = myriad(*line[1:])
    assert "resuming" in again.err
    assert "one seed each" in again.out
    assert len(calls) == 12


def test_a_sweep_records_its_trials_and_carries_the_best_on(folder, myriad, tmp_path):
    out = tmp_path / "out"
    words = ("--budget", "1280tokens", "--seeds", 1, "--sweep-lr", "--out", out)
    said = myriad("compare", folder / "list.yaml", *words)
    assert said.code == 0, said.err
    found = json.loads((out / "results.json").read_text())
    assert [trial["multiplier"] for trial in found["sweep"]] == [0.5, 1.0, 2.0] * 2
    assert all(trial["tokens"] == 256 for trial in found["sweep"])
    for name in ("peer", "dense"):
        trials = [trial for trial in found["sweep"] if trial["contender"] == name]
        best = min(trials, key=lambda trial: trial["best_validation_loss"])
        assert [trial["chosen"] for trial in trials] == [trial is best for trial in trials]
        run = json.loads((out / "runs" / f"{name}-1280tokens-seed0" / "run.json").read_text())
        assert run["optim"]["lr"] == pytest.approx(0.01 * best["multiplier"])
    assert "Learning rates" in (out / "report.html").read_text()


def test_a_run_that_diverges_is_told_and_the_others_go_on(folder, myriad, tmp_path, monkeypatch):
    real = conduct.fit

    def diverges(run, out, **options):
        if out.name == "peer-768tokens-seed1":
            out.mkdir()
            raise conduct.DivergedError("stopped at step 3: the loss is not finite")
        return real(run, out, **options)

    monkeypatch.setattr(conduct, "fit", diverges)
    out = tmp_path / "out"
    said = myriad("compare", folder / "list.yaml", "--seeds", 2, "--out", out)
    assert said.code == 0, said.err
    assert "No verdict on peer and dense: 1 of peer's runs diverged." in said.out
    found = json.loads((out / "results.json").read_text())
    assert [(each["contender"], each["seed"]) for each in found["diverged"]] == [("peer", 1)]
    assert len(found["runs"]) == 3
    assert "stopped at step 3" in (out / "report.html").read_text()


# What names contenders


def test_a_family_of_presets_is_named_by_its_first_part():
    found = resolve_contenders(["demo"], ["budget.tokens=5e3"])
    assert list(found) == [name for name in presets.names() if name.startswith("demo-")]
    assert {run.budget.tokens for run in found.values()} == {5000}


def test_presets_files_and_run_folders_mix(folder, tmp_path):
    shutil.copy(folder / "small.yaml", tmp_path / "mine.yaml")
    found = resolve_contenders(["enwik8-dense", str(tmp_path / "mine.yaml"), str(folder / "list.yaml")], ["seed=3"])
    assert list(found) == ["enwik8-dense", "mine", "peer", "dense"]
    assert {run.seed for run in found.values()} == {3}
    assert all(run.out is None for run in found.values())


def test_help_says_what_it_does(myriad):
    said = myriad("compare", "--help")
    assert said.code == 0
    for part in ("--budget", "--sweep-lr", "--allow", "LIST.yaml"):
        assert part in said.out


# What is refused


@pytest.fixture
def other_store(text, tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(text)
    return prepare(Recipe(source=tmp_path / "text.txt", tokenizer="bpe:300"), tmp_path / "other").path


BAD = {
    "no such contender": (["demo-per", "demo-dense"], "'demo-per': neither a preset", "did you mean 'demo-peer'?"),
    "one contender": (["demo-peer"], "contenders: expected two or more, found demo-peer"),
    "the same twice": (["demo-peer", "demo-peer"], "contenders: two are called 'demo-peer'"),
    "no seeds": (["LIST", "--seeds", "0"], "--seeds: expected 1 or more, found 0"),
    "no jobs": (["LIST", "--jobs", "0"], "--jobs: expected 1 or more, found 0"),
    "fewer than none": (["LIST", "--jobs", "-2"], "--jobs: expected 1 or more, found -2"),
    "an unknown unit": (["LIST", "--budget", "1e9flop"], "--budget: unknown unit 'flop'; did you mean 'flops'?"),
    "no unit": (["LIST", "--budget", "1e9"], "--budget: expected a number with a unit"),
    "no number": (["LIST", "--budget", "many"], "--budget: expected a number with a unit"),
    "nothing": (["LIST", "--budget", "0tokens"], "--budget: expected 1 to 9e18, found 0"),
    "a budget twice": (["LIST", "--budget", "1e9flops", "--budget", "10e8flops"], "--budget: one is named twice"),
    "a budget below a step": (["LIST", "--budget", "100tokens"], "--budget: 100tokens are 100 tokens of peer"),
    "compute below a step": (["LIST", "--budget", "1e6flops"], "--budget: 1e6flops are", "less than a step"),
    "a sweep below a step": (["LIST", "--sweep-lr", "--budget", "600tokens"], "--sweep-lr: 0.2 of the largest budget"),
    "unequal contexts": (["LIST", "LONG"], "model.context: 32 in peer, 64 in long", "--allow model.context"),
    "unequal schedules": (["LIST", "WARM"], "optim.warmup: 5 in peer, 9 in warm", "--allow optim.warmup"),
    "unequal text": (["LIST", "SOURCE"], "data.source: None in peer, python in source", "the same tokens"),
    "unequal tokenizers": (
        ["LIST", "OTHER"],
        "data.path: peer and other have different tokenizers (bytes and bpe:300)",
    ),
    "unequal budgets": (["LIST", "LONGER"], "--budget: missing; the contenders' own are not equally many tokens"),
    "early stopping": (["LIST", "early_stopping.patience=2"], "early_stopping.patience: peer would not spend"),
    "an unknown condition": (["LIST", "--allow", "model.contxt"], "--allow: 'model.contxt'", "'model.context'"),
    "other text allowed": (["LIST", "--allow", "data.source"], "--allow: 'data.source'", "cannot be compared"),
    "a misspelt setting": (["LIST", "optim.wramup=3"], "optim.wramup: unknown key; did you mean 'warmup'?"),
}
CHANGES = {
    "LONG": "model.context=64 batch.tokens=128",
    "WARM": "optim.warmup=9",
    "SOURCE": "data.source=python data.tokenizer=bytes",
    "OTHER": "data.path={other} model.vocab_size=null",
    "LONGER": "budget.steps=7",
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    name, folder, myriad, tmp_path, monkeypatch, request
):
    words, *parts = BAD[name]
    monkeypatch.setattr(conduct, "fit", None)
    shutil.copy(folder / "small.yaml", tmp_path)
    lists = {"LIST": str(folder / "list.yaml")}
    for key in CHANGES.keys() & set(words):
        other = request.getfixturevalue("other_store") if key == "OTHER" else ""
        text = {"contenders": {key.lower(): f"small.yaml {CHANGES[key].format(other=other)}"}}
        lists[key] = str(tmp_path / f"{key}.yaml")
        Path(lists[key]).write_text(yaml.safe_dump(text))
    said = myriad("compare", *(lists.get(word, word) for word in words), "--out", tmp_path / "out")
    assert said.code == 2, said.err
    assert len(said.err.splitlines()) == 1, said.err
    for part in parts:
        assert part in said.err
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--seeds", "1"], "seeds: 1 instead of 2"),
        (["--seeds", "3", "--budget", "5e8flops", "optim.lr=0.02"], "contenders.dense.optim.lr: 0.02 instead of 0.01"),
        (["--seeds", "2", "--sweep-lr"], "sweep_lr: true instead of false"),
    ],
)
def test_another_comparison_in_the_folder_is_refused(words, difference, compared, folder, myriad):
    out, _ = compared
    before = (out / "plan.json").read_bytes()
    said = myriad("compare", folder / "list.yaml", *BUDGETS, *words, "--out", out)
    assert said.code == 2
    assert said.err.startswith(f"myriad: --out: {out} holds another comparison ({difference}")
    assert len(said.err.splitlines()) == 1
    assert (out / "plan.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(folder, myriad, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    said = myriad("compare", folder / "list.yaml", "--out", tmp_path)
    assert said.code == 2
    assert "holds something else (thesis.txt)" in said.err
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"contenders": []}, "expected `contenders`, a mapping of names"),
        ({"contenders": {"a": "demo-peer"}, "seeds": 3}, "and nothing beside it"),
        ({"contenders": {"a": 3}}, "contenders.a: expected a preset or a file"),
        ({"contenders": {"a": "optim.lr=1"}}, "contenders.a: expected a preset or a file"),
        ({"contenders": {"a": "demo-peer 'b=c"}}, "contenders.a: No closing quotation"),
        ({"contenders": {"a/b": "demo-peer", "c": "demo-dense"}}, "contenders: 'a/b' is no name"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(content, part, tmp_path, myriad):
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(content))
    said = myriad("compare", tmp_path / "list.yaml", "--out", tmp_path / "out")
    assert said.code == 2
    assert part in said.err
    assert not (tmp_path / "out").exists()


def test_under_torchrun_it_is_refused(folder, myriad, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "trains each run in one process" in myriad("compare", folder / "list.yaml", "--out", tmp_path / "out").err


def test_a_list_is_read_from_where_it_stands(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(resolve_contenders([str(folder / "list.yaml")], [])) == ["peer", "dense"]
    with pytest.raises(ConfigError, match="no such file"):
        resolve_contenders(["list.yaml"], [])
