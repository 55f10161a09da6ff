import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myriad.data import DataError, sources
from myriad.data.sources import (
    Corpus,
    Document,
    PythonSource,
    Source,
    TextFile,
    TextFolder,
    open_source,
    split_from_hash,
    split_from_name,
)
from myriad.data.tokenizer import train_bpe


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


class Given(Source):
    """Documents given by a test."""

    def __init__(self, *documents):
        super().__init__("given")
        self._documents = documents

    def documents(self):
        return iter(self._documents)


def splits(source):
    """split -> all its text, joined."""
    texts = {}
    for document in Corpus(source).documents():
        texts[document.split] = texts.get(document.split, "") + document.text
    return texts


# --- one file


def test_a_file_is_one_document_cut_at_a_line_start(tmp_path):
    lines = [f"line {number}\n" for number in range(100)]
    source = open_source(write(tmp_path, {"a.txt": "".join(lines)}) / "a.txt")
    parts = list(Corpus(source).documents())
    assert [(part.name, part.split, part.continues) for part in parts] == [
        ("a.txt", "train", False),
        ("a.txt", "validation", False),
    ]
    assert parts[0].text + parts[1].text == "".join(lines)
    assert parts[1].text.startswith("line ")
    share = len(parts[1].text) / len("".join(lines))
    assert 0.05 <= share < 0.07


@given(text=st.text(min_size=2).filter(lambda text: not text.isspace()), part=st.integers(1, 20))
def test_a_single_document_is_split_without_loss(text, part, tmp_path_factory):
    path = tmp_path_factory.mktemp("split") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART", part)
        documents = list(Corpus(TextFile(path)).documents())
    assert "".join(document.text for document in documents) == text
    assert all(document.text for document in documents)
    names = [document.split for document in documents]
    assert names == sorted(names)  # train, then validation
    assert names[-1] == "validation"
    firsts = [document.split for document in documents if not document.continues]
    assert firsts in (["train", "validation"], ["validation"])


def test_parts_of_a_file_encode_like_the_whole(tmp_path, monkeypatch):
    text = "It's  a test, isn't it?\n\n  def f(x):\n\treturn 12345 + x...  \r\n = Title = \n café 日本 🎉!\n" * 50
    path = write(tmp_path, {"a.txt": text}) / "a.txt"
    tokenizer = train_bpe([text], 400)
    for part in (7, 64, 1000):
        monkeypatch.setattr(sources, "PART", part)
        parts = [document.text for document in TextFile(path).documents()]
        assert len(parts) > len(text) // (part + 100)
        assert [id for part in parts for id in tokenizer.encode(part)] == tokenizer.encode(text)
        assert sum(len(part.split()) for part in parts) == len(text.split())


def test_the_text_is_taken_as_it_is(tmp_path):
    text = "a\r\nb\rc\n\ufeff\x00d\n"
    assert "".join(d.text for d in TextFile(write(tmp_path, {"a": text}) / "a").documents()) == text


@pytest.mark.parametrize("part", [4, 7, 2**18])
@pytest.mark.parametrize(("content", "at"), [(b"good \xff", 5), (b"abc d\xc3\xa9 \xe6\x97", 8), (b"ab\xc3(", 2)])
def test_a_byte_that_is_not_utf8_is_located(content, at, part, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART", part)
    path = write(tmp_path, {"a.txt": content}) / "a.txt"
    with pytest.raises(DataError, match=rf"a\.txt: not UTF-8 text \(byte {at}\)"):
        list(TextFile(path).documents())


@pytest.mark.parametrize("content", ["", " \n\t \n"])
def test_empty_text_is_refused(content, tmp_path):
    path = write(tmp_path, {"a.txt": content}) / "a.txt"
    with pytest.raises(DataError, match=r"a\.txt: holds no text"):
        list(Corpus(open_source(path)).documents())


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path):
    write(tmp_path, {"wiki.txt": "a"})
    with pytest.raises(DataError, match=r"no such file or folder; did you mean '.*wiki\.txt'\?$"):
        open_source(tmp_path / "wikki.txt")
    with pytest.raises(DataError, match="did you mean 'python'"):
        open_source("pyton")
    for spec in ("", "/nowhere/at/all", "x" * 5000, "a\0b"):
        with pytest.raises(DataError, match="no such file or folder"):
            open_source(spec)


# --- folders


def test_a_folder_is_read_in_the_order_of_relative_paths(tmp_path):
    write(tmp_path, {"b.txt": "b", "a/z.md": "z", "a.txt": "a", ".git/x": "x", ".hidden": "h", "empty": ""})
    write(tmp_path, {"a/picture.png": b"\x89PNG\0\xff"})
    documents = list(Corpus(TextFolder(tmp_path)).documents())
    assert [document.name for document in documents] == ["a.txt", "a/z.md", "b.txt"]
    assert [document.split for document in documents] == ["train", "train", "validation"]


def test_the_last_documents_are_held_out(tmp_path):
    write(tmp_path, {f"{number:03}.txt": "text" for number in range(100)})
    documents = list(Corpus(TextFolder(tmp_path)).documents())
    assert [d.name for d in documents if d.split == "validation"] == [f"{n:03}.txt" for n in range(95, 100)]


def test_a_long_document_is_held_out_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "PART", 8)
    write(tmp_path, {"a": "first " * 10, "b": "second " * 10})
    assert splits(TextFolder(tmp_path)) == {"train": "first " * 10, "validation": "second " * 10}


def test_text_that_is_not_utf8_in_a_folder_is_told(tmp_path):
    write(tmp_path, {"a.txt": "a", "b.txt": "caf\xe9".encode("latin-1")})
    with pytest.raises(DataError, match=r"b\.txt: not UTF-8 text \(byte 3\)"):
        Corpus(TextFolder(tmp_path)).survey  # noqa: B018


@pytest.mark.parametrize(
    "files",
    [
        {"train.txt": "a", "valid.txt": "b", "test.txt": "c", "README": "not a split"},
        {"wiki.train.tokens": "a", "wiki.valid.tokens": "b", "wiki.test.tokens": "c"},
        {"train/1": "a", "validation/1": "b", "test/1": "c", "LICENSE": "not a split"},
    ],
)
def test_a_folder_can_bring_its_own_splits(files, tmp_path):
    assert splits(TextFolder(write(tmp_path, files))) == {"train": "a", "validation": "b", "test": "c"}


@pytest.mark.parametrize("files", [{"train.txt": "a", "other.txt": "b"}, {"test.txt": "a", "valid.txt": "b"}])
def test_names_of_splits_need_training_text_and_something_held_out(files, tmp_path):
    assert set(splits(TextFolder(write(tmp_path, files)))) == {"train", "validation"}
    assert sum(len(text) for text in splits(TextFolder(tmp_path)).values()) == 2


def test_splits_by_name():
    names = [
        "train-00001.txt",
        "wiki.valid.tokens",
        "dev",
        "TEST.md",
        "trainer.py",
        "train_test.txt",
        "val2.txt",
    ]
    found = ["train", "validation", "validation", "test", None, None, "validation"]
    assert [split_from_name(name) for name in names] == found


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


# --- what all sources share


def test_the_hash_tells_names_and_texts_apart():
    def digest(*documents):
        return Corpus(Given(*documents)).survey.sha256

    base = digest(Document("a", "bc"), Document("d", "e"))
    assert base == digest(Document("a", "b"), Document("a", "c", continues=True), Document("d", "e"))
    assert base == digest(Document("a", "bc"), Document("empty", ""), Document("d", "e"))
    others = [
        digest(Document("ab", "c"), Document("d", "e")),
        digest(Document("a", "bc"), Document("e", "d")),
        digest(Document("a", "b"), Document("a", "c"), Document("d", "e")),
        digest(Document("d", "e"), Document("a", "bc")),
    ]
    assert base not in others


def test_training_texts_stop_at_the_limit():
    source = Given(Document("a", "éé", "train"), Document("b", "vv", "validation"), Document("c", "cd", "train"))
    corpus = Corpus(source)
    assert "".join(corpus.training_texts(100)) == "éécd"
    assert "".join(corpus.training_texts(5)) == "ééc"
    assert "".join(corpus.training_texts(3)) == "é"
