"""The standings as a table of words, and as files for people (Markdown), spreadsheets (CSV) and programs (JSON)."""

import csv
import io
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from myriad.analysis.compare.conduct import Conducted
from myriad.analysis.compare.plan import SWEEP_SHARE
from myriad.analysis.compare.standings import Spread, Standing, Standings, verdicts
from myriad.analysis.report import MISSING, percent, whole

SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Column(NamedTuple):
    """A column of a table: its heading, and how it shows a standing beside the reference on the same budget."""

    heading: str
    show: Callable[[Standing, Standing], str]
    unit: str = ""
    """Said under the heading where there is room."""
    decisive: bool = False


def cost_columns(standings: Standings) -> list[Column]:
    """What a contender costs, on whatever budget."""
    found = [
        Column("parameters", lambda one, _: short(one.cost.parameters), "total"),
        Column("active", lambda one, _: short(one.cost.active_parameters), "parameters per token"),
        Column("FLOPs/token", lambda one, _: short(one.cost.flops), "forward"),
        Column("routing", lambda one, _: percent(one.routing_share) if one.cost.routing else MISSING, "of FLOPs"),
    ]
    if all(one.multiplier == 1 for one in standings.all):
        return found
    return [Column("LR", lambda one, _: f"x{one.multiplier:g}", "times the config's"), *found]


def effort_columns() -> list[Column]:
    """What a run on a budget took."""
    return [
        Column("tokens", lambda one, _: short(one.tokens), "each run"),
        Column("tokens/s", lambda one, _: whole(one.tokens_per_second), "median"),
        Column("peak memory", lambda one, _: _gigabytes(one.peak_bytes), "in training"),
    ]


def result_columns(standings: Standings) -> list[Column]:
    """What the runs on a budget reached."""
    return [
        Column("bits per byte", lambda one, _: spread(one.bits_per_byte, 4), "held-out", decisive=True),
        Column(f"vs {standings.reference}", _against, "seed by seed"),
        Column("perplexity", lambda one, _: spread(one.token_perplexity, 2), "per token"),
    ]


def columns(standings: Standings) -> list[Column]:
    """Those of the whole table: what is the same for all contenders has none."""
    found = [
        Column("contender", lambda one, _: one.name),
        Column("budget", lambda one, _: str(one.budget)),
        *cost_columns(standings),
        *effort_columns(),
        *result_columns(standings),
    ]
    if any(one.diverged for one in standings.all):
        found.append(Column("diverged", lambda one, _: f"{len(one.diverged)} of {len(one.diverged) + len(one.runs)}"))
    return found


def _gigabytes(count: int | None) -> str:
    return MISSING if count is None else f"{count / 1e9:.2f} GB"


def _against(standing: Standing, reference: Standing) -> str:
    return MISSING if standing is reference else spread(standing.relative_to(reference), 2, "+", " %")


def rows(standings: Standings) -> list[list[str]]:
    """The table's cells: budget by budget, in the order of the contenders."""
    shown = columns(standings)
    return [[column.show(one, standings.reference_of(one)) for column in shown] for one in standings.all]


def short(count: float) -> str:
    """A count in three digits or more: 7.88 M."""
    for scale, sign in SCALES:
        if count >= scale:
            return f"{count / scale:.3g} {sign}" if count < 999.5 * scale else f"{count / scale:,.0f} {sign}"
    return f"{count:g}"


def spread(figure: Spread | None, digits: int, sign: str = "", unit: str = "") -> str:
    """A mean and its standard deviation over seeds, where there is one."""
    if figure is None or not math.isfinite(figure.mean):
        return MISSING
    deviation = "" if figure.deviation is None else f" ± {figure.deviation:.{digits}f}"
    return f"{figure.mean:{sign}.{digits}f}{deviation}{unit}"


def to_markdown(standings: Standings, conducted: Conducted) -> str:
    """The verdicts, the table, and what is needed to read it."""
    heads = [column.heading for column in columns(standings)]
    lines = [*(f"- {sentence}" for sentence in verdicts(standings)), ""]
    lines += [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1)), *map(_line, rows(standings)), ""]
    return "\n".join([*lines, *conditions(standings, conducted)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def conditions(standings: Standings, conducted: Conducted) -> Iterator[str]:
    """What a reader of the figures must know."""
    plan = conducted.plan
    seeds = f"{plan.seeds} seeds; mean ± standard deviation" if plan.seeds > 1 else "one seed: the spread is not known"
    contexts = {run.model.context for run in plan.contenders.values()}
    yield (
        f"Held-out text is the {conducted.split} split ({conducted.store.split(conducted.split).sha256[:12]}), in "
        f"windows of {' or '.join(map(str, sorted(contexts)))} tokens side by side, in float32; {seeds}."
    )
    if conducted.split == "validation":
        yield "The store has no test split: the same text chose each run's best checkpoint."
    if conducted.sweep:
        share = f"{100 * SWEEP_SHARE:g} %"
        yield f"Each contender's learning rates were chosen by a sweep on {share} of the largest budget."
    yield from clocks(conducted)


def clocks(conducted: Conducted) -> Iterator[str]:
    """What a reader of speeds and times must know."""
    if conducted.at_a_time > 1:
        yield (
            f"tokens/s measured with up to {conducted.at_a_time} runs at a time on the same machine: "
            "a run that has it to itself may be faster."
        )


def to_csv(standings: Standings) -> str:
    """A line for each contender and budget, unrounded."""
    records = [standing.record(standings.reference_of(standing)) for standing in standings.all]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def to_json(standings: Standings, conducted: Conducted, command: str) -> str:
    """Every figure: the standings, each run, the trials of the sweep, and what it was made with."""
    content: dict[str, Any] = {
        "command": command,
        "plan": conducted.plan.digest(),
        "data": {"split": conducted.split, "sha256": conducted.store.split(conducted.split).sha256},
        "python": platform.python_version(),
        "runs_at_a_time": conducted.at_a_time,
        "reference": standings.reference,
        "verdicts": list(verdicts(standings)),
        "standings": [standing.record(standings.reference_of(standing)) for standing in standings.all],
        "runs": [
            {"budget": str(standing.budget)} | run.record() | {"sessions": run.sessions}
            for standing in standings.all
            for run in standing.runs
        ],
        "diverged": [
            {"contender": standing.name, "budget": str(standing.budget), "seed": seed, "why": why}
            for standing in standings.all
            for seed, why in standing.diverged.items()
        ],
        "sweep": [
            {
                "contender": trial.contender,
                "multiplier": trial.multiplier,
                "tokens": trial.tokens,
                "best_validation_loss": outcome.best_validation_loss,
                "diverged": outcome.diverged,
                "chosen": conducted.multipliers[trial.contender] == trial.multiplier,
            }
            for trial, outcome in conducted.sweep
        ],
    }
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(tree: Any) -> Any:
    """Nested values with null for numbers that are not finite, which JSON does not know."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
