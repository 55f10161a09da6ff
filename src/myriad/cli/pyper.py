"""`myriad pyper`: text in, a mixture of separately trained experts out, in one command that can be resumed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from myriad.analysis.pyper import Made


def pyper(
    source: str = typer.Argument(metavar="SOURCE|STORE", help="Text, as `myriad data prepare` takes it, or a store."),
    overrides: list[str] = typer.Argument(
        None,
        metavar="[key.path=value ...]",
        help="Settings of each expert's training, such as budget.epochs=2 or data.document_start='^ = '.",
    ),
    out: Path = typer.Option(help="Where to put everything. Called again, it goes on where it stopped."),
    experts: int = typer.Option(8, help="How many, each trained on a cluster of its own."),
    preset: str = typer.Option("pyper-expert", help="How an expert is trained: a preset or a config file."),
    routing: str = typer.Option("posterior", help="How a text is shared among them: posterior or cluster."),
    seed_share: float = typer.Option(
        0.0, help="Share of the experts' training that goes to one model of everything, from which all of them start."
    ),
    seed: int = typer.Option(0, help="Of the clusters; each run has its own, `seed`."),
    kernels: str = typer.Option(None, help="auto, reference, ...; default: as before when resuming, else auto."),
    quiet: bool = typer.Option(False, "--quiet", help="Show no progress."),
) -> None:
    """Cluster text, train an expert on each cluster, mix them, and evaluate. Resumes if interrupted."""
    from myriad.analysis.compare.board import TerminalBoard
    from myriad.analysis.compare.conduct import Stopped, opened
    from myriad.analysis.pyper import PyperPlan, make
    from myriad.cli.mix import resolve_routing
    from myriad.cli.train import resolve_run
    from myriad.config import validate
    from myriad.data.clusters import ClusterOptions
    from myriad.data.store import INDEX_NAME

    place = "path" if (Path(source) / INDEX_NAME).exists() else "source"
    run, _ = resolve_run(preset, [f"data.{place}={_quoted(source)}", *(overrides or [])])
    clusters = validate(ClusterOptions, {"clusters": experts, "seed": seed})
    shared = resolve_routing(routing, {})
    settings = {"run": run.model_copy(update={"out": None}), "clusters": clusters, "routing": shared}
    plan = validate(PyperPlan, settings | {"seed_share": seed_share})
    with opened(out, plan):
        try:
            with TerminalBoard(_console(stderr=True, quiet=quiet)) as board:
                made = make(plan, out, board, kernels)
        except Stopped as stopped:
            words = ["myriad", "pyper", source, *(overrides or []), "--out", str(out), "--experts", str(experts)]
            words += ["--preset", preset, "--routing", routing, "--seed", str(seed)]
            words += ["--seed-share", str(seed_share)] if seed_share else []
            typer.echo(f"{stopped}; to continue: {shlex.join(words)}")
            return
    show(made, out)


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)


def _console(**options: Any) -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, **options)


def show(made: Made, out: Path) -> None:
    """The table of all figures, and the verdict."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from myriad.cli.data import visible

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for heading in ("expert", "on its domain", "on everything", "mixture on its domain", "typical tokens"):
        table.add_column(heading, justify="left" if heading in ("expert", "typical tokens") else "right")
    figures = zip(made.clusters.index.clusters, made.own, made.whole, made.mixed, strict=True)
    for entry, own, whole, mixed in figures:
        cells = (f"{found.bits_per_byte:.4f}" for found in (own, whole, mixed))
        table.add_row(entry.name, *cells, escape(" ".join(visible(token) for token in entry.typical)))
    table.add_row("mixture", "", f"{made.mixture.bits_per_byte:.4f}", "", "")
    console = _console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    best = min(found.bits_per_byte for found in made.whole)
    change = 100 * (made.mixture.bits_per_byte / best - 1)
    typer.echo(
        f"{out / 'mixture'}: {made.mixture.bits_per_byte:.4f} bits per byte of the {made.split} split, "
        f"{change:+.1f} % against the best single expert"
    )
