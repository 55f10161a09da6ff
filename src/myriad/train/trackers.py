"""Trackers: where else a run's records go, such as TensorBoard or Weights & Biases.

A tracker takes the records of `metrics.jsonl` one by one. Its library is an extra, imported when it is asked for:
`pip install 'myriad-moe[tensorboard]'`.
"""

import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml

from myriad.config import ConfigError, RunError, nearest
from myriad.train.record import AXES, Record


class Tracker(Protocol):
    """Something that follows a run."""

    def log(self, record: Record) -> None:
        """Take a record, as it was written."""
        ...

    def close(self) -> None:
        """Finish: no record will come any more."""
        ...


class Opener(Protocol):
    """What opens a tracker for a session of a run, such as the tracker's class."""

    __name__: str

    def __call__(self, folder: Path, settings: Mapping[str, Any], digest: str, from_step: int, /) -> Tracker: ...


class Trackers:
    """Several trackers as one, none of which can stop a run: one that fails is dropped, with a note."""

    def __init__(self, trackers: Iterable[Tracker], note: Callable[[str], None]) -> None:
        """Follow a run.

        Args:
            trackers: to forward to.
            note: told in one line which was dropped, and why.
        """
        self._trackers = list(trackers)
        self._note = note

    def log(self, record: Record) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(record)
            except Exception as error:
                self._trackers.remove(tracker)
                self._note(f"{_name(tracker)} failed and is dropped; training goes on ({_one_line(error)})")
                with suppress(Exception):
                    tracker.close()

    def close(self) -> None:
        while self._trackers:
            tracker = self._trackers.pop()
            try:
                tracker.close()
            except Exception as error:
                self._note(f"{_name(tracker)} could not be finished ({_one_line(error)})")


class TensorBoard:
    """Writes event files into `RUN/tensorboard`; a resumed run replaces the steps after its checkpoint."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], digest: str, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)
        text = yaml.safe_dump(dict(settings), sort_keys=False, default_flow_style=None, width=100)
        self._writer.add_text("settings", f"```yaml\n# {digest}\n{text}```", from_step)
        compared = dict.fromkeys(("validation/loss", "validation/bits_per_byte"))
        for summary in hparams(_flatten(settings), compared):
            self._writer._get_file_writer().add_summary(summary, from_step)
        self._writer.flush()

    def log(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()  # a killed run keeps all that it wrote

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases; the `WANDB_*` variables say where, and whether there is a network.

    The run's id is kept in `RUN/wandb-id`, so that a resumed run goes on as the same one. The x axis is the field
    `step`: wandb's own only grows, and would refuse the steps that a resumed run repeats.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], digest: str, from_step: int) -> None:
        import wandb

        self._run = wandb.init(
            dir=str(folder),
            id=_kept_id(folder / "wandb-id"),
            resume="allow",
            reinit="create_new",
            project=os.environ.get("WANDB_PROJECT", "myriad"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            config={**settings, "digest": digest},
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        self._run.log({axis: record[axis] for axis in AXES} | scalars(record))

    def close(self) -> None:
        self._run.finish()


OPENERS: dict[str, Opener] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def named(names: Iterable[str]) -> list[Opener]:
    """The trackers that go by some names, each once; none is opened, and no library imported.

    Raises:
        ConfigError: an unknown name, with the nearest, or the library is missing.
    """
    unique = list(dict.fromkeys(names))
    for name in unique:
        if name not in OPENERS:
            raise ConfigError(f"'{name}': no such tracker{nearest(name, OPENERS)} (known: {', '.join(OPENERS)})")
        spec = find_spec(name)  # a library has the name of its tracker
        if spec is None or spec.origin is None:  # a mere folder of that name, such as wandb leaves, has no origin
            raise ConfigError(f"{name}: not installed; pip install 'myriad-moe[{name}]'")
    return [OPENERS[name] for name in unique]


def open_trackers(
    openers: Iterable[Opener], folder: Path, settings: Mapping[str, Any], digest: str, from_step: int
) -> list[Tracker]:
    """Open trackers for a run; if one fails, the others are closed again.

    Args:
        openers: from `named`, or others of the kind.
        folder: the run's, which is there.
        settings: the run's.
        digest: names these settings.
        from_step: the step that this session of the run starts after.

    Raises:
        RunError: a tracker cannot be opened.
    """
    trackers: list[Tracker] = []
    for opener in openers:
        try:
            trackers.append(opener(folder, settings, digest, from_step))
        except Exception as error:
            Trackers(trackers, note=lambda _: None).close()
            raise RunError(f"{opener.__name__}: cannot be opened ({_one_line(error)})") from None
    return trackers


def scalars(record: Record) -> dict[str, float]:
    """The finite numbers of a record by `kind/field`; what they are drawn against is left out."""
    return {
        f"{record['kind']}/{field}": value
        for field, value in record.items()
        if field not in AXES and _is_number(value) and math.isfinite(value)
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flatten(tree: Any, path: str = "") -> dict[str, bool | str | float]:
    """Nested settings by dotted path, as TensorBoard takes them."""
    if isinstance(tree, Mapping):
        parts = [_flatten(value, f"{path}.{key}" if path else str(key)) for key, value in tree.items()]
        return {name: value for part in parts for name, value in part.items()}
    return {path: tree if isinstance(tree, bool | str | int | float) else json.dumps(tree)}


def _kept_id(path: Path) -> str:
    """The id in a file; a new one is written there first."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(secrets.token_hex(4) + "\n")
        temporary.replace(path)
    return path.read_text(encoding="utf-8").strip()


def _name(tracker: Tracker) -> str:
    return type(tracker).__name__


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
