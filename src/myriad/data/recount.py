"""Counting again: the words and bytes of single documents of a store, which knows only its splits' totals."""

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from myriad.data.bpe import byte_characters
from myriad.data.parts import count_words
from myriad.data.tokenizer import Tokenizer


class Counter(Protocol):
    """Counts the text of a document."""

    def __call__(self, pieces: Iterable[np.ndarray], /) -> Iterator[tuple[np.ndarray, int, int]]:
        """Each piece of a document's tokens, with the words and bytes that it adds to the document."""
        ...


def counter_for(tokenizer: Tokenizer) -> Counter:
    """The counter that needs least memory."""
    words = _bytes_of_tokens(tokenizer)
    return ByteLevelCounter(words) if words is not None else DecodingCounter(tokenizer)


class ByteLevelCounter:
    """Where every token is a string of bytes: a document passes in pieces of any size.

    Args:
        words: the bytes of each id.
    """

    def __init__(self, words: list[bytes]):
        self._words = words

    def __call__(self, pieces: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int, int]]:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        within_word = False
        for ids in pieces:
            content = b"".join(map(self._words.__getitem__, ids.tolist()))
            text = decode(content)
            words = int(count_words([text])[0]) - (within_word and bool(text) and not text[0].isspace())
            within_word = not text[-1].isspace() if text else within_word
            yield ids, words, len(content)


class DecodingCounter:
    """Any tokenizer: documents are decoded whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, pieces: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int, int]]:
        ids = np.concatenate(list(pieces))
        text = self._tokenizer.decode(ids.tolist())
        yield ids, len(text.split()), len(text.encode())


def _bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes] | None:
    """The bytes of each id of a byte-level vocabulary; None for another kind."""
    definition = json.loads(tokenizer.definition())
    decoder, normalizer = definition["decoder"] or {}, definition["normalizer"]
    if decoder.get("type") != "ByteLevel" or normalizer is not None or definition["model"]["type"] != "BPE":
        return None
    codes = {character: byte for byte, character in enumerate(byte_characters())}
    special = {token["content"] for token in definition["added_tokens"]}
    words = [b""] * tokenizer.vocab_size
    for token, id in definition["model"]["vocab"].items():
        if token in special:
            continue
        if not codes.keys() >= set(token):
            return None
        words[id] = bytes(map(codes.__getitem__, token))
    return words
