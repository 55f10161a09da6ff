import hashlib
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import write

from myriad.data import DataError
from myriad.data.sources import HubDataset, JsonLines, Parquet, PythonSource, TextFile, TextFolder, open_source, text
from myriad.data.sources.base import split_from_hash, split_from_name

SPLITS = {"train": "a", "validation": "b", "test": "c"}


def joined(source, start=None):
    """(split, text) of each document."""
    documents = source.documents()
    found = []
    for document in source.begin_at(re.compile(start), documents) if start is not None else documents:
        if document.continues:
            found[-1] = (found[-1][0], found[-1][1] + document.text)
        else:
            found.append((document.split, document.text))
    return found


# --- files


def test_the_text_is_taken_as_it_is(tmp_path):
    content = "a\r\nb\rc\n\ufeff\x00d\n"
    assert joined(TextFile(write(tmp_path, {"a": content}) / "a")) == [("train", content)]


@pytest.mark.parametrize("block", [4, 7, 2**18])
@pytest.mark.parametrize(("content", "at"), [(b"good \xff", 5), (b"abc d\xc3\xa9 \xe6\x97", 8), (b"ab\xc3(", 2)])
def test_a_byte_that_is_not_utf8_is_located(content, at, block, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", block)
    path = write(tmp_path, {"a.txt": content}) / "a.txt"
    with pytest.raises(DataError, match=rf"a\.txt: not UTF-8 text \(byte {at}\)"):
        list(TextFile(path).documents())


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path):
    write(tmp_path, {"wiki.txt": "a"})
    with pytest.raises(DataError, match=r"no such file or folder; did you mean '.*wiki\.txt'\?$"):
        open_source(tmp_path / "wikki.txt")
    with pytest.raises(DataError, match="did you mean 'python'"):
        open_source("pyton")
    for spec in ("", "/nowhere/at/all", "x" * 5000, "a\0b"):
        with pytest.raises(DataError, match="no such file or folder"):
            open_source(spec)


def test_a_file_that_goes_away_is_told(tmp_path):
    source = open_source(write(tmp_path, {"a.txt": "a"}) / "a.txt")
    (tmp_path / "a.txt").unlink()
    for ask in (source.fingerprint, source.size, lambda: list(source.documents())):
        with pytest.raises(DataError, match=r"a\.txt: cannot be read \(No such file"):
            ask()


def test_specs(tmp_path):
    write(
        tmp_path, {"a.txt": "", "b.jsonl": "", "c.JSONL.GZ": b"", "d.parquet": b"", "text/a": "", "rows/a/b.jsonl": ""}
    )
    write(tmp_path, {"both/a.jsonl": "", "both/b.parquet": "", "hub/README.md": "", "hub/data/a.parquet": ""})
    kinds = {"a.txt": TextFile, "b.jsonl": JsonLines, "c.JSONL.GZ": JsonLines, "d.parquet": Parquet}
    kinds |= {"text": TextFolder, "rows": JsonLines, "hub": Parquet}
    assert {name: type(open_source(tmp_path / name)) for name in kinds} == kinds
    with pytest.raises(DataError, match="both: holds both JSONL and parquet files"):
        open_source(tmp_path / "both")
    hub = open_source("Salesforce/wikitext:wikitext-103-raw-v1@v1.0", field="line")
    assert isinstance(hub, HubDataset)
    assert (hub.path, hub.config, hub.revision, hub.field) == (
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
        "v1.0",
        "line",
    )
    assert (open_source("owner/name").config, open_source("owner/name@main").revision) == (None, "main")


def test_a_fingerprint_tells_of_sizes_and_times(tmp_path):
    write(tmp_path, {"t/a": "1", "t/b": "22", "f.txt": "1"})
    folder, file = open_source(tmp_path / "t"), open_source(tmp_path / "f.txt")
    before = [folder.fingerprint(), file.fingerprint()]
    assert before == [folder.fingerprint(), file.fingerprint()]
    os.utime(tmp_path / "t" / "b", (1, 1))
    write(tmp_path, {"f.txt": "11"})
    assert all(old != new for old, new in zip(before, [folder.fingerprint(), file.fingerprint()], strict=True))


# --- folders


def test_a_folder_is_read_in_the_order_of_relative_paths(tmp_path):
    write(tmp_path, {"b.txt": "b", "a/z.md": "z", "a.txt": "a", ".git/x": "x", ".hidden": "h"})
    write(tmp_path, {"a/picture.png": b"\x89PNG\0\xff"})
    documents = list(TextFolder(tmp_path).documents())
    assert [document.name for document in documents] == ["a.txt", "a/z.md", "b.txt"]


def test_text_that_is_not_utf8_in_a_folder_is_told(tmp_path):
    write(tmp_path, {"a.txt": "a", "b.txt": "caf\xe9".encode("latin-1")})
    with pytest.raises(DataError, match=r"b\.txt: not UTF-8 text \(byte 3\)"):
        list(TextFolder(tmp_path).documents())


@pytest.mark.parametrize(
    "files",
    [
        {"train.txt": "a", "valid.txt": "b", "test.txt": "c", "README": "not a split"},
        {"wiki.train.tokens": "a", "wiki.valid.tokens": "b", "wiki.test.tokens": "c"},
        {"train/1": "a", "validation/1": "b", "test/1": "c", "LICENSE": "not a split"},
    ],
)
def test_a_folder_can_bring_its_own_splits(files, tmp_path):
    assert dict(joined(TextFolder(write(tmp_path, files)))) == SPLITS


@pytest.mark.parametrize("files", [{"train.txt": "a", "other.txt": "b"}, {"test.txt": "a", "valid.txt": "b"}])
def test_names_of_splits_need_training_text_and_something_held_out(files, tmp_path):
    found = joined(TextFolder(write(tmp_path, files)))
    assert sorted(found) == [("train", "a"), ("train", "b")]


def test_splits_by_name():
    names = [
        "train-00001.txt",
        "wiki.valid.tokens",
        "dev",
        "TEST.md",
        "trainer.py",
        "train_test.txt",
        "val2.txt",
        "train-00000-of-00002.parquet",
        "c4-train.00000-of-01024.json.gz",
    ]
    found = ["train", "validation", "validation", "test", None, None, "validation", "train", "train"]
    assert [split_from_name(name) for name in names] == found


# --- documents that begin within files


def test_lines_begin_documents(tmp_path):
    content = "\n = One = \n\n text = \n = = Part = = \nmore\n = Two = \r\nlast"
    source = TextFile(write(tmp_path, {"a.tokens": content}) / "a.tokens")
    first, second = (text for _, text in joined(source, r"^ = [^=].* = $"))
    assert first + second == content
    assert second == " = Two = \r\nlast"


@given(
    lines=st.lists(st.sampled_from(["#", "# a", "text", "more # text", "", " ", "é#"]), max_size=20),
    ends=st.sampled_from(["\n", "\r\n"]),
    block=st.integers(16, 40),
)
def test_documents_begin_at_exactly_the_lines_that_match(lines, ends, block, tmp_path_factory):
    content = ends.join(lines)
    path = write(tmp_path_factory.mktemp("lines"), {"a": content}) / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK", block)
        found = [text for _, text in joined(TextFile(path), "^#")]
    assert "".join(found) == content
    matches = sum(line.startswith("#") for line in lines)
    first = next((place for place, line in enumerate(lines) if line.strip()), 0)
    headless = not lines or not lines[first].startswith("#")
    assert len(found) == matches + (headless and content != "")
    assert all(piece.startswith("#") for piece in found[1:])


def test_a_line_without_end_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 8)
    source = TextFile(write(tmp_path, {"a": "x" * 100 + "#" + "x" * 100 + "\n#second\n"}) / "a")
    assert [len(piece) for _, piece in joined(source, "^#")] == [202, 8]


def test_files_of_a_folder_stay_apart(tmp_path):
    source = TextFolder(write(tmp_path, {"a": "no heading", "b": "# 1\n# 2\n"}))
    assert [text for _, text in joined(source, "^#")] == ["no heading", "# 1\n", "# 2\n"]


# --- Python's own sources


def test_python_sources(tmp_path):
    write(
        tmp_path,
        {
            "b.py": "# coding: latin-1\r\nx = 'é'\r\n".encode("latin-1"),
            "a/c.py": "\ufeffc = 1\n",
            "broken.py": b"x = '\xff'\n",
            "test/t.py": "t",
            "a/idle_test/t.py": "t",
            "site-packages/p.py": "p",
            "data.txt": "text",
        },
    )
    documents = list(PythonSource(tmp_path).documents())
    assert [(d.name, d.text) for d in documents] == [
        ("a/c.py", "c = 1\n"),
        ("b.py", "# coding: latin-1\nx = 'é'\n"),
    ]
    assert [d.split for d in documents] == [split_from_hash(d.name) for d in documents]


def test_the_standard_library_is_found():
    source = open_source("python")
    names = {}
    for document in source.documents():
        names.setdefault(document.split, []).append(document.name)
    found = [name for split in names.values() for name in split]
    assert {"abc.py", "pydoc_data/topics.py", "json/decoder.py"} <= {*found}
    assert not any({"test", "tests", "site-packages"} & {*name.split("/")} for name in found)
    assert 0.85 < len(names["train"]) / len(found) < 0.95
    assert names["validation"]
    assert names["test"]


def test_a_machine_without_library_sources_is_told(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.py files"):
        list(PythonSource(tmp_path).documents())


def test_the_split_by_hash_is_stable():
    names = [f"{number}.py" for number in range(1000)]
    found = [split_from_hash(name) for name in names]
    assert hashlib.sha256("".join(found).encode()).hexdigest().startswith("f72151c44c3250b6")
    assert 0.87 < found.count("train") / 1000 < 0.93
