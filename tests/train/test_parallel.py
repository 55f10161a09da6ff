"""Several processes give the run that one gives, and end together: under torchrun, or started as it starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from calling import Result
from forking import Ranks, Server
from myriad.checkpoint import list_checkpoints, load
from myriad.data.store import Store
from myriad.ffn import DenseConfig, ExpertChoiceConfig, PEERConfig, StackConfig, TableConfig, TokenChoiceConfig
from myriad.train import fit, with_overrides
from myriad.train.record import CLOCK_FIELDS, read_records
from tiny import tiny_model, tiny_run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHELASTIC_ERROR_FILE": ""}
PEERS = StackConfig(
    layers=[
        PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8),  # dense gradients
        *2 * [PEERConfig(experts=64**2, heads=2, experts_per_head=1, d_key=8, table="pool")],  # sparse ones, added up
    ]
)
TABLES = {"pool": TableConfig(rows=64**2, parts=["down", "up"])}


@pytest.fixture(scope="module")
def config(store, tmp_path_factory) -> Path:
    """A run with tables of both kinds of gradient, one of them shared, a dense layer, a mixture balanced both ways, and
    micro-batches."""
    tokens = TokenChoiceConfig(experts=4, d_expert=8, shared_experts=1, balance_bias=0.01)
    ffns = {"peers": PEERS, "dense": DenseConfig(d_hidden=32), "tokens": tokens}
    model = tiny_model(layers=3, ffns=ffns, pattern=["peers", "dense", "tokens"], tables=TABLES)
    raw = tiny_run(store, model=model).model_dump(mode="json")
    raw["batch"] = {"tokens": 512, "micro_tokens": 256}
    path = tmp_path_factory.mktemp("parallel") / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def torchrun(processes: int, *words: object) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # a free port: tests run side by side
    command = [*launcher, "-m", "myriad", "train", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finish(process: subprocess.Popen) -> str:
    """What a launcher that must succeed wrote to stdout."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "myriad:" not in error
    return out


def said(results: list[Result]) -> list[str]:
    """The lines that Myriad wrote to stderr."""
    return [line for result in results for line in result.err.splitlines() if line.startswith("myriad:")]


def run_to_the_end(server: Server, processes: int, *words: object) -> str:
    results = Ranks(server, processes, "train", *words).wait()
    assert [result.code for result in results] == [0] * processes, results
    assert said(results) == []
    return "".join(result.out for result in results)


def figures(run: Path) -> list[dict]:
    records = read_records(run / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in CLOCK_FIELDS} for record in records]


def assert_close(run: Path, reference: Path) -> None:
    """The same figures within the rounding of float32."""
    mine, theirs = figures(run), figures(reference)
    assert [(record["kind"], record["step"]) for record in mine] == [(r["kind"], r["step"]) for r in theirs]
    for record, expected in zip(mine, theirs, strict=True):
        for name in ("loss", "gradient_norm", "bits_per_byte", "targets"):
            assert record.get(name, 0) == pytest.approx(expected.get(name, 0), rel=2e-5), (name, record["step"])


@pytest.fixture(scope="module")
def runs(server, config, tmp_path_factory) -> dict[int, Path]:
    """The run made by one, two (under torchrun) and four processes."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2, 4):
        words = (config, f"out={folder / str(processes)}")
        out = finish(torchrun(2, *words)) if processes == 2 else run_to_the_end(server, processes, *words)
        assert out.count("finished after step 12") == 1
    return {processes: folder / str(processes) for processes in (1, 2, 4)}


@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_give_the_losses_of_one(runs, processes):
    assert_close(runs[processes], runs[1])
    assert len(figures(runs[1])) == 12 + 3


def test_experts_choose_in_every_process_as_they_do_in_micro_batches_of_one(server, store, tmp_path):
    """With a window at a time in each process: what is computed at once is then the same windows."""
    model = tiny_model(layers=1, ffns={"experts": ExpertChoiceConfig(experts=4, d_expert=16)}, pattern=["experts"])
    context = model.context
    run = tiny_run(store, model=model, batch={"tokens": 8 * context, "micro_tokens": context}, budget={"steps": 6})
    fit(run, tmp_path / "one")
    (tmp_path / "config.yaml").write_text(run.to_yaml())
    two = [f"batch.micro_tokens={2 * context}", f"out={tmp_path / 'two'}"]
    run_to_the_end(server, 2, tmp_path / "config.yaml", *two)
    assert_close(tmp_path / "two", tmp_path / "one")
    mine, theirs = (load(tmp_path / name).blocks[0].ffn.thresholds for name in ("two", "one"))
    assert mine.steps == theirs.steps
    assert torch.allclose(mine.value, theirs.value, rtol=1e-4)
    wider = run.batch.model_copy(update={"micro_tokens": 2 * context})
    fit(run.model_copy(update={"batch": wider}), tmp_path / "wider")
    assert figures(tmp_path / "wider")[-1]["loss"] != pytest.approx(figures(tmp_path / "one")[-1]["loss"], rel=2e-5)


def test_weights_of_bfloat16_train_in_many_processes(server, config, tmp_path):
    """Were they rounded by other bits in each, the losses would part."""
    words = ["optim.weights=bfloat16", "train.precision=auto", "optim.table_lr=1e-3"]
    run_to_the_end(server, 2, config, f"out={tmp_path / 'two'}", *words)
    fit(with_overrides(yaml.safe_load(config.read_text()), words), tmp_path / "one")
    mine, theirs = figures(tmp_path / "two"), figures(tmp_path / "one")
    assert mine[0]["loss"] > mine[-1]["loss"]
    for record, expected in zip(mine, theirs, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=0.02), record["step"]


def test_only_the_first_process_writes(runs):
    (session,) = (json.loads(line) for line in (runs[4] / "sessions.jsonl").read_text().splitlines())
    assert session["processes"] == 4
    names = {path.name for path in runs[1].iterdir()} | {".lock"}
    assert {path.name for path in runs[4].iterdir()} | {".lock"} == names
    assert [path.name for path in list_checkpoints(runs[4])] == [path.name for path in list_checkpoints(runs[1])]


def test_one_process_prepares_the_data_for_all(server, config, text, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "runs" / "one"
    run_to_the_end(server, 2, config, f"out={out}", f"data.source={tmp_path / 'text.txt'}", "budget.steps=2")
    (store,) = (path for path in (tmp_path / "runs" / "data").iterdir() if not path.name.startswith("."))
    assert Store.open(store)
    assert figures(out)[-1]["step"] == 2


def test_a_run_stopped_and_continued_gives_the_bits_of_one_that_was_not(server, runs, config, tmp_path):
    out = tmp_path / "run"
    ranks = Ranks(server, 4, "train", config, f"out={out}", "checkpoint.every=3", "evaluation.every=4")
    wait_for_step(out, 3)
    for process in ranks.processes:
        process.send(signal.SIGKILL)
    assert [result.code for result in ranks.wait()] == [-signal.SIGKILL] * 4
    run_to_the_end(server, 4, out, "--resume")
    assert figures(out) == figures(runs[4])
    assert (out / "model.safetensors").read_bytes() == (runs[4] / "model.safetensors").read_bytes()


def test_another_number_of_processes_continues_the_same_stream(server, runs, config, tmp_path):
    out = tmp_path / "run"
    run_to_the_end(server, 2, config, f"out={out}", "early_stopping.patience=1", "early_stopping.min_delta=100")
    stopped = figures(out)[-1]["step"]
    assert stopped < 12
    run_to_the_end(server, 1, out, "--resume", "early_stopping.patience=null", "early_stopping.min_delta=0")
    assert_close(out, runs[1])


def wait_for_step(run: Path, step: int, ended: Callable[[], object] = lambda: None) -> None:
    until = time.monotonic() + 120
    while max((record["step"] for record in figures(run)), default=0) < step:
        assert ended() is None
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_takes_the_others_down_with_one_line(server, config, tmp_path, rank):
    out = tmp_path / "run"
    ranks = Ranks(server, 2, "train", config, f"out={out}", "budget.steps=100000", "evaluation.every=5")
    wait_for_step(out, 7)
    ranks.processes[rank].send(signal.SIGKILL)
    started = time.monotonic()
    results = ranks.wait()
    assert time.monotonic() - started < 60
    assert results[rank].code == -signal.SIGKILL
    assert results[1 - rank].code == 1
    (line,) = said(results)
    assert "another process of this run has ended" in line
    assert list_checkpoints(out)


def test_a_signal_stops_every_process_at_the_same_step(config, tmp_path):
    out = tmp_path / "run"
    process = torchrun(2, config, f"out={out}", "budget.steps=100000", "evaluation.every=100000")
    wait_for_step(out, 3, process.poll)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=300)[0]
    assert f"{out}: saved (SIGTERM at step" in told
    assert "--nproc-per-node 2 -m myriad train" in told
    assert int(list_checkpoints(out)[-1].name) == figures(out)[-1]["step"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["batch.micro_tokens=32"],
            "1 sequences computed at once (32 tokens at a context of 32) cannot be shared by 2",
        ),
        (["optim.lr=fast"], "optim.lr: expected a valid number"),
        (["data.path=nowhere"], "nowhere"),
    ],
)
def test_faults_are_told_once(server, config, tmp_path, words, expected):
    results = Ranks(server, 2, "train", config, f"out={tmp_path / 'run'}", *words).wait()
    assert all(result.code for result in results)
    (line,) = said(results)
    assert expected in line
    assert not (tmp_path / "run").exists()
