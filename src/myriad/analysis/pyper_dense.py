"""A mixture of experts against one dense model, which is trained on everything with the compute of all experts.

The dense model is one of the experts' shape. It goes through as many steps, of as many tokens, as they and their seed
do together; `dense-all/` stands beside what `pyper` makes.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from myriad.analysis.compare.conduct import Board, finish
from myriad.analysis.compare.plan import Trial
from myriad.analysis.pyper import MIXTURE, Measuring, PyperPlan, assemble
from myriad.analysis.routing import usage
from myriad.checkpoint import load
from myriad.config import ConfigError
from myriad.data.clusters import ClusterEntry
from myriad.data.store import Store
from myriad.evaluate import Perplexity
from myriad.models import LanguageModel
from myriad.train.run import BudgetConfig, DataConfig

POSTERIOR_TOKENS = 8192
"""Held-out tokens of each domain, from its start, over which the experts' weights are averaged."""


class Domain(NamedTuple):
    """What everyone makes of a domain's held-out text."""

    cluster: ClusterEntry
    expert: Perplexity
    """Its own."""
    mixture: Perplexity
    dense: Perplexity
    weights: list[float]
    """Each expert's mean weight in the mixture."""


class AgainstDense(NamedTuple):
    """A mixture and a dense model of the same training compute."""

    split: str
    experts: list[Trial]
    dense_run: Trial
    domains: list[Domain]
    mixture: Perplexity
    """On everything."""
    dense: Perplexity


def against_dense(plan: PyperPlan, out: Path, board: Board, kernel: str | None = None) -> AgainstDense:
    """Make a mixture and a dense model of the same compute, and measure both, in a folder that is `opened`.

    Args, errors: as those of `make`.
    """
    refuse_early_stopping(plan)
    made = assemble(plan, out, board, kernel)
    store, clusters, split, _, trials, own, parts = made
    trial = dense_training(plan, made.spent, store)
    board.expect([*made.spent, trial])
    outcome = finish(trial, out, board, split, kernel)
    if outcome.held_out is None:
        raise ConfigError(f"{out / trial.name}: {outcome.diverged}")
    note = board.begin(None).note
    measure, named = Measuring(out, split, note), f"{trial.name} {outcome.index_sha256}"
    mixed = [measure(out / MIXTURE, part) for part in parts]
    dense = [measure(out / trial.name, part, named) for part in parts]
    overall = measure(out / MIXTURE, store.path)
    note("reading the experts' weights")
    model = load(out / MIXTURE)
    weights = [_weights(model, Store.open(part), split) for part in parts]
    domains = [Domain(*each) for each in zip(clusters.index.clusters, own, mixed, dense, weights, strict=True)]
    return AgainstDense(split, trials, trial, domains, overall, outcome.held_out.perplexity)


def refuse_early_stopping(plan: PyperPlan) -> None:
    """Refuse runs that may not spend their budgets: the compute would not be equal."""
    if plan.run.early_stopping.patience is not None:
        raise ConfigError("early_stopping.patience: an expert would not spend its budget; set it to null")


def dense_training(plan: PyperPlan, spent: list[Trial], store: Store) -> Trial:
    """The dense model's training, as long as all others together: validated as often as one expert is."""
    run, experts = plan.run, plan.clusters.clusters
    steps = sum(trial.run.budget.steps or 0 for trial in spent)
    changes = {
        "data": DataConfig(path=str(store.path)),
        "model": spent[0].run.model,
        "budget": BudgetConfig(steps=steps),
        "evaluation": run.evaluation.model_copy(update={"every": run.evaluation.every * experts}),
        "out": None,
    }
    return Trial("dense", "all", run.model_copy(update=changes), 1.0, None)


def _weights(model: LanguageModel, store: Store, split: str) -> list[float]:
    """Each expert's share of the weights over the beginning of a split."""
    (layer,) = usage(model, [_beginning(store.split(split).tokens[:POSTERIOR_TOKENS], model.config.context)])
    return (layer.weights / layer.weights.sum()).tolist()


def _beginning(tokens: np.ndarray, context: int) -> Tensor:
    """Whole windows (B, S); one shorter one where there are no more tokens."""
    width = min(context, len(tokens))
    whole = len(tokens) // width * width
    return torch.from_numpy(tokens[:whole].astype(np.int64)).view(-1, width)
