"""`myriad inspect`: which experts a trained run uses, how it weights them, and what for."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from myriad.analysis.inspection import Inspection, LayerRouting

WIDTH = 140
"""Columns where the output is no terminal."""
TOP_TOKENS = 4


def inspect(
    run: Path = typer.Argument(metavar="RUN", help="A run folder, also of a run in training, or a checkpoint."),
    data: Path = typer.Option(None, help="A store; default: the one that the run was trained on."),
    split: Literal["train", "validation", "test"] = typer.Option("validation", help="Which part of it."),
    tokens: int = typer.Option(65_536, help="How many tokens to look at, about; fewer where the split has fewer."),
    seed: int = typer.Option(0, help="Which windows of the split are taken."),
    out: Path = typer.Option(None, help="A folder for the report, the figures and the JSON; default: RUN/inspect."),
) -> None:
    """Show how a trained model routes its tokens: usage and unevenness of experts, the entropy of router weights, the
    overlap of heads, and the tokens that the most used experts get. Writes a table here, and report.html, routing.json
    and PNGs to a folder."""
    from rich.console import Console

    from myriad.analysis.inspection import inspect_run
    from myriad.analysis.inspection_report import write_inspection
    from myriad.analysis.measure import open_run
    from myriad.cli.evaluate import progress_bar

    opened = open_run(run, data)
    out = run / "inspect" if out is None else out
    _refuse_unwritable(out)
    with progress_bar("reading") as progress:
        found = inspect_run(opened, split, limit=tokens, seed=seed, progress=progress)
    write_inspection(out, found, _command(run, data, split, tokens, seed))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    _print(console, found)
    typer.echo(f"{out / 'report.html'}: written, with figures and routing.json beside it")


def _refuse_unwritable(out: Path) -> None:
    """Before minutes of computing, not after."""
    from myriad.config import ConfigError

    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"--out: {out} cannot be written ({existing})")


def _command(run: Path, data: Path | None, split: str, tokens: int, seed: int) -> str:
    """What the reader types to see the same again."""
    words = ["myriad", "inspect", str(run), "--split", split, "--tokens", str(tokens), "--seed", str(seed)]
    return shlex.join([*words, *(["--data", str(data)] if data else [])])


def _print(console: Console, found: Inspection) -> None:
    from myriad.analysis.inspection_report import describe

    console.print(describe(found), markup=False, soft_wrap=True)
    console.print(_figures(found.layers))
    console.print(_specialties(found))


def _figures(layers: Sequence[LayerRouting]) -> Table:
    from rich import box
    from rich.table import Table

    from myriad.analysis.report import number, percent, whole

    table = Table("layer", box=box.SIMPLE_HEAD)
    columns = ("experts", "used", "by chance", "unused", "unevenness", "by chance", "entropy", "maximum")
    for column in (*columns, "heads share", "by chance", "elsewhere"):
        table.add_column(column, justify="right")
    for layer in layers:
        usage, heads = layer.usage, layer.heads
        table.add_row(
            layer.name,
            whole(usage.experts),
            percent(usage.share_used),
            percent(usage.chance_share_used),
            whole(usage.dead),
            number(usage.unevenness),
            number(usage.chance_unevenness),
            number(heads.mean_entropy),
            number(heads.largest_entropy),
            *(number(value) for value in heads.overlap() or (None, None, None)),
        )
    return table


def _specialties(found: Inspection) -> Table:
    """The most used expert of every layer, and the tokens that set it apart."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from myriad.analysis.report import brief, percent

    table = Table("layer", box=box.SIMPLE_HEAD)
    for column in ("top expert", "of draws"):
        table.add_column(column, justify="right")
    table.add_column("its tokens: share of its draws, times their share of the text")
    for layer in found.layers:
        for expert, share, tokens in layer.specialties[:1]:
            words = (
                f"{escape(found.word(each.token))} {percent(each.share)} ×{brief(each.lift)}"
                for each in tokens[:TOP_TOKENS]
            )
            table.add_row(layer.name, str(expert), percent(share), ", ".join(words))
    return table
