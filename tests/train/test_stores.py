"""The store of a run: prepared if it is absent, waited for if another process prepares it, checked always."""

import os
import threading

import pytest
from filelock import FileLock

from myriad.config import ConfigError, validate
from myriad.data import DataError
from myriad.data.prepare import prepare
from myriad.data.store import Store
from myriad.train import stores
from myriad.train.record import Silent
from myriad.train.run import DataConfig, with_overrides
from myriad.train.stores import ensure_store, open_store, store_path


class Notes(Silent):
    """A display that remembers its notes."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text("some words on a line\n" * 200)
    return DataConfig(source=str(tmp_path / "text.txt"), validation=0.1)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs" / "one"


def test_an_absent_store_is_prepared_beside_the_run(data, out, tmp_path):
    notes = Notes()
    store = open_store(data, out, notes)
    assert store.path.parent == tmp_path / "runs" / "data"
    assert len(notes.notes) == 1
    assert notes.notes[0].startswith(f"preparing {data.source} with bytes tokens in {store.path}")
    assert store.index.recipe == data.recipe()
    again = Notes()
    assert open_store(data, out, again).index == store.index
    assert again.notes == []


def test_progress_is_noted_now_and_then(data, out, monkeypatch):
    monkeypatch.setattr(stores, "SECONDS_BETWEEN_NOTES", 0.0)
    notes = Notes()
    ensure_store(data.model_copy(update={"tokenizer": "bpe:300"}), out, notes)
    assert "encoding: 0 MB (100%)" in notes.notes
    assert any(note.startswith("training the tokenizer: 0 MB") for note in notes.notes)


def test_every_setting_has_a_store_of_its_own(data, out, tmp_path, monkeypatch):
    changes = [{}, {"tokenizer": "bpe:300"}, {"validation": 0.2}, {"document_start": "^a"}, {"field": "body"}]
    changes += [{"validation": None}, {"validation": None, "split_bytes": (10, 10)}, {"test": 0.1}]
    paths = {store_path(data.model_copy(update=change), out) for change in changes}
    assert len(paths) == len(changes)
    monkeypatch.chdir(tmp_path)
    assert store_path(data.model_copy(update={"source": "text.txt"}), out) == store_path(data, out)
    assert store_path(DataConfig(path="somewhere"), out).name == "somewhere"


def test_settings_that_have_no_effect_are_refused(data):
    with pytest.raises(ConfigError, match="a store was prepared with settings of its own; validation has no effect"):
        validate(DataConfig, {"path": "somewhere", "validation": 0.1})
    settings = {"data": {"source": "python", "tokenizer": "gpt2", "split_bytes": [5, 5]}, "model": {}, "budget": {}}
    with pytest.raises(ConfigError) as error:  # of the model, not of the data
        with_overrides(settings, ["data.path=somewhere"])
    assert "data" not in str(error.value)


def test_a_source_that_changed_is_told(data, out):
    path = ensure_store(data, out, Notes())
    with open(data.source, "a") as file:
        file.write("more\n")
    with pytest.raises(DataError, match=f"{path}: .*text.txt has changed since this store was made of it; remove"):
        ensure_store(data, out, Notes())


def test_a_source_that_was_only_touched_has_not_changed(data, out):
    ensure_store(data, out, Notes())
    os.utime(data.source, (1, 1))
    ensure_store(data, out, Notes())


def test_a_damaged_store_is_told(data, out):
    path = ensure_store(data, out, Notes())
    content = bytearray((path / "train-00000.bin").read_bytes())
    content[1000] ^= 4
    (path / "train-00000.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.bin: damaged"):
        ensure_store(data, out, Notes())


def test_a_second_process_waits_for_the_first(data, out, tmp_path):
    path = store_path(data, out)
    path.parent.mkdir(parents=True)
    lock = FileLock(path.parent / f".{path.name}.lock", thread_local=False)
    lock.acquire()
    notes = Notes()
    waiting = threading.Thread(target=ensure_store, args=(data, out, notes))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    prepare(data.recipe(), tmp_path / "elsewhere")
    os.rename(tmp_path / "elsewhere", path)
    lock.release()
    waiting.join(60)
    assert not waiting.is_alive()
    assert notes.notes[1:] == [f"waiting for another process, which prepares {path}"]
    Store.open(path).verify()


def test_a_second_process_takes_over_if_the_first_gives_up(data, out):
    path = store_path(data, out)
    path.parent.mkdir(parents=True)
    lock = FileLock(path.parent / f".{path.name}.lock", thread_local=False)
    lock.acquire()
    threading.Timer(0.5, lock.release).start()
    assert ensure_store(data, out, Notes()) == path
    Store.open(path).verify()
