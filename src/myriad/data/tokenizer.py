"""Tokenizers: every one is a `tokenizers` file (tokenizer.json), so that any tool can read it.

    bytes        ids 0-255 are the byte values, 256 is the end token; nothing to train
    bpe:N        byte-level BPE with N tokens, split into words as GPT-2 does, trained on the text at hand
    PATH         a tokenizer.json, or a folder that holds one: a run, a store

The end token `<|endoftext|>` stands before every document. It is written by its id only: the same
characters in a text are encoded as text.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from myriad.data import DataError, suggest_path

END_TOKEN = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
BYTES_VOCAB_SIZE = 257
SMALLEST_BPE = 257
"""All bytes and the end token."""


class Tokenizer:
    """A tokenizers file.

    Attributes:
        vocab_size: one more than the largest id.
        end_id: id of the end token.
        dtype: the smallest unsigned little-endian dtype that holds every id, uint16 or uint32.
        sha256: of the file's content; two tokenizers are the same if it is.

    Args:
        content: the file's bytes.
        path: the file's name, for errors.

    Raises:
        DataError: not a tokenizers file, or one without the end token.
    """

    def __init__(self, content: bytes, path: str | Path = FILE_NAME):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more specific
            raise DataError(f"{path}: not a tokenizers file ({error})") from None
        end_id = self._tokenizer.token_to_id(END_TOKEN)
        if end_id is None:
            raise DataError(f"{path}: has no {END_TOKEN} token; add it to the tokenizer")
        self._tokenizer.encode_special_tokens = True  # the end token's characters in a text stay text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._content = content
        self._is_bytes = self._tokenizer.to_str() == _bytes_definition()
        self.end_id = end_id
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        self.sha256 = hashlib.sha256(content).hexdigest()

    @classmethod
    def open(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a folder.

        Raises:
            DataError: no such file, or not a tokenizer.
        """
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        try:
            return cls(file.read_bytes(), file)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from None

    def save(self, path: str | Path) -> None:
        """Write the file, byte for byte what was opened, to a path or into a folder."""
        path = Path(path)
        (path / FILE_NAME if path.is_dir() else path).write_bytes(self._content)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end token."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as an array of `dtype`, on all cores."""
        if self._is_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, end tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def byte_tokenizer() -> Tokenizer:
    """Every UTF-8 byte is a token, its value the id; 256 is the end token."""
    return Tokenizer(_bytes_model().to_str(pretty=True).encode())


def _bytes_model() -> tokenizers.Tokenizer:
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    _make_byte_level(tokenizer, split_words=False)
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
    return tokenizer


@cache
def _bytes_definition() -> str:
    return _bytes_model().to_str()


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's byte-level alphabet."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    codes = {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(codes[byte]) for byte in range(256)]


def _make_byte_level(tokenizer: tokenizers.Tokenizer, split_words: bool) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE. The same texts give the same file.

    Args:
        texts: read once.
        vocab_size: tokens, with all bytes and the end token among them. A short text may yield fewer.

    Raises:
        DataError: fewer tokens than bytes and an end token.
    """
    if vocab_size < SMALLEST_BPE:
        raise DataError(f"bpe:{vocab_size}: too few tokens; bytes and the end token alone are {SMALLEST_BPE}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    _make_byte_level(tokenizer, split_words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_TOKEN, special=True, normalized=False)],
        initial_alphabet=_byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str(pretty=True).encode())


def resolve_tokenizer(spec: str | Path, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `spec` names: `bytes`, `bpe:N`, a tokenizer.json, or a folder that holds one.

    Args:
        texts: what a BPE is trained on; not read for the other kinds.

    Raises:
        DataError: no such tokenizer.
    """
    spec = str(spec)
    if spec == "bytes":
        return byte_tokenizer()
    if (vocab_size := _bpe_vocab_size(spec)) is not None:
        return train_bpe(texts, vocab_size)
    if os.path.exists(spec):
        return Tokenizer.open(spec)
    hint = suggest_path(spec, ("bytes", "bpe:8192"))
    raise DataError(f"{spec}: no such tokenizer{hint} (expected bytes, bpe:8192, a {FILE_NAME} or its folder)")


def known_vocab_size(spec: str) -> int | None:
    """The vocabulary size that a spec tells by itself: 257 for `bytes`, N at most for `bpe:N`, else None."""
    return BYTES_VOCAB_SIZE if spec == "bytes" else _bpe_vocab_size(spec)


def _bpe_vocab_size(spec: str) -> int | None:
    match = re.fullmatch(r"bpe:([0-9]{1,7})", spec)
    return int(match[1]) if match else None
