"""The report of a comparison: one self-contained page, in the form of analysis/report.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from myriad.analysis.compare.conduct import Conducted
from myriad.analysis.compare.plan import MULTIPLIERS, SWEEP_SHARE
from myriad.analysis.compare.runs import Course
from myriad.analysis.compare.standings import Standing, Standings, verdicts
from myriad.analysis.compare.tables import Column, conditions, cost_columns, effort_columns, result_columns
from myriad.analysis.plots import loss_against_flops
from myriad.analysis.report import (
    Group,
    Row,
    describe_corpus,
    draw_picture,
    duration,
    number,
    origins,
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
    """A table for each budget, then one of what the contenders cost; rows are columns on the page."""
    budgeted = [*result_columns(standings), *effort_columns()]
    results = [_group(f"{budget} per run", budgeted, standings.of(budget), standings) for budget in standings.budgets]
    return [*results, _group("Cost", cost_columns(standings), standings.of(standings.budgets[0]), standings)]


def _group(heading: str, columns: Sequence[Column], found: Sequence[Standing], standings: Standings) -> Group:
    return Group(heading, [_row(column, found, standings) for column in columns])


def _row(column: Column, found: Sequence[Standing], standings: Standings) -> Row:
    heading = column.heading[0].upper() + column.heading[1:]
    values = [column.show(one, standings.reference_of(one)) for one in found]
    return Row(heading, column.unit, values, column.decisive)


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
