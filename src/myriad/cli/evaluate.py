"""`myriad eval`: honest figures of a run on a split of a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import typer


def evaluate(
    run: Path = typer.Argument(metavar="RUN", help="A run folder or a checkpoint."),
    data: Path = typer.Option(None, help="A store; default: the one that the run was trained on."),
    split: Literal["train", "validation", "test", "all"] = typer.Option("validation", help="Which part of it."),
    context: int = typer.Option(None, help="Tokens that a window holds; default: the model's context."),
    stride: int = typer.Option(None, help="Tokens by which windows advance; default: half the context."),
    training_view: bool = typer.Option(
        False, "--training-view", help="Choose experts as training does, looking ahead: no measure of quality."
    ),
    json_file: Path = typer.Option(None, "--json", help="Write the figures to a file, too."),
) -> None:
    """Measure perplexity per token and per word, and bits per byte; every target is counted once."""
    from myriad.analysis.measure import measure_run
    from myriad.evaluate import causal_view
    from myriad.evaluate import training_view as seeing_ahead
    from myriad.train.record import to_json

    with progress_bar("evaluating") as progress:
        view = seeing_ahead if training_view else causal_view
        record = measure_run(run, data, split, context, stride, view=view, progress=progress).record()
    for name, value in record.items():
        typer.echo(f"{name:<17} {value:.6g}" if isinstance(value, float) else f"{name:<17} {value}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(to_json(record) + "\n")


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function to advance a bar by some of a total; no bar where the output is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda tokens, total: bar.update(task, advance=tokens, total=total)
