"""Sources: where documents come from, one class each, and which split every document belongs to.

    TextFile      one UTF-8 file, one document
    TextFolder    the text files of a folder, one document each
    PythonSource  the Python standard library as found on this machine

A source only reads. `Corpus` adds what all sources share: it leaves empty documents out, counts and
hashes the text, and holds a validation split out of sources that have no splits of their own.
"""

import codecs
import hashlib
import os
import re
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from myriad.data import DataError, suggest_path

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE = 0.05
PART = 2**18
"""Characters read at a time: a file of any size passes through memory in parts of about this length."""


class Document(NamedTuple):
    """A document, or a part of a long one."""

    name: str
    text: str
    split: str | None = None
    """One of SPLITS, or None where the source has no splits of its own."""
    continues: bool = False
    """True for a part that goes on where the one before it stopped: no end token stands between them."""


class Source(ABC):
    """Documents in a fixed order, read anew by every call of `documents`."""

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents, the same ones in the same order each time.

        Raises:
            DataError: a file cannot be read or is not text; the line names the file.
        """


class TextFile(Source):
    """One UTF-8 text file: a single document, taken as it is (line endings included)."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path = path

    def documents(self) -> Iterator[Document]:
        return _read_document(self.path, self.path.name, None)


class TextFolder(Source):
    """The text files of a folder and its subfolders, in the order of their relative paths.

    Hidden files and folders are left out, and so are binary files (those with a NUL byte near the start);
    any other file that is not UTF-8 is an error.

    If the folder's own entries are named like splits (`train.txt` and `valid.txt`, `train/` and `test/`,
    `wiki.train.tokens` and `wiki.valid.tokens`), they are the splits and the other entries are left out.
    """

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path = path

    def documents(self) -> Iterator[Document]:
        for name, split in self._splits().items():
            if not _is_binary(self.path / name):
                yield from _read_document(self.path / name, name, split)

    def _splits(self) -> dict[str, str | None]:
        """The files to read, each with the split that the folder's own entries give it, if they do."""
        names = _walk(self.path)
        splits = {name: split_from_name(name.split("/")[0]) for name in names}
        if "train" in splits.values() and {"validation", "test"} & {*splits.values()}:
            return {name: split for name, split in splits.items() if split}
        return dict.fromkeys(names)


class PythonSource(Source):
    """The Python standard library's own sources, `pydoc_data` included, without its tests.

    Each file is decoded as Python does (PEP 263) and belongs to a split by the hash of its path:
    90 % train, 5 % validation, 5 % test, the same file always in the same one.
    """

    LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")

    def __init__(self, root: Path | None = None):
        super().__init__("python")
        self.root = root or Path(sysconfig.get_path("stdlib"))

    def documents(self) -> Iterator[Document]:
        names = [name for name in _walk(self.root, self.LEFT_OUT) if name.endswith(".py")]
        if not names:
            raise DataError(f"{self.root}: holds no .py files; give a text file or folder instead of 'python'")
        for name in names:
            try:
                with tokenize.open(self.root / name) as file:
                    yield Document(name, file.read(), split_from_hash(name))
            except (SyntaxError, UnicodeDecodeError):
                continue  # Python itself could not import it
            except OSError as error:
                raise DataError(f"{self.root / name}: cannot be read ({error.strerror})") from None


def open_source(spec: str | Path) -> Source:
    """The source that `spec` names: `python`, a text file, or a folder of text files.

    Raises:
        DataError: there is no such file.
    """
    spec = str(spec)
    if spec == "python":
        return PythonSource()
    if os.path.isfile(spec):
        return TextFile(Path(spec))
    if os.path.isdir(spec):
        return TextFolder(Path(spec))
    hint = suggest_path(spec, ("python",)) or " (expected a text file, a folder, or 'python')"
    raise DataError(f"{spec}: no such file or folder{hint}")


def split_from_name(name: str) -> str | None:
    """The split after which a file or folder is named, if it names exactly one: `wiki.train.tokens`."""
    words = {
        "train": "train",
        "training": "train",
        "valid": "validation",
        "validation": "validation",
        "val": "validation",
        "dev": "validation",
        "test": "test",
        "testing": "test",
    }
    found = {words[word] for word in re.split("[^a-z]+", name.lower()) if word in words}
    return found.pop() if len(found) == 1 else None


def split_from_hash(name: str) -> str:
    """The split of a name by its SHA-256: 90 % train, 5 % validation, 5 % test."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "train" if place < 0.90 else "validation" if place < 0.95 else "test"


class Survey(NamedTuple):
    """What one reading of all documents tells."""

    documents: int
    bytes: int
    sha256: str
    """Hash of the names and texts of all documents in order."""
    has_splits: bool


class Corpus:
    """The documents of a source, each with its split.

    A source without splits of its own gives its last 5 % of documents to validation; one that is a single
    document is cut in two at a line start, with the last 5 % of its bytes (or a little more) held out.
    """

    def __init__(self, source: Source):
        self.source = source

    @cached_property
    def survey(self) -> Survey:
        """Counts and hash, by reading the whole source once.

        Raises:
            DataError: the source holds no text, or cannot be read.
        """
        documents, size, blank, has_splits, digest = 0, 0, True, True, hashlib.sha256()
        for document in self._nonempty():
            text = document.text.encode()
            if not document.continues:
                documents += 1
                digest.update(b"\xff" + document.name.encode() + b"\xff")  # 0xff: never part of UTF-8
            digest.update(text)
            size += len(text)
            blank = blank and document.text.isspace()
            has_splits = has_splits and document.split is not None
        if blank:
            raise DataError(f"{self.source.name}: holds no text")
        return Survey(documents, size, digest.hexdigest(), has_splits)

    def documents(self) -> Iterator[Document]:
        """All documents in order, none of them empty, `split` always set."""
        if self.survey.has_splits:
            return self._nonempty()
        if self.survey.documents > 1:
            return _hold_out_documents(self._nonempty(), self.survey.documents)
        return _hold_out_text(self._nonempty(), self.survey.bytes)

    def training_texts(self, limit: int) -> Iterator[str]:
        """The texts of the train split, up to `limit` bytes: what a tokenizer is trained on."""
        for document in self.documents():
            if document.split == "train":
                text = document.text.encode()[:limit].decode(errors="ignore")
                limit -= len(text.encode())
                yield text
                if len(text) < len(document.text):
                    return

    def _nonempty(self) -> Iterator[Document]:
        return (document for document in self.source.documents() if document.text)


def _hold_out_documents(documents: Iterator[Document], count: int) -> Iterator[Document]:
    """Give the last 5 % of documents, at least one, to validation."""
    train = count - max(1, round(count * VALIDATION_SHARE))
    seen = 0
    for document in documents:
        seen += not document.continues
        yield document._replace(split="train" if seen <= train else "validation")


def _hold_out_text(parts: Iterator[Document], size: int) -> Iterator[Document]:
    """Cut a single document in two, the last 5 % of its `size` bytes for validation."""
    left = int(size * (1 - VALIDATION_SHARE))  # bytes of training text still to come
    cut = False
    for part in parts:
        text = part.text.encode()
        if cut or len(text) <= left:
            yield part._replace(split="validation" if cut else "train")
            left -= len(text)
            continue
        cut = True
        head, tail = _cut_at_line(text, left)
        if head:
            yield part._replace(text=head, split="train")
        yield part._replace(text=tail, split="validation", continues=False)


def _cut_at_line(text: bytes, at: int) -> tuple[str, str]:
    """Cut at the last line start up to byte `at`; without one, after a space, or else between characters."""
    start = text.rfind(b"\n", 0, at) + 1 or text.rfind(b" ", 0, at) + 1 or at
    head = text[:start].decode(errors="ignore")
    return head, text[len(head.encode()) :].decode()


_WORD_END = re.compile(r"(?s:.*)[^\W_](?=\s)")
"""Up to the last letter or digit that white space follows. The splitting rules of byte-level BPE (GPT-2's,
GPT-4's, Llama 3's) all begin anew there, so that a text cut there gives the tokens of the uncut one."""


def _read_document(path: Path, name: str, split: str | None) -> Iterator[Document]:
    for number, text in enumerate(_read_parts(path)):
        yield Document(name, text, split, continues=number > 0)


def _read_parts(path: Path) -> Iterator[str]:
    """A UTF-8 file in consecutive parts of about PART characters, each but the last ending with a word."""
    pending = ""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while len(block := file.read(PART)) == PART:
                end = _WORD_END.match(block)
                if end:
                    yield pending + block[: end.end()]
                    pending = ""
                pending += block[end.end() if end else 0 :]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text (byte {_first_bad_byte(path)}); convert it first") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if pending or block:
        yield pending + block


def _first_bad_byte(path: Path) -> int:
    """The offset of the first byte that is not UTF-8."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while block := file.read(PART):
            held_back = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return offset - held_back + error.start
            offset += len(block)
    return offset - len(decoder.getstate()[0])


def _is_binary(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return b"\0" in file.read(8192)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _walk(root: Path, left_out: tuple[str, ...] = ()) -> list[str]:
    """Relative POSIX paths of all regular files, sorted, without hidden ones and the folders left out."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out and not name.startswith(".")]
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(names)
