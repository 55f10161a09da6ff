"""Files for tests, and what a store of bytes says in return."""

import itertools
import json
from pathlib import Path

from myriad.data.prepare import Recipe, prepare
from myriad.data.store import Store


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def as_jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make(out: Path, **recipe: object) -> Store:
    return prepare(Recipe(**recipe), out)


def documents_of(store: Store) -> dict[str, list[str]]:
    """split -> the texts of its documents, in a store of byte tokens."""
    found = {}
    for name in store.index.splits:
        split = store.split(name)
        tokens, offsets = split.tokens[:], split.document_offsets.tolist()
        pieces = [tokens[begin:end] for begin, end in itertools.pairwise(offsets)]
        assert all(piece[0] == store.index.end_id for piece in pieces)
        found[name] = [bytes(piece[1:].tolist()).decode() for piece in pieces]
        assert split.bytes == sum(len(text.encode()) for text in found[name])
        assert split.words == sum(len(text.split()) for text in found[name])
        assert split.documents == len(found[name])
    return found
