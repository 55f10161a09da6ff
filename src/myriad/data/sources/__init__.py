"""Sources: where documents come from, one class each, and which split every document belongs to.

    TextFile      one UTF-8 file, one document
    TextFolder    the text files of a folder, one document each
    PythonSource  the Python standard library as found on this machine
    JsonLines     JSONL files, one document a row
    Parquet       parquet files, one document a row
    HubDataset    a Hugging Face dataset, one document a row

A source only reads; what becomes of its documents is the recipe's matter.
"""

import os
import re
from pathlib import Path

from myriad.data import DataError, suggest_path
from myriad.data.sources.base import SPLITS, Document, Source
from myriad.data.sources.rows import HubDataset, JsonLines, Parquet
from myriad.data.sources.text import PythonSource, TextFile, TextFolder

__all__ = [
    "SPLITS",
    "Document",
    "HubDataset",
    "JsonLines",
    "Parquet",
    "PythonSource",
    "Source",
    "TextFile",
    "TextFolder",
    "open_source",
]

HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


def open_source(spec: str | Path, field: str = "text") -> Source:
    """The source that `spec` names: `python`, a file, a folder, or a Hugging Face dataset.

    Args:
        spec: as in `Recipe.source`.
        field: which field of a row holds the text.

    Raises:
        DataError: there is no such file.
    """
    spec = str(spec)
    if spec == "python":
        return PythonSource()
    if os.path.isfile(spec):
        return _open_file(Path(spec), field)
    if os.path.isdir(spec):
        return _open_folder(Path(spec), field)
    hub = HUB_NAME.fullmatch(spec)
    hint = suggest_path(spec, () if hub else ("python",))
    if hub and not hint:
        return HubDataset(hub["name"], hub["config"], hub["revision"], field)
    hint = hint or " (expected a file, a folder, 'python', or a dataset's owner/name)"
    raise DataError(f"{spec}: no such file or folder{hint}")


def _open_file(path: Path, field: str) -> Source:
    for kind in (JsonLines, Parquet):
        if path.name.lower().endswith(kind.ENDINGS):
            return kind(str(path), path.parent, [path.name], field)
    return TextFile(path)


def _open_folder(path: Path, field: str) -> Source:
    found = [source for kind in (JsonLines, Parquet) if (source := kind.in_folder(path, field))]
    if len(found) > 1:
        raise DataError(f"{path}: holds both JSONL and parquet files; name one of them, or a folder with one kind")
    return found[0] if found else TextFolder(path)
