"""Clustering: a store in, a store for each domain out (arXiv 2303.14177).

1. Features (`features`) are fitted on excerpts of the training documents: TF-IDF over token ids, projected.
2. Balanced k-means (`kmeans`) finds the centers.
3. Training documents are assigned to near centers under a bound of tokens, so that each expert has as much to learn
   from; held-out documents go to the nearest center, as a text does that is met later.
4. The documents' tokens are copied, in order, into the stores of their clusters, and their words and bytes counted.

What is held in memory is the excerpts' counts, a distance for each document and cluster, and some tokens.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from myriad.data import DataError
from myriad.data.clusters import ClusterModel, ClusterOptions, Clusters, write_clusters
from myriad.data.features import PIECE, Features, count_documents, count_excerpts, excerpts_of
from myriad.data.kmeans import assign_balanced, balanced_kmeans
from myriad.data.place import new_folder
from myriad.data.prepare import BATCH, SHARD_TOKENS, index_of
from myriad.data.recount import Counter, counter_for
from myriad.data.store import Split, SplitIndex, Store, hash_of_hashes
from myriad.data.tokenizer import FILE_NAME
from myriad.data.writer import Encoded, SplitWriter

Progress = Callable[[str, int, int | None], None]
"""As for `prepare`, in bytes of tokens."""


def cluster(
    store: Store, out: str | Path, options: ClusterOptions | None = None, progress: Progress | None = None
) -> Clusters:
    """Divide a store by its documents' texts. The same store and options give the same clusters.

    Args:
        store: whose documents are to be divided, those of every split.
        out: the cluster folder; it must not exist, or be empty.
        options: how.
        progress: told now and then how far the work is.

    Raises:
        BusyError: another process is at work there.
        DataError: `out` is taken or cannot be written, the store is damaged, it has too few documents, or a cluster
            gets none.
    """
    out, options = Path(os.path.abspath(out)), options or ClusterOptions()
    with new_folder(out) as folder:
        _refuse_few(store, options.clusters)
        store.verify()
        splits = [store.split(name) for name in store.index.splits]
        model = _fit(store, options)
        assigned = {split.name: _assign(split, model, store, options.slack) for split in splits}
        for name in ("train", "validation"):
            if name in assigned:
                _refuse_empty(store, name, np.bincount(assigned[name], minlength=options.clusters))
        stores = _Dividing(store, folder, options.clusters, progress).run(assigned)
        names = [str(number) for number in range(options.clusters)]
        hashes = [split.sha256 for split in splits]
        write_clusters(
            folder,
            model,
            stores,
            by="text",
            names=names,
            options=options,
            source_sha256=hashes,
            divided=store.path,
        )
    return Clusters.open(out)


def _refuse_few(store: Store, clusters: int) -> None:
    for name in ("train", "validation"):
        split = store.index.splits.get(name)
        if split is None or split.documents >= clusters:
            continue
        found = f"{split.documents} document{'s' if split.documents > 1 else ''}"
        advice = "prepare it with --document-start, or from a source of more documents"
        if name != "train":
            advice += ", or hold out more"
        raise DataError(f"{store.path}: {found} in {name} cannot make {clusters} clusters; {advice}")


def _refuse_empty(store: Store, split: str, documents_C: np.ndarray) -> None:
    empty = np.flatnonzero(documents_C == 0)
    if len(empty):
        raise DataError(
            f"{store.path}: cluster {empty[0]} gets no {split} documents; ask for fewer clusters, hold out more text, "
            "or try another seed"
        )


def _fit(store: Store, options: ClusterOptions) -> ClusterModel:
    train, vocabulary = [store.split("train")], store.index.vocab_size
    excerpts = excerpts_of(train, options.seed)
    counts = count_excerpts(train, excerpts, vocabulary)
    features = Features.fit(counts, vocabulary, store.index.end_id, options.features, options.seed)
    sizes = excerpts.ends - excerpts.begins
    centers = balanced_kmeans(features.of(counts), sizes, options.clusters, options.slack, options.seed)
    return ClusterModel(features, centers)


def _assign(split: Split, model: ClusterModel, store: Store, slack: float) -> np.ndarray:
    """The cluster of each document, (N,) int64."""
    counts = count_documents(split, store.index.vocab_size)
    distances_NC = np.concatenate([model.distances(model.features.of(part)) for part in counts])
    if split.name == "train":
        return assign_balanced(distances_NC, np.diff(split.document_offsets), slack)
    return distances_NC.argmin(1)


class _Dividing:
    """Copies the documents of a store into the stores of their clusters."""

    def __init__(self, store: Store, folder: Path, clusters: int, progress: Progress | None):
        self._store = store
        self._folders = [folder / str(cluster) for cluster in range(clusters)]
        self._report = progress or (lambda stage, done, total: None)
        self._total = sum(split.bytes for split in store.index.splits.values())
        self._done = 0

    def run(self, assigned: dict[str, np.ndarray]) -> list[Store]:
        """Write all stores.

        Args:
            assigned: split -> the cluster of each of its documents.
        """
        for folder in self._folders:
            folder.mkdir()
            self._store.tokenizer.save(folder / FILE_NAME)
        counter = counter_for(self._store.tokenizer)
        written = {name: self._divide(self._store.split(name), found, counter) for name, found in assigned.items()}
        for number, folder in enumerate(self._folders):
            splits = {name: found for name, indexes in written.items() if (found := indexes[number])}
            made = hash_of_hashes([self._store.index.source_sha256, *(split.sha256 for split in splits.values())])
            changes = {"splits": splits, "fingerprint": made, "source_sha256": made}
            self._store.index.model_copy(update=changes).write(folder)
        return [Store.open(folder) for folder in self._folders]

    def _divide(self, split: Split, assigned_N: np.ndarray, counter: Counter) -> list[SplitIndex | None]:
        """Write one split of all stores, where they have any of it."""
        dtype = np.dtype(self._store.index.dtype).newbyteorder("<")
        with ExitStack() as files:
            parts = [_Part(SplitWriter(folder, split.name, dtype, SHARD_TOKENS)) for folder in self._folders]
            for part in parts:
                files.callback(part.writer.close)
            words, size = self._copy(split, assigned_N, counter, parts)
            if (words, size) != (split.words, split.bytes):
                raise DataError(
                    f"{self._store.path}: its tokenizer does not give back the text, so that the words and bytes of a "
                    "document cannot be counted; prepare it with bytes, bpe:N or gpt2"
                )
            for part in parts:
                part.write()
                part.writer.finish()
        return [index_of(part.writer) if part.writer.documents else None for part in parts]

    def _copy(self, split: Split, assigned_N: np.ndarray, counter: Counter, parts: list["_Part"]) -> tuple[int, int]:
        """Hand each document to its cluster.

        Returns:
            the words and bytes of all.
        """
        words = size = 0
        begins, ends = split.document_offsets[:-1].tolist(), split.document_offsets[1:].tolist()
        for begin, end, number in zip(begins, ends, assigned_N.tolist(), strict=True):
            parts[number].begin(split.tokens[begin : begin + 1])
            for ids, more_words, more_bytes in counter(_pieces(split, begin + 1, end)):
                parts[number].add(ids, more_words, more_bytes)
                words, size = words + more_words, size + more_bytes
                self._done += more_bytes
            self._report("dividing", self._done, self._total)
        return words, size


def _pieces(split: Split, begin: int, end: int) -> Iterator[np.ndarray]:
    for start in range(begin, end, PIECE):
        yield split.tokens[start : min(start + PIECE, end)]


class _Part:
    """One cluster's part of a split, written batch by batch."""

    def __init__(self, writer: SplitWriter):
        self.writer = writer
        self._clear()

    def _clear(self) -> None:
        self._ids: list[np.ndarray] = []
        self._starts: list[int] = []
        self._documents: list[int] = []
        self._counts: list[tuple[int, int]] = []
        self._held = 0

    def begin(self, end_token: np.ndarray) -> None:
        """A document begins with its end token."""
        self._starts.append(self._held)
        self._take(end_token)

    def add(self, ids: np.ndarray, words: int, size: int) -> None:
        """Tokens of the document that began last, and the words and bytes of their text."""
        self._take(ids)
        self._documents.append(len(self._starts))
        self._counts.append((words, size))
        if self._held >= BATCH:
            self.write()

    def _take(self, ids: np.ndarray) -> None:
        self._ids.append(ids)
        self._held += len(ids)

    def write(self) -> None:
        """Hand on what is held."""
        if not self._held:
            return
        batch = Encoded(
            split=self.writer.name,
            ids=np.concatenate(self._ids),
            starts=np.array(self._starts, np.int64),
            documents=np.array(self._documents, np.int64),
            counts=np.array(self._counts, np.int64).reshape(-1, 2),
        )
        self.writer.add(batch)
        self._clear()
