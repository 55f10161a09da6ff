"""Data: text in, windows of tokens out.

- `sources` reads documents and says to which split each belongs.
- `tokenizer` turns them into tokens: bytes, a trained BPE, or any `tokenizers` file.
- `store` keeps the tokens on disk, counted and hashed, and reads them by memory map.
- `stream` deals training windows out of a store in a seeded order.
"""

import os
from pathlib import Path

from myriad.config import MyriadError, nearest


class DataError(MyriadError):
    """Text, a tokenizer or a store that cannot be used: one line that names it and says what to do."""


def suggest_path(spec: str, words: tuple[str, ...] = ()) -> str:
    """`; did you mean 'x'?` for a path that leads nowhere, from what lies beside it and some keywords."""
    folder = Path(spec).parent
    beside = [str(folder / name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
    return nearest(spec, [*words, *beside])
