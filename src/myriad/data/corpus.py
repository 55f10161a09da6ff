"""Corpora: the documents of a recipe, each in its split."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from myriad.data import DataError
from myriad.data.parts import in_parts
from myriad.data.recipe import Recipe
from myriad.data.sources import SPLITS, Document, Source, open_source
from myriad.data.sources.base import encode_name
from myriad.data.splits import (
    Bound,
    at_character,
    at_line,
    bounds_of_lengths,
    bounds_of_shares,
    cut_at_bytes,
    documents_of_shares,
)

VALIDATION_SHARE = 0.05
BPE_TRAINING_BYTES = 50_000_000


class TextHash:
    """Hashes documents while they are read.

    Attributes:
        bytes: of the text so far, as UTF-8.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._hash = hashlib.sha256()

    def watch(self, source: Source) -> Iterator[Document]:
        """A source's documents.

        Raises:
            DataError: a text that is no Unicode text, or the source itself is at fault.
        """
        name = None
        for document in source.documents():
            try:
                text = document.text.encode()
            except UnicodeEncodeError:
                raise DataError(f"{source.name}: {document.name} holds half of a character (a surrogate)") from None
            if not document.continues:
                name = b"\xff" + encode_name(document.name) + b"\xff"  # 0xff: never part of UTF-8
            if text and name:
                self._hash.update(name)
                name = None
            self._hash.update(text)
            self.bytes += len(text)
            yield document

    def hexdigest(self) -> str:
        """Hash of the names and texts of all documents in order, empty ones left out."""
        return self._hash.hexdigest()


class Corpus:
    """The documents of a recipe.

    A validation split is, in this order: what the recipe says, the source's own, the last 5 % of its training
    documents; a test split the same without the last. What the recipe says takes the place of the source's own.

    Args:
        recipe: what to read.
        opener: makes a source of what names it and the field of its rows.

    Raises:
        DataError: there is no such source.
    """

    def __init__(self, recipe: Recipe, opener: Callable[[str, str], Source] = open_source):
        self.recipe = recipe
        self.source = opener(recipe.source, recipe.field)
        self._held_out = {
            name: opener(spec, recipe.field) for name in SPLITS[1:] if isinstance(spec := getattr(recipe, name), str)
        }
        self._replaced = {name for name in SPLITS[1:] if getattr(recipe, name) is not None}
        self._start = re.compile(recipe.document_start) if recipe.document_start is not None else None

    def fingerprint(self) -> str:
        """Hash of what is known of the sources without reading them."""
        texts = [source.fingerprint() for source in (self.source, *self._held_out.values())]
        return hashlib.sha256("\xff".join(texts).encode("utf-8", "surrogateescape")).hexdigest()

    def size(self) -> int | None:
        """Bytes of all text, about, where they are known without reading it."""
        sizes = [source.size() for source in (self.source, *self._held_out.values())]
        known = [size for size in sizes if size is not None]
        total = sum(known) if len(known) == len(sizes) else None
        asked = sum(self.recipe.split_bytes or ()) or None
        return min((size for size in (total, asked) if size is not None), default=None)

    def bounds(self) -> list[Bound] | None:
        """The bytes at which the splits end, where they can be told before the text is read."""
        if self.recipe.split_bytes is not None:
            return bounds_of_lengths(self.recipe.split_bytes, SPLITS)
        size, shares = self.source.single_size(), self.shares(has_validation=False)
        return bounds_of_shares(size, shares) if size and shares and self._start is None else None

    def shares(self, has_validation: bool) -> dict[str, float]:
        """The shares of the training documents that are held out, by split.

        Args:
            has_validation: whether there is validation text without them.
        """
        given = {name: getattr(self.recipe, name) for name in SPLITS[1:]}
        if given["validation"] is None and not has_validation:
            given["validation"] = VALIDATION_SHARE
        return {name: share for name, share in given.items() if isinstance(share, float)}

    def documents(self, bounds: list[Bound] | None, digest: TextHash) -> Iterator[Document]:
        """All documents, those still among the training text that shares hold out of it.

        Args:
            bounds: where to cut the training text; None: nowhere.
            digest: is told of all that is read.

        Raises:
            DataError: a source cannot be read, or holds less text than the recipe asks for.
        """
        yield from self._own_documents(bounds, digest)
        for split, source in self._held_out.items():
            for document in self._begun(source, digest):
                yield document._replace(split=split)

    def _own_documents(self, bounds: list[Bound] | None, digest: TextHash) -> Iterator[Document]:
        documents = self._begun(self.source, digest)
        if self.recipe.split_bytes is not None and bounds:
            whole = (document._replace(split="train") for document in documents)
            missing = yield from cut_at_bytes(whole, bounds, at_character)
            if missing:
                asked = bounds[-1][1]
                raise DataError(
                    f"{self.source.name}: holds {asked - missing:,} bytes of text; split_bytes asks for {asked:,}"
                )
            return
        documents = (document for document in documents if document.split not in self._replaced)
        yield from cut_at_bytes(documents, bounds, at_line) if bounds else documents

    def _begun(self, source: Source, digest: TextHash) -> Iterator[Document]:
        documents = digest.watch(source)
        return documents if self._start is None else source.begin_at(self._start, documents)

    def training_texts(self, limit: int = BPE_TRAINING_BYTES) -> Iterator[str]:
        """The texts of the train split, up to `limit` bytes: what a tokenizer is trained on."""
        bounds = self.bounds()
        if bounds is None:
            start = self._beginning(limit)
            if start.documents > 1 or not start.shares:
                left = start.documents - sum(documents_of_shares(start.documents, start.shares).values())
                return _limited((text for number, text in start.texts if number <= left), limit)
            bounds = bounds_of_shares(start.bytes, start.shares)
        documents = self.documents(bounds, TextHash())
        return _limited((document.text for document in documents if document.split == "train"), limit)

    def _beginning(self, limit: int) -> "_Beginning":
        """Training text, read until its first `limit` bytes are known to be none that is held out."""
        texts: list[tuple[int, str]] = []
        documents = size = 0
        has_validation = False
        for part in in_parts(self.documents(None, TextHash())):
            has_validation = has_validation or part.split == "validation"
            if part.split != "train":
                continue
            documents += not part.continues
            if size < limit:
                texts.append((documents, part.text))
            elif documents - sum(documents_of_shares(documents, self.shares(False)).values()) >= texts[-1][0]:
                return _Beginning(texts, documents, size, self.shares(False))
            size += len(part.text.encode())
        return _Beginning(texts, documents, size, self.shares(has_validation))


class _Beginning(NamedTuple):
    """The beginning of a corpus' training text, before shares are held out."""

    texts: list[tuple[int, str]]
    """Each with the number of its document, from 1."""
    documents: int
    """How many were seen."""
    bytes: int
    shares: dict[str, float]


def text_hash(recipe: Recipe) -> str:
    """Hash of the names and texts of all documents that a store is made of, by reading them all."""
    corpus, digest = Corpus(recipe), TextHash()
    for _ in corpus.documents(corpus.bounds(), digest):
        pass
    return digest.hexdigest()


def _limited(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts up to a number of bytes."""
    for text in texts:
        head = text.encode()[:limit].decode(errors="ignore")
        limit -= len(head.encode())
        yield head
        if len(head) < len(text):
            return
