"""The logs of a run, `metrics.jsonl` and `sessions.jsonl`: every checkpoint seals what they hold by then.

A seal is the length and the SHA-256 of a log as it was when the checkpoint was saved. What is appended later, and
what a kill cuts short, leaves it intact; a resumed run drops later records and comes back to the sealed bytes.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from myriad import checkpoint
from myriad.checkpoint import CheckpointError, FileEntry, naming

LOGS = ("metrics.jsonl", "sessions.jsonl")
SEALS = TypeAdapter(dict[str, FileEntry])


def seal_logs(run: Path) -> dict[str, FileEntry]:
    """The logs of a run folder as they are now."""
    return {name: checkpoint.hash_file(run / name) for name in LOGS if (run / name).exists()}


def append_line(path: Path, line: str) -> None:
    """Add a line to a log; one that a kill left torn is ended first."""
    with naming(path), path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read() not in (b"", b"\n")
        file.write((b"\n" if torn else b"") + line.encode() + b"\n")


def broken_seals(run: Path, state: Mapping[str, Any]) -> dict[str, FileEntry]:
    """The seals in a checkpoint's state that a run's logs do not agree with.

    Raises:
        CheckpointError: the state holds something else.
    """
    try:
        seals = SEALS.validate_python(state.get("logs", {}))
    except ValidationError as error:
        raise CheckpointError(f"{run}: damaged (seals of logs: {' '.join(str(error).split())})") from None
    return {name: seal for name, seal in seals.items() if name in LOGS and not _holds(run / name, seal)}


def _holds(path: Path, seal: FileEntry) -> bool:
    """Whether a file begins with what was sealed."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return hashlib.sha256(file.read(seal.size)).hexdigest() == seal.sha256


def refuse_damaged_logs(run: Path) -> None:
    """Compare a run's logs with its newest checkpoint whose counters are intact; one without any has no seals.

    Raises:
        CheckpointError: names the log that does not hold what was written.
    """
    for folder in reversed(checkpoint.list_checkpoints(run)):
        try:
            manifest = checkpoint.Manifest.read(folder / checkpoint.MANIFEST)
            checkpoint.verify(folder, manifest, only=f"{checkpoint.TRAINING}/state.json")
            state = checkpoint.read_json(folder / checkpoint.TRAINING / "state.json")
        except CheckpointError:
            continue
        for name in broken_seals(run, state):
            raise CheckpointError(f"{run / name}: damaged (not what was recorded up to step {int(folder.name)})")
        return
