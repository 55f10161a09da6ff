"""A session: one process's part in a run, from its config to the outcome of the loop.

`fit` opens or prepares the data, builds the model, continues from the newest intact checkpoint if asked, and trains.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from myriad import __version__, checkpoint, distributed, kernels
from myriad.checkpoint import CheckpointError, naming
from myriad.config import ConfigError, RunError, first_difference, validate
from myriad.data.store import Store
from myriad.data.stream import Stream
from myriad.data.tokenizer import FILE_NAME
from myriad.ffn.base import ffn_configs
from myriad.kernels.hardware import processor
from myriad.models import LanguageModel
from myriad.models.transformer import Block
from myriad.train.captured import Captured, CudaGraphs
from myriad.train.initial import initial_model
from myriad.train.job import Job, read_state, restore
from myriad.train.logs import append_line
from myriad.train.loop import Outcome, train
from myriad.train.optim import build_optimizer, freeze, hold_weights
from myriad.train.passes import Launched
from myriad.train.precision import Precision, autocast, resolve_precision
from myriad.train.record import Display, Metrics, Record, Silent
from myriad.train.replica import Replica
from myriad.train.run import RunConfig
from myriad.train.stores import open_store, with_store_vocabulary
from myriad.train.trackers import Opener, Trackers, open_trackers

MAY_CHANGE = ("out", "budget", "train", "evaluation", "early_stopping", "checkpoint")
"""Settings in which a resumed run may differ from its record."""

MOST_PARAMETERS = 2**48
"""A quadrillion bytes: no machine has so many, and PyTorch's own errors beyond them are about overflowing integers."""


def fit(
    run: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    kernel: str | None = None,
    display: Display | None = None,
    trackers: Sequence[Opener] = (),
) -> Outcome:
    """Train a run in a folder, in this process or in all that a launcher such as torchrun started.

    Args:
        run: the settings.
        out: the run folder; only the first process writes there.
        resume: continue a run that is there; without one, start it.
        kernel: the kernels to use; None: those that the run has used before, else `auto`.
        display: where to show progress; the first process does.
        trackers: are opened for the run in the first process, take every record, and are closed at the end.

    Raises:
        MyriadError: settings, data or folder cannot be used, or training failed; the text says why.
    """
    out = Path(out)
    with distributed.joined():
        display = Silent() if display is None or distributed.rank() else display
        distributed.once(lambda: _refuse_present(out, resume))
        _refuse_uneven_shares(run)
        _refuse_few_tokens(run)
        _refuse_graph(run)
        store = open_store(run.data, out, display)
        run = with_store_vocabulary(run, store)
        with _alone_in(out), _naming_lack_of_memory(run):
            distributed.once(lambda: _refuse_present(out, resume))  # another may have begun there since
            newest = _newest_checkpoint(run, out, store, display)
            kernels.select(kernel or (str(read_state(newest).get("kernels", "auto")) if newest else "auto"))
            job = _build_job(run, out, store, display, newest)
            if newest is not None:
                restore(job, newest)
            if run.train.cuda_graph:
                job.forward_backward = _captured(job)
            distributed.once(lambda: _record_session(job))
            with _telling(job, trackers) as tell:
                return train(job, tell)


def _refuse_present(out: Path, resume: bool) -> None:
    if holds_run(out) and not resume:
        raise ConfigError(f"{out}: already holds a run; --resume continues it, or choose another folder with out=")


def _refuse_uneven_shares(run: RunConfig) -> None:
    world = distributed.world_size()
    if run.micro_windows % world:
        raise ConfigError(
            f"batch: {run.micro_windows} sequences computed at once ({run.micro_tokens} tokens at a context of "
            f"{run.model.context}) cannot be shared by {world} processes"
        )


def _refuse_few_tokens(run: RunConfig) -> None:
    tokens = run.micro_tokens // distributed.world_size()
    for ffn in ffn_configs(run.model):
        least = ffn.least_tokens()
        if tokens < least:
            kind = ffn.model_dump()["kind"]
            raise ConfigError(f"batch: {tokens} tokens computed at once are fewer than {kind} takes, which is {least}")


def _refuse_graph(run: RunConfig) -> None:
    if not run.train.cuda_graph:
        return
    world = distributed.world_size()
    if world > 1:
        raise ConfigError(
            f"train.cuda_graph: is for one process alone, not for {world}, whose exchange of gradients is not captured"
        )
    if distributed.device().type != "cuda":
        raise ConfigError("train.cuda_graph: needs a CUDA device, of which there is none here")


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process that holds it, however that ends."""
    lock = FileLock(out / ".lock", timeout=0)

    def take() -> None:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(f"{out}: another process is training in this folder; choose another with out=") from None

    distributed.once(take)
    try:
        yield
    finally:
        if lock.is_locked and os.listdir(out) == [".lock"]:  # refused before it began: leave no trace
            shutil.rmtree(out)
        lock.release()


@contextmanager
def _naming_lack_of_memory(run: RunConfig) -> Iterator[None]:
    """Turn the allocators' errors into one that says what the model needs."""
    if run.model.cost().parameters > MOST_PARAMETERS:
        raise _lack_of_memory(run)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        raise _lack_of_memory(run) from None


def _lack_of_memory(run: RunConfig) -> RunError:
    parameters, weights = run.model.cost().parameters, run.optim.weights
    size = 16 if weights == "float32" else 8
    return RunError(
        f"out of memory: the model has {parameters:,} parameters, which with gradients and moments take about "
        f"{size * parameters // 10**6:,} MB in {weights}, and activations more; "
        "a smaller batch.micro_tokens or train.activation_checkpointing=true hold fewer of these"
    )


def holds_run(folder: Path) -> bool:
    """Whether a folder has the traces of a run in it."""
    traces = ("run.json", "metrics.jsonl", checkpoint.CHECKPOINTS, checkpoint.MANIFEST)
    return any((folder / name).exists() for name in traces)


def _newest_checkpoint(run: RunConfig, out: Path, store: Store, display: Display) -> Path | None:
    """The newest intact checkpoint, found by the first process, if it belongs to this run."""
    name = distributed.once(lambda: _name_of_newest(run, out, store, display))
    return out / checkpoint.CHECKPOINTS / name if name else None


def _name_of_newest(run: RunConfig, out: Path, store: Store, display: Display) -> str | None:
    """The name of the newest intact checkpoint; says which damaged ones were passed over."""
    for folder, damage in checkpoint.intact_checkpoints(out):
        if damage is not None:
            display.note(f"passed over: {damage}")
            continue
        recorded = validate(RunConfig, checkpoint.read_json(folder / "run.json"))
        _refuse_other_run(run, recorded, out)
        if read_state(folder).get("data_sha256") != store.split("train").sha256:
            raise ConfigError(f"{store.path}: not the data that {out} was trained on (its hash is another)")
        if run.budget != recorded.budget:
            display.note(f"the budget was {recorded.budget}, is now {run.budget}: the learning rates follow it")
        display.note(f"resuming {out} from step {int(folder.name)}")
        return folder.name
    if checkpoint.list_checkpoints(out):
        raise CheckpointError(f"{out}: none of its checkpoints is intact; start anew with another out=")
    if (out / checkpoint.MANIFEST).exists():
        raise ConfigError(f"{out}: holds a model and none of the checkpoints that training goes on from")
    if holds_run(out):
        display.note(f"{out} has no checkpoint yet: starting from the first step")
    return None


def _refuse_other_run(run: RunConfig, recorded: RunConfig, out: Path) -> None:
    mine, theirs = run.model_dump(mode="json"), recorded.model_dump(mode="json")
    mine["data"]["path"] = theirs["data"]["path"]  # a store may move: its hash tells whether it is the same
    mine["init"] = theirs["init"]  # and so may a seed: what the run took of it is in the checkpoint
    for section in mine.keys() - set(MAY_CHANGE):
        if mine[section] != theirs[section]:
            raise ConfigError(
                f"{section}: not as in the run that {out} holds ({first_difference(mine[section], theirs[section])})"
            )


def _build_job(run: RunConfig, out: Path, store: Store, display: Display, newest: Path | None) -> Job:
    device = distributed.device()
    torch.manual_seed(run.seed)
    stream = Stream(store.split("train").tokens, run.model.context, run.seed)
    optim = run.optim
    # A run that goes on has its weights in its checkpoint.
    model = run.model.build() if newest is not None else initial_model(run, store.path / FILE_NAME)
    hold_weights(model, optim.weights)
    model = model.to(device)
    freeze(model, optim.frozen)
    _apply_run_time_choices(run, model)
    optimizer = build_optimizer(
        model, optim.lr, optim.table_lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    replica, precision = Replica(model), _precision(run, device, newest)
    passes = distributed.world_size() * (run.batch.tokens // run.micro_tokens)
    return Job(
        run=run,
        folder=out,
        store=store,
        model=model,
        replica=replica,
        forward_backward=Launched(
            replica,
            partial(autocast, precision, device, optim.weights),
            device,
            targets=run.batch.tokens,  # the stream gives every position one
            passes=passes,
        ),
        optimizer=optimizer,
        stream=stream,
        validation=store.split("validation"),
        device=device,
        precision=precision,
        steps=run.budget.in_steps(run.batch.tokens, stream.windows, run.windows_per_step),
        display=display,
    )


def _precision(run: RunConfig, device: torch.device, newest: Path | None) -> Precision:
    """What was asked for; a resumed run with `auto` keeps what `auto` meant when it began."""
    if run.optim.weights == "bfloat16":
        return "bfloat16"
    recorded = read_state(newest).get("precision") if newest is not None else None
    if run.train.precision == "auto" and recorded in ("float32", "bfloat16"):
        return recorded
    return resolve_precision(run.train.precision, device)


def _apply_run_time_choices(run: RunConfig, model: LanguageModel) -> None:
    model.activation_checkpointing = run.train.activation_checkpointing
    if run.train.compile:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()


def _captured(job: Job) -> Captured:
    """The passes as graphs, captured on the first micro-batch of the data."""
    run = job.run
    ids, targets = job.stream.batch(0, run.micro_windows)
    job.model.train()
    return Captured(
        job.forward_backward,
        ids.to(job.device),
        targets.to(job.device),
        job.model.parameters(),
        CudaGraphs(job.device),
        accumulates=run.micro_tokens < run.batch.tokens,
    )


@contextmanager
def _telling(job: Job, openers: Sequence[Opener]) -> Iterator[Callable[[Record], None]]:
    """What takes the records of a session: `metrics.jsonl`, the display and trackers, in the first process only."""
    if distributed.rank():
        yield lambda record: None
        return
    step = job.progress.step
    settings, digest = job.run.model_dump(mode="json"), job.run.digest()
    with (
        closing(Metrics(job.folder / "metrics.jsonl", up_to_step=step)) as metrics,
        closing(Trackers(open_trackers(openers, job.folder, settings, digest, step), job.display.note)) as trackers,
        job.display,
    ):

        def tell(record: Record) -> None:
            metrics.write(record)
            job.display.show(record)
            trackers.log(record)

        yield tell


def _record_session(job: Job) -> None:
    """Note what this session runs on in `sessions.jsonl`, and the settings in `run.json`."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if not (job.folder / "run.json").exists():
        temporary = job.folder / ".run.json.tmp"
        with naming(job.folder / "run.json"):
            temporary.write_text(json.dumps(job.run.model_dump(mode="json"), indent=2) + "\n")
        os.replace(temporary, job.folder / "run.json")
    session = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "from_step": job.progress.step,
        "steps": job.steps,
        "config": job.run.digest(),
        "seed": job.run.seed,
        "data": {"path": str(job.store.path), "source_sha256": job.store.index.source_sha256}
        | {name: split.sha256 for name, split in job.store.index.splits.items()},
        "precision": job.precision,
        "kernels": kernels.choices(job.device.type),
        "device": torch.cuda.get_device_name() if job.device.type == "cuda" else processor(),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "versions": {"myriad": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
    }
    if job.run.init is not None and job.progress.step == 0:
        session["init"] = {"path": job.run.init, "digest": checkpoint.fingerprint(Path(job.run.init))}
    append_line(job.folder / "sessions.jsonl", json.dumps(session))
