"""Data: text in, windows of tokens out.

- `sources` reads documents: text, JSONL, parquet, Hugging Face datasets.
- `recipe` says what is to become of them; `corpus` and `splits` give each document its split.
- `tokenizer` turns them into tokens: bytes, a trained BPE, GPT-2's, or any `tokenizers` file; `bpe` does it fast.
- `prepare` does all this in one pass, in `parts` of bounded size, and `writer` writes the tokens.
- `store` is what lies on disk, counted and hashed.
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
