"""Places: a folder of results that is whole or not there.

It is written into a hidden folder beside its place, under a lock, and renamed at the end. What a killed process left
is removed by the next one.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from myriad.data import DataError
from myriad.data.store import INDEX_NAME


class BusyError(DataError):
    """Another process is preparing the same store."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place, synced, if all goes well and is removed if not.

    Args:
        out: an absolute path; it must not exist, or be an empty folder.

    Raises:
        BusyError: another process is making it.
        DataError: it is taken, or cannot be written.
    """
    try:
        _refuse_taken(out)
        with _locked(out), _beside(out) as folder:
            yield folder
    except OSError as error:
        raise DataError(f"{out}: cannot be prepared ({error})") from None


def _refuse_taken(out: Path) -> None:
    if (out / INDEX_NAME).exists():
        raise DataError(f"{out}: holds a store already; give another folder, or remove this one first")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not an empty folder; give another one")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of a place; it ends with the process, however that ends."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f".{out.name}.lock"
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(f"{out}: another process is preparing this store") from None
    try:
        _refuse_taken(out)  # another process may have finished it since
        yield
    finally:
        path.unlink(missing_ok=True)  # filelock tells from a lock's file whether it is still the one at its place
        lock.release()


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    beginning = f".{out.name}.preparing-"
    for path in out.parent.iterdir():
        if re.fullmatch(re.escape(beginning) + "[0-9a-f]{8}", path.name):
            shutil.rmtree(path)  # of a preparation that was killed: its lock is free
    folder = out.parent / f"{beginning}{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync(out.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
