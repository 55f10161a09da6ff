import gzip
import json
import re
import sys

import pytest
from made import as_jsonl, documents_of, make, write

from myriad.data import DataError
from myriad.data.sources import HubDataset, JsonLines, Parquet, open_source

ROWS = [{"text": f"row {number}\n", "id": number} for number in range(5)]


def texts(source):
    return [document.text for document in source.documents()]


def write_parquet(path, rows):
    arrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


# --- JSONL


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.ndjson"])
def test_rows_of_json_lines(name, tmp_path):
    content = as_jsonl(*ROWS).replace("\n{", "\n\n{").encode()
    write(tmp_path, {name: gzip.compress(content) if name.endswith("gz") else content})
    source = open_source(tmp_path / name)
    assert texts(source) == [row["text"] for row in ROWS]
    assert len({document.name for document in source.documents()}) == 5
    assert source.size() is None


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"txt": "a", "id": 1}', r"a\.jsonl:2: has no field 'text'; did you mean 'txt'\? \(it has txt, id\)"),
        ("{}", r"a\.jsonl:2: has no field 'text' \(it has none\)"),
        ('{"text": 1}', r"a\.jsonl:2: field 'text' holds int, not text"),
        ('{"text": null}', r"a\.jsonl:2: field 'text' holds NoneType, not text"),
        ("[1]", r"a\.jsonl:2: expected an object with a field 'text', found list"),
        ('{"text": "a"', r"a\.jsonl:2: not JSON"),
        ("[" * 100_000, r"a\.jsonl:2: not JSON"),
        ("9" * 5000, r"a\.jsonl:2: not JSON"),
        ('{"text": "\\ud800"}', r"a\.jsonl:1 holds half of a character"),
    ],
)
def test_a_bad_row_is_named(line, fault, tmp_path):
    write(tmp_path, {"a.jsonl": as_jsonl(ROWS[0]) + line + "\n"})
    with pytest.raises(DataError, match=fault) as error:
        make(tmp_path / "out", source=tmp_path / "a.jsonl")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_row_that_is_not_utf8_is_named(tmp_path):
    write(tmp_path, {"a.jsonl": b'{"text": "a"}\n{"text": "\xff"}\n'})
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8"):
        texts(open_source(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:60] + b"\0\0\0\0" + b[64:], lambda b: b"plain"])
def test_a_damaged_gzip_file_is_named(damage, tmp_path):
    content = gzip.compress(as_jsonl(*ROWS * 50).encode())
    write(tmp_path, {"a.jsonl.gz": damage(content)})
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        texts(open_source(tmp_path / "a.jsonl.gz"))


def test_another_field(tmp_path):
    write(tmp_path, {"a.jsonl": as_jsonl({"body": "mine", "text": "not"})})
    assert texts(open_source(tmp_path / "a.jsonl", "body")) == ["mine"]


# --- parquet and folders


def test_rows_of_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    assert texts(open_source(path)) == [row["text"] for row in ROWS]


def test_bad_parquet_files_are_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    with pytest.raises(DataError, match=r"a\.parquet: has no field 'txt'; did you mean 'text'\? \(it has text, id\)"):
        texts(open_source(path, "txt"))
    with pytest.raises(DataError, match=r"a\.parquet: field 'id' holds int, not text"):
        texts(open_source(path, "id"))
    content = path.read_bytes()
    for damaged in (b"", b"junk", content[:-20], content[:4] + bytes(80) + content[84:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet: (damaged|cannot be read)") as error:
            texts(open_source(path))
        assert "\n" not in str(error.value)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.parquet": b""})
    for module in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    for source in (open_source(tmp_path / "a.parquet"), HubDataset("owner/name")):
        with pytest.raises(DataError, match=r"needs the extra `data`: pip install 'myriad-moe\[data\]'"):
            texts(source)


def test_folders_in_the_form_of_the_hub_bring_their_splits(tmp_path):
    write(tmp_path, {"README.md": "a dataset", ".gitattributes": "x"})
    for name, text in (
        ("train-00000-of-00002", "a"),
        ("train-00001-of-00002", "b"),
        ("validation-00000-of-00001", "c"),
    ):
        write_parquet(tmp_path / "data" / f"{name}.parquet", [{"text": text}])
    source = open_source(tmp_path)
    assert isinstance(source, Parquet)
    assert [(d.split, d.text) for d in source.documents()] == [("train", "a"), ("train", "b"), ("validation", "c")]


def test_folders_of_json_lines_bring_their_splits(tmp_path):
    write(
        tmp_path,
        {"train.jsonl": as_jsonl({"text": "a"}), "test.jsonl.gz": gzip.compress(as_jsonl({"text": "b"}).encode())},
    )
    write(tmp_path, {"other.jsonl": "not read"})
    source = open_source(tmp_path)
    assert isinstance(source, JsonLines)
    assert sorted((d.split, d.text) for d in source.documents()) == [("test", "b"), ("train", "a")]


# --- rows that are lines


ARTICLES = ["", " = One = \n", "", " text \n", " = = Part = = \n", " = Two = \n", " more \n"]


@pytest.mark.parametrize("strip", [False, True])
def test_rows_become_lines_of_documents(strip, tmp_path):
    rows = [{"text": line.rstrip("\n") if strip else line} for line in ARTICLES]
    source = open_source(write(tmp_path, {"a.jsonl": as_jsonl(*rows)}) / "a.jsonl")
    found = []
    for row in source.begin_at(re.compile("^ = [^=].* = $"), source.documents()):
        found = [*found[:-1], found[-1] + row.text] if row.continues else [*found, row.text]
    assert found == ["\n = One = \n\n text \n = = Part = = \n", " = Two = \n more \n"]


def test_documents_of_rows_end_with_their_split(tmp_path):
    write(tmp_path, {"train.jsonl": as_jsonl({"text": "# a"}, {"text": "b"}), "valid.jsonl": as_jsonl({"text": "c"})})
    store = make(tmp_path / "out", source=tmp_path, document_start="^#")
    assert documents_of(store) == {"train": ["# a\nb\n"], "validation": ["c\n"]}


# --- Hugging Face datasets


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """Files as the hub has them, which `datasets` reads as it reads the hub's."""
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, rows in (("train", ROWS[:3]), ("validation", ROWS[3:4]), ("test", ROWS[4:])):
        write_parquet(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet", rows)
    return tmp_path / "hub"


def test_a_dataset_is_streamed_with_its_splits(hub_folder, tmp_path, monkeypatch):
    source = HubDataset(str(hub_folder))
    found = [(document.split, document.text) for document in source.documents()]
    splits = ["train"] * 3 + ["validation", "test"]
    assert sorted(found) == sorted(zip(splits, (row["text"] for row in ROWS), strict=True))
    monkeypatch.setattr("myriad.data.corpus.open_source", lambda spec, field: HubDataset(spec, field=field))
    store = make(tmp_path / "out", source=hub_folder)
    assert documents_of(store) == {
        "train": ["row 0\n", "row 1\n", "row 2\n"],
        "validation": ["row 3\n"],
        "test": ["row 4\n"],
    }


def test_a_field_that_a_dataset_has_not_is_named(hub_folder):
    with pytest.raises(DataError, match=r"has no field 'body' \(it has text, id\)"):
        texts(HubDataset(str(hub_folder), field="body"))


@pytest.mark.parametrize(
    "error", [ConnectionError("no network\nat all"), FileNotFoundError(), ValueError("no config x")]
)
def test_a_hub_out_of_reach_is_one_line(error, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"owner/name:x@v1: .*; a local copy of its files can be used instead$"
    ) as found:
        texts(open_source("owner/name:x@v1"))
    assert "\n" not in str(found.value)


def test_a_hub_dataset_keeps_its_fingerprint_without_the_network():
    names = [
        HubDataset("a/b").fingerprint(),
        HubDataset("a/b", "c").fingerprint(),
        HubDataset("a/b", "c", "d").fingerprint(),
    ]
    assert names == ["a/b", "a/b:c", "a/b:c@d"]
    assert json.dumps(names)
