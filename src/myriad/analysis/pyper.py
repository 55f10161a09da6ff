"""A mixture of experts from text to figures: cluster, train each expert on its cluster, mix, evaluate.

OUT/
  plan.json           the whole plan: it goes on only if it is the same
  data/...            the store, where the data were a source
  clusters/           a store for each domain, and the cluster model
  seed-all/           the run that all experts start from, where a share of the compute is its
  experts/0 ...       run folders, with outcome.json when they are finished and measured on their own domain
  mixture/            the model
  figures.json        what everyone makes of all domains

What is finished is skipped, what is not goes on.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from myriad.analysis.compare.conduct import Board, HeldOut, finish, write, write_plan
from myriad.analysis.compare.plan import FolderPlan, Trial
from myriad.analysis.measure import measure_run
from myriad.checkpoint import fingerprint, intact_folder, read_config, read_json
from myriad.config import Config, ConfigError, validate
from myriad.data.cluster import cluster
from myriad.data.clusters import ClusterOptions, Clusters
from myriad.data.store import Store
from myriad.evaluate import Perplexity
from myriad.models import ExpertChoiceRouting, ExpertRouting
from myriad.train import RunConfig
from myriad.train.mix import mix
from myriad.train.run import BudgetConfig, DataConfig
from myriad.train.stores import ensure_store

CLUSTERS, EXPERTS, MIXTURE, FIGURES = "clusters", "experts", "mixture", "figures.json"


class PyperPlan(FolderPlan):
    """What is made."""

    noun: ClassVar[str] = "mixture"

    run: RunConfig
    """How each expert is trained; its data are those of all."""
    clusters: ClusterOptions
    routing: ExpertRouting
    """Of the mixture."""
    seed_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the experts' training that goes to one model of everything instead, from which all of them start."""

    @model_validator(mode="after")
    def _no_router(self) -> Self:
        if isinstance(self.routing, ExpertChoiceRouting):
            raise ConfigError(
                "--routing: expert_choice has a router, which is trained after mixing: see docs/pyper.md, Experts that "
                "choose; use posterior or cluster here"
            )
        return self


class Figures(Config):
    """What everyone makes of held-out text, by `WHO on WHAT`."""

    mixture: str
    """The digest of the mixture's manifest."""
    found: dict[str, HeldOut] = {}


class Assembled(NamedTuple):
    """A mixture that is finished, of experts that are measured."""

    store: Store
    clusters: Clusters
    split: str
    """That of the held-out text."""
    seed: Trial | None
    trials: list[Trial]
    """An expert's training each."""
    own: list[Perplexity]
    """Each expert on its own domain."""
    parts: list[Path]
    """The domains' stores."""

    @property
    def spent(self) -> list[Trial]:
        """All that was trained."""
        return [*([self.seed] if self.seed else []), *self.trials]


class Made(NamedTuple):
    """A mixture that is finished and measured."""

    clusters: Clusters
    split: str
    own: list[Perplexity]
    """Each expert on its own domain."""
    whole: list[Perplexity]
    """Each expert on everything."""
    mixed: list[Perplexity]
    """The mixture on each domain."""
    mixture: Perplexity
    """The mixture on everything."""


def make(plan: PyperPlan, out: Path, board: Board, kernel: str | None = None) -> Made:
    """Do all that a plan says, in a folder that is `opened`.

    Args:
        plan: what to make.
        out: the folder.
        board: shows how the experts' training goes.
        kernel: the kernels to train with; None: those that a run has used before, else `auto`.

    Raises:
        MyriadError: the data cannot be clustered, an expert not be trained, or the figures not be taken.
        Stopped: a signal stopped a run, which is saved.
    """
    store, clusters, split, _, trials, own, parts = assemble(plan, out, board, kernel)
    measure = Measuring(out, split, board.begin(None).note)
    return Made(
        clusters=clusters,
        split=split,
        own=own,
        whole=[measure(out / EXPERTS / trial.name, store.path) for trial in trials],
        mixed=[measure(out / MIXTURE, part) for part in parts],
        mixture=measure(out / MIXTURE, store.path),
    )


def assemble(plan: PyperPlan, out: Path, board: Board, kernel: str | None) -> Assembled:
    """Cluster, train and measure each expert on its cluster, and mix; arguments and errors as those of `make`."""
    write_plan(out, plan)
    display = board.begin(None)
    store = Store.open(ensure_store(plan.run.data, out / EXPERTS, display))
    clusters = _cluster(plan, store, out, display.note)
    split = "test" if all("test" in part.index.splits for part in clusters.stores()) else "validation"
    seed, trials = trainings(plan, clusters, store, out)
    board.expect([*([seed] if seed else []), *trials])
    if seed is not None:
        finished(seed, out, board, split, kernel)
    own = [finished(trial, out / EXPERTS, board, split, kernel) for trial in trials]
    runs = [out / EXPERTS / trial.name for trial in trials]
    if not (out / MIXTURE).exists():
        display.note(f"mixing {len(runs)} experts in {out / MIXTURE}")
        mix(runs, out / MIXTURE, plan.routing, clusters=clusters, data=store.path)
    parts = [clusters.store_path(number) for number in range(len(runs))]
    return Assembled(store, clusters, split, seed, trials, own, parts)


def finished(trial: Trial, runs: Path, board: Board, split: str, kernel: str | None) -> Perplexity:
    """What a run that is brought to its end makes of its own held-out text.

    Raises:
        ConfigError: it diverged.
    """
    outcome = finish(trial, runs, board, split, kernel)
    if outcome.held_out is None:
        raise ConfigError(f"{runs / trial.name}: {outcome.diverged}")
    return outcome.held_out.perplexity


def _cluster(plan: PyperPlan, store: Store, out: Path, note: Callable[[str], None]) -> Clusters:
    """The clusters, made now or before of the same text."""
    if not (out / CLUSTERS).exists():
        note(f"dividing {store.path} into {plan.clusters.clusters} clusters")
        return cluster(store, out / CLUSTERS, plan.clusters)
    found = Clusters.open(out / CLUSTERS)
    if found.index.source_sha256 != [split.sha256 for split in store.index.splits.values()]:
        raise ConfigError(f"{out / CLUSTERS}: made of other text than that of {store.path}; choose another folder")
    return found


def trainings(plan: PyperPlan, clusters: Clusters, store: Store, out: Path) -> tuple[Trial | None, list[Trial]]:
    """The training of the seed, where there is one, and of each expert; their budgets in steps."""
    stores = [Store.open(clusters.store_path(number)) for number in range(plan.clusters.clusters)]
    steps = [_steps(plan.run, store) for store in stores]
    spent = [round(plan.seed_share * each) for each in steps]
    trials = [
        Trial("expert", str(number), _apart(plan.run, part, max(1, each - less)), 1.0, None)
        for number, (part, each, less) in enumerate(zip(stores, steps, spent, strict=True))
    ]
    if not sum(spent):
        return None, trials
    whole = _apart(plan.run, store, sum(spent))
    constant = plan.run.optim.model_copy(update={"schedule": "constant"})
    seed = Trial("seed", "all", whole.model_copy(update={"optim": constant}), 1.0, None)
    init = {"init": str(out / seed.name)}
    return seed, [trial._replace(run=trial.run.model_copy(update=init)) for trial in trials]


def _steps(run: RunConfig, store: Store) -> int:
    windows = (len(store.split("train").tokens) - 1) // run.model.context
    return run.budget.in_steps(run.batch.tokens, windows, run.windows_per_step)


def _apart(run: RunConfig, store: Store, steps: int) -> RunConfig:
    """A run on a store of its own."""
    changes = {
        "data": DataConfig(path=str(store.path)),
        "model": run.model.with_vocabulary(run.model.vocab_size or store.index.vocab_size),
        "budget": BudgetConfig(steps=steps),
        "out": None,
    }
    return run.model_copy(update=changes)


class Measuring:
    """Measures models on stores, each pair once."""

    def __init__(self, out: Path, split: str, note: Callable[[str], None]):
        self._out, self._split, self._note = out, split, note
        mixture = str(fingerprint(out / MIXTURE))
        self._figures = Figures(mixture=mixture)
        if (out / FIGURES).exists():
            recorded = validate(Figures, read_json(out / FIGURES))
            self._figures = recorded if recorded.mixture == mixture else self._figures

    def __call__(self, run: Path, store: Path, named: str | None = None) -> Perplexity:
        """What a run makes of a store.

        Args:
            named: what the record calls the run; None: by its folder. A name stands for the same weights forever:
                those of experts are told by the mixture's digest.
        """
        name = f"{named or run.name} on {store.name}"
        if name not in self._figures.found:
            self._note(f"measuring {run.name} on {store.name}")
            context = read_config(intact_folder(run)).context
            found = measure_run(run, store, self._split, stride=context).perplexity
            held_out = HeldOut(split=self._split, **found._asdict())
            self._figures = self._figures.model_copy(update={"found": self._figures.found | {name: held_out}})
            write(self._out / FIGURES, json.dumps(self._figures.model_dump(mode="json"), indent=1))
        return self._figures.found[name].perplexity
