"""The learning curve of a run as a picture beside its metrics, drawn anew while it trains."""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from myriad.analysis.compare import Curve
from myriad.analysis.plots import learning_curve
from myriad.train.record import Record, read_records

PAUSE = 30.0
"""Seconds of training between two drawings, at least."""
SHARE = 0.01
"""The share of the time that drawing may take, where that asks for longer pauses."""


class LearningCurve:
    """A tracker that keeps `learning-curve.png` in a run folder up to date.

    It is drawn at validations, though seldom enough not to slow training, and at the end. A resumed run's picture
    begins with what `metrics.jsonl` holds from before.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], digest: str, from_step: int, *, pause: float = PAUSE
    ) -> None:
        """Draw nothing yet.

        Args:
            folder: the run's.
            settings: not shown.
            digest: not shown.
            from_step: records up to this step come from the file.
            pause: seconds between two drawings, at least.
        """
        self.path = folder / "learning-curve.png"
        self._pause = pause
        self._curve = Curve(folder.resolve().name, [], [], [], [])
        self._validation_loss: list[float] = []
        self._stale = False
        self._next = -math.inf
        for record in read_records(folder / "metrics.jsonl"):
            if record["step"] <= from_step:
                self._add(record)

    def log(self, record: Record) -> None:
        """Add a record; at a validation, draw if the last drawing is some time ago."""
        self._add(record)
        self._stale = True
        if record["kind"] == "validation" and time.monotonic() >= self._next:
            self._draw()

    def close(self) -> None:
        """Draw what has come since the last drawing."""
        if self._stale:
            self._draw()

    def _add(self, record: Record) -> None:
        curve, loss = self._curve, _number(record.get("loss"))
        if record.get("kind") == "train":
            curve.train_tokens.append(record["tokens"])
            curve.train_loss.append(loss)
        elif record.get("kind") == "validation":
            curve.validation_tokens.append(record["tokens"])
            curve.validation_bits.append(_number(record.get("bits_per_byte")))
            self._validation_loss.append(loss)

    def _draw(self) -> None:
        started = time.monotonic()
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        learning_curve(self._curve, self._validation_loss, temporary)
        os.replace(temporary, self.path)
        self._stale = False
        now = time.monotonic()
        self._next = now + max(self._pause, (now - started) / SHARE)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
