"""Sources of plain text: a file, a folder, the Python standard library."""

import codecs
import re
import sysconfig
import tokenize
from abc import ABC
from collections.abc import Iterable, Iterator
from pathlib import Path

from myriad.data import DataError
from myriad.data.sources.base import (
    Document,
    Source,
    by_document,
    fingerprint_of,
    own_splits,
    size_of,
    split_from_hash,
    split_from_name,
    unreadable,
    walk,
)

BLOCK = 2**18
"""Characters read at a time. Of a line that is longer, only this much decides whether it begins a document."""


class TextSource(Source, ABC):
    """A source of files, each a document; lines can begin further ones."""

    def begin_at(self, start: re.Pattern[str], documents: Iterable[Document]) -> Iterator[Document]:
        for first, texts in by_document(documents):
            continues = False
            for piece, begins in _at_starts(start, texts):
                yield first._replace(text=piece, continues=continues and not begins)
                continues = True


class TextFile(TextSource):
    """One UTF-8 text file: a single document, taken as it is (line endings included)."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path = path

    def documents(self) -> Iterator[Document]:
        return _read_document(self.path, self.path.name, "train")

    def fingerprint(self) -> str:
        return fingerprint_of(self.path.parent, [self.path.name])

    def size(self) -> int:
        return size_of(self.path.parent, [self.path.name])

    def single_size(self) -> int:
        return self.size()


class TextFolder(TextSource):
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

    def fingerprint(self) -> str:
        return fingerprint_of(self.path, self._splits())

    def size(self) -> int:
        return size_of(self.path, self._splits())

    def _splits(self) -> dict[str, str]:
        return own_splits({name: split_from_name(name.split("/")[0]) for name in walk(self.path)})


class PythonSource(TextSource):
    """The Python standard library's own sources, `pydoc_data` included, without its tests.

    Each file is decoded as Python does (PEP 263) and belongs to a split by the hash of its path:
    90 % train, 5 % validation, 5 % test, the same file always in the same one.
    """

    LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")

    def __init__(self, root: Path | None = None):
        super().__init__("python")
        self.root = root or Path(sysconfig.get_path("stdlib"))

    def documents(self) -> Iterator[Document]:
        for name in self._names():
            try:
                with tokenize.open(self.root / name) as file:
                    yield Document(name, file.read(), split_from_hash(name))
            except (SyntaxError, UnicodeDecodeError):
                continue  # Python itself could not import it
            except OSError as error:
                raise unreadable(self.root / name, error) from None

    def fingerprint(self) -> str:
        return fingerprint_of(self.root, self._names())

    def size(self) -> int:
        return size_of(self.root, self._names())

    def _names(self) -> list[str]:
        names = [name for name in walk(self.root, self.LEFT_OUT) if name.endswith(".py")]
        if not names:
            raise DataError(f"{self.root}: holds no .py files; give a text file or folder instead of 'python'")
        return names


def _at_starts(start: re.Pattern[str], texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The text of a file in pieces, each with whether its first line begins a document."""
    line_begins, blank = True, True
    for block in _whole_lines(texts):
        cuts = [at for at, line in _lines(block) if (at or line_begins) and start.search(line)]
        if blank and cuts and not block[: cuts[0]].strip():
            del cuts[0]  # blank lines before the first document belong to it
        for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(block)], strict=True)):
            if begin < end:
                yield block[begin:end], number > 0
        line_begins, blank = block.endswith("\n"), blank and block.isspace()


def _whole_lines(texts: Iterable[str]) -> Iterator[str]:
    """Text in blocks that end with a line; a line that is longer than BLOCK comes in several."""
    pending = ""
    for text in texts:
        pending += text
        end = pending.rfind("\n") + 1 or (len(pending) if len(pending) > BLOCK else 0)
        if end:
            yield pending[:end]
            pending = pending[end:]
    if pending:
        yield pending


def _lines(block: str) -> Iterator[tuple[int, str]]:
    """Where each line begins, and the line without its end."""
    at = 0
    for line in block.split("\n"):
        yield at, line.removesuffix("\r")
        at += len(line) + 1


def _read_document(path: Path, name: str, split: str) -> Iterator[Document]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            continues = False
            while block := file.read(BLOCK):
                yield Document(name, block, split, continues)
                continues = True
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text (byte {_first_bad_byte(path)}); convert it first") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _first_bad_byte(path: Path) -> int:
    """The offset of the first byte that is not UTF-8."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
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
        raise unreadable(path, error) from None
