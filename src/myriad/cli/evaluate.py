"""`myriad eval`: honest figures of a run on a split of a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    from myriad.data.store import Store
    from myriad.evaluate import Perplexity
    from myriad.models import LanguageModel

SplitChoice = Literal["train", "validation", "test", "all"]


def evaluate(
    run: Path = typer.Argument(metavar="RUN", help="A run folder or a checkpoint."),
    data: Path = typer.Option(None, help="A store; default: the one that the run was trained on."),
    split: SplitChoice = typer.Option("validation", help="Which part of it."),
    context: int = typer.Option(None, help="Tokens that a window holds; default: the model's context."),
    stride: int = typer.Option(None, help="Tokens by which windows advance; default: half the context."),
    json_file: Path = typer.Option(None, "--json", help="Write the figures to a file, too."),
) -> None:
    """Measure perplexity per token and per word, and bits per byte; every target is counted once."""
    from myriad.train.record import to_json

    found, data_sha256 = measure_run(run, data, split, context, stride, show_progress=True)
    record = {**found.record(), "split": split, "data_sha256": data_sha256}
    for name, value in record.items():
        typer.echo(f"{name:<17} {value:.6g}" if isinstance(value, float) else f"{name:<17} {value}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(to_json(record) + "\n")


def measure_run(
    run: Path,
    data: Path | None = None,
    split: SplitChoice = "validation",
    context: int | None = None,
    stride: int | None = None,
    *,
    show_progress: bool = False,
) -> tuple[Perplexity, str]:
    """What the model makes of the text, in float32, and the hash of that text's tokens.

    Raises:
        MyriadError: the run, the store or the windows cannot be used, or the model is not causal.
    """
    import torch

    from myriad.checkpoint import intact_folder, load
    from myriad.data.store import hash_of_hashes
    from myriad.evaluate import check_causality
    from myriad.evaluate import evaluate as measure

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = intact_folder(run)
    model = load(folder, device)
    store = _store_of(run, folder, data)
    _refuse_misfit(run, folder, model, store)
    names = list(store.index.splits) if split == "all" else [split]
    splits = [store.split(name) for name in names]
    probe = torch.randint(model.config.vocabulary, (2, min(64, model.config.context)), device=device)
    if probe.shape[1] > 1:
        check_causality(model, probe)
    total = sum(len(part.tokens) for part in splits)
    with _progress(total, show_progress) as advance:
        found = measure(model, splits, end_id=store.index.end_id, context=context, stride=stride, progress=advance)
    return found, splits[0].sha256 if len(splits) == 1 else hash_of_hashes(part.sha256 for part in splits)


def _progress(total: int, show: bool) -> Any:
    """A context manager that gives a function to advance a bar; no bar where the output is no terminal."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)

    @contextmanager
    def bar():
        with Progress(console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
            task = progress.add_task("evaluating", total=total)
            yield lambda tokens: progress.advance(task, tokens)

    return bar()


def _store_of(run: Path, folder: Path, data: Path | None) -> Store:
    """The store to measure on, every byte of it checked."""
    store = _open_store_of(run, folder, data)
    store.verify()
    return store


def _open_store_of(run: Path, folder: Path, data: Path | None) -> Store:
    from myriad.checkpoint import CHECKPOINTS, read_json
    from myriad.config import ConfigError, validate
    from myriad.data.store import Store
    from myriad.train import RunConfig
    from myriad.train.session import store_path

    if data is not None:
        return Store.open(data)
    recorded = folder / "run.json"
    if not recorded.exists():
        raise ConfigError(f"{run}: does not say what it was trained on; name a store with --data")
    out = run.resolve()
    out = out.parents[1] if out.parent.name == CHECKPOINTS else out
    path = store_path(validate(RunConfig, read_json(recorded)).data, out)
    if not path.exists():
        raise ConfigError(f"{path}: the store that {run} was trained on is not there; name one with --data")
    return Store.open(path)


def _refuse_misfit(run: Path, folder: Path, model: LanguageModel, store: Store) -> None:
    """Another tokenizer, or a vocabulary that does not fit, would make the figures meaningless."""
    from myriad.config import ConfigError
    from myriad.data.tokenizer import Tokenizer

    if model.config.vocabulary < store.index.vocab_size:
        raise ConfigError(
            f"{store.path}: its vocabulary of {store.index.vocab_size} exceeds {run}'s of {model.config.vocabulary}"
        )
    own = folder / "tokenizer.json"
    if own.exists() and Tokenizer.open(own).sha256 != store.index.tokenizer_sha256:
        raise ConfigError(
            f"{store.path}: made with another tokenizer than {run}; prepare it again with --tokenizer {run}"
        )
