"""A run's data: the store that it names, or the one made of the source that it names."""

import re
import time
from pathlib import Path

from myriad import distributed
from myriad.config import ConfigError
from myriad.data import DataError
from myriad.data.place import BusyError
from myriad.data.prepare import has_changed, prepare
from myriad.data.store import Store
from myriad.train.record import Display
from myriad.train.run import DataConfig, RunConfig

SECONDS_BETWEEN_NOTES = 10.0
SECONDS_BETWEEN_LOOKS = 1.0


def store_path(data: DataConfig, out: Path) -> Path:
    """Where the tokens of a run are: the store that it names, or the one made of its source, beside the run."""
    if data.path is not None:
        return Path(data.path)
    recipe = data.recipe()
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{Path(recipe.source).name}-{Path(recipe.tokenizer).name}")
    return out.resolve().parent / "data" / f"{name}-{recipe.located().digest()[:8]}"


def open_store(data: DataConfig, out: Path, display: Display) -> Store:
    """Open a run's store; the first process sees to it with `ensure_store` while the others wait.

    Raises:
        DataError: it is missing or damaged, or the source has changed since it was prepared.
    """
    return Store.open(distributed.once(lambda: str(ensure_store(data, out, display))))


def ensure_store(data: DataConfig, out: Path, display: Display) -> Path:
    """See that a run's store is there, whole and of the source as it is: all that takes time about it.

    A source's store that is not there yet is prepared; while another process prepares it, this one waits.

    Returns:
        the store's folder.

    Raises:
        DataError: it is missing or damaged, or the source has changed since it was prepared.
    """
    path = store_path(data, out)
    if data.source is not None and not path.exists():
        _prepare(data, path, display)
    store = Store.open(path)
    store.verify()
    if data.source is not None and has_changed(store, data.recipe()):
        raise DataError(
            f"{path}: {data.source} has changed since this store was made of it; "
            f"remove the store to prepare it anew, or train on it as it is with data.path={path}"
        )
    return path


def _prepare(data: DataConfig, path: Path, display: Display) -> None:
    """Prepare a store, or wait until another process has."""
    display.note(f"preparing {data.source} with {data.tokenizer} tokens in {path}")
    waiting = False
    while not path.exists():
        try:
            prepare(data.recipe(), path, _Notes(display))
        except BusyError:
            if not waiting:
                display.note(f"waiting for another process, which prepares {path}")
            waiting = True
            time.sleep(SECONDS_BETWEEN_LOOKS)


class _Notes:
    """Tells a display now and then how far a preparation is."""

    def __init__(self, display: Display):
        self._display = display
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_NOTES:
            self._last = time.monotonic()
            share = f" ({done / total:.0%})" if total else ""
            self._display.note(f"{stage}: {done / 1e6:,.0f} MB{share}")


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
