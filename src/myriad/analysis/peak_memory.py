"""The most memory that training a run held, kept in its folder."""

import gc
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from myriad import distributed
from myriad.analysis.bench.memory import peak_since, reset_peak, tells_peak
from myriad.checkpoint import CheckpointError, read_json
from myriad.train.record import Record

FILE = "memory.json"


class PeakMemory:
    """A tracker that keeps the peak over all sessions of a run in `memory.json`, where the system tells it.

    On CUDA that is what PyTorch allocated, on a CPU what the whole process held, its libraries included.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], digest: str, from_step: int) -> None:
        """Count from now on: what earlier runs of this process held is let go first."""
        self._path = folder / FILE
        self._device = distributed.device()
        self._tells = tells_peak(self._device)
        self._earlier = recorded_peak(folder) or 0
        self._trained = False
        if self._tells:
            gc.collect()
            reset_peak(self._device)

    def log(self, record: Record) -> None:
        """Write at each validation, so that a kill does not lose it."""
        self._trained = True
        if record["kind"] == "validation":
            self._write()

    def close(self) -> None:
        if self._trained:
            self._write()

    def _write(self) -> None:
        if self._tells:
            peak = max(self._earlier, peak_since(self._device))
            temporary = self._path.with_name(f".{FILE}.tmp")
            temporary.write_text(json.dumps({"peak_bytes": peak}) + "\n")
            os.replace(temporary, self._path)


def recorded_peak(folder: Path) -> int | None:
    """The peak that a run folder holds; None where it holds none."""
    try:
        peak = read_json(folder / FILE).get("peak_bytes")
    except CheckpointError:
        return None
    return peak if isinstance(peak, int) else None
