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
    with _noting_interrupts() as interrupts:
        try:
            from myriad.cli.app import app

            app()
        except BaseException as error:
            _end(error, interrupted=bool(interrupts))


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """The signals of Ctrl-C so far: what one interrupts may be an import that makes another error of it."""
    noted: list[int] = []

    def interrupt(number: int, frame: object) -> NoReturn:
        noted.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield noted
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def _end(error: BaseException, interrupted: bool) -> NoReturn:
    """Say in a line what ended the command, if it is a fault that the user can mend."""
    if interrupted or isinstance(error, KeyboardInterrupt):
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
