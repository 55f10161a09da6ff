import hashlib
import json
import os
import random
import resource
from functools import reduce
from operator import getitem

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import make, write

from myriad.data import DataError
from myriad.data.prepare import Recipe, prepare
from myriad.data.store import Store, Tokens

FILES = {"1.txt": "zero one\n", "2.txt": "zwei drei é\n", "3.txt": "last"}


@pytest.fixture
def store(tmp_path):
    source = write(tmp_path / "texts", FILES)
    return prepare(Recipe(source=source), tmp_path / "store", shard_tokens=8)


def as_ids(*texts):
    return [id for text in texts for id in (256, *text.encode())]


def write_index(store, content):
    """Write an index with its seal: one that was made that way, not damaged."""
    content.pop("sha256", None)
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (store.path / "index.json").write_text(json.dumps(content | {"sha256": seal}))


# --- what a store holds


def test_a_split_reads_end_token_document_end_token_document(store):
    train = store.split("train")
    assert train.tokens[:].tolist() == as_ids("zero one\n", "zwei drei é\n")
    assert (train.name, train.documents, train.words, train.bytes) == ("train", 2, 5, 22)
    assert len(train.tokens) == train.bytes + train.documents
    assert train.document_offsets.tolist() == [0, 10, 24]
    assert store.split("validation").tokens[:].tolist() == as_ids("last")


def test_the_index_tells_what_is_there(store):
    index = json.loads((store.path / "index.json").read_text())
    assert (index["dtype"], index["vocab_size"], index["end_id"]) == ("uint16", 257, 256)
    assert (index["recipe"]["source"], index["recipe"]["tokenizer"]) == (store.index.source, "bytes")
    assert [shard["size"] for shard in index["splits"]["train"]["shards"]] == [16, 16, 16]
    named = {shard["name"] for split in index["splits"].values() for shard in (*split["shards"], split["offsets"])}
    assert {path.name for path in store.path.iterdir()} == {*named, "index.json", "tokenizer.json"}
    assert store.index.tokenizer_sha256 == store.tokenizer.sha256
    store.verify()


def test_a_store_lends_its_tokenizer(store, tmp_path):
    other = make(tmp_path / "other", source=tmp_path / "texts", tokenizer=store.path)
    assert other.index.tokenizer_sha256 == store.index.tokenizer_sha256


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    start=st.none() | st.integers(-30, 30),
    stop=st.none() | st.integers(-30, 30),
)
def test_slices_over_shards_are_slices_of_the_whole(lengths, start, stop):
    whole = np.arange(sum(lengths), dtype=np.uint16)
    tokens = Tokens(np.split(whole, np.cumsum(lengths)[:-1]))
    assert len(tokens) == len(whole)
    assert tokens[start:stop].tolist() == whole[start:stop].tolist()
    assert tokens[start:stop].dtype == np.uint16


def test_slices_of_files_are_slices_of_the_whole(store):
    tokens = store.split("train").tokens
    whole = tokens[:].tolist()
    for start in range(len(whole) + 2):
        for stop in range(len(whole) + 2):
            assert tokens[start:stop].tolist() == whole[start:stop]


def test_tokens_are_read_only(store):
    tokens = store.split("train").tokens
    for window in (slice(0, 3), slice(0, 20)):
        with pytest.raises(ValueError, match="read-only"):
            tokens[window][0] = 1
    for key in (0, slice(0, 4, 2)):
        with pytest.raises(TypeError, match="slices of step 1"):
            tokens[key]


def test_files_are_closed_with_the_tokens(store):
    def open_files():
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    before = open_files()
    split = store.split("train")
    assert split.tokens[:3].tolist() == [256, *b"ze"]
    del split
    assert open_files() == before


# --- faults


def test_a_missing_split_is_told(store):
    with pytest.raises(DataError, match=r"store: has no split 'test' \(it has train, validation\)"):
        store.split("test")


def test_a_folder_without_a_store_is_told(tmp_path):
    with pytest.raises(DataError, match="no store here; make one with `myriad data prepare`"):
        Store.open(tmp_path)


def fault_of(path):
    """The line that opening, checking and reading a store gives, or None if nothing is wrong."""
    try:
        store = Store.open(path)
        store.verify()
        for name in store.index.splits:
            store.split(name).tokens[:]
    except DataError as error:
        return str(error)


NAMES = [
    "index.json",
    "tokenizer.json",
    "train-00000.bin",
    "train-00002.bin",
    "train-documents.bin",
    "validation-00000.bin",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_short_is_noticed_wherever_it_is_cut(name, store):
    content = (store.path / name).read_bytes()
    for length in {0, 1, len(content) - 1, *random.Random(0).sample(range(len(content)), min(len(content), 40))}:
        (store.path / name).write_bytes(content[:length])
        fault = fault_of(store.path)
        if content[:length].strip() != content.strip():  # the index may lose its last line end
            assert fault
            assert name in fault
            assert "\n" not in fault


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_noticed_wherever_it_is(name, store):
    content = (store.path / name).read_bytes()
    places = range(8 * len(content))
    for place in random.Random(1).sample(places, min(len(places), 400)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        (store.path / name).write_bytes(changed)
        fault = fault_of(store.path)
        assert fault, (place, changed[place // 8 - 20 : place // 8 + 20])
        assert name in fault
        assert "\n" not in fault


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_missing_file_is_found_when_opening(name, store):
    (store.path / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: damaged \(No such file"):
        Store.open(store.path)


def test_a_shard_cut_short_is_found_when_opening(store):
    os.truncate(store.path / "train-00001.bin", 15)
    with pytest.raises(DataError, match=r"train-00001\.bin: damaged \(15 bytes instead of 16\)"):
        Store.open(store.path)


def test_a_store_that_shrinks_while_it_is_read_is_told(store):
    tokens = store.split("train").tokens
    os.truncate(store.path / "train-00001.bin", 6)
    assert tokens[:11].tolist() == as_ids("zero one\n", "zwei")[:11]
    with pytest.raises(DataError, match=r"train-00001\.bin: damaged \(it has become shorter"):
        tokens[8:16]
    with pytest.raises(DataError, match="tokens instead of 24"):
        store.split("train")


def test_a_store_that_is_removed_while_it_is_read_stays_readable(store):
    tokens = store.split("train").tokens
    for path in store.path.iterdir():
        path.unlink()
    assert tokens[:].tolist() == as_ids("zero one\n", "zwei drei é\n")
    with pytest.raises(DataError, match="damaged"):
        store.split("train")


def test_too_many_open_files_are_told(store):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open(store.path, os.O_RDONLY)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 2, hard))
        with pytest.raises(DataError, match="Too many open files"):
            [store.split("train") for _ in range(9)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(held[0])


@pytest.mark.parametrize("offsets", [b"", b"junk" * 10, bytes(24), b"\x93NUMPY\x01\x00\xff\xff"])
def test_hostile_offsets_are_data_errors(offsets, store):
    (store.path / "train-documents.bin").write_bytes(offsets)
    with pytest.raises(DataError, match="damaged"):
        store.split("train")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{",
        b"NaN",
        b"[" * 100_000,
        b'{"format": ' + b"9" * 5000 + b"}",
        b'"x"',
        b'{"format": 2}',
    ],
)
def test_an_index_that_is_none_is_a_data_error(content, store):
    (store.path / "index.json").write_bytes(content)
    with pytest.raises(DataError, match=r"index\.json: damaged") as error:
        Store.open(store.path)
    assert "\n" not in str(error.value)


def test_an_index_that_is_a_folder_is_a_data_error(tmp_path):
    (tmp_path / "index.json").mkdir()
    with pytest.raises(DataError, match=r"index\.json: cannot be read"):
        Store.open(tmp_path)


@pytest.mark.parametrize("number", [1, 3, None, "2"])
def test_another_format_is_told(number, store):
    write_index(store, json.loads((store.path / "index.json").read_text()) | {"format": number})
    with pytest.raises(DataError, match=r"index\.json: of format .* not 2: .*; prepare the store again$"):
        Store.open(store.path)


HOSTILE = [
    None,
    -1,
    0,
    1.5,
    2**70,
    True,
    "",
    "../../etc/passwd",
    "\0",
    [],
    {},
    [None],
    {"a": {}},
    float("nan"),
]


def paths(tree, base=()):
    """The paths of all values of a nested structure."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*base, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*base, key))


def with_value(tree, path, value):
    """JSON text with the value at a path replaced, or removed where the value is `KeyError`."""
    changed = json.loads(tree)
    *parents, key = path
    node = reduce(getitem, parents, changed)
    if value is KeyError:
        del node[key]
    else:
        node[key] = value
    return json.dumps(changed)


def test_hostile_index_values_are_data_errors_or_harmless(store):
    sound = (store.path / "index.json").read_text()
    harmless = ("recipe", "fingerprint", "source_sha256", "end_id", "words", "bytes")
    for path in paths(json.loads(sound)):
        for value in [*HOSTILE, KeyError]:
            write_index(store, json.loads(with_value(sound, path, value)))
            fault = fault_of(store.path)
            assert "\n" not in (fault or "")
            same = value == reduce(getitem, path, json.loads(sound)) or path == ("sha256",)
            removed = value is KeyError and path[0] == "splits" and len(path) == 2
            assert fault or same or removed or {*path} & {*harmless}, (path, value)
