"""Writing splits: tokens and counts go to disk as they come, and a split's last documents can be moved to another."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

COPIED = 2**20
"""Items copied at a time."""


class Encoded(NamedTuple):
    """Parts of one split, encoded."""

    split: str
    ids: np.ndarray
    """The tokens of all parts, with an end token before each that begins a document."""
    starts: np.ndarray
    """Where these end tokens stand, int64."""
    documents: np.ndarray
    """The document of each part, int64: 0 is the one that began in an earlier batch."""
    counts: np.ndarray
    """(parts, 2) int64: words and bytes of each part."""


class DiskArray:
    """An array on disk that grows at its end and can be cut short.

    Args:
        path: the file, which must not be there.
        dtype: of the items.
        width: numbers in an item; 0: an item is a number by itself.
    """

    def __init__(self, path: Path, dtype: np.dtype | str, width: int = 0):
        self.path = path
        self.length = 0
        self._dtype = np.dtype(dtype)
        self._shape = (-1, width) if width else (-1,)
        self._item = self._dtype.itemsize * max(1, width)
        self._file = open(path, "x+b")  # noqa: SIM115 (closed by `close`)

    def append(self, items: np.ndarray) -> None:
        """Write items after the last one."""
        self._file.write(np.ascontiguousarray(items, self._dtype).data)
        self.length += len(items)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The items from `start` to `stop`."""
        self._file.seek(start * self._item)
        content = self._file.read((stop - start) * self._item)
        self._file.seek(0, 2)
        return np.frombuffer(content, self._dtype).reshape(self._shape)

    def truncate(self, length: int) -> None:
        """Cut off all items from `length` on."""
        self._file.truncate(length * self._item)
        self._file.seek(0, 2)
        self.length = length

    def close(self) -> None:
        """Write what is still in memory."""
        self._file.close()


class SplitWriter:
    """Writes one split into a folder.

    Attributes:
        tokens, documents, words, bytes: what it holds so far.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int):
        self.name = name
        self.tokens = self.documents = self.words = self.bytes = 0
        self._folder = folder
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._open_files = ExitStack()
        self._shards: list[DiskArray] = []
        self._offsets = self._array(f"{name}-documents.bin", "<i8")
        self._counts = self._array(f"{name}-counts.tmp", "<i8", 2)
        """Words and bytes of each document but the last, which may go on."""
        self._last = np.zeros((1, 2), np.int64)

    @property
    def shards(self) -> list[Path]:
        """The files of tokens, in order."""
        return [shard.path for shard in self._shards]

    @property
    def offsets(self) -> Path:
        """The file of documents' places."""
        return self._offsets.path

    def add(self, batch: Encoded) -> None:
        """Write a batch and count what is in it."""
        counts = np.zeros((len(batch.starts) + 1, 2), np.int64)
        np.add.at(counts, batch.documents, batch.counts)
        counts[0] += self._last[0]
        finished = counts if self.documents else counts[1:]  # before the first document there is none to finish
        self._counts.append(finished[:-1])
        self._last = finished[-1:]
        self._offsets.append(batch.starts + self.tokens)
        self.documents += len(batch.starts)
        self._write(batch.ids)
        words, size = batch.counts.sum(0).tolist()
        self.words, self.bytes = self.words + words, self.bytes + size

    def move_tail(self, documents: int, other: "SplitWriter") -> None:
        """Move the last documents to another, empty split."""
        self._counts.append(self._last)
        first = self.documents - documents
        begin = int(self._offsets.read(first, first + 1)[0])
        for start in range(first, self.documents, COPIED):
            stop = min(start + COPIED, self.documents)
            other._take_counts(self._offsets.read(start, stop) - begin, self._counts.read(start, stop))
        for ids in self._read_tokens(begin):
            other._write(ids)
        other._counts.truncate(documents - 1)
        self._cut(first, begin)
        self.words, self.bytes = self.words - other.words, self.bytes - other.bytes

    def _take_counts(self, offsets: np.ndarray, counts: np.ndarray) -> None:
        self._offsets.append(offsets)
        self.documents += len(offsets)
        self._counts.append(counts)
        self._last = counts[-1:]
        words, size = counts.sum(0).tolist()
        self.words, self.bytes = self.words + words, self.bytes + size

    def _read_tokens(self, begin: int) -> Iterator[np.ndarray]:
        while begin < self.tokens:
            number, place = divmod(begin, self._shard_tokens)
            ids = self._shards[number].read(place, min(place + COPIED, self._shards[number].length))
            yield ids
            begin += len(ids)

    def _cut(self, documents: int, tokens: int) -> None:
        """Drop all documents from one on, and all tokens."""
        whole, rest = divmod(tokens, self._shard_tokens)
        keep = whole + (rest > 0)
        for shard in self._shards[keep:]:
            shard.path.unlink()
        del self._shards[keep:]
        if rest:
            self._shards[-1].truncate(rest)
        self._last = self._counts.read(documents - 1, documents)
        self._counts.truncate(documents - 1)
        self._offsets.truncate(documents)
        self.documents, self.tokens = documents, tokens

    def _write(self, ids: np.ndarray) -> None:
        self.tokens += len(ids)
        while len(ids):
            if not self._shards or self._shards[-1].length == self._shard_tokens:
                name = f"{self.name}-{len(self._shards):05}.bin"
                self._shards.append(self._array(name, self._dtype))
            room = self._shard_tokens - self._shards[-1].length
            self._shards[-1].append(ids[:room])
            ids = ids[room:]

    def finish(self) -> None:
        """Write the last offset, close all files and drop what was only needed on the way."""
        if self.documents:
            self._offsets.append(np.array([self.tokens]))
        self.close()
        self._counts.path.unlink()
        if not self.documents:
            self._offsets.path.unlink()

    def close(self) -> None:
        """Close all files."""
        self._open_files.close()

    def _array(self, name: str, dtype: np.dtype | str, width: int = 0) -> DiskArray:
        array = DiskArray(self._folder / name, dtype, width)
        self._open_files.callback(array.close)
        return array
