"""`myriad data`: make a store of tokens from text, and tell what is in one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from myriad.data.prepare import Progress
    from myriad.data.store import Store

app = typer.Typer(help="Prepare text for training.", no_args_is_help=True)


@app.command()
def prepare(
    source: str = typer.Argument(
        help="`python` (the standard library's own sources), a text, JSONL or parquet file, a folder of them, or a "
        "Hugging Face dataset: owner/name or owner/name:config."
    ),
    tokenizer: str = typer.Option(
        help="`bytes`, `bpe:8192` (trained on the text), `gpt2`, a tokenizer.json, or a folder that holds one or "
        "GPT-2's encoder.json and vocab.bpe."
    ),
    out: str = typer.Option(help="The store's folder. It must not exist, or be empty."),
    validation: str = typer.Option(
        None,
        metavar="SOURCE|SHARE",
        help="Another source, or the share of the last training documents (of the bytes, if there is one document). "
        "Default: the source's own validation split, else 0.05.",
    ),
    test: str = typer.Option(
        None, metavar="SOURCE|SHARE", help="The same for the test split. Default: the source's own, else none."
    ),
    split_bytes: str = typer.Option(
        None, metavar="N,N[,N]", help="Cut the text at these bytes instead: 90e6,5e6,5e6 is enwik8's convention."
    ),
    field: str = typer.Option("text", help="Which field of a row (JSONL, parquet, Hugging Face) holds the text."),
    document_start: str = typer.Option(
        None, metavar="REGEX", help="A line, or a row, in which this is found begins a document: '^ = [^=].* = $'."
    ),
) -> None:
    """Split, tokenize, count and hash the text of SOURCE into a store."""
    import time

    from rich.console import Console

    from myriad.config import validate
    from myriad.data.prepare import Recipe
    from myriad.data.prepare import prepare as prepare_store

    settings: dict[str, Any] = {
        "source": source,
        "tokenizer": tokenizer,
        "validation": validation,
        "test": test,
        "split_bytes": None if split_bytes is None else split_bytes.split(","),
        "field": field,
        "document_start": document_start,
    }
    recipe = validate(Recipe, settings)
    console = Console()
    start = time.perf_counter()
    with _progress_bar(console) as report:
        made = prepare_store(recipe, out, report)
    seconds = time.perf_counter() - start
    console.print(_summary(made))
    console.print(f"{out}: prepared in {seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)


@app.command()
def info(store: Path = typer.Argument(metavar="DIR", help="The store's folder.")) -> None:
    """Tell what a store holds, after comparing every file with its hash."""
    from rich.console import Console

    from myriad.data.store import Store

    opened = Store.open(store)
    opened.verify()
    console = Console()
    console.print(_summary(opened))
    for name, value in opened.index.recipe.model_dump(exclude_none=True).items():
        console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{store}: every file is as it was made", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _progress_bar(console: Console) -> Iterator[Progress]:
    """A bar for each stage of a preparation; nothing where the output is no terminal."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, progress.TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _summary(made: Store) -> Table:
    """What each split of a store holds."""
    from rich.markup import escape
    from rich.table import Table

    index = made.index
    table = Table("split", title=f"{escape(index.source)}, vocabulary {index.vocab_size:,}", title_justify="left")
    for column in ("documents", "tokens", "words", "bytes", "bytes/token"):
        table.add_column(column, justify="right")
    for name, split in index.splits.items():
        counts = (split.documents, split.tokens, split.words, split.bytes)
        table.add_row(name, *(f"{count:,}" for count in counts), f"{split.bytes / split.tokens:.2f}")
    return table
