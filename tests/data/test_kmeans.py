import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myriad.data.kmeans import assign_balanced, balanced_kmeans, kmeans, squared_distances


def blobs(sizes, seed=0, spread=0.05):
    """Points around the corners of a simplex, and the corner of each."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return (np.eye(len(sizes))[labels] + spread * random.standard_normal((len(labels), len(sizes)))).astype(
        np.float32
    ), labels


def test_distances_are_those_of_geometry():
    points, _ = blobs([5, 6, 7])
    expected = ((points[:, None] - points[None, :4]) ** 2).sum(-1)
    np.testing.assert_allclose(squared_distances(points, points[:4]), expected, atol=1e-5)


def test_kmeans_finds_separate_clusters_whatever_the_seed():
    points, labels = blobs([50, 30, 5, 15])
    for seed in range(5):
        centers = kmeans(points, 4, seed)
        nearest = squared_distances(points, centers).argmin(1)
        assert {tuple(sorted(np.flatnonzero(nearest == c))) for c in range(4)} == {
            tuple(np.flatnonzero(labels == c)) for c in range(4)
        }
        for cluster in range(4):
            np.testing.assert_allclose(centers[cluster], points[nearest == cluster].mean(0), atol=1e-6)


def test_fewer_different_points_than_clusters_are_no_fault():
    assert kmeans(np.ones((6, 2), np.float32), 3, 0).tolist() == [[1, 1]] * 3


def test_a_bound_moves_those_who_lose_least():
    distances = np.array([[0, 9], [0, 1], [0, 5], [2, 0]], np.float32)
    assert assign_balanced(distances, np.ones(4, int), slack=1).tolist() == [0, 1, 0, 1]
    assert assign_balanced(distances, np.ones(4, int), slack=1.5).tolist() == [0, 0, 0, 1]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(2, 6), st.integers(0, 9))
@settings(max_examples=60)
def test_no_cluster_exceeds_its_bound_by_a_document(sizes, clusters, seed):
    sizes = np.array(sizes)
    distances = np.random.default_rng(seed).random((len(sizes), clusters), np.float32)
    found = assign_balanced(distances, sizes, 1.1)
    bound = math.ceil(sizes.sum() / clusters * 1.1)
    held = np.bincount(found, sizes, clusters)
    assert held.sum() == sizes.sum()
    assert held.max() < bound + sizes.max()


@pytest.mark.parametrize("slack", [1.0, 1.05])
def test_many_documents_keep_within_the_bound(slack):
    points, _ = blobs([700, 200, 100], spread=0.3)
    sizes = np.random.default_rng(0).integers(1, 10, len(points))
    centers = balanced_kmeans(points, sizes, 3, slack, seed=0)
    held = np.bincount(assign_balanced(squared_distances(points, centers), sizes, slack), sizes, 3)
    assert held.max() <= math.ceil(sizes.sum() / 3 * slack) + (9 if slack == 1 else 0)


def test_the_balanced_centers_draw_more_even_shares_than_those_of_kmeans():
    points, _ = blobs([700, 200, 100], spread=0.3)
    sizes = np.ones(len(points), int)

    def largest(centers):
        return np.bincount(squared_distances(points, centers).argmin(1), minlength=3).max()

    assert largest(balanced_kmeans(points, sizes, 3, 1.05, seed=0)) < largest(kmeans(points, 3, 0))
