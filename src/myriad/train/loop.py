"""The training loop: `train` takes a run from its first step, or from its newest checkpoint, to its end.

    while step < steps:
        train a step;  validate if due;  save if due;  stop if asked or if nothing improves

The losses are a function of the config and the seed. A run that was killed and resumed gives the same weights
and the same metrics as one that was not: everything that it depends on is in the checkpoint.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from myriad.config import RunError
from myriad.evaluate import Perplexity, check_causality, evaluate
from myriad.train.job import Job, Progress, save
from myriad.train.optim import clip_gradients
from myriad.train.precision import autocast
from myriad.train.record import Metrics, Record
from myriad.train.run import RunConfig


class Outcome(NamedTuple):
    """How a session of a run ended."""

    step: int
    finished: bool
    """False: a signal stopped it, and it can be resumed."""
    best_loss: float | None
    reason: str


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last, happens now."""
    return step % every == 0 or step == last


def train_step(job: Job) -> Record:
    """One optimizer step over all micro-batches.

    A loss or gradient that is not finite skips the update; the windows count as used.

    Raises:
        RunError: too many updates in a row were skipped.
    """
    run, progress = job.run, job.progress
    started = time.perf_counter()
    job.model.train()
    ids, targets = job.stream.batch(progress.position, run.windows_per_step)
    loss, aux_loss, loads = _backward(job, ids, targets)
    norm = clip_gradients(job.model.parameters(), run.optim.clip)
    scale = run.optim.scale(progress.step, job.steps)
    job.optimizer.scale_lr(scale)
    finite = bool((loss + aux_loss + norm).isfinite())
    if finite:
        job.optimizer.step()
        job.model.after_step(loads)
    job.optimizer.zero_grad(set_to_none=True)

    progress.step += 1
    progress.position += run.windows_per_step
    progress.skipped += not finite
    progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
    seconds = time.perf_counter() - started
    progress.seconds += seconds
    return {
        "kind": "train",
        "step": progress.step,
        "tokens": progress.step * run.batch.tokens,
        "loss": loss.item(),
        "aux_loss": aux_loss.item(),
        "gradient_norm": norm.item(),
        "lr": scale * run.optim.lr,
        "skipped": progress.skipped,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(run.batch.tokens / seconds, 1),
    }


def _backward(job: Job, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Gradients of the mean loss over a step's targets; returns it, the auxiliary loss and the summed loads."""
    windows = job.run.micro_tokens // job.run.model.context
    parts = list(zip(ids.split(windows), targets.split(windows), strict=True))
    count = int((targets >= 0).sum())
    loss, aux_loss = torch.zeros((), device=job.device), torch.zeros((), device=job.device)
    loads: list[dict[str, Tensor]] = []
    for part_ids, part_targets in parts:
        with autocast(job.precision, job.device):
            output = job.model(part_ids.to(job.device), targets=part_targets.to(job.device))
        mean, aux = output.loss / count, output.aux_loss / len(parts)
        (mean + aux).backward()
        loss, aux_loss = loss + mean.detach(), aux_loss + aux.detach()
        loads = _add_loads(loads, output.loads)
    return loss, aux_loss, loads


def _add_loads(total: list[dict[str, Tensor]], more: tuple[dict[str, Tensor], ...]) -> list[dict[str, Tensor]]:
    if not total:
        return list(more)
    return [
        {name: value + part[name] for name, value in layer.items()} for layer, part in zip(total, more, strict=True)
    ]


def validate(job: Job) -> Record:
    """Measure the model on the validation split, and note whether it is the best so far."""
    run, progress = job.run, job.progress
    with autocast(job.precision, job.device):
        found = evaluate(
            job.model,
            [job.validation],
            end_id=job.store.index.end_id,
            stride=run.model.context,
            limit=run.evaluation.tokens,
        )
    progress.validated_step = progress.step
    mark, delta = progress.mark_loss, run.early_stopping.min_delta
    if math.isfinite(found.loss) and (mark is None or found.loss < mark - delta):
        progress.mark_loss, progress.without_improvement = found.loss, 0
    else:
        progress.without_improvement += 1
    if math.isfinite(found.loss) and (progress.best_loss is None or found.loss < progress.best_loss):
        progress.best_loss, progress.best_step = found.loss, progress.step
    return _validation_record(progress, run, found)


def _validation_record(progress: Progress, run: RunConfig, found: Perplexity) -> Record:
    return {
        "kind": "validation",
        "step": progress.step,
        "tokens": progress.step * run.batch.tokens,
        "loss": found.loss,
        "token_perplexity": found.token_perplexity,
        "bits_per_byte": found.bits_per_byte,
        "targets": found.tokens,
        "best": progress.best_step == progress.step,
        "seconds": round(progress.seconds, 3),
    }


def train(job: Job, metrics: Metrics) -> Outcome:
    """Run a job to the end of its budget, to its early stop, or to a signal.

    Raises:
        RunError: the loss stays infinite, or the model sees the future.
    """
    run, progress, display = job.run, job.progress, job.display
    _refuse_leaks(job)
    display.start(progress.step, job.steps)
    with _catching_signals(job):
        while progress.step < job.steps and not _stops_early(job) and job.stop_signal is None:
            record = train_step(job)
            metrics.write(record)
            display.show(record)
            if progress.skipped_in_a_row >= run.train.max_skipped:
                raise RunError(_divergence(job))
            if due(progress.step, run.evaluation.every, job.steps):
                record = validate(job)
                metrics.write(record)
                display.show(record)
            if _save_is_due(job):
                save(job)
        if job.stop_signal is not None and job.saved_step != progress.step:
            save(job)  # the signal came between two steps
    if job.stop_signal is not None and progress.step < job.steps and not _stops_early(job):
        return Outcome(progress.step, False, progress.best_loss, f"{job.stop_signal} at step {progress.step}")
    reason = "early stop" if progress.step < job.steps else "budget spent"
    return Outcome(progress.step, True, progress.best_loss, reason)


def _refuse_leaks(job: Job) -> None:
    """Every run begins with the check that its validation figures will mean something."""
    ids, _ = job.stream.batch(0, 2)
    training = job.model.training
    check_causality(job.model.eval(), ids.to(job.device))
    job.model.train(training)


def _stops_early(job: Job) -> bool:
    patience = job.run.early_stopping.patience
    return patience is not None and job.progress.without_improvement >= patience


def _save_is_due(job: Job) -> bool:
    """At each validation unless told otherwise; whenever the model is the best so far, ends, or must stop."""
    run, progress = job.run, job.progress
    validated = progress.validated_step == progress.step
    regular = validated if run.checkpoint.every is None else due(progress.step, run.checkpoint.every, job.steps)
    best = validated and progress.best_step == progress.step
    ends = progress.step == job.steps or _stops_early(job)
    return regular or best or ends or job.stop_signal is not None


def _divergence(job: Job) -> str:
    skipped, step = job.progress.skipped_in_a_row, job.progress.step
    return (
        f"stopped at step {step}: the loss or a gradient was not finite in {skipped} updates in a row; "
        f"the last checkpoint is kept. A lower optim.lr, a longer optim.warmup or train.precision=float32 may help"
    )


@contextmanager
def _catching_signals(job: Job) -> Iterator[None]:
    """The first SIGTERM or SIGINT lets the step finish and the run save; the second acts as ever."""
    before: dict[signal.Signals, Any] = {}

    def ask_to_stop(number: int, frame: object) -> None:
        job.stop_signal = signal.Signals(number).name
        for which, handler in before.items():
            signal.signal(which, handler)

    try:
        for which in (signal.SIGTERM, signal.SIGINT):
            before[which] = signal.signal(which, ask_to_stop)
    except ValueError:
        pass  # only the main thread may catch signals
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
