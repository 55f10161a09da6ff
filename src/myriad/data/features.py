"""Features of documents: TF-IDF over token ids, projected onto a few directions.

    tfidf_v = count_v * idf_v                              of token v in the document
    x = components @ (tfidf / |tfidf|),   x / |x|          R features

`idf_v = ln((1 + n) / (1 + n_v)) + 1`, where v stands in n_v of n excerpts, and 0 for the end token. `components` are
the first R right singular vectors of the excerpts' normalised vectors (latent semantic analysis).

Documents are held as sparse counts and as R features each, never as (documents, V).

Legend: `N` documents or excerpts, `V` vocabulary, `R` features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from myriad.data.store import Split

PIECE = 2**20
"""Tokens read at a time."""
EXCERPT = 2**13
"""Tokens of an excerpt, at most: a long document gives several."""
FIT_TOKENS = 2**24
"""Tokens of all excerpts that the features are fitted on: 32 MB of ids, and less than 400 MB of counts."""
POWER_ITERATIONS = 5
"""Of the randomised singular value decomposition (arXiv 0909.4061)."""


class Counts(NamedTuple):
    """How often each token stands in each of some texts, sparse."""

    rows: np.ndarray
    """The text of each entry, int64, ascending."""
    tokens: np.ndarray
    """int64."""
    counts: np.ndarray
    """float32."""
    texts: int


class Excerpts(NamedTuple):
    """Stretches of the tokens of some splits, none across the border of a document; end tokens are left out."""

    splits: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


def excerpts_of(splits: Sequence[Split], seed: int, most_tokens: int = FIT_TOKENS) -> Excerpts:
    """All documents cut into excerpts, or as many of them, drawn at random, as have so many tokens together."""
    found = [_cut(split.document_offsets) for split in splits]
    numbers = np.repeat(np.arange(len(found)), [len(begins) for begins, _ in found])
    begins, ends = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.random.default_rng(seed).permutation(len(begins))
    taken = np.sort(order[np.cumsum((ends - begins)[order]) <= max(most_tokens, EXCERPT)])
    return Excerpts(numbers[taken], begins[taken], ends[taken])


def _cut(offsets_N1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the excerpts of each document begin and end."""
    begins_N, ends_N = offsets_N1[:-1] + 1, offsets_N1[1:]
    pieces_N = np.maximum(1, -(-(ends_N - begins_N) // EXCERPT))
    document = np.repeat(np.arange(len(begins_N)), pieces_N)
    place = np.arange(len(document)) - np.repeat(np.cumsum(pieces_N) - pieces_N, pieces_N)
    begins = begins_N[document] + place * EXCERPT
    return begins, np.minimum(begins + EXCERPT, ends_N[document])


def count_excerpts(splits: Sequence[Split], excerpts: Excerpts, vocabulary: int) -> Counts:
    """The counts of excerpts."""
    places = zip(*(part.tolist() for part in excerpts), strict=True)
    return _gather([_count(splits[number], begin, end, vocabulary) for number, begin, end in places])


def count_documents(split: Split, vocabulary: int) -> Iterator[Counts]:
    """The counts of all documents in order, a bounded number at a time."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    held = 0
    for begin, end in zip(split.document_offsets[:-1].tolist(), split.document_offsets[1:].tolist(), strict=True):
        found.append(_count(split, begin + 1, end, vocabulary))
        held += len(found[-1][0]) + 1
        if held >= PIECE:
            yield _gather(found)
            found, held = [], 0
    if found:
        yield _gather(found)


def _count(split: Split, begin: int, end: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a stretch, and how often each stands there."""
    if end - begin <= PIECE:
        return np.unique(split.tokens[begin:end], return_counts=True)
    total = np.zeros(vocabulary, np.int64)
    for start in range(begin, end, PIECE):
        total += np.bincount(split.tokens[start : min(start + PIECE, end)], minlength=vocabulary)
    present = np.flatnonzero(total)
    return present, total[present]


def _gather(found: list[tuple[np.ndarray, np.ndarray]]) -> Counts:
    rows = np.repeat(np.arange(len(found)), [len(tokens) for tokens, _ in found])
    tokens = np.concatenate([tokens for tokens, _ in found]).astype(np.int64)
    return Counts(rows, tokens, np.concatenate([counts for _, counts in found]).astype(np.float32), len(found))


@dataclass(frozen=True)
class Features:
    """What turns counts of tokens into features: float32 `idf_V` and `components_RV`."""

    idf_V: np.ndarray
    components_RV: np.ndarray

    @classmethod
    def fit(cls, counts: Counts, vocabulary: int, end_id: int, features: int, seed: int) -> "Features":
        """From the counts of excerpts; there are fewer features where there are fewer excerpts or tokens."""
        present_V = np.bincount(counts.tokens, minlength=vocabulary)
        idf_V = (np.log((1 + counts.texts) / (1 + present_V)) + 1).astype(np.float32)
        idf_V[end_id] = 0
        return cls(idf_V, _right_singular_vectors(_weigh(counts, idf_V), min(features, counts.texts, vocabulary), seed))

    def of(self, counts: Counts) -> np.ndarray:
        """The features of texts, (N, R) float32, each of length 1; those of an empty text are 0."""
        return _normalized(_weigh(counts, self.idf_V) @ self.components_RV.T)


def _weigh(counts: Counts, idf_V: np.ndarray) -> csr_array:
    """The normalised TF-IDF vectors of texts, (N, V)."""
    values = counts.counts * idf_V[counts.tokens]
    squares_N = np.bincount(counts.rows, values.astype(np.float64) ** 2, minlength=counts.texts)
    values = (values / np.sqrt(np.maximum(squares_N, 1e-24))[counts.rows]).astype(np.float32)
    return csr_array((values, (counts.rows, counts.tokens)), shape=(counts.texts, len(idf_V)))


def _normalized(x_NR: np.ndarray) -> np.ndarray:
    return x_NR / np.maximum(np.linalg.norm(x_NR, axis=1, keepdims=True), 1e-12)


def _right_singular_vectors(x_NV: csr_array, number: int, seed: int) -> np.ndarray:
    """The first so many of a sparse matrix, (R, V)."""
    from sklearn.decomposition import TruncatedSVD  # a second of imports, for fitting alone

    svd = TruncatedSVD(number, n_iter=POWER_ITERATIONS, random_state=seed)
    return np.asarray(svd.fit(x_NV).components_, np.float32)
