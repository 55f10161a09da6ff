"""What all sources share: documents, the names of splits, and files found and read."""

import hashlib
import itertools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from myriad.data import DataError

SPLITS = ("train", "validation", "test")


class Document(NamedTuple):
    """A document, or a piece of one."""

    name: str
    text: str
    split: str = "train"
    """One of SPLITS; all is training text where a source has no splits of its own."""
    continues: bool = False
    """True for a piece that goes on where the one before it stopped: no end token stands between them."""


class Source(ABC):
    """Documents in a fixed order, read anew by every call of `documents`.

    Attributes:
        name: as the user gave it.
    """

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents, the same ones in the same order each time, long ones in pieces.

        Raises:
            DataError: something cannot be read or is not text; the line names it.
        """

    @abstractmethod
    def begin_at(self, start: re.Pattern[str], documents: Iterable[Document]) -> Iterator[Document]:
        """The source's documents, divided anew so that they begin where `start` is found."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A text that changes when the source does, known without reading it."""

    def size(self) -> int | None:
        """Bytes of all text, where they are known without reading it."""
        return None

    def single_size(self) -> int | None:
        """Bytes of the one document that there is, where that is known without reading it."""
        return None


def by_document(documents: Iterable[Document]) -> Iterator[tuple[Document, Iterator[str]]]:
    """Each document's first piece and the texts of all its pieces."""
    begun = 0

    def number(document: Document) -> int:
        nonlocal begun
        begun += not document.continues
        return begun

    groups = (pieces for _, pieces in itertools.groupby(documents, number))
    for pieces in groups:
        first = next(pieces)
        yield first, itertools.chain([first.text], (piece.text for piece in pieces))


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
    place = int.from_bytes(hashlib.sha256(encode_name(name)).digest()[:8], "big") / 2**64
    return "train" if place < 0.90 else "validation" if place < 0.95 else "test"


def own_splits(splits: dict[str, str | None]) -> dict[str, str]:
    """Which names belong to which split, given the split that each names by itself.

    Names are taken at their word if some are of training text and others of held-out text; those that name no
    split are then left out. Else all are training text.
    """
    if "train" in splits.values() and {"validation", "test"} & {*splits.values()}:
        return {name: split for name, split in splits.items() if split}
    return dict.fromkeys(splits, "train")


def encode_name(name: str) -> bytes:
    """A file's name as bytes, also one that is not UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def walk(root: Path, left_out: tuple[str, ...] = ()) -> list[str]:
    """Relative POSIX paths of all regular files, sorted, without hidden ones and the folders left out."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out and not name.startswith(".")]
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(names)


def fingerprint_of(root: Path, names: Iterable[str]) -> str:
    """Names, sizes and times of change of files below a folder."""
    found = ((name, _stat(root / name)) for name in names)
    return "\n".join(f"{name}\0{file.st_size}\0{file.st_mtime_ns}" for name, file in found)


def size_of(root: Path, names: Iterable[str]) -> int:
    """Bytes of files below a folder."""
    return sum(_stat(root / name).st_size for name in names)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """The fault of a file that cannot be read."""
    return DataError(f"{path}: cannot be read ({error.strerror or error})")
