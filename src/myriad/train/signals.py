"""SIGTERM and Ctrl-C while something is in the making that is worth saving."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOP_SIGNALS = ("SIGTERM", "SIGINT")
SAME_SIGNAL = 1.0
"""Seconds in which a second signal is the first one again: `timeout` sends it to a process and to its group."""


@contextmanager
def first_signal(deliver: Callable[[int], object]) -> Iterator[None]:
    """Let `deliver` take the number of the first of `STOP_SIGNALS`; a later one acts as ever."""
    before: dict[int, Any] = {}
    first: list[float] = []

    def restore() -> None:
        for which, handler in before.items():
            signal.signal(which, handler)

    def handle(number: int, frame: object) -> None:
        if not first:
            first.append(time.monotonic())
            deliver(number)
        elif time.monotonic() > first[0] + SAME_SIGNAL:
            restore()
            signal.raise_signal(number)

    with suppress(ValueError):  # only the main thread may catch signals
        for name in STOP_SIGNALS:
            which = signal.Signals[name]
            before[which] = signal.signal(which, handle)
    try:
        yield
    finally:
        restore()
