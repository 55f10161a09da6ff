"""Tokenizers: every one is a `tokenizers` file (tokenizer.json), so that any tool can read it.

    bytes        ids 0-255 are the byte values, 256 is the end token; nothing to train
    bpe:N        byte-level BPE with N tokens, split into words as GPT-2 does, trained on the text at hand
    gpt2         GPT-2's BPE, from the Hugging Face hub or its cache
    PATH         a tokenizer.json, or a folder that holds one: a run, a store; or a folder with GPT-2's files

The end token `<|endoftext|>` stands before every document. It is written by its id only: the same
characters in a text are encoded as text.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from myriad.data import DataError, suggest_path
from myriad.data.bpe import byte_characters, fast_bpe
from myriad.data.hub import reading_from_hub

END_TOKEN = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
BYTES_VOCAB_SIZE = 257
SMALLEST_BPE = 257
"""All bytes and the end token."""
GPT2_VOCAB_SIZE = 50257
GPT2_REPOSITORY = "openai-community/gpt2"
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
"""Vocabulary and merges, under the names that OpenAI and Hugging Face gave them."""


class Encoder(Protocol):
    """Turns texts into ids."""

    def encode(self, texts: Sequence[str], /) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts one after another, and how many each text has, int64."""
        ...


class ByteEncoder:
    """Every byte is its own id."""

    def __init__(self, dtype: np.dtype):
        self._dtype = dtype

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(encoded), np.uint8).astype(self._dtype)
        return ids, np.array([len(text) for text in encoded], np.int64)


class LibraryEncoder:
    """Whatever `tokenizers` knows, by itself."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, dtype: np.dtype):
        self._tokenizer = tokenizer
        self._dtype = dtype

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        lists = [encoding.ids for encoding in encodings]
        ids = np.fromiter(itertools.chain(*lists), self._dtype, sum(map(len, lists)))
        return ids, np.array([len(ids) for ids in lists], np.int64)


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
        return cls(_read(file), file)

    def save(self, path: str | Path) -> None:
        """Write the file, byte for byte what was opened, to a path or into a folder."""
        path = Path(path)
        (path / FILE_NAME if path.is_dir() else path).write_bytes(self._content)

    @cached_property
    def encoder(self) -> Encoder:
        """The fastest way to these ids."""
        if self.definition() == _bytes_definition():
            return ByteEncoder(self.dtype)
        return fast_bpe(self._tokenizer, self.dtype) or LibraryEncoder(self._tokenizer, self.dtype)

    def definition(self) -> str:
        """The tokenizer as JSON."""
        return self._tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as an array of `dtype`."""
        ids, counts = self.encoder.encode(texts)
        return np.split(ids, np.cumsum(counts)[:-1]) if len(texts) else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, end tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def byte_tokenizer() -> Tokenizer:
    """Every UTF-8 byte is a token, its value the id; 256 is the end token."""
    return Tokenizer(_bytes_model().to_str(pretty=True).encode())


def _bytes_model() -> tokenizers.Tokenizer:
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    _make_byte_level(tokenizer, split_words=False)
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
    return tokenizer


@cache
def _bytes_definition() -> str:
    return _bytes_model().to_str()


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
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str(pretty=True).encode())


def gpt2_tokenizer(vocabulary: Path, merges: Path) -> Tokenizer:
    """GPT-2's tokenizer, or another of the same form, from its two files. The same content gives the same file.

    Args:
        vocabulary: JSON, token -> id: `encoder.json` or `vocab.json`.
        merges: a pair of tokens a line, in order of priority: `vocab.bpe` or `merges.txt`.

    Raises:
        DataError: they cannot be read, or do not belong together.
    """
    tokens, lines = _read(vocabulary), _read(merges)
    try:
        pairs = [line.split(" ") for line in lines.decode().split("\n") if line and not line.startswith("#version")]
        bpe = models.BPE(vocab=json.loads(tokens), merges=[(left, right) for left, right in pairs])
    except Exception as error:  # the library raises nothing more specific
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{vocabulary} and {merges}: not the two files of a BPE ({reason})") from None
    tokenizer = tokenizers.Tokenizer(bpe)
    _make_byte_level(tokenizer, split_words=True)
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
    return Tokenizer(tokenizer.to_str(pretty=True).encode())


def _gpt2_from_hub() -> Tokenizer:
    from huggingface_hub import hf_hub_download

    advice = f"give the path of a folder that holds {' and '.join(GPT2_FILES[0])} instead"
    with reading_from_hub("gpt2: cannot be had from the Hugging Face hub", advice):
        vocabulary, merges = (Path(hf_hub_download(GPT2_REPOSITORY, name)) for name in GPT2_FILES[1])
    return gpt2_tokenizer(vocabulary, merges)


def _open_path(path: Path) -> Tokenizer:
    """A tokenizer.json, or a folder with one or with GPT-2's two files."""
    if not (path / FILE_NAME).exists():
        for names in GPT2_FILES:
            if all((path / name).exists() for name in names):
                return gpt2_tokenizer(*(path / name for name in names))
    return Tokenizer.open(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def resolve_tokenizer(spec: str | Path, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `spec` names: `bytes`, `bpe:N`, `gpt2`, a tokenizer.json, or a folder that holds one.

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
    if spec == "gpt2":
        return _gpt2_from_hub()
    if os.path.exists(spec):
        return _open_path(Path(spec))
    hint = suggest_path(spec, ("bytes", "bpe:8192", "gpt2"))
    raise DataError(f"{spec}: no such tokenizer{hint} (expected bytes, bpe:8192, gpt2, a {FILE_NAME} or its folder)")


def known_vocab_size(spec: str) -> int | None:
    """The vocabulary size that a spec tells by itself: of `bytes`, of `gpt2`, at most N of `bpe:N`, else None."""
    sizes = {"bytes": BYTES_VOCAB_SIZE, "gpt2": GPT2_VOCAB_SIZE}
    return sizes.get(spec) or _bpe_vocab_size(spec)


def _bpe_vocab_size(spec: str) -> int | None:
    match = re.fullmatch(r"bpe:([0-9]{1,7})", spec)
    return int(match[1]) if match else None
