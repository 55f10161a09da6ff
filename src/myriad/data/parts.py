"""Parts: the text of a corpus cut into pieces of one size, which can be encoded and counted one by one."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from myriad.data.sources.base import Document, by_document

PART = 2**18
"""Characters of a part, about."""
LONGEST_PART = 2**20
"""Characters after which text that has no place to cut is cut anywhere."""

_WORD_END = re.compile(r"(?s:.*)[^\W_](?=\s)")
"""Up to the last letter or digit that white space follows. The splitting rules of byte-level BPE (GPT-2's,
GPT-4's, Llama 3's) all begin anew there, so that a text cut there gives the tokens of the uncut one."""


class Part(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    split: str
    continues: bool = False
    """True for a part that goes on where the one before it stopped."""
    within_word: bool = False
    """True where the cut before it went through a word."""


def in_parts(documents: Iterable[Document]) -> Iterator[Part]:
    """The text of all documents in parts, none of them empty, each but a document's last ending with a word.

    Text without such an end is cut after LONGEST_PART characters, so that any text passes through bounded memory.
    """
    for first, texts in by_document(documents):
        before = ""
        for text in _cut(texts):
            within_word = bool(before) and not before[-1].isspace() and not text[0].isspace()
            yield Part(text, first.split, bool(before), within_word)
            before = text


def _cut(texts: Iterable[str]) -> Iterator[str]:
    pending = ""
    for text in texts:
        for start in range(0, len(text), PART):
            pending += text[start : start + PART]
            if len(pending) < PART:
                continue
            end = _WORD_END.match(pending)
            cut = end.end() if end else len(pending) if len(pending) >= LONGEST_PART else 0
            if cut:
                yield pending[:cut]
                pending = pending[cut:]
    if pending:
        yield pending


class CharacterSet:
    """A set of characters of the basic plane, looked up in a whole text at once."""

    def __init__(self, characters: Iterable[str]):
        codes = [ord(character) for character in characters]
        self._table = np.zeros(max(codes) + 2, bool)  # the last entry stands for all higher characters
        self._table[codes] = True

    def find(self, text: str) -> np.ndarray:
        """Which characters of a text are in the set, (len(text),) bool."""
        return self._table.take(np.frombuffer(text.encode("utf-32-le"), np.uint32), mode="clip")


SPACES = CharacterSet(character for character in map(chr, range(2**16)) if character.isspace())
"""What separates words: as in `str.split`."""


def count_words(texts: Sequence[str]) -> np.ndarray:
    """How many words each text has, int64: `len(text.split())`."""
    spaces = SPACES.find("\n" + "\n".join(texts))
    begins = np.flatnonzero(spaces[:-1] & ~spaces[1:])
    ends = np.cumsum([len(text) + 1 for text in texts])
    return np.diff(np.searchsorted(begins, ends), prepend=0)
