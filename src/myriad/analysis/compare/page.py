"""The report of a comparison: one self-contained page, in the form of analysis/report.py."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from myriad.analysis.compare.conduct import Conducted
from myriad.analysis.compare.plan import MULTIPLIERS, SWEEP_SHARE
from myriad.analysis.compare.runs import Course
from myriad.analysis.compare.standings import Standing, Standings, verdicts
from myriad.analysis.compare.tables import MISSING, conditions, short, spread
from myriad.analysis.plots import loss_against_flops
from myriad.analysis.report import (
    Group,
    Row,
    describe_corpus,
    draw_picture,
    duration,
    number,
    origins,
    percent,
    picture_usages,
    render,
    whole,
)
from myriad.analysis.routing import LayerUsage


class Single(NamedTuple):
    """A line of the table of all runs."""

    contender: str
    budget: str
    seed: int
    cells: list[str]


class Rates(NamedTuple):
    """What the sweep found of a contender."""

    contender: str
    lr: float
    losses: list[str]
    """By multiplier; the chosen one is marked."""


def write_page(
    path: str | Path,
    *,
    title: str,
    standings: Standings,
    conducted: Conducted,
    courses: Sequence[Course],
    usages: Mapping[str, Sequence[LayerUsage]],
    commands: Sequence[str],
) -> None:
    """Write the report of a comparison as one HTML file, whole or not at all.

    Args:
        path: the file.
        title: of the page.
        standings: what its tables show.
        conducted: what was trained.
        courses: from `load_courses`.
        usages: name of a contender -> its routed layers.
        commands: which the reader types to make all of this again.
    """
    names = list(conducted.plan.contenders)
    render(
        path,
        "comparison.html.jinja",
        title=title,
        verdicts=list(verdicts(standings)),
        names=names,
        conditions=list(conditions(standings, conducted)),
        comparisons=_comparison(standings),
        losses=draw_picture(loss_against_flops, courses, _describe(standings)),
        several_budgets=len(standings.budgets) > 1,
        singles=_singles(standings),
        diverged=[(one.name, str(one.budget), *found) for one in standings.all for found in one.diverged.items()],
        multipliers=[f"{multiplier:g}" for multiplier in MULTIPLIERS],
        sweep=_sweep(conducted),
        sweep_share=SWEEP_SHARE,
        usages=picture_usages(usages),
        corpus=describe_corpus(conducted.store),
        commands=commands,
        origins=origins([[run for one in standings.all if one.name == name for run in one.runs] for name in names]),
        settings=conducted.plan.contenders,
    )


def _comparison(standings: Standings) -> list[Group]:
    """The costs of the contenders, then a group for each budget."""

    def row(found: Sequence[Standing], label: str, unit: str, show: Callable[[Standing], str], **options) -> Row:
        return Row(label, unit, [show(each) for each in found], **options)

    first = standings.of(standings.budgets[0])
    groups = [
        Group(
            "Cost",
            [
                row(first, "Parameters", "total", lambda each: short(each.cost.parameters)),
                row(first, "Active parameters", "per token", lambda each: short(each.cost.active_parameters)),
                row(first, "FLOPs", "per token, forward", lambda each: short(each.cost.flops)),
                row(first, "Routing", "share of FLOPs", _routing),
                row(first, "Learning rates", "times the config's", lambda each: f"{each.multiplier:g}"),
            ],
        )
    ]
    for budget in standings.budgets:
        found = standings.of(budget)
        reference = standings.reference_of(found[0])
        rows = [
            row(found, "Training tokens", "of each run", lambda each: short(each.tokens)),
            row(found, "Training FLOPs", "of each run", lambda each: short(each.training_flops)),
            row(found, "Speed", "tokens/s, median", lambda each: whole(each.tokens_per_second)),
            row(found, "Peak memory", "GB, in training", _peak),
            row(found, "Token perplexity", "held-out", lambda each: spread(each.token_perplexity, 2)),
            row(found, "Bits per byte", "held-out", lambda each: spread(each.bits_per_byte, 4), decisive=True),
            row(found, f"Against {reference.name}", "%, seed by seed", lambda each: _against(each, standings)),
        ]
        groups.append(Group(f"{budget} per run", rows))
    return groups


def _routing(standing: Standing) -> str:
    return percent(standing.routing_share) if standing.cost.routing else MISSING


def _peak(standing: Standing) -> str:
    return MISSING if standing.peak_bytes is None else f"{standing.peak_bytes / 1e9:.2f}"


def _against(standing: Standing, standings: Standings) -> str:
    reference = standings.reference_of(standing)
    return MISSING if standing is reference else spread(standing.relative_to(reference), 2, "+")


def _singles(standings: Standings) -> list[Single]:
    return [
        Single(
            one.name,
            str(one.budget),
            run.run.seed,
            [
                f"{run.perplexity.bits_per_byte:.4f}",
                f"{run.perplexity.token_perplexity:.2f}",
                number(run.best_validation_loss),
                whole(run.tokens_per_second),
                duration(run.seconds),
            ],
        )
        for one in standings.all
        for run in one.runs
    ]


def _sweep(conducted: Conducted) -> list[Rates]:
    rows: dict[str, list[str]] = {}
    for trial, outcome in conducted.sweep:
        chosen = " (chosen)" if conducted.multipliers[trial.contender] == trial.multiplier else ""
        loss = "diverged" if outcome.diverged else number(outcome.best_validation_loss)
        rows.setdefault(trial.contender, []).append(loss + chosen)
    return [Rates(name, conducted.plan.contenders[name].optim.lr, losses) for name, losses in rows.items()]


def _describe(standings: Standings) -> str:
    parts = ["Bits per byte of the validation split against training FLOPs, and of held-out text by parameters."]
    for one in standings.all:
        if one.bits_per_byte is not None:
            parts.append(f"{one.name} on {one.budget}: {one.bits_per_byte}.")
    return " ".join(parts)
