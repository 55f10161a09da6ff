"""`myriad data prepare` and `myriad data info`: every option, and every fault in one line."""

import json

import pytest
from filelock import FileLock

from myriad.data.store import Store

LINES = "".join(f"line {number}\n" for number in range(100))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "a.txt").write_text(LINES)
    (tmp_path / "b.txt").write_text("other text\n")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"body": f"# {n}" if n % 2 else "more"}) + "\n" for n in range(8))
    )
    return tmp_path


def prepare(myriad, source, *options):
    return myriad("data", "prepare", source, "--tokenizer", "bytes", "--out", "out", *options)


def test_prepare_sums_up_what_it_made(myriad, folder):
    result = prepare(myriad, "a.txt")
    assert result.code == 0, result.err
    assert "a.txt, vocabulary 257" in result.out
    assert "out: prepared in" in result.out
    assert f"{Store.open('out').split('train').bytes:,}" in result.out


@pytest.mark.parametrize(
    ("words", "documents"),
    [
        (["a.txt", "--validation", "0.2", "--test", "0.1"], {"train": 1, "validation": 1, "test": 1}),
        (["a.txt", "--validation", "b.txt"], {"train": 1, "validation": 1}),
        (["a.txt", "--split-bytes", "3e2,100"], {"train": 1, "validation": 1}),
        (["a.txt", "--split-bytes", "300,100,50"], {"train": 1, "validation": 1, "test": 1}),
        (["a.txt", "--document-start", "0$"], {"train": 9, "validation": 1}),
        (["rows.jsonl", "--field", "body"], {"train": 7, "validation": 1}),
        (["rows.jsonl", "--field", "body", "--document-start", "^#"], {"train": 4, "validation": 1}),
    ],
)
def test_every_option_does_what_it_says(myriad, folder, words, documents):
    result = prepare(myriad, *words)
    assert result.code == 0, result.err
    assert {name: split.documents for name, split in Store.open("out").index.splits.items()} == documents


def test_info_tells_what_a_store_holds_after_checking_it(myriad, folder):
    prepare(myriad, "a.txt", "--validation", "0.2")
    result = myriad("data", "info", "out")
    assert result.code == 0
    for part in ("a.txt, vocabulary 257", "validation: 0.2", "tokenizer: bytes", "out: every file is as it was made"):
        assert part in result.out
    shard = folder / "out" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes().replace(b"l", b"L", 1))
    result = myriad("data", "info", "out")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("myriad: out/train-00000.bin: damaged (its hash is not the one in the index)")
    assert (
        myriad("data", "info", "nowhere").err == "myriad: nowhere: no store here; make one with `myriad data prepare`\n"
    )


FAULTS = {
    "a share too large": (["a.txt", "--validation", "1.5"], "validation: expected a share between 0 and 1"),
    "no validation source": (["a.txt", "--validation", "c.txt"], "c.txt: no such file or folder; did you mean"),
    "shares of everything": (["a.txt", "--validation", "0.5", "--test", "0.5"], "leave nothing to train on"),
    "two ways to split": (
        ["a.txt", "--validation", "0.5", "--split-bytes", "1,1"],
        "validation and test cannot be set",
    ),
    "bytes that are no numbers": (["a.txt", "--split-bytes", "1,x"], "split_bytes.1: expected a valid integer"),
    "one number of bytes": (["a.txt", "--split-bytes", "100"], "split_bytes"),
    "too many bytes": (
        ["a.txt", "--split-bytes", "9e9,1"],
        "a.txt: holds 790 bytes of text; split_bytes asks for 9,000,000,001",
    ),
    "no expression": (["a.txt", "--document-start", "("], "document_start: '(' is no regular expression"),
    "a missing field": (["rows.jsonl"], "rows.jsonl:1: has no field 'text' (it has body)"),
    "a source that is not there": (["none.txt"], "none.txt: no such file or folder"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_one_line(myriad, folder, name):
    words, part = FAULTS[name]
    before = sorted(folder.iterdir())
    result = prepare(myriad, *words)
    assert (result.code, result.out) == (2, "")
    assert part in result.err
    assert len(result.err.splitlines()) == 1
    assert sorted(folder.iterdir()) == before


def test_a_store_that_is_being_prepared_is_refused(myriad, folder):
    with FileLock(".out.lock"):
        result = prepare(myriad, "a.txt")
    assert result.code == 2
    assert "another process is preparing this store" in result.err


@pytest.mark.parametrize("name", ["prepare", "info"])
def test_help_names_every_option(myriad, name):
    out = myriad("data", name, "--help").out
    options = (
        ["--validation", "--test", "--split-bytes", "--field", "--document-start"] if name == "prepare" else ["DIR"]
    )
    assert all(option in out for option in options)


# --- clusters

TOPICS = {"sea": "ship sail tide anchor wave", "kitchen": "flour butter oven sugar spoon"}


@pytest.fixture
def topics(folder):
    rows = [{"text": f"{words} {n}", "topic": topic} for n in range(20) for topic, words in TOPICS.items()]
    (folder / "topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_cluster_tells_what_it_made(myriad, topics):
    myriad("data", "prepare", "topics.jsonl", "--tokenizer", "bpe:300", "--validation", "0.2", "--out", "store")
    result = myriad("data", "cluster", "store", "--clusters", 2, "--out", "parts", "--features", 8)
    assert result.code == 0, result.err
    for part in ("topics.jsonl, 2 clusters by text", "typical tokens", "parts: clustered in"):
        assert part in result.out
    stores = [Store.open(topics / "parts" / str(number)) for number in range(2)]
    assert [store.index.splits["train"].documents for store in stores] == [16, 16]


def test_cluster_takes_a_source_where_it_says_what_belongs_where(myriad, topics):
    words = ["--by", "field", "--field", "topic", "--tokenizer", "bytes", "--validation", "0.25"]
    result = myriad("data", "cluster", "topics.jsonl", *words, "--out", "parts")
    assert result.code == 0, result.err
    assert "2 clusters by field" in result.out
    assert "kitchen" in result.out
    (topics / "texts" / "one").mkdir(parents=True)
    for name in ("one/a.txt", "b.txt"):
        (topics / "texts" / name).write_text(LINES)
    result = myriad("data", "cluster", "texts", "--by", "file", "--tokenizer", "bytes", "--out", "files")
    assert result.code == 0, result.err
    assert "2 clusters by file" in result.out


CLUSTER_FAULTS = {
    "no such store": (["nowhere"], "nowhere: no store here; make one with `myriad data prepare`"),
    "one document": (["store"], "store: 1 document in train cannot make 8 clusters; prepare it with --document-start"),
    "too few clusters": (["store", "--clusters", "1"], "clusters: expected greater than or equal to 2, found 1"),
    "a store and a tokenizer": (["store", "--tokenizer", "bytes"], "--tokenizer: a store was prepared with settings"),
    "no field": (["topics.jsonl", "--by", "field", "--tokenizer", "bytes"], "--field: the field that decides"),
    "a field too many": (["store", "--field", "topic"], "--field: the field that decides"),
    "no tokenizer": (["topics.jsonl", "--by", "file"], "--tokenizer: missing"),
    "a number of clusters": (["texts", "--by", "file", "--tokenizer", "bytes", "--clusters", "3"], "--clusters: "),
}


@pytest.mark.parametrize("fault", CLUSTER_FAULTS)
def test_faults_of_cluster_are_one_line(myriad, topics, fault):
    words, message = CLUSTER_FAULTS[fault]
    myriad("data", "prepare", "a.txt", "--tokenizer", "bytes", "--out", "store")
    before = sorted(topics.rglob("*"))
    result = myriad("data", "cluster", *words, "--out", "parts")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"myriad: {message}")
    assert result.err.count("\n") == 1
    assert sorted(topics.rglob("*")) == before


def test_clusters_are_not_overwritten(myriad, topics):
    words = ["topics.jsonl", "--by", "field", "--field", "topic", "--tokenizer", "bytes", "--out", "parts"]
    assert myriad("data", "cluster", *words).code == 0
    result = myriad("data", "cluster", *words)
    expected = f"myriad: {topics / 'parts'}: exists and is not an empty folder; give another one\n"
    assert (result.code, result.err) == (2, expected)
