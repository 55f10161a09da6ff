"""One run of a comparison in a process of its own, which a `Crew` in another process started.

What to do comes as a line of standard input; how it goes is told in lines of standard output. Standard input stays
open as long as the parent lives: its end, however the parent ended, makes the run save and stop.
"""

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from myriad.analysis.compare.conduct import Outcome, Stopped, finish
from myriad.analysis.compare.plan import Trial
from myriad.config import Config, ConfigError, validate
from myriad.train.record import Record

STANDARD_INPUT, STANDARD_OUTPUT, STANDARD_ERROR = 0, 1, 2
SECONDS_BETWEEN_LOOKS = 0.1


class Order(Config):
    """What a process is to do: the arguments of `finish`."""

    trial: Trial
    runs: Path
    split: str | None
    kernel: str | None


def work() -> None:
    """Do what standard input says. A run that is stopped by a signal is saved, and ends without an outcome.

    Raises:
        MyriadError: it says nothing, or the run cannot be trained or measured.
    """
    line = sys.stdin.readline()
    if not line.startswith("{"):
        raise ConfigError("compare --one: trains what a comparison with --jobs tells it")
    order, wire = validate(Order, json.loads(line)), Wire()
    threading.Thread(target=_stop_without_parent, args=[wire], daemon=True).start()
    with suppress(Stopped):
        finish(order.trial, order.runs, wire, order.split, order.kernel)


def _stop_without_parent(wire: "Wire") -> None:
    """When standard input ends, end this process if training has not begun, else ask training to stop. What is being
    saved or measured then comes to its end, which is near."""
    while os.read(STANDARD_INPUT, 1):  # past Python's buffer, whose lock this thread would hold at exit
        pass
    while wire.started and not callable(signal.getsignal(signal.SIGTERM)):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)


class Wire:
    """The board and the display of a run, which pass on all that they are told: each a line, `[kind, values...]`."""

    started = False
    """Whether training has begun."""

    def __init__(self) -> None:
        """Take standard output; what else would write there goes to standard error."""
        self._file = os.fdopen(os.dup(STANDARD_OUTPUT), "w", encoding="utf-8")
        os.dup2(STANDARD_ERROR, STANDARD_OUTPUT)

    def _send(self, *message: Any) -> None:
        with suppress(OSError):  # the parent is gone: the run goes on until it is saved
            self._file.write(json.dumps(message) + "\n")
            self._file.flush()

    def expect(self, trials: object) -> None:
        """The parent knows."""

    def begin(self, trial: object) -> Self:
        return self

    def measuring(self, trial: object, tokens: int, total: int) -> None:
        self._send("measuring", tokens, total)

    def end(self, trial: object, outcome: Outcome, new: bool) -> None:
        self._send("end", outcome.model_dump(mode="json"), new)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, step: int, steps: int) -> None:
        self.started = True
        self._send("start", step, steps)

    def show(self, record: Record) -> None:
        self._send("show", record)

    def note(self, text: str) -> None:
        self._send("note", text)
