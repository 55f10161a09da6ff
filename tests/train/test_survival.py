"""Runs that are killed at any moment and resumed give the bits of a run never killed.

Two ways to kill: from outside, at random moments of the real command's start and of the steps and saves of forks that
have torch loaded already; and forks that kill themselves at the n-th change of the disk, so that many moments inside
saves are met.
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from forking import Server
from myriad.checkpoint import list_checkpoints, load
from myriad.train.record import CLOCK_FIELDS, read_records
from tiny import tiny_model

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
STEPS = 40


@pytest.fixture(scope="module")
def config(store, tmp_path_factory) -> Path:
    settings = {
        "model": tiny_model(layers=1, d_model=16, dropout=0.1).model_dump(mode="json"),
        "data": {"path": str(store.path)},
        "optim": {"lr": 0.01, "warmup": 5},
        "budget": {"steps": STEPS},
        "batch": {"tokens": 128},
        "train": {"precision": "float32"},
        "evaluation": {"every": 4, "tokens": 256},
        "checkpoint": {"every": 2},
    }
    path = tmp_path_factory.mktemp("survival") / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(*words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "myriad", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finish(process: subprocess.Popen) -> str:
    """Wait for a command that must succeed; what it wrote to stdout."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


@pytest.fixture(scope="module")
def never_killed(server, config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("never-killed") / "run"
    assert server.run("train", config, f"out={run}").code == 0
    return run


def figures(run: Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name not in CLOCK_FIELDS}
        for record in read_records(run / "metrics.jsonl")
    ]


def assert_same_outcome(run: Path, reference: Path) -> None:
    """Weights and metrics, bit for bit; and the last checkpoint with all that the optimizer knows."""
    assert figures(run) == figures(reference)
    assert [record["step"] for record in figures(run) if record["kind"] == "train"] == list(range(1, STEPS + 1))
    assert (run / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    last, expected = list_checkpoints(run)[-1], list_checkpoints(reference)[-1]
    assert last.name == expected.name
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        assert (last / name).read_bytes() == (expected / name).read_bytes()
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def last_step(run: Path) -> int:
    return max((record["step"] for record in read_records(run / "metrics.jsonl")), default=0)


def wait_for_step(run: Path, step: int) -> None:
    until = time.monotonic() + 120
    while last_step(run) < step:
        assert time.monotonic() < until
        time.sleep(0.002)


# SIGKILL


def kill_again_and_again(server: Server, config: Path, run: Path, kills: int, seed: int) -> None:
    """Kill the command at random moments of its start, its steps and its saves, and let it finish at last."""
    dice = random.Random(seed)
    starts = [dice.uniform(0.0, 3.0) for _ in range(kills // 4)]
    for delay in starts:  # while Python and torch are loaded, the model is built, the folder is made
        process = start("train", config, f"out={run}", "--resume")
        time.sleep(delay)
        process.kill()
        process.communicate()
    for step in sorted(dice.choices(range(1, STEPS), k=kills - len(starts))):
        process = server.start("train", config, f"out={run}", "--resume")
        wait_for_step(run, step)
        time.sleep(dice.uniform(0.0, 0.03))
        process.send(signal.SIGKILL)
        process.wait()
        if list_checkpoints(run):  # something to show at any moment
            load(run)
    result = server.run("train", config, f"out={run}", "--resume")
    assert result.code == 0, result.err


def test_sigkill_at_random_moments_then_resume_gives_the_bits_of_a_run_never_killed(
    server, config, never_killed, tmp_path
):
    kill_again_and_again(server, config, tmp_path / "run", kills=8, seed=0)
    assert_same_outcome(tmp_path / "run", never_killed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_sigkill_thirty_times_gives_the_bits_of_a_run_never_killed(server, config, never_killed, tmp_path, seed):
    kill_again_and_again(server, config, tmp_path / "run", kills=30, seed=seed)
    assert_same_outcome(tmp_path / "run", never_killed)


SELF_KILLING = """
import json, os, random, shutil, signal, sys
from pathlib import Path

import torch
torch.set_num_threads(1)
import matplotlib.backends.backend_agg, matplotlib.figure, numba
import myriad.analysis.curve, myriad.hf, myriad.presets, myriad.train
from myriad import checkpoint
from myriad.cli import main
from myriad.train.record import Metrics

config, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
CALLS = [(os, "replace"), (os, "link"), (os, "fsync"), (shutil, "rmtree"), (Path, "mkdir"), (Path, "write_text"),
         (checkpoint, "save_file"), (checkpoint, "save_torch_state_dict"), (Metrics, "write")]
count = 0


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def half(name, call, *args, **options):
    if name == "write_text":
        call(args[0], args[1][: len(args[1]) // 2])
    elif name == "rmtree":
        for path in list(Path(args[0]).glob("*"))[:2]:
            path.unlink() if path.is_file() else None
    elif name in ("save_file", "save_torch_state_dict"):
        call(*args, **options)
        path = Path(args[1]) if name == "save_file" else Path(args[1]) / "model.safetensors"
        os.truncate(path, path.stat().st_size // 2)
    elif name == "write":
        args[0]._file.write('{"kind": "train", "st')
        args[0]._file.flush()


def arm(nth, moment):
    def wrap(name, call):
        def counted(*args, **options):
            global count
            count += 1
            if count == nth:
                if moment == "half":
                    half(name, call, *args, **options)
                kill()
            return call(*args, **options)
        return counted

    for owner, name in CALLS:
        setattr(owner, name, wrap(name, getattr(owner, name)))


def run(out, nth=None, moment=None, report=None):
    '''Train in a fork; how it ended.'''
    child = os.fork()
    if child == 0:
        code = 3
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            arm(nth, moment)
            sys.argv = ["myriad", "train", config, f"out={out}", "--resume", "--quiet"]
            main()
        except SystemExit as exit:
            code = exit.code or 0
        finally:
            if report is not None:
                Path(report).write_bytes(str(count).encode())
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


assert run(folder / "whole", report=folder / "count") == 0
total = int((folder / "count").read_bytes())
dice = random.Random(seed)
done = []
for nth in sorted(dice.sample(range(1, total + 1), kills)):
    out, endings = folder / f"killed-{nth}", []
    endings.append(run(out, nth, dice.choice(["before", "half"])))
    if dice.random() < 0.5:  # and once more while it resumes
        endings.append(run(out, dice.randrange(1, 40), dice.choice(["before", "half"])))
    endings.append(run(out))
    done.append([str(out), endings])
print(json.dumps({"total": total, "done": done}))
"""


def kill_inside(config: Path, folder: Path, reference: Path, kills: int) -> None:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", SELF_KILLING, str(config), str(folder), str(kills), "0"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=1500)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["total"] > 20 * STEPS // 2
    assert len(report["done"]) == kills
    for run, endings in report["done"]:
        assert endings[0] == -signal.SIGKILL, run
        assert endings[-1] == 0, (run, endings, result.stderr)
        assert_same_outcome(Path(run), reference)


def test_sigkill_inside_saves_then_resume_gives_the_bits_of_a_run_never_killed(config, never_killed, tmp_path):
    kill_inside(config, tmp_path, never_killed, kills=12)


@pytest.mark.slow
def test_sigkill_inside_many_saves_gives_the_bits_of_a_run_never_killed(config, never_killed, tmp_path):
    kill_inside(config, tmp_path, never_killed, kills=150)


# SIGTERM and Ctrl-C


def test_a_signal_ends_the_command_with_code_0_and_a_line_that_resumes(config, tmp_path):
    """Two runs that were stopped at different steps end alike."""
    slow = ["batch.tokens=2048", "budget.steps=60", "evaluation.every=20", "checkpoint.every=null"]
    runs = {number: tmp_path / f"stopped by {number.name}" for number in (signal.SIGTERM, signal.SIGINT)}
    steps = {signal.SIGTERM: 3, signal.SIGINT: 10}
    processes = {number: start("train", config, *slow, f"out={run}") for number, run in runs.items()}
    for number, run in runs.items():
        wait_for_step(run, steps[number])
        processes[number].send_signal(number)
    resumed = {}
    for number, run in runs.items():
        said = finish(processes[number])
        assert f"{run}: saved ({number.name} at step " in said
        command = shlex.split(said.split("to continue: ")[1])
        assert command == ["myriad", "train", str(run), "--resume"]
        resumed[number] = start(*command[1:])
    for number, run in runs.items():
        assert f"{run}: finished after step 60" in finish(resumed[number])
    one, other = runs.values()
    assert figures(one) == figures(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_kill_during_the_first_step_leaves_a_run_that_starts_anew(server, never_killed, tmp_path):
    """`run.json` and `metrics.jsonl` are there, a checkpoint is not."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_bytes((never_killed / "run.json").read_bytes())
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "tokens": 128, "loss": 9.0}\n{"kind": "tr')
    (run / ".run.json.tmp").write_text("{")
    result = server.run("train", run, "--resume", f"out={run}")
    assert result.code == 0, result.err
    assert figures(run) == figures(never_killed)
    assert (run / "model.safetensors").read_bytes() == (never_killed / "model.safetensors").read_bytes()
