"""Cluster folders: a corpus in parts by domain, and the model that says which part a text belongs to.

    DIR/
      clusters.json            what is here and how it was made; sealed with its own hash
      clusters.safetensors     idf (V), components (R, V), centers (C, R), float32
      0 ... 7                  a store each

A text belongs to the center nearest to its features (`features`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from myriad.config import Config
from myriad.data.features import PIECE, Features
from myriad.data.kmeans import squared_distances
from myriad.data.sealed import read_sealed, write_sealed
from myriad.data.store import Sha256, Store, damaged, hash_file

INDEX_NAME, MODEL_NAME = "clusters.json", "clusters.safetensors"
FORMAT = 1
AGAIN = "cluster the store again"
TYPICAL = 6
"""Tokens named for each cluster."""


class ClusterOptions(Config):
    """How documents are clustered by their text."""

    clusters: int = Field(default=8, ge=2, le=1024)
    """Parts to divide the corpus into."""
    features: int = Field(default=100, ge=1, le=4096)
    """Directions that TF-IDF vectors are projected onto."""
    slack: float = Field(default=1.05, ge=1, le=1024)
    """How many times its equal share of the training tokens a cluster may hold."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of what is drawn at random: excerpts, projections, the first centers."""


class ClusterEntry(Config):
    """A cluster."""

    name: str
    """Its number, or the file or value that it is made of."""
    documents: dict[str, int]
    """By split."""
    tokens: dict[str, int]
    """By split, end tokens included."""
    typical: list[str]
    """The tokens that set its training text apart from that of all clusters most."""


class ClusterIndex(Config):
    """What a cluster folder holds: its clusters.json."""

    format: Literal[1] = FORMAT
    by: Literal["text", "field", "file"]
    """What decided where a document belongs."""
    source: str
    """The source of the text."""
    store: str | None
    """The store that was divided, if one was."""
    source_sha256: list[Sha256]
    """Of the text that was divided."""
    options: ClusterOptions
    vocab_size: int
    end_id: int
    tokenizer_sha256: Sha256
    model_sha256: Sha256
    clusters: Annotated[list[ClusterEntry], Field(min_length=2)]

    def write(self, folder: Path) -> None:
        """Write clusters.json, sealed with its own hash."""
        write_sealed(folder / INDEX_NAME, self)


@dataclass(frozen=True)
class ClusterModel:
    """What assigns texts: features, and float32 `centers_CR`."""

    features: Features
    centers_CR: np.ndarray

    def distances(self, features_NR: np.ndarray) -> np.ndarray:
        """Squared distances to the centers, (N, C)."""
        return squared_distances(features_NR, self.centers_CR)

    def save(self, folder: Path) -> str:
        """Write clusters.safetensors.

        Returns:
            its hash.
        """
        tensors = {
            "idf": self.features.idf_V,
            "components": np.ascontiguousarray(self.features.components_RV),
            "centers": np.ascontiguousarray(self.centers_CR),
        }
        save_file(tensors, folder / MODEL_NAME)
        return hash_file(folder / MODEL_NAME)


@dataclass(frozen=True)
class Clusters:
    """A cluster folder, its index and model read and their hashes checked."""

    path: Path
    index: ClusterIndex
    model: ClusterModel

    @classmethod
    def open(cls, path: str | Path) -> "Clusters":
        """Open a cluster folder; its stores are opened when they are asked for.

        Raises:
            DataError: no cluster folder, or a damaged one.
        """
        path = Path(path)
        index = _read_index(path / INDEX_NAME)
        if hash_file(path / MODEL_NAME) != index.model_sha256:
            raise damaged(path / MODEL_NAME, "its hash is not the one in the index", AGAIN)
        try:
            found = load_file(path / MODEL_NAME)
            features = Features(found["idf"], found["components"])
            model = ClusterModel(features, found["centers"])
        except (SafetensorError, KeyError) as error:
            raise damaged(path / MODEL_NAME, str(error), AGAIN) from None
        return cls(path, index, model)

    def store_path(self, cluster: int) -> Path:
        """Where a cluster's store is."""
        return self.path / str(cluster)

    def stores(self) -> Iterator[Store]:
        """The stores, in order.

        Raises:
            DataError: one is missing or damaged.
        """
        for cluster in range(len(self.index.clusters)):
            yield Store.open(self.store_path(cluster))


def _read_index(path: Path) -> ClusterIndex:
    absent = "no clusters here; make them with `myriad data cluster`"
    return read_sealed(path, ClusterIndex, FORMAT, absent=absent, again=AGAIN)


def typical_tokens(stores: Sequence[Store]) -> list[list[str]]:
    """For each store the tokens that add most to the divergence of its training text from that of all.

    That is p log(p / q), for a token's share p of the store's and q of all stores' tokens.
    """
    counts_CV = np.stack([_count_tokens(store) for store in stores])
    p_CV, q_V = counts_CV / counts_CV.sum(1, keepdims=True), counts_CV.sum(0) / counts_CV.sum()
    apart_CV = p_CV * np.log(np.maximum(p_CV, 1e-30) / np.maximum(q_V, 1e-30))
    ids_CK = np.argsort(-apart_CV, axis=1, kind="stable")[:, :TYPICAL].tolist()
    return [[stores[0].tokenizer.decode([id]) for id in ids] for ids in ids_CK]


def _count_tokens(store: Store) -> np.ndarray:
    tokens, total = store.split("train").tokens, np.zeros(store.index.vocab_size, np.int64)
    for start in range(0, len(tokens), PIECE):
        total += np.bincount(tokens[start : start + PIECE], minlength=len(total))
    total[store.index.end_id] = 0
    return total


def write_clusters(
    folder: Path,
    model: ClusterModel,
    stores: Sequence[Store],
    *,
    by: Literal["text", "field", "file"],
    names: Sequence[str],
    options: ClusterOptions,
    source_sha256: Sequence[str],
    divided: Path | None = None,
) -> None:
    """Write the model and the index of a folder that holds the stores already."""
    first = stores[0].index
    typical = typical_tokens(stores)
    entries = [
        ClusterEntry(
            name=name,
            documents={split: found.documents for split, found in store.index.splits.items()},
            tokens={split: found.tokens for split, found in store.index.splits.items()},
            typical=tokens,
        )
        for name, store, tokens in zip(names, stores, typical, strict=True)
    ]
    ClusterIndex(
        by=by,
        source=first.source,
        store=None if divided is None else str(divided.resolve()),
        source_sha256=list(source_sha256),
        options=options,
        vocab_size=first.vocab_size,
        end_id=first.end_id,
        tokenizer_sha256=first.tokenizer_sha256,
        model_sha256=model.save(folder),
        clusters=entries,
    ).write(folder)
