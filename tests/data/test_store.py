import json
import os
import signal
import subprocess
import sys
from functools import reduce
from operator import getitem

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from myriad.cli.data import app
from myriad.data import DataError, sources
from myriad.data.store import Store, Tokens, prepare

FILES = {"1.txt": "zero one\n", "2.txt": "zwei drei é\n", "3.txt": "last"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    for name, text in FILES.items():
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    return tmp_path / "texts"


@pytest.fixture
def store(folder, tmp_path):
    return prepare(folder, "bytes", tmp_path / "store", shard_tokens=8)


def as_ids(*texts):
    return [id for text in texts for id in (256, *text.encode())]


def change_index(store, change):
    index = json.loads((store.path / "index.json").read_text())
    change(index)
    (store.path / "index.json").write_text(json.dumps(index))


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
    assert [shard["size"] for shard in index["splits"]["train"]["shards"]] == [16, 16, 16]
    named = {shard["name"] for split in index["splits"].values() for shard in (*split["shards"], split["offsets"])}
    assert {path.name for path in store.path.iterdir()} == {*named, "index.json", "tokenizer.json"}
    assert store.index.tokenizer_sha256 == store.tokenizer.sha256
    store.verify()


def test_the_same_text_gives_the_same_hashes_wherever_it_lies(store, folder, tmp_path):
    again = prepare(folder.rename(tmp_path / "elsewhere"), "bytes", tmp_path / "deep" / "store2", shard_tokens=8)
    assert again.index.source_sha256 == store.index.source_sha256
    assert again.split("train").sha256 == store.split("train").sha256 != store.split("validation").sha256


def test_a_long_file_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART", 16)
    text = "some words on a line\n" * 100
    (tmp_path / "a.txt").write_text(text)
    store = prepare(tmp_path / "a.txt", "bpe:300", tmp_path / "store", shard_tokens=50)
    train, validation = store.split("train"), store.split("validation")
    assert (train.documents, validation.documents) == (1, 1)
    assert train.bytes + validation.bytes == len(text)
    assert train.words + validation.words == 500
    assert store.tokenizer.decode([*train.tokens[1:], *validation.tokens[1:]]) == text
    assert validation.tokens[:1] == [store.index.end_id]


def test_the_end_token_in_a_text_adds_no_document(tmp_path):
    (tmp_path / "a.txt").write_text("one <|endoftext|> two\n" * 50)
    for tokenizer in ("bytes", "bpe:280"):
        store = prepare(tmp_path / "a.txt", tokenizer, tmp_path / tokenizer)
        tokens = store.split("train").tokens[:]
        assert np.flatnonzero(tokens == store.index.end_id).tolist() == [0]


def test_a_store_lends_its_tokenizer(store, folder, tmp_path):
    other = prepare(folder, store.path, tmp_path / "other")
    assert other.index.tokenizer_sha256 == store.index.tokenizer_sha256


def test_progress_is_told(folder, tmp_path):
    told = []
    prepare(folder, "bpe:300", tmp_path / "store", lambda *what: told.append(what))
    assert told[-1] == ("encoding", 26, 26)
    assert {stage for stage, _, _ in told} == {"training the tokenizer", "encoding"}


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


def test_tokens_are_read_only(store):
    tokens = store.split("train").tokens
    with pytest.raises(ValueError, match="read-only"):
        tokens[0:3][0] = 1
    for key in (0, slice(0, 4, 2)):
        with pytest.raises(TypeError, match="slices of step 1"):
            tokens[key]


# --- faults


def test_a_missing_split_is_told(store):
    with pytest.raises(DataError, match=r"store: has no split 'test' \(it has train, validation\)"):
        store.split("test")


@pytest.mark.parametrize("make", ["store", "file", "full"])
def test_nothing_is_overwritten(make, folder, tmp_path):
    out = tmp_path / "out"
    if make == "store":
        prepare(folder, "bytes", out)
    elif make == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"out: (holds a store already|exists and is not an empty folder)"):
        prepare(folder, "bytes", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_may_become_a_store(folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert prepare(folder, "bytes", tmp_path / "out").split("train").documents == 2


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_interrupted_preparation_leaves_nothing(fault, folder, tmp_path):
    def interrupt(stage, done, total):
        raise fault("stop")

    expected = DataError if fault is OSError else fault
    with pytest.raises(expected):
        prepare(folder, "bytes", tmp_path / "out", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_a_killed_preparation_leaves_no_store(folder, tmp_path):
    code = (
        "import os, signal, sys; from myriad.data.store import prepare\n"
        "prepare(*sys.argv[1:], lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    )
    arguments = [sys.executable, "-c", code, str(folder), "bytes", str(tmp_path / "out")]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path != folder]
    assert all(path.name.startswith(".out.preparing-") for path in left)
    for path in (*left, tmp_path / "out"):
        with pytest.raises(DataError, match="no store here"):
            Store.open(path)
    assert prepare(folder, "bytes", tmp_path / "out").split("train").documents == 2


def test_a_source_that_changes_meanwhile_is_refused(folder, tmp_path, monkeypatch):
    encode = sources.Corpus.documents

    def grow(corpus):
        corpus.survey  # noqa: B018
        (folder / "1.txt").write_text("longer than before")
        return encode(corpus)

    monkeypatch.setattr(sources.Corpus, "documents", grow)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(folder, "bytes", tmp_path / "out")


def test_a_text_too_short_to_split_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="too little text for a train split"):
        prepare(tmp_path / "a.txt", "bytes", tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(folder, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match="cannot be prepared"):
        prepare(folder, "bytes", tmp_path / "locked" / "out")


def test_an_out_below_a_file_is_told(folder):
    with pytest.raises(DataError, match="cannot be prepared"):
        prepare(folder, "bytes", folder / "1.txt" / "out")


def test_a_truncated_shard_is_found_when_opening(store):
    os.truncate(store.path / "train-00001.bin", 15)
    with pytest.raises(DataError, match=r"train-00001\.bin: damaged \(15 bytes instead of 16\)"):
        Store.open(store.path)


@pytest.mark.parametrize("name", ["train-00000.bin", "tokenizer.json", "validation-documents.npy"])
def test_a_missing_file_is_found_when_opening(name, store):
    (store.path / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: damaged \(No such file"):
        Store.open(store.path)


@pytest.mark.parametrize("name", ["train-00002.bin", "validation-00000.bin", "train-documents.npy"])
def test_a_flipped_bit_is_found_by_verify(name, store):
    content = bytearray((store.path / name).read_bytes())
    content[-3] ^= 1
    (store.path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: damaged"):
        Store.open(store.path).verify()


def test_another_tokenizer_is_found_when_opening(store):
    with open(store.path / "tokenizer.json", "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"tokenizer\.json: damaged \(not the tokenizer"):
        Store.open(store.path)


@pytest.mark.parametrize("offsets", [b"", b"junk" * 10, b"\x93NUMPY\x01\x00\xff\xff"])
def test_hostile_offsets_are_data_errors(offsets, store):
    (store.path / "train-documents.npy").write_bytes(offsets)
    with pytest.raises(DataError, match="damaged"):
        store.split("train")


def test_offsets_are_never_unpickled(store):
    np.save(store.path / "train-documents.npy", np.array([print], object), allow_pickle=True)
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


def fault_of(path):
    """The line that opening and reading a store gives, or None if nothing is wrong."""
    try:
        store = Store.open(path)
        for name in store.index.splits:
            store.split(name).tokens[:]
    except DataError as error:
        return str(error)


def test_hostile_index_values_are_data_errors_or_harmless(store):
    sound = (store.path / "index.json").read_text()
    faults = []
    for path in paths(json.loads(sound)):
        for value in [*HOSTILE, KeyError]:
            (store.path / "index.json").write_text(with_value(sound, path, value))
            faults.append(fault_of(store.path))
    assert not any("\n" in fault for fault in faults if fault)
    assert faults.count(None) < 30  # a source called "", an end id of 0, a word count of 0 ...


def test_a_newer_format_is_told(store):
    change_index(store, lambda index: index.update(format=2))
    with pytest.raises(DataError, match=r"index\.json: damaged \(format: expected 1, found 2\)"):
        Store.open(store.path)


# --- the command


def test_the_command_prepares_and_sums_up(folder, tmp_path):
    arguments = ["prepare", str(folder), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "vocabulary 257" in result.output
    assert "validation" in result.output
    assert f"{tmp_path / 'out'}: prepared in" in result.output
    assert Store.open(tmp_path / "out").split("train").bytes == 22


def test_the_command_lets_faults_through(tmp_path):
    arguments = ["prepare", str(tmp_path / "none"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match="no such file"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
