"""The command line: one file per verb, each of which imports what is heavy only when it runs.

A fault that the user can mend is one line on stderr and exit code 2; a fault during a run, exit code 1; Ctrl-C where
nothing can be saved, one line and exit code 130.
"""

import ctypes
import os
import signal
import sys
from types import FrameType
from typing import NoReturn, Self

INTERRUPTED = 130
"""The exit code after Ctrl-C; typer's too."""

BEFORE_TORCH = {
    # Threads that spin long while they wait make a run several times slower where it shares its cores with other work;
    # a short spin costs nothing measurable where it does not.
    "GOMP_SPINCOUNT": "20000",
    # How many shapes of products oneDNN and PyTorch keep code and scratch memory for: a thousand by default.
    # A model has a few dozen that come again. But the experts of a mixture have other numbers of tokens at every step,
    # each a shape of its own, and memory would grow to several times what training needs (docs/LOG.md).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
"""Variables that libraries read when torch is loaded."""

# The numbers of malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def main() -> None:
    """Run the command line."""
    try:
        os.environ.update(BEFORE_TORCH | os.environ)
        _keep_freed_memory()
        with _Interrupts() as interrupts:
            _run(interrupts)
    except KeyboardInterrupt:  # in the moments before and after interrupts are looked after
        _fail("interrupted", INTERRUPTED)


def _run(interrupts: "_Interrupts") -> None:
    try:
        from myriad.cli.app import app

        app()
    except BaseException as error:
        if interrupts.seen or isinstance(error, KeyboardInterrupt):
            _fail("interrupted", INTERRUPTED)
        _end(error)


def _keep_freed_memory() -> None:
    """Let the C library keep what was freed, where it is glibc and the environment has no settings of its own for it.

    Otherwise it returns every large tensor to the system and is handed a new one page by page, each of them zeroed:
    layers that make tensors of megabytes spend more time on that than on arithmetic (docs/LOG.md).
    """
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not is_set else None
    if mallopt is not None:
        for parameter, size in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**30), (M_TOP_PAD, 2**26)):
            mallopt(parameter, size)


class _Interrupts:
    """Lets Ctrl-C end the command, also while it loads libraries; training catches it itself.

    Libraries make errors of their own of what is raised while they call back, so what was seen is remembered.
    """

    seen = False

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> NoReturn:
        self.seen = True
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith("<frozen importlib") or f"{os.sep}llvmlite{os.sep}" in file:
                # Amid an import, some libraries swallow an exception, and others abort the process; so does what a
                # compiler calls back.
                os.write(2, b"myriad: interrupted\n")
                os._exit(INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt


def _end(error: BaseException) -> NoReturn:
    """Say in a line what ended the command, if it is a fault that the user can mend."""
    if isinstance(error, SystemExit) and error.code == INTERRUPTED:
        _fail("interrupted", INTERRUPTED)
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
