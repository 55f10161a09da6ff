"""`myriad compare --jobs 2`: real runs side by side give the figures of runs in turn, fail alone, and go on."""

import io
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing import write_list
from filelock import FileLock, Timeout

from myriad.analysis.compare import conduct
from myriad.checkpoint import list_checkpoints
from myriad.train.record import CLOCK_FIELDS, read_records

SIDE_BY_SIDE = "tokens/s measured with up to 2 runs at a time"
LONG = ("evaluation.every=40", "checkpoint.every=40", "--budget", "38400tokens")
"""So many steps that a signal comes amid them."""
REFERENCE = ("--kernels", "reference")
"""They need no compiling, which takes a process longer than these runs."""


class NoCurve:
    """In place of the learning curve, in the runs of this process."""

    def __init__(self, *_: object) -> None: ...
    def log(self, record: object) -> None: ...
    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """As many threads in this process as in those that it starts, and no drawing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(conduct, "LearningCurve", NoCurve)
    monkeypatch.setattr("myriad.analysis.plots.loss_against_flops", lambda *_, **__: b"a figure")
    monkeypatch.setattr("myriad.analysis.compare.page.loss_against_flops", lambda *_, **__: b"a figure")
    monkeypatch.setattr("myriad.analysis.report.expert_usage", lambda *_, **__: b"a figure")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    write_list(folder, store)
    return folder


def history(run: Path) -> list[dict]:
    """What a run recorded, without what the clock says."""
    return [
        {name: value for name, value in record.items() if name not in CLOCK_FIELDS}
        for record in read_records(run / "metrics.jsonl")
    ]


def same_runs(mine: Path, theirs: Path) -> None:
    """Assert that two comparisons trained the same, and measured the same."""
    names = sorted(path.parent.name for path in (mine / "runs").glob("*/outcome.json"))
    assert names == sorted(path.parent.name for path in (theirs / "runs").glob("*/outcome.json"))
    for name in names:
        assert history(mine / "runs" / name) == history(theirs / "runs" / name)
        found = [json.loads((out / "runs" / name / "outcome.json").read_text()) for out in (mine, theirs)]
        assert found[0]["held_out"] == found[1]["held_out"] is not None
        (session, *_) = (mine / "runs" / name / "sessions.jsonl").read_text().splitlines()
        assert json.loads(session)["threads"] == 1


def test_a_run_that_fails_leaves_the_others_and_all_go_on_to_the_figures_of_runs_in_turn(folder, myriad, tmp_path):
    out = tmp_path / "out"
    words = ["compare", folder / "list.yaml", "--seeds", 1, "--out", out]
    runs, taken = out / "runs", out / "runs" / "peer-768tokens-seed0"
    taken.mkdir(parents=True)
    with FileLock(taken / ".lock"):
        said = myriad(*words, *REFERENCE, "--jobs", 2)
    assert said.code == 2
    why = f"peer-768tokens-seed0: {taken}: another process is training in this folder; choose another with out="
    assert said.err.splitlines()[-1] == f"myriad: {why}"
    assert f"{why}; no other run starts, 1 run in the making to be finished" in said.err
    assert "dense-768tokens-seed0: run 2 of 2, 768 tokens" in said.err
    assert (runs / "dense-768tokens-seed0" / "outcome.json").exists()
    assert not (out / "results.json").exists()

    said = myriad(*words, *REFERENCE, "--jobs", 2)
    assert said.code == 0, said.err
    assert said.err.count("(finished before)") == 1
    assert sorted(path.name for path in runs.iterdir()) == ["dense-768tokens-seed0", "peer-768tokens-seed0"]
    line = shlex.split(json.loads((out / "results.json").read_text())["command"])
    assert line == ["myriad", *map(str, words), "--jobs", "2"]

    said = myriad(*words)
    assert said.err.count("(finished before)") == 2
    for text in (said.out, (out / "results.md").read_text(), (out / "report.html").read_text()):
        assert SIDE_BY_SIDE in text
    assert json.loads((out / "results.json").read_text())["runs_at_a_time"] == 2

    alone = tmp_path / "alone"
    said = myriad(*words[:-1], alone, *REFERENCE)
    assert said.code == 0, said.err
    assert SIDE_BY_SIDE not in said.out
    same_runs(out, alone)


def last_step(out: Path) -> int:
    """Of the newest checkpoint of any run; 0 where there is none."""
    runs = list((out / "runs").glob("*-seed0"))
    return max((int(folder.name) for run in runs for folder in list_checkpoints(run)), default=0)


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def is_free(run: Path) -> bool:
    try:
        with FileLock(run / ".lock", timeout=0):
            return True
    except Timeout:
        return False


def test_after_a_kill_and_after_ctrl_c_the_same_command_goes_on_from_where_all_runs_were_saved(
    folder, server, myriad, tmp_path
):
    out = tmp_path / "out"
    words = ["compare", folder / "list.yaml", *LONG, "--seeds", 1, "--out", out]
    command = server.start(*words, *REFERENCE, "--jobs", 2)
    wait_until(lambda: last_step(out) >= 40)
    command.send(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    wait_until(lambda: all(is_free(run) for run in (out / "runs").glob("*-seed0")))
    saved = last_step(out)
    assert saved % 40

    command = server.start(*words, *REFERENCE, "--jobs", 2)
    wait_until(lambda: last_step(out) > saved)
    command.send(signal.SIGINT)
    said = command.wait()
    assert said.code == 0, said.err
    assert f"from step {saved}" in said.err
    assert "SIGINT: 2 runs in the making to be saved" in said.err
    start, line = said.out.strip().split("; to continue: ")
    assert start == f"{out / 'runs'}: what had begun is saved"
    assert not list(out.glob("runs/*/outcome.json"))
    assert shlex.split(line) == ["myriad", *map(str, words), "--jobs", "2"]

    said = myriad(*shlex.split(line)[1:], *REFERENCE)
    assert said.code == 0, said.err
    myriad(*words[:-1], tmp_path / "alone", *REFERENCE)
    same_runs(out, tmp_path / "alone")


def test_the_command_of_one_run_is_none_of_the_users(myriad, monkeypatch):
    said = myriad("compare", "--help")
    assert "--jobs" in said.out
    assert "--one" not in said.out
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    said = myriad("compare", "--one", "peer")
    assert said.code == 2
    assert said.err == "myriad: compare --one: trains what a comparison with --jobs tells it\n"
