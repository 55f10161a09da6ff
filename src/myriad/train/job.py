"""A job: what a run's config built, how far it is, and how that is saved and restored.

A checkpoint holds everything that the rest of the run depends on: weights, moments and counters. Random numbers
need no state: each step's are seeded by its number.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from myriad import checkpoint, distributed, kernels
from myriad.checkpoint import CheckpointError, FileEntry
from myriad.config import RunError
from myriad.data.store import Split, Store
from myriad.data.stream import Stream
from myriad.models import LanguageModel
from myriad.train.logs import broken_seals, seal_logs
from myriad.train.optim import NamedState, RoleOptimizer, optimizer_state, restore_optimizer
from myriad.train.passes import ForwardBackward
from myriad.train.precision import Precision, autocast
from myriad.train.record import Display
from myriad.train.replica import Replica
from myriad.train.run import RunConfig


class DivergedError(RunError):
    """The numbers of a run broke: its loss stays infinite or undefined, or its weights are."""


@dataclass
class Progress:
    """How far a run is: the counters of a checkpoint, all of them plain values."""

    step: int = 0
    position: int = 0
    """Windows dealt by the stream."""
    seconds: float = 0.0
    """Training time over all sessions."""
    skipped: int = 0
    """Updates skipped because a loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    mark_loss: float | None = None
    """The validation loss that the next one must beat by `min_delta` to count as improvement."""
    without_improvement: int = 0
    """Validations since then."""
    validated_step: int | None = None


@dataclass
class Job:
    """A run in the making: what the config built, and how far it is."""

    run: RunConfig
    folder: Path
    store: Store
    model: LanguageModel
    replica: Replica
    """The model as this process trains it."""
    forward_backward: ForwardBackward
    """How it goes through a micro-batch."""
    optimizer: RoleOptimizer
    stream: Stream
    validation: Split
    device: torch.device
    precision: Precision
    steps: int
    """Steps of the whole budget."""
    display: Display
    progress: Progress = field(default_factory=Progress)
    signals: set[str] = field(default_factory=set)
    """Names of the signals that asked this process to stop."""
    stop_signal: str | None = None
    """The signal at which all processes have agreed to stop."""
    saved_step: int | None = None
    """The step of the newest checkpoint."""
    broken_seals: dict[str, FileEntry] = field(default_factory=dict)
    """Of logs that were damaged when the run was resumed; kept, so that the damage stays known."""

    def autocast(self) -> AbstractContextManager[object]:
        """The context of forward passes."""
        return autocast(self.precision, self.device, self.run.optim.weights)

    @property
    def checkpoint_folders(self) -> Path:
        return self.folder / checkpoint.CHECKPOINTS


def save(job: Job) -> None:
    """Write a checkpoint, show the best in the run folder, and delete what is no longer kept.

    The first process writes; the others, which hold the same, go on to the next exchange and wait there.

    Raises:
        DivergedError: the weights are not finite; earlier checkpoints are as they were.
        RunError: a file cannot be written; so are they then.
    """
    _refuse_broken(job)
    job.saved_step = job.progress.step
    if distributed.rank():
        return
    moments = optimizer_state(job.optimizer, parameter_names(job.model))
    seals = seal_logs(job.folder) | job.broken_seals
    state = {
        "progress": asdict(job.progress),
        "logs": {name: seal.model_dump() for name, seal in seals.items()},
        "optimizer_steps": moments.steps,
        "precision": job.precision,
        "kernels": kernels.current(),
        "data_sha256": job.store.split("train").sha256,
    }
    written = checkpoint.save_checkpoint(
        job.folder,
        job.progress.step,
        job.model,
        run_config=job.run.model_dump(mode="json"),
        tokenizer=job.store.path / "tokenizer.json",
        end_id=job.store.index.end_id,
        tensors={"optimizer": moments.tensors},
        state=state,
    )
    publish(job, written)


def _refuse_broken(job: Job) -> None:
    """An update can break the weights though loss and gradients were finite: they must not replace what is kept."""
    try:
        checkpoint.refuse_broken_weights(job.model, f"stopped at step {job.progress.step}")
    except CheckpointError as error:
        advice = "the last checkpoint is kept. A lower optim.lr or optim.table_lr may help"
        raise DivergedError(f"{error}; {advice}") from None


def publish(job: Job, newest: Path) -> None:
    """Let the run folder show the best checkpoint, or the newest where none was validated."""
    best = None if job.progress.best_step is None else job.checkpoint_folders / f"{job.progress.best_step:08d}"
    checkpoint.publish(job.folder, newest if best is None else best, best)
    checkpoint.prune(job.folder, job.run.checkpoint.keep, newest, best)


def parameter_names(model: LanguageModel) -> dict[Tensor, str]:
    """Parameter -> name."""
    return {parameter: name for name, parameter in model.named_parameters()}


def restore(job: Job, folder: Path) -> None:
    """Bring a freshly built job to where a checkpoint was saved.

    Raises:
        CheckpointError: a file does not hold what `save` wrote.
    """
    training = folder / checkpoint.TRAINING
    checkpoint.load_weights(job.model, folder)
    checkpoint.refuse_broken_weights(job.model, folder)
    state = read_state(folder)
    tensors = checkpoint.read_tensors(training / "optimizer.safetensors")
    moments = {name: value.to(job.device) for name, value in tensors.items()}
    try:
        job.progress = TypeAdapter(Progress).validate_python(state["progress"])
        names = parameter_names(job.model)
        restore_optimizer(job.optimizer, names, NamedState(moments, state["optimizer_steps"]))
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{training}: damaged ({' '.join(str(error).split())})") from None
    job.saved_step = job.progress.step
    if distributed.rank() == 0:
        _note_damaged_logs(job, state)
    if damage := distributed.once(lambda: _damage_of_best(job)):
        # They cannot be shown again; the next validation finds others.
        job.display.note(f"the best weights are lost: {damage}")
        job.progress.best_step, job.progress.best_loss = None, None
    distributed.once(lambda: publish(job, folder))


def _note_damaged_logs(job: Job, state: Mapping[str, Any]) -> None:
    """Nothing that is computed depends on the logs: say what is damaged, and go on."""
    job.broken_seals = broken_seals(job.folder, state)
    for name in job.broken_seals:
        job.display.note(f"{job.folder / name}: damaged; what can be read of it is kept, and reports will refuse it")


def _damage_of_best(job: Job) -> str | None:
    """What is wrong with the best checkpoint, if anything is."""
    if job.progress.best_step is None:
        return None
    try:
        best = job.checkpoint_folders / f"{job.progress.best_step:08d}"
        checkpoint.verify(best, checkpoint.Manifest.read(best / checkpoint.MANIFEST))
    except CheckpointError as error:
        return str(error)
    return None


def read_state(folder: Path) -> Mapping[str, Any]:
    """The counters of a checkpoint."""
    return checkpoint.read_json(folder / checkpoint.TRAINING / "state.json")
