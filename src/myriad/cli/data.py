"""`myriad data`: make a store of tokens from text, and tell what is in one."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from myriad.data.clusters import Clusters
    from myriad.data.prepare import Progress
    from myriad.data.recipe import Recipe
    from myriad.data.store import Store

app = typer.Typer(help="Prepare text for training.", no_args_is_help=True)

SOURCE = (
    "`python` (the standard library's own sources), a text, JSONL or parquet file, a folder of them, or a "
    "Hugging Face dataset: owner/name or owner/name:config."
)
TOKENIZER = (
    "`bytes`, `bpe:8192` (trained on the text), `gpt2`, a tokenizer.json, or a folder that holds one or "
    "GPT-2's encoder.json and vocab.bpe."
)
VALIDATION = typer.Option(
    None,
    metavar="SOURCE|SHARE",
    help="Another source, or the share of the last training documents (of the bytes, if there is one document). "
    "Default: the source's own validation split, else 0.05.",
)
TEST = typer.Option(
    None, metavar="SOURCE|SHARE", help="The same for the test split. Default: the source's own, else none."
)
SPLIT_BYTES = typer.Option(
    None, metavar="N,N[,N]", help="Cut the text at these bytes instead: 90e6,5e6,5e6 is enwik8's convention."
)
FIELD = typer.Option(None, help="Which field of a row (JSONL, parquet, Hugging Face) holds the text. Default: text.")
DOCUMENT_START = typer.Option(
    None, metavar="REGEX", help="A line, or a row, in which this is found begins a document: '^ = [^=].* = $'."
)


@app.command()
def prepare(
    source: str = typer.Argument(help=SOURCE),
    tokenizer: str = typer.Option(help=TOKENIZER),
    out: str = typer.Option(help="The store's folder. It must not exist, or be empty."),
    validation: str = VALIDATION,
    test: str = TEST,
    split_bytes: str = SPLIT_BYTES,
    field: str = FIELD,
    document_start: str = DOCUMENT_START,
) -> None:
    """Split, tokenize, count and hash the text of SOURCE into a store."""
    import time

    from rich.console import Console

    from myriad.data.prepare import prepare as prepare_store

    recipe = _recipe(source, tokenizer, validation, test, split_bytes, field, document_start)
    console = Console()
    start = time.perf_counter()
    with progress_bar(console) as report:
        made = prepare_store(recipe, out, report)
    seconds = time.perf_counter() - start
    console.print(_summary(made))
    console.print(f"{out}: prepared in {seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)


def _recipe(
    source: str,
    tokenizer: str | None,
    validation: str | None,
    test: str | None,
    split_bytes: str | None,
    field: str | None,
    document_start: str | None,
) -> Recipe:
    """A recipe of the options given.

    Raises:
        ConfigError: it cannot be.
    """
    from myriad.config import validate
    from myriad.data.recipe import Recipe

    given: dict[str, Any] = {
        "tokenizer": tokenizer,
        "validation": validation,
        "test": test,
        "split_bytes": None if split_bytes is None else split_bytes.split(","),
        "field": field,
        "document_start": document_start,
    }
    return validate(Recipe, {"source": source} | {name: value for name, value in given.items() if value is not None})


class By(enum.StrEnum):
    """What decides where a document belongs."""

    text = "text"
    field = "field"
    file = "file"


@app.command()
def cluster(
    source: str = typer.Argument(
        metavar="STORE|SOURCE", help="A store; with `--by field` and `--by file` a source, as `prepare` takes it."
    ),
    out: Path = typer.Option(help="The folder for the clusters' stores. It must not exist, or be empty."),
    clusters: int = typer.Option(None, help="How many. Default: 8; by field or file as many as there are."),
    by: By = typer.Option(By.text, help="What decides where a document belongs: its text, its file, a field."),
    field: str = typer.Option(None, metavar="NAME", help="With `--by field`: the field of a row that decides."),
    seed: int = typer.Option(0, help="Of what is drawn at random."),
    features: int = typer.Option(100, help="Directions that the TF-IDF vectors of documents are projected onto."),
    slack: float = typer.Option(1.05, help="How many times its equal share of the tokens a cluster may hold."),
    tokenizer: str = typer.Option(None, help=f"For a source: {TOKENIZER}"),
    validation: str = VALIDATION,
    test: str = TEST,
    split_bytes: str = SPLIT_BYTES,
    text_field: str = FIELD,
    document_start: str = DOCUMENT_START,
) -> None:
    """Divide documents into stores by domain, for experts that are trained apart."""
    import time

    from rich.console import Console

    from myriad.config import ConfigError, validate
    from myriad.data.cluster import cluster as cluster_store
    from myriad.data.clusters import ClusterOptions
    from myriad.data.labels import FieldLabels, FileLabels, cluster_source
    from myriad.data.store import Store

    preparing = {
        "--tokenizer": tokenizer,
        "--validation": validation,
        "--test": test,
        "--split-bytes": split_bytes,
        "--text-field": text_field,
        "--document-start": document_start,
    }
    given = [name for name, value in preparing.items() if value is not None]
    if by is By.text and given:
        raise ConfigError(f"{given[0]}: a store was prepared with settings of its own; for a source, see --by")
    if (by is By.field) != (field is not None):
        raise ConfigError("--field: the field that decides; it belongs to --by field, which needs it")
    if by is not By.text and clusters is not None:
        raise ConfigError(f"--clusters: by {by} there are as many as there are values; leave it out")
    if by is not By.text and tokenizer is None:
        raise ConfigError("--tokenizer: missing; a source is prepared with one")
    wanted = {"clusters": clusters, "seed": seed, "features": features, "slack": slack}
    options = validate(ClusterOptions, {name: value for name, value in wanted.items() if value is not None})
    console = Console()
    start = time.perf_counter()
    with progress_bar(console) as report:
        if by is By.text:
            made = cluster_store(Store.open(source), out, options, report)
        else:
            recipe = _recipe(source, tokenizer, validation, test, split_bytes, text_field, document_start)
            labels = FileLabels() if by is By.file else FieldLabels(field)
            made = cluster_source(recipe, out, labels, options, report)
    seconds = time.perf_counter() - start
    console.print(clusters_table(made))
    console.print(f"{out}: clustered in {seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)


def clusters_table(made: Clusters) -> Table:
    """What each cluster holds, and what its text is like."""
    from rich.markup import escape
    from rich.table import Table

    entries = made.index.clusters
    total = sum(entry.tokens["train"] for entry in entries)
    title = f"{escape(made.index.source)}, {len(entries)} clusters by {made.index.by}"
    table = Table("cluster", title=title, title_justify="left")
    for column in ("documents", "tokens", "share", "validation"):
        table.add_column(column, justify="right")
    table.add_column("typical tokens")
    for entry in entries:
        documents, tokens = entry.documents, entry.tokens["train"]
        table.add_row(
            escape(entry.name),
            f"{documents['train']:,}",
            f"{tokens:,}",
            f"{tokens / total:.1%}",
            f"{documents.get('validation', 0):,}",
            escape(" ".join(visible(token) for token in entry.typical)),
        )
    return table


def visible(token: str) -> str:
    """A token without white space around it, or the white space as Python writes it."""
    return token.strip() or repr(token)[1:-1].replace(" ", "·")


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
def progress_bar(console: Console) -> Iterator[Progress]:
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
