"""`myriad demo pyper`: a mixture of eight small transformers on the built-in corpus, against a dense model.

Divides the Python standard library's own sources into eight domains, trains a small model on everything, from which an
expert goes on on each domain by itself, mixes the experts by their posterior, trains one dense model on everything with
the compute of all, and shows what everyone makes of each domain's held-out text.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from myriad.analysis.pyper_dense import AgainstDense

EXPERTS = 8
PRESET = "pyper-demo-expert"
SEED_SHARE = 0.5
"""Of the experts' training, for the model that all of them start from."""
WIDTH = 160
"""Columns where the output is no terminal."""


def demo_pyper(out: Path, overrides: list[str]) -> None:
    """Do all of it, or go on where it stopped."""
    import time

    from rich.console import Console

    from myriad.analysis.compare.board import TerminalBoard
    from myriad.analysis.compare.conduct import Stopped, opened
    from myriad.analysis.pyper import PyperPlan
    from myriad.analysis.pyper_dense import against_dense, refuse_early_stopping
    from myriad.cli.train import resolve_run
    from myriad.data.clusters import ClusterOptions
    from myriad.models import PosteriorRouting

    started = time.perf_counter()
    run, _ = resolve_run(PRESET, overrides)
    run = run.model_copy(update={"out": None})
    clusters = ClusterOptions(clusters=EXPERTS)
    plan = PyperPlan(run=run, clusters=clusters, routing=PosteriorRouting(), seed_share=SEED_SHARE)
    refuse_early_stopping(plan)
    with opened(out, plan):
        try:
            with TerminalBoard(Console(stderr=True, highlight=False, soft_wrap=True)) as board:
                found = against_dense(plan, out, board)
        except Stopped as stopped:
            again = shlex.join(["myriad", "demo", "pyper", "--out", str(out), *overrides])
            typer.echo(f"{stopped}; to continue: {again}")
            return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(_table(found))
    for line in summary(found):
        typer.echo(line)
    typer.echo(f"done in {time.perf_counter() - started:.0f} s: {out / 'mixture'} and {out / found.dense_run.name}")


def _table(found: AgainstDense) -> Table:
    """Bits per byte of everyone on every domain, and on everything."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from myriad.cli.data import visible

    table = Table("domain", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("training tokens", "its expert", "the mixture", "the dense model", "its expert's weight"):
        table.add_column(heading, justify="right")
    table.add_column("typical tokens")
    for number, (domain, trial) in enumerate(zip(found.domains, found.experts, strict=True)):
        cells = (f"{each.bits_per_byte:.4f}" for each in (domain.expert, domain.mixture, domain.dense))
        typical = " ".join(visible(token) for token in domain.cluster.typical)
        weight = f"{domain.weights[number]:.0%}"
        table.add_row(domain.cluster.name, f"{trial.tokens:,}", *cells, weight, escape(typical))
    everything = (f"{each.bits_per_byte:.4f}" for each in (found.mixture, found.dense))
    table.add_row("everything", f"{found.dense_run.tokens:,}", "", *everything, "", "")
    return table


def summary(found: AgainstDense) -> list[str]:
    """How the weights divide the domains, and who is ahead."""
    return [_division(found), _verdict(found)]


def _division(found: AgainstDense) -> str:
    own = [domain.weights[number] for number, domain in enumerate(found.domains)]
    least = own.index(min(own))
    most = sum(max(domain.weights) == domain.weights[number] for number, domain in enumerate(found.domains))
    return (
        f"the posterior gives a domain's own expert {sum(own) / len(own):.0%} of the weight on average (by chance "
        f"{1 / len(own):.1%}), least in domain {found.domains[least].cluster.name} ({own[least]:.0%}); in {most} of "
        f"{len(own)} domains no other expert has more"
    )


def _verdict(found: AgainstDense) -> str:
    mixture, dense = found.mixture.bits_per_byte, found.dense.bits_per_byte
    conditions = (
        f"at the same training compute, {found.dense_run.tokens:,} tokens in all; one seed, {found.split} split. To "
        f"predict a token the mixture runs all {len(found.domains)} experts"
    )
    if mixture < dense:
        return f"the mixture is ahead of the dense model by {100 * (1 - mixture / dense):.1f} %, {conditions}"
    return f"the mixture does not win: the dense model is ahead by {100 * (1 - dense / mixture):.1f} %, {conditions}"
