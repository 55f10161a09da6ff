"""Training what a plan names, one run after another or several at a time (`crew`).

What is finished is skipped, what is not goes on.

OUT/
  plan.json            the whole plan: a comparison goes on only if it is the same, or adds seeds or budgets
  jobs.json            how many runs were trained at a time, at most, where that was more than one
  runs/NAME-.../       run folders, with outcome.json when they are finished and measured
  runs/data/...        the store, where the data were a source
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout

from myriad.analysis.compare.plan import FolderPlan, Plan, Trial, refuse_other_stores
from myriad.analysis.curve import LearningCurve
from myriad.analysis.measure import measure_run
from myriad.analysis.peak_memory import PeakMemory
from myriad.checkpoint import INDEX, CheckpointError, naming, read_json
from myriad.config import Config, ConfigError, first_difference, validate
from myriad.data.store import Store
from myriad.evaluate import Perplexity
from myriad.train import fit
from myriad.train.job import DivergedError
from myriad.train.record import Display
from myriad.train.stores import ensure_store, store_path, with_store_vocabulary

PLAN, JOBS, RUNS, OUTCOME = "plan.json", "jobs.json", "runs", "outcome.json"


class Stopped(Exception):
    """A signal stopped a run; it is saved, and can go on."""


class HeldOut(Config):
    """What a model made of a split, as `Perplexity` counts it."""

    split: str
    loss: float
    tokens: int
    words: int
    bytes: int
    context: int
    stride: int

    @property
    def perplexity(self) -> Perplexity:
        return Perplexity(**self.model_dump(exclude={"split"}))


class Outcome(Config):
    """How a run ended."""

    index_sha256: str | None = None
    """Of the run's index: names the weights that were measured."""
    best_validation_loss: float | None = None
    diverged: str | None = None
    """Why it has no result, if it has none."""
    held_out: HeldOut | None = None


class Board(Protocol):
    """Where a comparison shows how it goes."""

    def expect(self, trials: Sequence[Trial]) -> None:
        """All runs that there will be."""
        ...

    def begin(self, trial: Trial | None) -> Display:
        """A run starts, or what comes before the first; the display is its own."""
        ...

    def measuring(self, trial: Trial, tokens: int, total: int) -> None:
        """Of a run's held-out text so many more tokens were measured, of so many."""
        ...

    def end(self, trial: Trial, outcome: Outcome, new: bool) -> None:
        """A run is finished, now or (not `new`) by an earlier session."""
        ...


Done = tuple[Trial, Outcome]
"""A run, and how it ended."""


class Work(Protocol):
    """How runs that do not depend on each other are brought to their ends."""

    def __call__(
        self, trials: Sequence[Trial], runs: Path, board: Board, split: str | None, kernel: str | None
    ) -> list[Done]:
        """Do what `finish` does for each; the list is in the order of the trials."""
        ...


class Conducted(NamedTuple):
    """A comparison whose runs are all finished."""

    plan: Plan
    """With the vocabulary of the store."""
    store: Store
    split: str
    """That of the held-out text."""
    sweep: list[Done]
    multipliers: dict[str, float]
    trials: list[Done]
    at_a_time: int
    """How many runs shared the machine, at most, while speeds were measured."""


@contextmanager
def opened(out: Path, plan: FolderPlan) -> Iterator[None]:
    """Hold the folder of a plan's runs, made now or of a plan that this one keeps, against other processes.

    Raises:
        ConfigError: it holds another plan, or something else, or another process is at work in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"--out: another process is at work in {out}") from None
    try:
        _refuse_other(out, plan)
        yield
    finally:
        lock.release()
        if sorted(os.listdir(out)) in ([], [".lock"]):  # refused before it began: leave no trace
            shutil.rmtree(out)


def _refuse_other(out: Path, plan: FolderPlan) -> None:
    if (out / PLAN).exists():
        recorded = read_json(out / PLAN)
        with suppress(ConfigError):  # of another kind: the difference tells
            recorded = validate(type(plan), recorded).extended(plan).model_dump(mode="json")
        if recorded != plan.model_dump(mode="json"):
            raise ConfigError(
                f"--out: {out} holds another {plan.noun} ({_difference(plan, recorded)}); choose another folder"
            )
        return
    strangers = sorted(set(os.listdir(out)) - {".lock", RUNS})
    if strangers:
        raise ConfigError(f"--out: {out} holds something else ({strangers[0]}); choose another folder")


def _difference(plan: Config, recorded: dict[str, Any]) -> str:
    mine = plan.model_dump(mode="json")
    names = [list(found.get("contenders", ())) for found in (mine, recorded)]
    if sorted(names[0]) != sorted(names[1]):
        return f"contenders: {', '.join(names[0]) or 'none'} instead of {', '.join(names[1]) or 'none'}"
    return first_difference(mine, recorded)


def in_turn(trials: Sequence[Trial], runs: Path, board: Board, split: str | None, kernel: str | None) -> list[Done]:
    """One run after another, in this process."""
    return [(trial, finish(trial, runs, board, split, kernel)) for trial in trials]


def conduct(plan: Plan, out: Path, board: Board, kernel: str | None = None, work: Work = in_turn) -> Conducted:
    """Train and measure all that a plan names, in a folder that is `opened`.

    Args:
        plan: what to do.
        out: the folder.
        board: shows how it goes.
        kernel: the kernels to use; None: those that a run has used before, else `auto`.
        work: how the runs are trained: those of the sweep first, as the others take its learning rates.

    Raises:
        ConfigError: a budget that is less than a step, stores that differ.
        MyriadError: a run cannot be trained or measured.
        Stopped: a signal stopped a run, which is saved.
    """
    store, resolved = _resolve(plan, out / RUNS, board)
    sweep = resolved.sweep()
    board.expect([*sweep, *resolved.trials(dict.fromkeys(resolved.contenders, 1.0))])
    write_plan(out, plan)
    split = "test" if "test" in store.index.splits else "validation"
    tried = work(sweep, out / RUNS, board, None, kernel)
    multipliers = _best_multipliers(resolved, tried)
    trials = resolved.trials(multipliers)
    done = work(trials, out / RUNS, board, split, kernel)
    return Conducted(resolved, store, split, tried, multipliers, done, most_at_a_time(out))


def _resolve(plan: Plan, runs: Path, board: Board) -> tuple[Store, Plan]:
    """The store, prepared if need be, and the plan with its vocabulary."""
    display = board.begin(None)
    places = {name: store_path(run.data, runs / name) for name, run in plan.contenders.items()}
    for name in {place: name for name, place in places.items()}.values():
        ensure_store(plan.contenders[name].data, runs / name, display)
    stores = {name: Store.open(place) for name, place in places.items()}
    refuse_other_stores(stores)
    resolved = {name: with_store_vocabulary(run, stores[name]) for name, run in plan.contenders.items()}
    return next(iter(stores.values())), plan.model_copy(update={"contenders": resolved})


def finish(trial: Trial, runs: Path, board: Board, split: str | None, kernel: str | None) -> Outcome:
    """Bring a run to its end, and measure it on a split if one is named."""
    folder = runs / trial.name
    outcome = recorded(folder)
    if outcome is not None:
        board.end(trial, outcome, new=False)
        return outcome
    outcome = _train(trial, folder, board, kernel)
    if split is not None and outcome.diverged is None:
        outcome = outcome.model_copy(update=_measure(trial, folder, split, board))
    write(folder / OUTCOME, outcome.model_dump_json(indent=1))
    board.end(trial, outcome, new=True)
    return outcome


def _train(trial: Trial, folder: Path, board: Board, kernel: str | None) -> Outcome:
    trackers = [LearningCurve, PeakMemory]
    display = board.begin(trial)
    try:
        ended = fit(trial.run, folder, resume=True, kernel=kernel, display=display, trackers=trackers)
    except DivergedError as error:
        return Outcome(diverged=str(error))
    if not ended.finished:
        raise Stopped(f"{folder}: saved ({ended.reason})")
    return Outcome(index_sha256=_index_hash(folder), best_validation_loss=ended.best_loss)


def _measure(trial: Trial, folder: Path, split: str, board: Board) -> dict[str, Any]:
    """What held-out text tells of a run, as fields of its outcome."""

    def progress(tokens: int, total: int) -> None:
        board.measuring(trial, tokens, total)

    found = measure_run(folder, split=split, stride=trial.run.model.context, progress=progress)
    if not math.isfinite(found.perplexity.loss):
        return {"diverged": f"the loss on the {split} split is not finite"}
    return {"held_out": HeldOut(split=split, **found.perplexity._asdict())}


def recorded(folder: Path) -> Outcome | None:
    """How a run ended, if it did and its weights are those that were measured."""
    if not (folder / OUTCOME).exists():
        return None
    outcome = validate(Outcome, read_json(folder / OUTCOME))
    return outcome if outcome.diverged is not None or outcome.index_sha256 == _index_hash(folder) else None


def _index_hash(folder: Path) -> str | None:
    index = folder / INDEX
    return hashlib.sha256(index.read_bytes()).hexdigest() if index.exists() else None


def _best_multipliers(plan: Plan, tried: list[Done]) -> dict[str, float]:
    """Of each contender that of the trial with the lowest validation loss; 1 where there is none."""
    best = dict.fromkeys(plan.contenders, 1.0)
    for name in best:
        losses = [
            (outcome.best_validation_loss, trial.multiplier)
            for trial, outcome in tried
            if trial.contender == name and outcome.best_validation_loss is not None
        ]
        best[name] = min(losses)[1] if losses else 1.0
    return best


def write_plan(out: Path, plan: Config) -> None:
    """Note what a folder's runs are for."""
    write(out / PLAN, json.dumps(plan.model_dump(mode="json"), indent=1))


def note_at_a_time(out: Path, count: int) -> None:
    """Note that so many runs share the machine: what their clocks say stays marked, whoever reads it later."""
    if count > most_at_a_time(out):
        write(out / JOBS, json.dumps({"at_a_time": count}))


def most_at_a_time(out: Path) -> int:
    """How many of a comparison's runs were trained at a time, at most."""
    try:
        count = read_json(out / JOBS).get("at_a_time")
    except CheckpointError:
        return 1
    return count if isinstance(count, int) else 1


def write(path: Path, text: str) -> None:
    """Write a file, replacing an older one at once."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
