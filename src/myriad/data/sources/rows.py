"""Sources of rows, of which one field holds the text: JSONL, parquet, Hugging Face datasets."""

import gzip
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from myriad.config import nearest
from myriad.data import DataError
from myriad.data.hub import reading_from_hub
from myriad.data.sources.base import (
    Document,
    Source,
    fingerprint_of,
    own_splits,
    split_from_name,
    unreadable,
    walk,
)

NEEDS_EXTRA = "needs the extra `data`: pip install 'myriad-moe[data]'"


class RowSource(Source, ABC):
    """A source of rows, each a document, or, where `begin_at` says so, a line of one."""

    def begin_at(self, start: re.Pattern[str], documents: Iterable[Document]) -> Iterator[Document]:
        split, blank = None, True
        for row in documents:
            new = row.split != split
            found = start.search(row.text.rstrip("\r\n")) is not None
            begins = new or (found and not blank)  # blank rows before the first document belong to it
            split, blank = row.split, (new or blank) and not row.text.strip()
            text = row.text if row.text.endswith("\n") else row.text + "\n"
            yield row._replace(text=text, continues=not begins)


class RowFiles(RowSource, ABC):
    """Files of rows in one folder. Those whose paths name splits belong to them, as `own_splits` says."""

    ENDINGS: ClassVar[tuple[str, ...]]

    def __init__(self, name: str, root: Path, names: list[str], field: str):
        super().__init__(name)
        self.root = root
        self.names = names
        self.field = field

    @classmethod
    def in_folder(cls, root: Path, field: str) -> Self | None:
        """The files of this kind in a folder and its subfolders, if there are any."""
        names = [name for name in walk(root) if name.lower().endswith(cls.ENDINGS)]
        return cls(str(root), root, names, field) if names else None

    def documents(self) -> Iterator[Document]:
        splits = own_splits({name: _split_of_path(name) for name in self.names})
        for name, split in splits.items():
            for number, text in enumerate(self._texts(self.root / name)):
                yield Document(f"{name}:{number}", text, split)

    def fingerprint(self) -> str:
        return fingerprint_of(self.root, self.names)

    @abstractmethod
    def _texts(self, path: Path) -> Iterator[str]:
        """The texts of a file's rows.

        Raises:
            DataError: the line names the file and, if it can, the row.
        """


def _split_of_path(name: str) -> str | None:
    """The split that the first part of a path to name one names: `data/train-00000-of-00002.parquet`."""
    return next((split for part in name.split("/") if (split := split_from_name(part))), None)


class JsonLines(RowFiles):
    """JSON objects, one a line, in plain or gzipped files. Blank lines are left out."""

    ENDINGS = (".jsonl", ".jsonl.gz", ".json.gz", ".ndjson", ".ndjson.gz")

    def _texts(self, path: Path) -> Iterator[str]:
        opener = gzip.open if path.name.lower().endswith(".gz") else open
        try:
            with opener(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.isspace():
                        yield text_of(_parse(line, f"{path}:{number}"), self.field, f"{path}:{number}")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: not a whole gzip file ({error})") from None
        except OSError as error:
            raise unreadable(path, error) from None


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); every line must be an object of its own") from None


class Parquet(RowFiles):
    """Parquet files, read a few rows at a time."""

    ENDINGS = (".parquet",)
    ROWS = 1024

    def _texts(self, path: Path) -> Iterator[str]:
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError:
            raise DataError(f"{path}: parquet {NEEDS_EXTRA}") from None
        try:
            with parquet.ParquetFile(path) as file:
                text_of(dict.fromkeys(file.schema_arrow.names, ""), self.field, str(path))
                for batch in file.iter_batches(self.ROWS, columns=[self.field]):
                    for value in batch.column(0).to_pylist():
                        yield value if isinstance(value, str) else text_of({self.field: value}, self.field, str(path))
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: damaged parquet file ({_first_line(error)})") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({_first_line(error)})") from None


class HubDataset(RowSource):
    """A dataset of the Hugging Face hub (or of its cache), streamed.

    Its splits are used as `own_splits` says. It counts as unchanged while its name, config and revision are the
    same, because to ask the hub at every start would make a run depend on the network.
    """

    def __init__(self, path: str, config: str | None = None, revision: str | None = None, field: str = "text"):
        super().__init__(path + (f":{config}" if config else "") + (f"@{revision}" if revision else ""))
        self.path, self.config, self.revision, self.field = path, config, revision, field

    def documents(self) -> Iterator[Document]:
        try:
            import datasets
        except ImportError:
            raise DataError(f"{self.name}: a dataset of the Hugging Face hub {NEEDS_EXTRA}") from None
        what = f"{self.name}: no file or folder, and cannot be read as a dataset of the Hugging Face hub"
        with reading_from_hub(what, "a local copy of its files can be used instead"):
            found = datasets.load_dataset(self.path, self.config, revision=self.revision, streaming=True)
            assert isinstance(found, Mapping)
            for name, split in own_splits({str(name): split_from_name(str(name)) for name in found}).items():
                for number, row in enumerate(found[name]):
                    yield Document(f"{name}:{number}", text_of(row, self.field, f"{self.name}: {name}"), split)

    def fingerprint(self) -> str:
        return self.name


def text_of(row: Any, field: str, place: str) -> str:
    """The text of a row.

    Raises:
        DataError: the row has no such field, or no text in it; the line names the fields there are.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: expected an object with a field '{field}', found {type(row).__name__}")
    if field not in row:
        known = ", ".join(map(str, row)) or "none"
        raise DataError(f"{place}: has no field '{field}'{nearest(field, map(str, row))} (it has {known})")
    if not isinstance(row[field], str):
        raise DataError(f"{place}: field '{field}' holds {type(row[field]).__name__}, not text")
    return row[field]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0][:300]
