import json
import shlex
from pathlib import Path

import pytest
import yaml

from calling import call_in_a_fresh_process
from myriad import checkpoint, presets
from myriad.data.store import Store
from myriad.train import fit
from myriad.train.record import CLOCK_FIELDS, read_records
from myriad.train.run import DataConfig
from tiny import tiny_model, tiny_run

TINY = [
    "model.context=32",
    "batch.tokens=128",
    "batch.micro_tokens=null",
    "budget.steps=4",
    "evaluation.every=2",
    "evaluation.tokens=256",
]
"""Overrides that make the runs of presets tiny; their models: `tiny_blocks`."""


@pytest.fixture(scope="module")
def config(store, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    run = tiny_run(store, model=tiny_model(layers=1, d_model=16)).model_dump(mode="json")
    path.write_text(yaml.safe_dump(run | {"budget": {"steps": 4}}))
    return path


def figures(run: Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name not in CLOCK_FIELDS}
        for record in read_records(run / "metrics.jsonl")
    ]


def test_a_config_file_trains_as_the_library_does(myriad, config, tmp_path):
    result = myriad("train", config, f"out={tmp_path / 'run'}")
    assert result.code == 0
    assert result.out.startswith(f"{tmp_path / 'run'}: finished after step 4 (budget spent), best validation loss ")
    assert "step 4: validation loss" in result.err
    from myriad.train.run import with_overrides

    fit(with_overrides(yaml.safe_load(config.read_text()), []), tmp_path / "library")
    assert figures(tmp_path / "run") == figures(tmp_path / "library")


def test_quiet_shows_nothing_on_stderr(myriad, config, tmp_path):
    assert myriad("train", config, f"out={tmp_path / 'run'}", "--quiet").err == ""


def test_without_out_the_run_goes_to_runs_and_the_files_name(myriad, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert myriad("train", config).out.startswith("runs/small: finished")
    assert checkpoint.load("runs/small").config.d_model == 16


def tiny_blocks(preset: str) -> list[str]:
    """Overrides that make a preset's blocks tiny, those of one pattern, wherever its model has them."""
    model = presets.get(preset).model.model_dump()
    path, blocks = ("model.expert", model["expert"]) if "expert" in model else ("model", model)
    return [f"{path}.d_model=16", f"{path}.heads=2", f"{path}.layers={len(blocks['pattern'])}"]


@pytest.mark.parametrize("preset", presets.names())
def test_a_preset_with_overrides_trains(myriad, preset, store, tmp_path):
    result = myriad("train", preset, *TINY, *tiny_blocks(preset), f"data.path={store.path}", f"out={tmp_path / 'run'}")
    assert result.code == 0, result.err
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 2, 3, 4, 4]
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recorded["data"] == DataConfig(path=str(store.path)).model_dump(mode="json")
    assert recorded["budget"] == {"steps": 4, "tokens": None, "epochs": None}
    assert recorded["model"]["vocab_size"] == 257


def test_a_run_folder_goes_on_and_another_trains_the_same_from_its_settings(myriad, config, tmp_path):
    run = tmp_path / "run"
    myriad("train", config, f"out={run}")
    result = myriad("train", run, "budget.steps=6", "--resume")
    assert result.code == 0
    assert f"resuming {run} from step 4" in result.err
    assert f"{run}: finished after step 6" in result.out
    again = myriad("train", run, "budget.steps=4", f"out={tmp_path / 'again'}")
    assert again.out.startswith(f"{tmp_path / 'again'}: finished after step 4")
    assert figures(tmp_path / "again")[:3] == figures(run)[:3]


def test_a_source_is_prepared_trained_on_and_evaluated_without_being_named_again(myriad, config, text, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    words = [f"data.source={tmp_path / 'text.txt'}", "data.tokenizer=bpe:300", f"out={tmp_path / 'runs' / 'a'}"]
    assert myriad("train", config, *words).code == 0
    assert checkpoint.load(tmp_path / "runs" / "a").config.vocab_size == 300
    assert myriad("eval", tmp_path / "runs" / "a").code == 0
    newest = checkpoint.list_checkpoints(tmp_path / "runs" / "a")[-1]
    assert myriad("eval", newest).code == 0


def test_prepare_then_train_on_the_store(myriad, config, text, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    result = myriad("data", "prepare", tmp_path / "text.txt", "--tokenizer", "bytes", "--out", tmp_path / "store")
    assert result.code == 0
    assert f"{tmp_path / 'store'}: prepared in" in result.out
    store = Store.open(tmp_path / "store")
    assert f"{store.index.splits['train'].tokens:,}" in result.out
    assert myriad("train", config, f"data.path={tmp_path / 'store'}", f"out={tmp_path / 'run'}").code == 0
    session = json.loads((tmp_path / "run" / "sessions.jsonl").read_text())
    assert session["data"]["train"] == store.split("train").sha256


def test_the_kernels_are_recorded_and_kept_when_resuming(myriad, config, tmp_path):
    run = tmp_path / "run"
    assert myriad("train", config, f"out={run}", "--kernels", "reference").code == 0
    assert myriad("train", run, "budget.steps=6", "--resume").code == 0
    sessions = [json.loads(line) for line in (run / "sessions.jsonl").read_text().splitlines()]
    assert len(sessions) == 2
    assert all("reference" in json.dumps(session["kernels"]) for session in sessions)
    assert sessions[0]["kernels"] == sessions[1]["kernels"]


USERS_MODULE = """
from typing import Literal

from torch import nn

from myriad import FFNConfig, register
from myriad.ffn.base import FFN, Cost, FFNOutput, no_loss


@register
class DoubleConfig(FFNConfig):
    kind: Literal["double"] = "double"
    factor: float = 2.0

    def build(self, d_model):
        return Double(self, d_model)

    def cost(self, d_model):
        return Cost.of_matrix(d_model, d_model)


class Double(FFN):
    def __init__(self, config, d_model):
        super().__init__()
        self.factor = config.factor
        self.mine = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, *, mask=None, with_routing=False):
        return FFNOutput(self.factor * self.mine(x), no_loss(x), {}, ())

    def roles(self):
        return {"mine.weight": "matrix"}
"""


def test_an_imported_module_adds_a_kind_that_yaml_can_name(config, store, tmp_path):
    (tmp_path / "mine.py").write_text(USERS_MODULE)
    settings = yaml.safe_load(config.read_text())
    settings["model"]["ffns"] = {"double": {"kind": "double", "factor": 3.0}}
    settings["model"]["pattern"] = ["double"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    result = call_in_a_fresh_process("--import", "mine", "train", "mine.yaml", "out=run", cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.out.startswith("run: finished after step 4")
    assert any("mine.weight" in name for name in checkpoint.read_weights(tmp_path / "run"))
    without = call_in_a_fresh_process("eval", "run", cwd=tmp_path)
    assert without.code == 2
    assert "unknown kind 'double'" in without.err


def test_the_line_that_resumes_names_the_imported_modules(myriad, config, tmp_path, monkeypatch):
    from myriad.train import loop

    (tmp_path / "nothing_special.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    step = loop.train_step

    def stops(job):
        job.stop_signal = "SIGTERM"
        return step(job)

    monkeypatch.setattr(loop, "train_step", stops)
    run = tmp_path / "a run"
    result = myriad("--import", "nothing_special", "train", config, f"out={run}")
    assert result.code == 0
    line = shlex.split(result.out.split("to continue: ")[1])
    assert line == ["myriad", "--import", "nothing_special", "train", str(run), "--resume"]
    monkeypatch.setattr(loop, "train_step", step)
    assert myriad(*line[1:]).out.startswith(f"{run}: finished after step 4")
