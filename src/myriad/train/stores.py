"""A run's data: the store that it names, or the one made of the source that it names."""

import hashlib
import re
from pathlib import Path

from myriad.config import ConfigError
from myriad.data import DataError
from myriad.data.sources import Corpus, open_source
from myriad.data.store import Store, prepare
from myriad.train.record import Display
from myriad.train.run import DataConfig, RunConfig


def store_path(data: DataConfig, out: Path) -> Path:
    """Where the tokens of a run are: the store that it names, or the one made of its source, beside the run."""
    if data.path is not None:
        return Path(data.path)
    assert data.source is not None
    source, tokenizer = data.source, data.tokenizer
    place = str(Path(source).resolve()) if Path(source).exists() else source
    mark = hashlib.sha256(f"{place}\n{tokenizer}".encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{Path(source).name}-{Path(tokenizer).name}")
    return out.resolve().parent / "data" / f"{name}-{mark}"


def open_store(data: DataConfig, out: Path, display: Display) -> Store:
    """Open a run's store and check every byte; a source's store that is not there yet is prepared.

    Raises:
        DataError: it is missing or damaged, or the source has changed since it was prepared.
    """
    path = store_path(data, out)
    if data.source is not None and not path.exists():
        display.note(f"preparing {data.source} with {data.tokenizer} tokens in {path}")
        return prepare(data.source, data.tokenizer, path)
    store = Store.open(path)
    store.verify()
    if data.source is not None and Corpus(open_source(data.source)).survey.sha256 != store.index.source_sha256:
        raise DataError(
            f"{path}: {data.source} has changed since this store was made of it; "
            f"remove the store to prepare it anew, or train on it as it is with data.path={path}"
        )
    return store


def with_store_vocabulary(run: RunConfig, store: Store) -> RunConfig:
    """The run with the store's vocabulary where it names none.

    Raises:
        ConfigError: the store's tokens do not fit the model's vocabulary.
    """
    size = store.index.vocab_size
    if run.model.vocab_size is None:
        return run.model_copy(update={"model": run.model.with_vocabulary(size)})
    if run.model.vocab_size < size:
        raise ConfigError(f"model.vocab_size: {run.model.vocab_size}, but {store.path} has a vocabulary of {size}")
    return run
