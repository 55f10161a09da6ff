"""What a run tells: `metrics.jsonl` for programs, a progress bar for people.

Every record of `metrics.jsonl` has `kind` (`train` or `validation`), `step` and `tokens`. `seconds` and
`tokens_per_second` are clock fields; all others are functions of the config and the seed.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from myriad.checkpoint import naming

CLOCK_FIELDS = ("seconds", "tokens_per_second")
AXES = ("step", "tokens")
"""Fields that the others are drawn against."""
Record = dict[str, Any]


def to_json(record: Record) -> str:
    """One line; numbers that are not finite become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, as far as its lines are whole; others may be torn by a kill, or damaged."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_record(record):
            yield record


def _is_record(found: object) -> bool:
    if not isinstance(found, dict) or not all(_is_integer(found.get(axis)) for axis in AXES):
        return False
    return all(value is None or isinstance(value, str | float) or _is_integer(value) for value in found.values())


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and abs(value) < 2**63  # a larger one is nothing that was counted


class Metrics:
    """Appends records to a file, one line each, at once."""

    def __init__(self, path: Path, up_to_step: int) -> None:
        """Open a file and drop the records after a step: a resumed run writes them again."""
        kept = [to_json(record) for record in read_records(path) if record["step"] <= up_to_step]
        self._path = path
        temporary = path.with_name(f".{path.name}.tmp")
        with naming(path):
            temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        with naming(self._path):
            self._file.write(to_json(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # of a record that could not be written: that has been said
            self._file.close()


class Display(Protocol):
    """Where a run shows how it goes."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def start(self, step: int, steps: int) -> None:
        """Training starts after `step` of `steps`."""
        ...

    def show(self, record: Record) -> None:
        """A record was written."""
        ...

    def note(self, text: str) -> None:
        """Something to know."""
        ...


class Silent:
    """A display that shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, step: int, steps: int) -> None:
        pass

    def show(self, record: Record) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Numbers:
    """The newest figures of a run, in a few words."""

    def __init__(self) -> None:
        self.loss = self.speed = self.validation = ""

    def take(self, record: Record) -> None:
        if record["kind"] == "train":
            self.loss = f"loss {record['loss']:.3f}"
            speed = record["tokens_per_second"]  # None where the clock stood still
            self.speed = "" if speed is None else f"{speed:,.0f} tok/s"
        else:
            self.validation = f"val {record['loss']:.3f} ({record['bits_per_byte']:.3f} bpb)"

    def __str__(self) -> str:
        return "  ".join(filter(None, (self.loss, self.speed, self.validation)))


class Terminal:
    """A live bar on a terminal; elsewhere a line at each validation."""

    def __init__(self, title: str) -> None:
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn(title),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=None, numbers="")
        self._numbers = Numbers()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, step: int, steps: int) -> None:
        self._progress.update(self._task, completed=step, total=steps)

    def show(self, record: Record) -> None:
        self._numbers.take(record)
        if record["kind"] == "validation" and not self._console.is_terminal:
            step, loss, bits = record["step"], record["loss"], record["bits_per_byte"]
            speed = f", {self._numbers.speed}" if self._numbers.speed else ""
            self.note(f"step {step}: validation loss {loss:.4f}, {bits:.4f} bits per byte{speed}")
        self._progress.update(self._task, completed=record["step"], numbers=str(self._numbers))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)
