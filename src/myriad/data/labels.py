"""Labels: which part of a corpus a document belongs to, where its file or a field of its row says so.

Every cluster is prepared from the source anew, of which it takes its own documents: each has splits of its own, held
out as the recipe says, and is read as often as there are clusters.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from myriad.data import DataError
from myriad.data.clusters import ClusterModel, ClusterOptions, Clusters, write_clusters
from myriad.data.corpus import BPE_TRAINING_BYTES, Corpus
from myriad.data.features import Features, count_excerpts, excerpts_of
from myriad.data.kmeans import means
from myriad.data.place import new_folder
from myriad.data.prepare import SHARD_TOKENS, Progress, fill
from myriad.data.recipe import Recipe
from myriad.data.sources import Document, Source, open_source
from myriad.data.sources.base import split_from_name
from myriad.data.sources.rows import RowSource
from myriad.data.store import Store
from myriad.data.tokenizer import resolve_tokenizer

MOST = 1024
"""Clusters."""


class Labels(Protocol):
    """Says where the documents of a source belong."""

    kind: Literal["field", "file"]

    def labelled(self, spec: str, source: Source) -> Iterator[tuple[str, Document]]:
        """The documents of a source, which `spec` named, each with its label.

        Raises:
            DataError: it has none.
        """
        ...


class FileLabels:
    """The first folder of a document's path, or the file itself where it is in none; folders of splits do not count."""

    kind: Literal["field", "file"] = "file"

    def labelled(self, spec: str, source: Source) -> Iterator[tuple[str, Document]]:
        if not os.path.isdir(spec) and spec != "python":
            raise DataError(f"{spec}: --by file divides a folder, and this is none")
        rows = isinstance(source, RowSource)
        for document in source.documents():
            yield _place(document.name.rpartition(":")[0] if rows else document.name), document


def _place(path: str) -> str:
    first, *rest = path.split("/")
    if rest and split_from_name(first):
        first = rest[0]
    return first


class FieldLabels:
    """The text in a field of a document's row."""

    kind: Literal["field", "file"] = "field"

    def __init__(self, field: str):
        self._field = field

    def labelled(self, spec: str, source: Source) -> Iterator[tuple[str, Document]]:
        if not isinstance(source, RowSource):
            raise DataError(f"{spec}: --by field needs rows (JSONL, parquet, Hugging Face datasets); use --by file")
        labels = open_source(spec, self._field)
        for label, document in zip(labels.documents(), source.documents(), strict=True):
            yield label.text, document


class _Selected(Source):
    """The documents of a source that have one label."""

    def __init__(self, spec: str, field: str, labels: Labels, label: str):
        self._whole = open_source(spec, field)
        super().__init__(f"{self._whole.name}: {label}")
        self._spec, self._labels, self._label = spec, labels, label

    def documents(self) -> Iterator[Document]:
        for label, document in self._labels.labelled(self._spec, self._whole):
            if label == self._label:
                yield document

    def begin_at(self, start: re.Pattern[str], documents: Iterable[Document]) -> Iterator[Document]:
        return self._whole.begin_at(start, documents)

    def fingerprint(self) -> str:
        return f"{self._whole.fingerprint()}\n{self._label}"


def cluster_source(
    recipe: Recipe,
    out: str | Path,
    labels: Labels,
    options: ClusterOptions | None = None,
    progress: Progress | None = None,
) -> Clusters:
    """Divide a source by its files or a field.

    Args:
        recipe: the source, the tokenizer (a BPE is trained on equally much of each cluster), and how each cluster's
            splits are held out.
        out: the cluster folder; it must not exist, or be empty.
        labels: where a document belongs.
        options: how the model is fitted that assigns texts met later; the clusters are as many as there are labels.
        progress: as for `prepare`.

    Raises:
        BusyError: another process is at work there.
        DataError: `out` is taken or cannot be written, the source or tokenizer is at fault, or a cluster has no
            training or validation text.
    """
    out, report = Path(os.path.abspath(out)), progress or (lambda stage, done, total: None)
    with new_folder(out) as folder:
        names = _names(recipe, labels)
        corpora = [Corpus(recipe, _selecting(labels, name)) for name in names]
        fingerprints = [corpus.fingerprint() for corpus in corpora]
        share = BPE_TRAINING_BYTES // len(corpora)
        texts = (text for corpus in corpora for text in corpus.training_texts(share))
        tokenizer = resolve_tokenizer(recipe.tokenizer, texts)
        parts = [folder / str(number) for number in range(len(names))]
        for part, corpus, fingerprint in zip(parts, corpora, fingerprints, strict=True):
            part.mkdir()
            fill(part, corpus, tokenizer, fingerprint, SHARD_TOKENS, report)
        stores = [Store.open(part) for part in parts]
        options = (options or ClusterOptions()).model_copy(update={"clusters": len(names)})
        model, hashes = _fit(stores, options), [store.index.source_sha256 for store in stores]
        write_clusters(folder, model, stores, by=labels.kind, names=names, options=options, source_sha256=hashes)
    return Clusters.open(out)


def _selecting(labels: Labels, name: str) -> Callable[[str, str], Source]:
    return lambda spec, field: _Selected(spec, field, labels, name)


def _names(recipe: Recipe, labels: Labels) -> list[str]:
    """All labels of a source, in order."""
    found: set[str] = set()
    for label, _ in labels.labelled(recipe.source, open_source(recipe.source, recipe.field)):
        found.add(label)
        if len(found) > MOST:
            raise DataError(f"{recipe.source}: more than {MOST} clusters; divide it by something that has fewer values")
    if len(found) < 2:
        raise DataError(f"{recipe.source}: all documents belong to one cluster ({', '.join(found) or 'none'})")
    return sorted(found)


def _fit(stores: Sequence[Store], options: ClusterOptions) -> ClusterModel:
    """Features of all clusters' text; a center is the mean of its cluster's excerpts."""
    splits, index = [store.split("train") for store in stores], stores[0].index
    excerpts = excerpts_of(splits, options.seed)
    counts = count_excerpts(splits, excerpts, index.vocab_size)
    features = Features.fit(counts, index.vocab_size, index.end_id, options.features, options.seed)
    x_NR = features.of(counts)
    centers_CR = means(x_NR, excerpts.splits, np.zeros((len(stores), x_NR.shape[1]), np.float32))
    return ClusterModel(features, centers_CR)
