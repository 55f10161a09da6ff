"""Stores: a corpus as tokens on disk, counted and hashed.

    STORE/
      index.json                    what is here: counts, sizes, hashes
      tokenizer.json
      train-00000.bin ...           tokens, raw and little-endian, in shards of equal length
      train-documents.npy           where each document begins
      validation-00000.bin ...

Every document is preceded by one end token, so a split reads `<end> doc 0 <end> doc 1 ...`: the first
token of a document can be predicted from the end token before it.

A store is written into a hidden folder beside its place and renamed at the end: it is whole or not there.
"""

import hashlib
import itertools
import json
import os
import secrets
import shutil
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from myriad.config import Config, ConfigError, validate
from myriad.data import DataError
from myriad.data.sources import SPLITS, Corpus, Document, open_source
from myriad.data.tokenizer import FILE_NAME, Tokenizer, resolve_tokenizer

INDEX_NAME = "index.json"
SHARD_TOKENS = 2**27
BATCH_CHARACTERS = 2**22
"""Text encoded at a time: enough to keep all cores busy, little enough to hold."""
BPE_TRAINING_BYTES = 50_000_000

Progress = Callable[[str, int, int], None]
"""Called with a stage ("training the tokenizer", "encoding"), its bytes of text done, and those to do."""

FileName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*\.(bin|npy)$")]
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
        return self


class Index(Config):
    """What a store holds: its index.json."""

    format: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    """Of the tokens, little-endian."""
    vocab_size: Annotated[Size, Field(gt=0)]
    end_id: Size
    tokenizer_sha256: Sha256
    source: str
    source_sha256: Sha256
    """Hash of the names and texts of all documents in order."""
    splits: Annotated[dict[SplitName, SplitIndex], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "Index":
        item = np.dtype(self.dtype).itemsize
        if not self.end_id < self.vocab_size <= 256**item:
            raise ValueError(f"vocab_size {self.vocab_size} does not fit end_id {self.end_id} and {self.dtype}")
        for name, split in self.splits.items():
            if sum(shard.size for shard in split.shards) != split.tokens * item:
                raise ValueError(f"the sizes of the shards of {name} do not fit its tokens")
        return self


class Tokens:
    """A split's tokens over all its shards, read-only: `tokens[a:b]` is an unsigned array of shape (b - a,).

    The array is a view of the file where one shard holds it all. Slices have step 1.
    """

    def __init__(self, shards: Sequence[np.ndarray]):
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
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


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
                raise _damaged(path / file.name, f"{size} bytes instead of {file.size}")
        if _hash_file(path / FILE_NAME) != store.index.tokenizer_sha256:
            raise _damaged(path / FILE_NAME, "not the tokenizer that the store was made with")
        return store

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            DataError: a file has changed.
        """
        for file in self._files():
            if _hash_file(self.path / file.name) != file.sha256:
                raise _damaged(self.path / file.name, "its hash is not the one in the index")

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
        try:
            shards = [np.memmap(self.path / shard.name, dtype, "r").view(np.ndarray) for shard in index.shards]
            offsets = np.load(self.path / index.offsets.name, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(self.path, str(error)) from None
        if offsets.shape != (index.documents + 1,) or offsets.dtype != np.int64 or offsets[-1] != index.tokens:
            raise _damaged(self.path / index.offsets.name, "does not fit the index")
        return Split(name, Tokens(shards), offsets, index.words, index.bytes, index.sha256)

    def _files(self) -> Iterator[FileIndex]:
        for split in self.index.splits.values():
            yield from (*split.shards, split.offsets)


def prepare(
    source_spec: str | Path,
    tokenizer_spec: str | Path,
    out: str | Path,
    progress: Progress | None = None,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> Store:
    """Make a store from text.

    Args:
        source_spec: `python`, a text file or a folder of text files.
        tokenizer_spec: `bytes`, `bpe:N`, a tokenizer.json or a folder that holds one. A BPE is trained on
            the first 50 MB of the train split.
        out: the store's folder; it must not exist, or be empty.
        progress: told now and then how far the work is.
        shard_tokens: tokens per file.

    Raises:
        DataError: `out` is taken or cannot be written, or the source or the tokenizer is at fault.
    """
    out = Path(out)
    report = progress or (lambda stage, done, total: None)
    try:
        _refuse_taken(out)
        corpus = Corpus(open_source(source_spec))
        tokenizer = resolve_tokenizer(tokenizer_spec, _training_texts(corpus, report))
        with _new_folder(out) as folder:
            tokenizer.save(folder / FILE_NAME)
            splits = _write_splits(folder, corpus, tokenizer, shard_tokens, report)
            index = Index(
                dtype="uint16" if tokenizer.dtype.itemsize == 2 else "uint32",
                vocab_size=tokenizer.vocab_size,
                end_id=tokenizer.end_id,
                tokenizer_sha256=tokenizer.sha256,
                source=corpus.source.name,
                source_sha256=corpus.survey.sha256,
                splits=splits,
            )
            (folder / INDEX_NAME).write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be prepared ({error})") from None
    return Store.open(out)


def _training_texts(corpus: Corpus, report: Progress) -> Iterator[str]:
    total = min(corpus.survey.bytes, BPE_TRAINING_BYTES)
    done = 0
    for text in corpus.training_texts(BPE_TRAINING_BYTES):
        yield text
        done += len(text.encode())
        report("training the tokenizer", done, total)
    report("training the tokenizer", total, total)  # held-out text is none of it


def _write_splits(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, shard_tokens: int, report: Progress
) -> dict[str, SplitIndex]:
    """Encode all documents into shards, each into its split."""
    done, total = 0, corpus.survey.bytes
    with ExitStack() as stack:
        writers: dict[str | None, _SplitWriter] = {}
        for name in SPLITS:
            writers[name] = _SplitWriter(folder, name, tokenizer, shard_tokens)
            stack.callback(writers[name].close)
        for batch in _batches(corpus.documents()):
            for document, ids in zip(batch, tokenizer.encode_batch([part.text for part in batch]), strict=True):
                done += writers[document.split].add(document, ids)
            report("encoding", done, total)
        if done != total:
            raise DataError(f"{corpus.source.name}: changed while it was read; prepare it again")
        if not writers["train"].tokens:
            raise DataError(f"{corpus.source.name}: too little text for a train split")
        return {name: writers[name].finish() for name in SPLITS if writers[name].tokens}


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Writes one split's tokens and counts what goes in."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, shard_tokens: int):
        self.tokens = self._words = self._bytes = 0
        self._folder = folder
        self._name = name
        self._end = np.array([tokenizer.end_id], tokenizer.dtype)
        self._shard_bytes = shard_tokens * tokenizer.dtype.itemsize
        self._offsets = array("q")
        self._shards: list[_HashedFile] = []

    def add(self, document: Document, ids: np.ndarray) -> int:
        """Append a document; returns its bytes."""
        if not document.continues:
            self._offsets.append(self.tokens)
            self._write(self._end)
        self._write(ids)
        size = len(document.text.encode())
        self._words += len(document.text.split())
        self._bytes += size
        return size

    def _write(self, ids: np.ndarray) -> None:
        self.tokens += len(ids)
        data = memoryview(ids.tobytes())
        while data:
            if not self._shards or self._shards[-1].size == self._shard_bytes:
                self.close()
                self._shards.append(_HashedFile(self._folder / f"{self._name}-{len(self._shards):05}.bin"))
            room = self._shard_bytes - self._shards[-1].size
            self._shards[-1].write(data[:room])
            data = data[room:]

    def finish(self) -> SplitIndex:
        """Close the last shard, write the offsets and say what the split holds."""
        self.close()
        shards = [shard.index() for shard in self._shards]
        return SplitIndex(
            tokens=self.tokens,
            documents=len(self._offsets),
            words=self._words,
            bytes=self._bytes,
            shards=shards,
            offsets=self._write_offsets(),
            sha256=hash_of_hashes(shard.sha256 for shard in shards),
        )

    def _write_offsets(self) -> FileIndex:
        path = self._folder / f"{self._name}-documents.npy"
        np.save(path, np.array([*self._offsets, self.tokens], "<i8"), allow_pickle=False)
        return FileIndex(name=path.name, size=path.stat().st_size, sha256=_hash_file(path))

    def close(self) -> None:
        if self._shards:
            self._shards[-1].close()


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path):
        self.size = 0
        self._path = path
        self._hash = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)

    def write(self, data: memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> None:
        self._file.close()

    def index(self) -> FileIndex:
        return FileIndex(name=self._path.name, size=self.size, sha256=self._hash.hexdigest())


def _refuse_taken(out: Path) -> None:
    if (out / INDEX_NAME).exists():
        raise DataError(f"{out}: holds a store already; give another folder, or remove this one first")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not an empty folder; give another one")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place, synced, if all goes well and is removed if not."""
    out = Path(os.path.abspath(out))
    folder = out.parent / f".{out.name}.preparing-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in (*folder.iterdir(), folder):
            _sync(path)
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync(out.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_index(path: Path) -> Index:
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path.parent}: no store here; make one with `myriad data prepare`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "not JSON") from None
    try:
        return validate(Index, raw)
    except ConfigError as error:
        raise _damaged(path, str(error).splitlines()[0]) from None


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: damaged ({why}); prepare the store again")


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from None


def _hash_file(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from None


def hash_of_hashes(hashes: Iterable[str]) -> str:
    """One hash for several files or splits, in order."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
