import itertools
import math

import numpy as np
import pytest
from made import make, write

from myriad.data import features as module
from myriad.data.features import Counts, Features, count_documents, count_excerpts, excerpts_of

V, END = 300, 256


@pytest.fixture
def split(tmp_path):
    write(tmp_path / "in", {f"{n:02}": "abc" * n or "-" for n in range(20)})
    return make(tmp_path / "out", source=tmp_path / "in", tokenizer="bytes", validation=0.1).split("train")


def dense(counts):
    """The counts as (texts, V)."""
    found = np.zeros((counts.texts, V))
    found[counts.rows, counts.tokens] = counts.counts
    return found


def texts_of(split):
    return [split.tokens[begin + 1 : end] for begin, end in itertools.pairwise(split.document_offsets)]


def random_counts(texts=40, seed=0):
    random = np.random.default_rng(seed)
    found = random.poisson(0.2, (texts, V)).astype(np.float32)
    found[:, END] = 1
    rows, tokens = np.nonzero(found)
    return Counts(rows, tokens, found[rows, tokens], texts), found


def test_documents_are_counted_without_their_end_tokens(split, monkeypatch):
    expected = np.stack([np.bincount(text, minlength=V) for text in texts_of(split)])
    for piece in (2**20, 7):  # of 7 tokens: long documents in pieces, and several batches
        monkeypatch.setattr(module, "PIECE", piece)
        batches = list(count_documents(split, V))
        assert len(batches) == 1 or piece == 7
        np.testing.assert_array_equal(np.concatenate([dense(batch) for batch in batches]), expected)


def test_excerpts_cover_every_document_and_cross_no_border(split, monkeypatch):
    monkeypatch.setattr(module, "EXCERPT", 10)
    found = excerpts_of([split, split], seed=0)
    lengths = [len(text) for text in texts_of(split)]
    assert len(found.begins) == 2 * sum(math.ceil(length / 10) for length in lengths)
    assert (found.ends - found.begins).sum() == 2 * sum(lengths)
    assert (found.ends - found.begins).max() == 10
    covered = [place for begin, end in zip(found.begins, found.ends, strict=True) for place in range(begin, end)]
    ends = set(split.document_offsets.tolist())
    assert not ends & set(covered)
    total = count_excerpts([split, split], found, V)
    np.testing.assert_array_equal(
        dense(total).sum(0), 2 * np.sum([np.bincount(t, minlength=V) for t in texts_of(split)], 0)
    )


def test_of_too_much_text_a_sample_is_drawn(split, monkeypatch):
    monkeypatch.setattr(module, "EXCERPT", 10)
    one, two = excerpts_of([split], 0, most_tokens=100), excerpts_of([split], 1, most_tokens=100)
    assert 80 < (one.ends - one.begins).sum() <= 100
    assert one.begins.tolist() != two.begins.tolist()
    assert one.begins.tolist() == excerpts_of([split], 0, most_tokens=100).begins.tolist()


def test_features_are_the_projection_that_the_page_describes():
    counts, found = random_counts()
    features = Features.fit(counts, V, END, features=12, seed=3)
    present = (found > 0).sum(0)
    idf = np.log(41 / (1 + present)) + 1
    idf[END] = 0
    np.testing.assert_allclose(features.idf_V, idf, rtol=1e-6)
    weighted = found * idf
    weighted /= np.linalg.norm(weighted, axis=1, keepdims=True)
    x = weighted @ features.components_RV.T
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(features.of(counts), x, atol=1e-5)


def test_components_are_the_leading_singular_vectors():
    counts, found = random_counts()
    features = Features.fit(counts, V, END, features=5, seed=0)
    weighted = found * features.idf_V
    weighted /= np.linalg.norm(weighted, axis=1, keepdims=True)
    _, values, exact = np.linalg.svd(weighted, full_matrices=False)
    np.testing.assert_allclose(features.components_RV @ features.components_RV.T, np.eye(5), atol=1e-5)
    kept = np.linalg.norm(weighted @ features.components_RV.T) ** 2
    assert kept > 0.99 * (values[:5] ** 2).sum()
    assert abs(features.components_RV[0] @ exact[0]) > 0.9999


def test_few_texts_have_few_features_and_an_empty_one_none():
    counts, _ = random_counts(texts=3)
    assert Features.fit(counts, V, END, features=50, seed=0).components_RV.shape == (3, V)
    features = Features.fit(random_counts()[0], V, END, features=4, seed=0)
    empty = Counts(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), 1)
    assert features.of(empty).tolist() == [[0, 0, 0, 0]]
