"""Stores: a corpus as tokens on disk, counted and hashed.

    STORE/
      index.json                    what is here: the recipe, counts, sizes, hashes
      tokenizer.json
      train-00000.bin ...           tokens, raw and little-endian, in shards of equal length
      train-documents.bin           where each document begins: int64, little-endian
      validation-00000.bin ...

Every document is preceded by one end token, so a split reads `<end> doc 0 <end> doc 1 ...`: the first
token of a document can be predicted from the end token before it.

Tokens are read from open files rather than memory maps: a file that is cut short under a memory map kills the
process when the missing part is touched, a read that comes back short is a fault with a name.
"""

import hashlib
import itertools
import os
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from myriad.config import Config
from myriad.data import DataError
from myriad.data.recipe import Recipe
from myriad.data.sealed import read_sealed, write_sealed
from myriad.data.sources import SPLITS
from myriad.data.tokenizer import FILE_NAME, Tokenizer

INDEX_NAME = "index.json"
FORMAT = 2
AGAIN = "prepare the store again"

FileName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*\.bin$")]
SplitName = Annotated[str, Field(pattern=f"^({'|'.join(SPLITS)})$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, lt=2**63)]


class FileIndex(Config):
    """A file of a store."""

    name: FileName
    size: Size
    """Bytes."""
    sha256: Sha256


class SplitIndex(Config):
    """A split of a store."""

    tokens: Annotated[Size, Field(gt=0)]
    """End tokens included."""
    documents: Annotated[Size, Field(gt=0)]
    words: Size
    """Stretches of text between white space."""
    bytes: Size
    """Of the text as UTF-8."""
    shards: list[FileIndex]
    """The tokens, in order."""
    offsets: FileIndex
    """Where each document's end token stands among the tokens, and the number of tokens at last: int64."""
    sha256: Sha256
    """Hash of the shards' hashes: names the split's tokens."""

    @model_validator(mode="after")
    def _check(self) -> "SplitIndex":
        if self.sha256 != hash_of_hashes(shard.sha256 for shard in self.shards):
            raise ValueError("its hash does not fit its shards'")
        if self.offsets.size != 8 * (self.documents + 1):
            raise ValueError("the size of its offsets does not fit its documents")
        return self


class Index(Config):
    """What a store holds: its index.json."""

    format: Literal[2] = FORMAT
    recipe: Recipe
    """What the store was made of, and how."""
    fingerprint: Sha256
    """Hash of what is known of the sources without reading them: names, sizes and times of files."""
    source_sha256: Sha256
    """Hash of the names and texts of all documents in order."""
    dtype: Literal["uint16", "uint32"]
    """Of the tokens, little-endian."""
    vocab_size: Annotated[Size, Field(gt=0)]
    end_id: Size
    tokenizer_sha256: Sha256
    splits: Annotated[dict[SplitName, SplitIndex], Field(min_length=1)]

    @property
    def source(self) -> str:
        """The source, as it was given."""
        return self.recipe.source

    @model_validator(mode="after")
    def _check(self) -> "Index":
        item = np.dtype(self.dtype).itemsize
        if not self.end_id < self.vocab_size <= 256**item:
            raise ValueError(f"vocab_size {self.vocab_size} does not fit end_id {self.end_id} and {self.dtype}")
        for name, split in self.splits.items():
            if sum(shard.size for shard in split.shards) != split.tokens * item:
                raise ValueError(f"the sizes of the shards of {name} do not fit its tokens")
            if any(shard.size % item for shard in split.shards):
                raise ValueError(f"a shard of {name} holds part of a token")
        return self

    def write(self, folder: Path) -> None:
        """Write index.json, sealed with its own hash."""
        write_sealed(folder / INDEX_NAME, self)


class Shard(Protocol):
    """A stretch of tokens that can be read in slices."""

    def __len__(self) -> int: ...
    def __getitem__(self, window: slice, /) -> np.ndarray: ...


class ShardFile:
    """The tokens of one file, which stays open as long as this is used.

    Raises:
        DataError: the file cannot be opened, or, when read, has become shorter.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self._path = path
        self._dtype = dtype
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise damaged(path, str(error.strerror)) from None
        weakref.finalize(self, os.close, self._file)
        self._length = os.fstat(self._file).st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, _ = window.indices(self._length)
        item = self._dtype.itemsize
        content = self._read(start * item, max(0, stop - start) * item)
        return np.frombuffer(content, self._dtype)

    def _read(self, begin: int, size: int) -> bytes:
        pieces = []
        while size:  # a call reads 2 GiB at most
            try:
                piece = os.pread(self._file, size, begin)
            except OSError as error:
                raise damaged(self._path, str(error.strerror)) from None
            if not piece:
                raise damaged(self._path, "it has become shorter since it was opened")
            pieces.append(piece)
            begin, size = begin + len(piece), size - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Tokens:
    """A split's tokens over all its shards: `tokens[a:b]` is a read-only unsigned array of shape (b - a,).

    Slices have step 1.
    """

    def __init__(self, shards: Sequence[Shard]):
        self._shards = shards
        self._starts = list(itertools.accumulate(map(len, shards[:-1]), initial=0))
        self._length = sum(map(len, shards))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, window: slice) -> np.ndarray:
        if not isinstance(window, slice) or window.step not in (None, 1):
            raise TypeError("tokens are read in slices of step 1")
        start, stop, _ = window.indices(self._length)
        first = bisect_right(self._starts, start) - 1
        last = bisect_left(self._starts, stop, lo=first + 1)
        parts = [
            shard[max(start - base, 0) : max(stop - base, 0)]
            for base, shard in zip(self._starts[first:last], self._shards[first:last], strict=True)
        ]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        tokens.flags.writeable = False
        return tokens


@dataclass(frozen=True)
class Split:
    """The tokens of one split and what was counted when they were made."""

    name: str
    tokens: Tokens
    document_offsets: np.ndarray
    """(documents + 1,) int64: where each document's end token stands, and the number of tokens at last."""
    words: int
    bytes: int
    sha256: str

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.document_offsets) - 1


class Store:
    """A store on disk, its index read and the sizes of its files checked.

    Attributes:
        path: the folder.
        index: counts, sizes and hashes.
    """

    def __init__(self, path: Path, index: Index):
        self.path = path
        self.index = index

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Open a store: its index must be sound, its files as long as noted, its tokenizer unchanged.

        Raises:
            DataError: no store, or a damaged one. The tokens' hashes are left to `verify`.
        """
        path = Path(path)
        store = cls(path, _read_index(path / INDEX_NAME))
        for file in store._files():
            size = _size_of(path / file.name)
            if size != file.size:
                raise damaged(path / file.name, f"{size} bytes instead of {file.size}")
        if hash_file(path / FILE_NAME) != store.index.tokenizer_sha256:
            raise damaged(path / FILE_NAME, "not the tokenizer that the store was made with")
        return store

    def verify(self) -> None:
        """Compare every file with its hash, on all cores.

        Raises:
            DataError: a file has changed.
        """
        files = list(self._files())
        hashes = hash_files(self.path / file.name for file in files)
        for file, found in zip(files, hashes, strict=True):
            if found != file.sha256:
                raise damaged(self.path / file.name, "its hash is not the one in the index")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the store was made with."""
        return Tokenizer.open(self.path)

    def split(self, name: str) -> Split:
        """One of the splits: train, validation or test.

        Raises:
            DataError: the store has no such split, or its files cannot be read.
        """
        if name not in self.index.splits:
            raise DataError(f"{self.path}: has no split '{name}' (it has {', '.join(self.index.splits)})")
        index = self.index.splits[name]
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        tokens = Tokens([ShardFile(self.path / shard.name, dtype) for shard in index.shards])
        if len(tokens) != index.tokens:
            raise damaged(self.path, f"{name} has {len(tokens)} tokens instead of {index.tokens}")
        offsets = self._offsets(index)
        return Split(name, tokens, offsets, index.words, index.bytes, index.sha256)

    def _offsets(self, index: SplitIndex) -> np.ndarray:
        path = self.path / index.offsets.name
        try:
            offsets = np.fromfile(path, "<i8")
        except OSError as error:
            raise damaged(path, str(error)) from None
        if offsets.shape != (index.documents + 1,) or offsets[-1] != index.tokens:
            raise damaged(path, "does not fit the index")
        return offsets

    def _files(self) -> Iterator[FileIndex]:
        for split in self.index.splits.values():
            yield from (*split.shards, split.offsets)


def _read_index(path: Path) -> Index:
    absent = "no store here; make one with `myriad data prepare`"
    return read_sealed(path, Index, FORMAT, absent=absent, again=AGAIN)


def damaged(path: Path, why: str, again: str = AGAIN) -> DataError:
    """The fault of a file that is not as it was made, and how to make it anew."""
    return DataError(f"{path}: damaged ({why}); {again}")


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise damaged(path, str(error.strerror)) from None


def hash_file(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, str(error.strerror)) from None


def hash_files(paths: Iterable[Path]) -> list[str]:
    """The SHA-256 of each file, on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(hash_file, paths))


def hash_of_hashes(hashes: Iterable[str]) -> str:
    """One hash for several files or splits, in order."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
