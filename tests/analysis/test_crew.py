"""Processes side by side, with small programs in place of training."""

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from myriad.analysis.compare.conduct import JOBS, Outcome, Stopped, most_at_a_time, note_at_a_time
from myriad.analysis.compare.crew import Crew
from myriad.analysis.compare.plan import Trial
from myriad.config import MyriadError, RunError
from tiny import tiny_run

BEGIN = """
import json, os, signal, sys, time
order, name = json.loads(sys.stdin.readline()), sys.argv[1]
def say(*message): print(json.dumps(message), flush=True)
def end(): say("end", {"best_validation_loss": float(name[-1])}, True)
"""


class Kept:
    """A board, and the displays of all runs, that keep what they are told."""

    def __init__(self) -> None:
        self.begun, self.ended, self.notes, self.other = [], [], [], []

    def expect(self, trials) -> None: ...

    def begin(self, trial):
        self.begun += [] if trial is None else [trial.name]
        return self

    def measuring(self, trial, tokens, total) -> None:
        self.other.append((trial.name, tokens, total))

    def end(self, trial, outcome, new) -> None:
        self.ended.append(trial.name)

    def start(self, step, steps) -> None:
        self.other.append((step, steps))

    def show(self, record) -> None:
        self.other.append(record)

    def note(self, text) -> None:
        self.notes.append(text)


@pytest.fixture
def board() -> Kept:
    return Kept()


@pytest.fixture
def trials() -> list[Trial]:
    run = tiny_run(SimpleNamespace(path="store"))
    return [Trial("peer", f"seed{number}", run, 1.0, None) for number in range(4)]


@pytest.fixture
def finish_by(tmp_path, board, trials):
    """Brings the trials to their ends by a program."""

    def finish_by(program: str, jobs: int):
        return Crew(jobs, [sys.executable, "-c", BEGIN + program])(trials, tmp_path / "runs", board, "test", None)

    return finish_by


def test_the_outcomes_are_in_order_whoever_ends_first(finish_by, board, trials, tmp_path):
    done = finish_by("time.sleep(1 if name[-1] == '0' else 0); end()", jobs=2)
    assert done == [(trial, Outcome(best_validation_loss=number)) for number, trial in enumerate(trials)]
    assert board.begun == [trial.name for trial in trials]
    assert board.ended[0] == "peer-seed1"
    assert most_at_a_time(tmp_path) == 2
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_a_run_tells_is_shown(finish_by, board):
    finish_by(
        "print('no message'); say('start', 0, 6); say('show', {'step': 1}); say('measuring', 2, 9); end()", jobs=1
    )
    assert board.other[:3] == [(0, 6), {"step": 1}, ("peer-seed0", 2, 9)]


def test_no_more_run_at_a_time_than_asked_for(finish_by, board, tmp_path, monkeypatch):
    (tmp_path / "now").mkdir()
    monkeypatch.chdir(tmp_path / "now")
    finish_by("open(name, 'w'); time.sleep(0.2); say('note', len(os.listdir())); os.remove(name); end()", jobs=3)
    assert max(int(note.split()[-1]) for note in board.notes) in (2, 3)


@pytest.mark.parametrize(("jobs", "threads"), [(2, "6"), (64, "3"), (5, "3")])
def test_processes_share_the_cores(jobs, threads, finish_by, board, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    finish_by("say('note', os.environ['OMP_NUM_THREADS']); end()", jobs)
    assert {note.split()[-1] for note in board.notes} == {threads}


def test_threads_are_as_many_as_the_user_says(finish_by, board, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    finish_by("say('note', os.environ['OMP_NUM_THREADS']); end()", 2)
    assert {note.split()[-1] for note in board.notes} == {"7"}


FAULTS = {
    "a fault of the user": (
        "print('myriad: optim.lr: bad', file=sys.stderr); sys.exit(2)",
        MyriadError,
        "optim.lr: bad",
    ),
    "a fault of the run": ("print('myriad: out of memory', file=sys.stderr); sys.exit(1)", RunError, "out of memory"),
    "a defect": ("raise ValueError('a defect')", RunError, "ValueError: a defect (STDERR has more)"),
    "a kill": ("os.kill(os.getpid(), signal.SIGKILL)", RunError, "its process was ended by SIGKILL"),
    "no word": ("sys.exit(3)", RunError, "its process ended with code 3"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_fails_is_named_lets_the_other_end_and_none_follows(name, finish_by, board, tmp_path):
    program, kind, why = FAULTS[name]
    with pytest.raises(MyriadError) as raised:
        finish_by(f"if name[-1] == '1': {program}\ntime.sleep(1); end()", jobs=2)
    assert type(raised.value) is kind
    errors = tmp_path / "runs" / "peer-seed1.stderr"
    assert str(raised.value) == f"peer-seed1: {why.replace('STDERR', str(errors))}"
    assert board.begun == ["peer-seed0", "peer-seed1"]
    assert board.ended == ["peer-seed0"]
    assert board.notes == [f"{raised.value}; no other run starts, 1 run in the making to be finished"]
    assert errors.exists() == (name == "a defect")


def test_all_that_fail_are_named(finish_by):
    with pytest.raises(RunError, match=r"peer-seed[01]: .*\npeer-seed[01]: "):
        finish_by("print('myriad: bad', file=sys.stderr); time.sleep(0.3); sys.exit(1 + int(name[-1]))", jobs=2)


SAVES = """
def save(*_):
    time.sleep(0.5)
    sys.exit(SAVED)
signal.signal(signal.SIGTERM, save)
say("note", "ready")
while True: time.sleep(0.1)
"""


@pytest.fixture
def ended():
    """The SIGTERM signals that would have ended this process."""
    found = []
    before = signal.signal(signal.SIGTERM, lambda number, _: found.append(number))
    yield found
    signal.signal(signal.SIGTERM, before)


def send_when_ready(board: Kept, count: int, *numbers: signal.Signals) -> threading.Thread:
    """Send signals to this process when so many runs are ready for theirs."""

    def send() -> None:
        while len(board.notes) < count:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_signal_is_passed_on_and_one_right_after_it_is_the_same(finish_by, board, ended):
    sender = send_when_ready(board, 3, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(Stopped, match="what had begun is saved"):
        finish_by(SAVES.replace("SAVED", "0"), jobs=3)
    sender.join()
    assert board.notes[-1] == "SIGTERM: 3 runs in the making to be saved"
    assert len(board.begun) == 3
    assert not ended
    signal.raise_signal(signal.SIGTERM)
    assert ended


@pytest.mark.usefixtures("ended")
def test_a_run_that_does_not_listen_yet_ends_by_the_signal(finish_by, board):
    sender = send_when_ready(board, 2, signal.SIGTERM)
    with pytest.raises(Stopped):
        finish_by("say('note', 'ready'); time.sleep(60)", jobs=2)
    sender.join()


@pytest.mark.usefixtures("ended")
def test_a_fault_while_a_run_is_saved_is_told(finish_by, board):
    sender = send_when_ready(board, 1, signal.SIGTERM)
    with pytest.raises(RunError, match="disk full"):
        finish_by(SAVES.replace("SAVED", "print('myriad: disk full', file=sys.stderr) or 1"), jobs=1)
    sender.join()


def test_a_later_signal_ends_all_at_once(finish_by, board, monkeypatch):
    monkeypatch.setattr("myriad.train.signals.SAME_SIGNAL", 0.0)
    program = "signal.signal(signal.SIGINT, signal.SIG_IGN); say('note', os.getpid()); time.sleep(60)"
    sender = send_when_ready(board, 2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        finish_by(program, jobs=2)
    sender.join()
    for note in board.notes[:2]:
        with pytest.raises(ProcessLookupError):
            os.kill(int(note.split()[-1]), 0)


def test_how_many_shared_the_machine_is_kept_at_its_most(tmp_path):
    for count, most in ((1, 1), (3, 3), (2, 3)):
        note_at_a_time(tmp_path, count)
        assert most_at_a_time(tmp_path) == most
    (tmp_path / JOBS).write_text("{")
    assert most_at_a_time(tmp_path) == 1
