"""The command line: one file per verb, each of which imports what is heavy only when it runs.

A fault that the user can mend is one line on stderr and exit code 2; a fault during a run, exit code 1; Ctrl-C where
nothing can be saved, one line and exit code 130.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


def main() -> None:
    """Run the command line."""
    # Read by OpenMP when torch is loaded. Threads that spin long while they wait make a run several times slower
    # where it shares its cores with other work; a short spin costs nothing measurable where it does not.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    with _noting_interrupts():
        try:
            from myriad.cli.app import app

            app()
        except BaseException as error:
            _end(error)


_interrupts: list[int] = []
"""Ctrl-C's signals so far. What one interrupts may be an import that makes another error of it, or none at all."""


def end_if_interrupted() -> None:
    """End here, where a library that was being imported has swallowed a Ctrl-C."""
    if _interrupts:
        raise KeyboardInterrupt


@contextmanager
def _noting_interrupts() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> NoReturn:
        _interrupts.append(number)
        raise KeyboardInterrupt

    _interrupts.clear()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def _end(error: BaseException) -> NoReturn:
    """Say in a line what ended the command, if it is a fault that the user can mend."""
    if isinstance(error, SystemExit) and not error.code:
        raise error
    if _interrupts or isinstance(error, KeyboardInterrupt):
        _fail("interrupted", 130)
    if isinstance(error, SystemExit):
        raise error
    from myriad.config import MyriadError

    if isinstance(error, MyriadError):
        _fail(str(error), error.exit_code)
    if isinstance(error, OSError):  # a full disk, a folder that cannot be written
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)
    raise error


def _fail(message: str, code: int) -> NoReturn:
    for line in message.splitlines():
        print(f"myriad: {line}", file=sys.stderr)
    sys.exit(code)
