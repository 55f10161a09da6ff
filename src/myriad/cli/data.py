"""`myriad data`: make a store of tokens from text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from myriad.data import store

app = typer.Typer(help="Prepare text for training.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Prepare text for training."""  # a callback keeps `prepare` a subcommand though it is the only one


@app.command()
def prepare(
    source: str = typer.Argument(
        help="A text file, a folder of text files, or `python`: the Python standard library's own sources."
    ),
    tokenizer: str = typer.Option(
        help="`bytes`, `bpe:8192` (trained on the text), a tokenizer.json, or a folder that holds one."
    ),
    out: str = typer.Option(help="The store's folder. It must not exist, or be empty."),
) -> None:
    """Split, tokenize, count and hash the text of SOURCE into a store."""
    import time

    from rich.console import Console

    from myriad.data.store import prepare as prepare_store

    console = Console()
    start = time.perf_counter()
    with _progress_bar(console) as report:
        made = prepare_store(source, tokenizer, out, report)
    seconds = time.perf_counter() - start
    console.print(_summary(made))
    console.print(f"{out}: prepared in {seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _progress_bar(console: Console) -> Iterator[store.Progress]:
    """A bar for each stage of a preparation; nothing where the output is no terminal."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, progress.TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report


def _summary(made: store.Store) -> Table:
    """What each split of a store holds."""
    from rich.table import Table

    index = made.index
    table = Table("split", title=f"{index.source}, vocabulary {index.vocab_size:,}", title_justify="left")
    for column in ("documents", "tokens", "words", "bytes", "bytes/token"):
        table.add_column(column, justify="right")
    for name, split in index.splits.items():
        counts = (split.documents, split.tokens, split.words, split.bytes)
        table.add_row(name, *(f"{count:,}" for count in counts), f"{split.bytes / split.tokens:.2f}")
    return table
