"""Where each contender stands on each budget: means over seeds and their spread, beside those of the reference."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from myriad.analysis.compare.conduct import RUNS, Conducted, Outcome
from myriad.analysis.compare.plan import FORWARDS, Budget, Trial
from myriad.analysis.compare.runs import (
    TIE,
    Contender,
    Course,
    Curve,
    Result,
    compare_flops,
    compare_tokens,
    load_contender,
    load_curve,
    verdict,
)
from myriad.ffn import Cost


class Spread(NamedTuple):
    """A figure over seeds."""

    mean: float
    deviation: float | None
    """The standard deviation over seeds (n - 1); None for one seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None where there are no values."""
        if not values:
            return None
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.deviation is None else f"{self.mean:.4f} ± {self.deviation:.4f}"


@dataclass(frozen=True)
class Standing:
    """A contender on a budget.

    Attributes:
        name: the contender.
        budget: of each of its runs.
        multiplier: of its learning rates.
        cost: of its model, per token.
        tokens: of each of its runs, in training.
        runs: those with a result, by seed.
        diverged: seed -> why it has none.
    """

    name: str
    budget: Budget
    multiplier: float
    cost: Cost
    tokens: int
    runs: list[Contender]
    diverged: dict[int, str]

    @property
    def routing_share(self) -> float:
        """The share of a token's FLOPs that choose experts."""
        return self.cost.routing / self.cost.flops

    @property
    def training_flops(self) -> int:
        """What each run took, in whole steps."""
        return FORWARDS * self.cost.flops * self.tokens

    @cached_property
    def bits_per_byte(self) -> Spread | None:
        return Spread.of([run.perplexity.bits_per_byte for run in self.runs])

    @cached_property
    def token_perplexity(self) -> Spread | None:
        return Spread.of([run.perplexity.token_perplexity for run in self.runs])

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the runs, each the median of its steps."""
        speeds = [run.tokens_per_second for run in self.runs if run.tokens_per_second is not None]
        return median(speeds) if speeds else None

    @property
    def peak_bytes(self) -> int | None:
        """The largest over the runs."""
        return max((run.peak_bytes for run in self.runs if run.peak_bytes is not None), default=None)

    def relative_to(self, reference: "Standing") -> Spread | None:
        """By how many percent its bits per byte exceed the reference's, seed by seed."""
        theirs = {run.run.seed: run.perplexity.bits_per_byte for run in reference.runs}
        pairs = [(run.perplexity.bits_per_byte, theirs.get(run.run.seed)) for run in self.runs]
        return Spread.of([100 * (mine / other - 1) for mine, other in pairs if other is not None])

    def record(self, reference: "Standing") -> dict[str, Any]:
        """All figures, by name."""
        relative = self.relative_to(reference)
        return {
            "contender": self.name,
            "budget": str(self.budget),
            "seeds": len(self.runs),
            "diverged": len(self.diverged),
            "parameters": self.cost.parameters,
            "active_parameters": self.cost.active_parameters,
            "flops_per_token": self.cost.flops,
            "routing_share": self.routing_share,
            "training_tokens": self.tokens,
            "training_flops": self.training_flops,
            "lr_multiplier": self.multiplier,
            "tokens_per_second": None if self.tokens_per_second is None else round(self.tokens_per_second, 1),
            "peak_bytes": self.peak_bytes,
            **_fields("token_perplexity", self.token_perplexity),
            **_fields("bits_per_byte", self.bits_per_byte),
            **_fields("percent_above_reference", relative),
            "reference": reference.name,
        }


def _fields(name: str, spread: Spread | None) -> dict[str, float | None]:
    mean, deviation = spread or (None, None)
    return {name: mean, f"{name}_deviation": deviation}


class Standings(NamedTuple):
    """All standings of a comparison, budget by budget, in the order of the contenders."""

    reference: str
    all: list[Standing]

    @property
    def budgets(self) -> list[Budget]:
        return list({str(standing.budget): standing.budget for standing in self.all}.values())

    def of(self, budget: Budget) -> list[Standing]:
        return [standing for standing in self.all if standing.budget == budget]

    def reference_of(self, standing: Standing) -> Standing:
        """The reference on the budget of a standing."""
        return next(each for each in self.of(standing.budget) if each.name == self.reference)


def load_standings(conducted: Conducted, out: Path) -> Standings:
    """Read what the runs of a finished comparison recorded about themselves.

    Raises:
        MyriadError: a run's files are damaged.
    """
    groups: dict[tuple[str, str], list[tuple[Trial, Outcome]]] = {}
    for trial, outcome in conducted.trials:
        groups.setdefault((str(trial.budget), trial.contender), []).append((trial, outcome))
    return Standings(conducted.plan.reference, [_standing(group, out / RUNS) for group in groups.values()])


def _standing(group: list[tuple[Trial, Outcome]], runs: Path) -> Standing:
    trial = group[0][0]
    assert trial.budget is not None
    return Standing(
        name=trial.contender,
        budget=trial.budget,
        multiplier=trial.multiplier,
        cost=trial.run.model.cost(),
        tokens=trial.tokens,
        runs=[
            load_contender(runs / trial.name, trial.contender, outcome.held_out.perplexity, outcome.held_out.split)
            for trial, outcome in group
            if outcome.held_out is not None
        ],
        diverged={trial.run.seed: outcome.diverged for trial, outcome in group if outcome.diverged is not None},
    )


def load_courses(standings: Standings, conducted: Conducted, out: Path) -> list[Course]:
    """Each contender's losses against compute, from what its runs recorded.

    Raises:
        CheckpointError: a run's records are damaged.
    """
    curves: dict[tuple[str, str], list[Curve]] = {}
    for trial, outcome in conducted.trials:
        if outcome.diverged is None:
            curve = load_curve(out / RUNS / trial.name, trial.contender)
            curves.setdefault((trial.contender, str(trial.budget)), []).append(curve)
    return [
        _course([standing for standing in standings.all if standing.name == name], curves)
        for name in conducted.plan.contenders
    ]


def _course(standings: Sequence[Standing], curves: Mapping[tuple[str, str], list[Curve]]) -> Course:
    results, validation = [], []
    for one in standings:
        if one.bits_per_byte is not None:
            results.append(Result(str(one.budget), *one.bits_per_byte))
            found = curves[one.name, str(one.budget)]
            tokens = found[0].validation_tokens
            flops = [float(FORWARDS * one.cost.flops * count) for count in tokens]
            bits = [mean(column) for column in zip(*(curve.validation_bits for curve in found), strict=True)]
            validation.append((flops, bits))
    return Course(standings[0].name, standings[0].cost.parameters, validation, results)


def verdicts(standings: Standings) -> Iterator[str]:
    """The sentences at the top of a report: on each budget, each contender against the reference, best first."""
    for budget in standings.budgets:
        found = sorted(standings.of(budget), key=_rank)
        reference = standings.reference_of(found[0])
        prefix = f"{budget}: " if len(standings.budgets) > 1 else ""
        for standing in found:
            if standing is not reference:
                yield prefix + standing_verdict(standing, reference)


def _rank(standing: Standing) -> float:
    return math.inf if standing.bits_per_byte is None else standing.bits_per_byte.mean


def standing_verdict(a: Standing, b: Standing) -> str:
    """One sentence: which of two contenders is better on held-out text, by how much, and what that is worth."""
    broken = [f"{len(one.diverged)} of {one.name}'s runs diverged" for one in (a, b) if one.diverged]
    if broken:
        return f"No verdict on {a.name} and {b.name}: {' and '.join(broken)}."
    if len(a.runs) == 1:
        return verdict(a.runs[0], b.runs[0])
    return f"{_outcome(a, b)}; {compare_flops(a.runs[0], b.runs[0])}, {compare_tokens(a.runs[0], b.runs[0])}."


def _outcome(a: Standing, b: Standing) -> str:
    better, worse = sorted((a, b), key=_rank)
    low, high = better.bits_per_byte, worse.bits_per_byte
    assert low is not None
    assert high is not None
    gap = high.mean - low.mean
    spread = max(low.deviation or 0.0, high.deviation or 0.0)
    figures = f"{low} against {high} bits per byte over {len(a.runs)} seeds"
    difference = f"{gap:.4f} ({100 * gap / high.mean:.3g} %)"
    text = f"held-out text ({a.runs[0].split} split)"
    if gap < TIE * high.mean:
        return (
            f"{better.name} and {worse.name} tie on {text}: {figures}, a difference of {difference}, below the "
            f"{100 * TIE:g} % that would count"
        )
    if gap <= spread:
        return (
            f"{better.name} and {worse.name} are not told apart on {text}: {figures}, a difference of {difference}, "
            "within the spread of the seeds"
        )
    return f"{better.name} is better than {worse.name} on {text}: {figures}, {difference} lower"
