"""Runs of a comparison side by side, each in a process of its own: small models do not fill a GPU, or many cores.

The parent starts processes (`worker`), shows what they tell, and decides what comes next. A run that fails or stops
lets the others end, and none follows it. Ctrl-C and SIGTERM are passed on: all runs save, and stop.
"""

import json
import os
import signal
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from myriad.analysis.compare.conduct import Board, Done, Outcome, Stopped, note_at_a_time, recorded
from myriad.analysis.compare.plan import Trial
from myriad.analysis.compare.worker import Order
from myriad.config import MyriadError, RunError, validate
from myriad.train.signals import first_signal

INTERRUPTED = 130
"""The exit code of the command after Ctrl-C where nothing can be saved."""
SECONDS_OF_SLEEP = 0.5
"""At most, while nothing comes: a signal just before Python falls asleep does not wake it."""
SAID = "myriad: "
"""Begins a line by which the command says what went wrong."""


class Crew:
    """Brings runs to their ends, some at a time: in place of `in_turn`.

    Args:
        jobs: how many at a time, at most.
        command: starts a process that calls `work`; the run's name is added, for people who list processes.
    """

    def __init__(self, jobs: int, command: Sequence[str]) -> None:
        self._jobs, self._command = jobs, command

    def __call__(
        self, trials: Sequence[Trial], runs: Path, board: Board, split: str | None, kernel: str | None
    ) -> list[Done]:
        """Do what `finish` does for each.

        Raises:
            MyriadError: a run failed; the text has a line for each that did.
            Stopped: a run was stopped; it is saved.
        """
        done = {trial.name: outcome for trial in trials if (outcome := recorded(runs / trial.name)) is not None}
        for trial in trials:
            if trial.name in done:
                board.end(trial, done[trial.name], new=False)
        left = [Order(trial=one, runs=runs, split=split, kernel=kernel) for one in trials if one.name not in done]
        if left:
            runs.mkdir(parents=True, exist_ok=True)
            note_at_a_time(runs.parent, min(self._jobs, len(left)))
            environment = _share_of_cores(min(self._jobs, len(trials))) | os.environ
            done |= _Shift(self._command, environment, board).work(left, self._jobs)
        return [(trial, done[trial.name]) for trial in trials]


def _share_of_cores(processes: int) -> dict[str, str]:
    """The variable that says how many threads each of some processes has, that none waits for another's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // processes))}


class _Worker:
    """A process that brings a run to its end.

    Attributes:
        trial: the run.
        outcome: how it ended; None until it has.
    """

    def __init__(
        self, order: Order, command: Sequence[str], environment: Mapping[str, str], board: Board, mailbox: SimpleQueue
    ) -> None:
        """Start it.

        Args:
            order: what it is to do.
            command: what is started.
            environment: its own.
            board: shows the run.
            mailbox: takes (self, message) for all that the process tells, and (self, None) at its end.
        """
        self.trial, self.outcome = order.trial, None
        self._board, self._display = board, board.begin(order.trial)
        self._errors = order.runs / f"{order.trial.name}.stderr"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, order.trial.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the parent alone: a second signal would end a run unsaved
            )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and its exit code will say why
            self._process.stdin.write(order.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()
        Thread(target=self._listen, args=[mailbox], daemon=True).start()

    def _listen(self, mailbox: SimpleQueue) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # what a user's module prints while it is imported is no message
                mailbox.put((self, json.loads(line)))
        mailbox.put((self, None))

    def hear(self, message: Any) -> None:
        """Show what the run tells."""
        match message:
            case ["start", step, steps]:
                self._display.start(step, steps)
            case ["show", record]:
                self._display.show(record)
            case ["note", text]:
                self._display.note(f"{self.trial.name}: {text}")
            case ["measuring", tokens, total]:
                self._board.measuring(self.trial, tokens, total)
            case ["end", outcome, new]:
                self.outcome = validate(Outcome, outcome)
                self._board.end(self.trial, self.outcome, new)

    def send(self, number: int) -> None:
        """Pass a signal on."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def fault(self, asked_to_stop: bool) -> MyriadError | None:
        """Why the process, which has told all, gave no outcome; None where it gave one, or was stopped.

        What it wrote to standard error is kept where no line of it says what went wrong.
        """
        self._process.communicate()
        code = self._process.returncode
        stopped = code == 0 or (asked_to_stop and code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM))
        lines = self._errors.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.removeprefix(SAID) for line in lines if line.startswith(SAID)]
        if stopped or self.outcome is not None or said or not lines:
            self._errors.unlink()
        if stopped or self.outcome is not None:
            return None
        killed = [f"its process was ended by {signal.Signals(-code).name}"] if code < 0 else []
        last = [f"{lines[-1]} ({self._errors} has more)"] if lines and not said else []
        why = "; ".join([*killed, *said, *last]) or f"its process ended with code {code}"
        return (MyriadError if code == MyriadError.exit_code else RunError)(f"{self.trial.name}: {why}")


class _Shift:
    """The work on a list of runs, from the first process to the end of the last."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], board: Board) -> None:
        self._command, self._environment, self._board = command, environment, board
        self._note = board.begin(None).note
        self._mailbox: SimpleQueue[Any] = SimpleQueue()
        """What processes tell, and the numbers of signals."""
        self._workers: set[_Worker] = set()
        self._outcomes: dict[str, Outcome] = {}
        self._faults: list[MyriadError] = []
        self._asked_to_stop = self._closing = False

    def work(self, orders: Sequence[Order], at_a_time: int) -> dict[str, Outcome]:
        """Bring the runs to their ends, and return their outcomes by name.

        Raises:
            MyriadError: a run failed; the text has a line for each that did.
            Stopped: a run was stopped; it is saved.
        """
        waiting = deque(orders)
        with self._catching_signals():
            while self._workers or (waiting and not self._closing):
                if waiting and not self._closing and len(self._workers) < at_a_time:
                    self._start(waiting.popleft())
                else:
                    self._take_next()
        if self._faults:
            kind = RunError if any(isinstance(fault, RunError) for fault in self._faults) else MyriadError
            raise kind("\n".join(map(str, self._faults)))
        if len(self._outcomes) < len(orders):
            raise Stopped(f"{orders[0].runs}: what had begun is saved")
        return self._outcomes

    def _start(self, order: Order) -> None:
        self._workers.add(_Worker(order, self._command, self._environment, self._board, self._mailbox))

    def _take_next(self) -> None:
        try:
            mail = self._mailbox.get(timeout=SECONDS_OF_SLEEP)
        except Empty:
            return
        if isinstance(mail, int):
            self._stop(mail)
            return
        worker, message = mail
        if message is not None:
            worker.hear(message)
        else:
            self._workers.remove(worker)
            self._dismiss(worker)

    def _stop(self, number: int) -> None:
        self._asked_to_stop = self._closing = True
        self._note(f"{signal.Signals(number).name}: {_runs(len(self._workers))} in the making to be saved")
        for worker in self._workers:
            worker.send(number)

    def _dismiss(self, worker: _Worker) -> None:
        """A process has ended."""
        fault = worker.fault(self._asked_to_stop)
        if worker.outcome is not None:
            self._outcomes[worker.trial.name] = worker.outcome
            return
        self._closing = True
        if fault is not None:
            self._faults.append(fault)
            if self._workers and not self._asked_to_stop:
                self._note(f"{fault}; no other run starts, {_runs(len(self._workers))} in the making to be finished")

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT comes by the mailbox. No process is left behind."""
        try:
            with first_signal(self._mailbox.put):
                yield
        finally:
            for worker in self._workers:
                worker.kill()


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
