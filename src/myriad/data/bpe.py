"""Byte-level BPE, fast: what `tokenizers` gives, through tiktoken.

tiktoken knows no merges: it joins the neighbours whose joint bytes are the token of lowest rank. That gives the ids
of `tokenizers` if every token is made by one merge, later merges make higher ids, and every token's own text is
encoded as that token; `fast_bpe` checks this for each token and declines where it does not hold.

GPT-2's splitting rule looks ahead at white space (`\\s+(?!\\S)`: all but the last space of a run before a word),
which takes a backtracking matcher. Here the cuts that it would make are found beforehand, for a whole text at once,
and handed over as special tokens; the rule that is left needs none and runs about twice as fast.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from myriad.data.parts import CharacterSet

SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
"""GPT-2's rule without its lookahead."""
SPACES = CharacterSet(
    character for character in map(chr, range(2**16)) if character.isspace() and not "\x1c" <= character <= "\x1f"
)
"""What `\\s` means there: Unicode's white space."""
JOIN, CUT = "<|myriad: join|>", "<|myriad: cut|>"
JOIN_ID, CUT_ID = 2**32 - 1, 2**32 - 2


class FastBPE:
    """Encodes with tiktoken.

    Args:
        ranks: the bytes of each token -> its id.
        dtype: of the ids.
    """

    def __init__(self, ranks: dict[bytes, int], dtype: np.dtype):
        import tiktoken

        self._dtype = dtype
        self._encoding = tiktoken.Encoding(
            "myriad", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={JOIN: JOIN_ID, CUT: CUT_ID}
        )

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts one after another, and how many each text has, int64."""
        if not texts:
            return np.empty(0, self._dtype), np.empty(0, np.int64)
        lines = "\n".join(texts)
        if JOIN in lines or CUT in lines:
            return self._encode_one_by_one(texts)
        marked = _mark(lines, np.cumsum([len(text) + 1 for text in texts])[:-1] - 1)
        ids = self._encoding.encode_to_numpy(marked, allowed_special="all")
        is_plain = ids < CUT_ID
        special = np.flatnonzero(~is_plain)
        ends = (special - np.arange(len(special)))[ids[special] == JOIN_ID]
        plain = ids.astype(self._dtype)[is_plain]
        return plain, np.diff(ends, prepend=0, append=len(plain))

    def _encode_one_by_one(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """For texts in which the names of the special tokens occur."""
        found = [list(itertools.chain(*map(self._encoding.encode_ordinary, _pieces(text)))) for text in texts]
        return np.array(list(itertools.chain(*found)), self._dtype), np.array([len(ids) for ids in found])


def _cuts(text: str) -> np.ndarray:
    """Where the rule cuts runs of white space: before the last one, if something follows it."""
    spaces = SPACES.find(text)
    return np.flatnonzero(spaces[:-2] & spaces[1:-1] & ~spaces[2:]) + 1


def _pieces(text: str) -> list[str]:
    cuts = _cuts(text).tolist()
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _mark(lines: str, separators: np.ndarray) -> str:
    """Put JOIN in the place of the separators between texts, and CUT where the rule cuts."""
    places = np.concatenate([_cuts(lines), separators])
    order = np.argsort(places, kind="stable")
    replaces = order >= len(places) - len(separators)
    pieces, begin = [], 0
    for place, replace in zip(places[order].tolist(), replaces.tolist(), strict=True):
        pieces += (lines[begin:place], JOIN if replace else CUT)
        begin = place + replace
    return "".join([*pieces, lines[begin:]])


def fast_bpe(tokenizer: tokenizers.Tokenizer, dtype: np.dtype) -> FastBPE | None:
    """The same tokenizer in its fast form, or None if it has none that gives the same ids."""
    definition = json.loads(tokenizer.to_str())
    if not _is_like_gpt2(definition):
        return None
    ranks = _ranks(tokenizer, definition["model"])
    return FastBPE(ranks, dtype) if ranks else None


def _is_like_gpt2(definition: dict[str, Any]) -> bool:
    model, splitter = definition["model"], definition["pre_tokenizer"] or {}
    plain = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return (
        model["type"] == "BPE"
        and not any(model.get(option) for option in plain)
        and definition["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and not splitter["add_prefix_space"]
        and splitter["use_regex"]
        and all(token["special"] for token in definition["added_tokens"])
    )


def _ranks(tokenizer: tokenizers.Tokenizer, model: dict[str, Any]) -> dict[bytes, int]:
    """Bytes -> id of all tokens but special ones; empty if tiktoken would join them in another order."""
    codes = {character: byte for byte, character in enumerate(byte_characters())}
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    vocabulary = {token: id for token, id in model["vocab"].items() if token not in special}
    merged = ["".join(pair) for pair in model["merges"]]
    ids = [vocabulary.get(token, -1) for token in merged]
    ordered = all(before < after for before, after in itertools.pairwise([-1, *ids]))
    if not ordered or not codes.keys() <= vocabulary.keys() or {*codes, *merged} != vocabulary.keys():
        return {}
    pairs = zip(model["merges"], ids, strict=True)
    earlier = all(vocabulary[part] < id or part in codes for pair, id in pairs for part in pair)
    alone = all([found.value for found in tokenizer.model.tokenize(token)] == [token] for token in vocabulary)
    return {bytes(map(codes.__getitem__, token)): id for token, id in vocabulary.items()} if earlier and alone else {}


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's byte-level alphabet."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    codes = {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(codes[byte]) for byte in range(256)]
