"""The training loop: `train` takes a run from its first step, or from its newest checkpoint, to its end.

    while step < steps:
        train a step;  validate if due;  save if due;  stop if asked or if nothing improves

The losses are a function of the config and the seed. A run that was killed and resumed gives the same weights
and the same metrics as one that was not: everything that it depends on is in the checkpoint.
"""

import math
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from myriad import distributed
from myriad.evaluate import Perplexity, check_causality, evaluate
from myriad.train.job import DivergedError, Job, Progress, save
from myriad.train.optim import clip_gradients
from myriad.train.record import Record
from myriad.train.run import RunConfig
from myriad.train.signals import STOP_SIGNALS, first_signal

Loads = list[dict[str, Tensor]]
"""Each layer's additive statistics."""


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
    rank, world = distributed.rank(), distributed.world_size()
    seed_step(run.seed, progress.step, rank)
    ids, targets = job.stream.batch(progress.position, run.windows_per_step, rank, world)
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
    seconds = max(0.0, time.perf_counter() - started)  # clocks have been seen to jump, and to stand still
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
        "tokens_per_second": round(run.batch.tokens / seconds, 1) if seconds else None,
    }


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make a step's random numbers (dropout's) a function of the run's seed, the step and the process."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def _backward(job: Job, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Loads]:
    """Gradients of the mean loss over a step's targets, over all micro-batches and processes.

    Returns:
        the loss, the auxiliary loss and the loads, the same in every process.
    """
    windows = job.run.micro_windows // distributed.world_size()
    parts = list(zip(ids.split(windows), targets.split(windows), strict=True))
    loss, aux_loss = torch.zeros((), device=job.device), torch.zeros((), device=job.device)
    loads: Loads = []
    for number, (part_ids, part_targets) in enumerate(parts, 1):
        with job.replica.collecting(last=number == len(parts)):
            output = job.forward_backward(part_ids, part_targets)
        loss, aux_loss = loss + output.loss, aux_loss + output.aux_loss
        loads = _add_loads(loads, output.loads)
    job.replica.total_tables()
    return _total(loss, aux_loss, loads)


def _add_loads(total: Loads, more: tuple[dict[str, Tensor], ...]) -> Loads:
    if not total:
        return list(more)
    return [
        {name: value + part[name] for name, value in layer.items()} for layer, part in zip(total, more, strict=True)
    ]


def _total(loss: Tensor, aux_loss: Tensor, loads: Loads) -> tuple[Tensor, Tensor, Loads]:
    """The sums over all processes."""
    values = [value for layer in loads for value in layer.values()]
    loss, aux_loss, *values = distributed.total([loss, aux_loss, *values])
    left = iter(values)
    return loss, aux_loss, [{name: next(left) for name in layer} for layer in loads]


def validate(job: Job) -> Record:
    """Measure the model on the validation split, and note whether it is the best so far."""
    run, progress = job.run, job.progress
    with job.autocast():
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


def train(job: Job, tell: Callable[[Record], None]) -> Outcome:
    """Run a job to the end of its budget, to its early stop, or to a signal.

    Args:
        job: what to train, and how far it is.
        tell: takes the record of every step and of every validation.

    Raises:
        DivergedError: the loss stays infinite, or the weights became so.
        RunError: the model sees the future, or a checkpoint cannot be written.
    """
    run, progress = job.run, job.progress
    _refuse_leaks(job)
    _settle(job)
    job.display.start(progress.step, job.steps)
    # The first SIGTERM or SIGINT lets the step finish and the run save.
    with first_signal(lambda number: job.signals.add(signal.Signals(number).name)):
        while progress.step < job.steps and not _stops_early(job) and not _must_stop(job):
            tell(train_step(job))
            if progress.skipped_in_a_row >= run.train.max_skipped:
                raise DivergedError(_divergence(job))
            if due(progress.step, run.evaluation.every, job.steps):
                tell(validate(job))
            if _must_stop(job) or _save_is_due(job):
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


def _settle(job: Job) -> None:
    """Bring the exchange of gradients to the state in which every later step finds it."""
    ids, targets = job.stream.batch(0, job.run.micro_windows, distributed.rank(), distributed.world_size())
    job.model.train()
    with job.autocast():
        job.replica.settle(ids.to(job.device), targets.to(job.device))


def _must_stop(job: Job) -> bool:
    """Whether a signal has reached any process: all of them stop at the same step."""
    if job.stop_signal is None:
        asked = [torch.tensor(float(name in job.signals), device=job.device) for name in STOP_SIGNALS]
        found = [name for name, count in zip(STOP_SIGNALS, distributed.total(asked), strict=True) if count]
        job.stop_signal = found[0] if found else None
    return job.stop_signal is not None


def _stops_early(job: Job) -> bool:
    patience = job.run.early_stopping.patience
    return patience is not None and job.progress.without_improvement >= patience


def _save_is_due(job: Job) -> bool:
    """At each validation unless told otherwise; whenever the model is the best so far, or the run ends."""
    run, progress = job.run, job.progress
    validated = progress.validated_step == progress.step
    regular = validated if run.checkpoint.every is None else due(progress.step, run.checkpoint.every, job.steps)
    best = validated and progress.best_step == progress.step
    return regular or best or progress.step == job.steps or _stops_early(job)


def _divergence(job: Job) -> str:
    skipped, step = job.progress.skipped_in_a_row, job.progress.step
    return (
        f"stopped at step {step}: the loss or a gradient was not finite in {skipped} updates in a row; "
        f"the last checkpoint is kept. A lower optim.lr, a longer optim.warmup or train.precision=float32 may help"
    )
