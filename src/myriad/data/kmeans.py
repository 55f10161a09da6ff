"""k-means, and its balanced form, in which no cluster grows beyond a size.

Legend: `N` points, `R` their width, `C` clusters.
"""

import math
import warnings

import numpy as np

RESTARTS = 4
BALANCED_ROUNDS = 10
CHUNK = 2**16
"""Points whose choices are held as Python's numbers at once."""


def squared_distances(points_NR: np.ndarray, centers_CR: np.ndarray) -> np.ndarray:
    """(N, C) float32."""
    squares_N1, squares_C = (points_NR**2).sum(1, keepdims=True), (centers_CR**2).sum(1)
    return np.maximum(squares_N1 - 2 * points_NR @ centers_CR.T + squares_C, 0)


def kmeans(points_NR: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Centers (C, R) of scikit-learn's k-means, the best of some starts; the same bits each time."""
    from sklearn.cluster import KMeans  # a second of imports, for fitting alone
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # Several threads add up in the order in which they finish. Fewer points than clusters are no fault.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(clusters, n_init=RESTARTS, random_state=seed).fit(points_NR)  # pyright: ignore[reportArgumentType]
        return found.cluster_centers_


def means(points_NR: np.ndarray, clusters_N: np.ndarray, before_CR: np.ndarray) -> np.ndarray:
    """The mean of each cluster's points; one without any stays where it was."""
    found = before_CR.copy()
    for cluster in np.unique(clusters_N):
        found[cluster] = points_NR[clusters_N == cluster].mean(0, dtype=np.float64)
    return found


def balanced_kmeans(points_NR: np.ndarray, sizes_N: np.ndarray, clusters: int, slack: float, seed: int) -> np.ndarray:
    """Centers (C, R) of clusters of bounded size (after arXiv 2303.14177).

    From those of k-means on, points are assigned under the bound, and centers moved to the means of their points, in
    turn, until nothing changes.
    """
    centers_CR, before_N = kmeans(points_NR, clusters, seed), None
    for _ in range(BALANCED_ROUNDS):
        found_N = assign_balanced(squared_distances(points_NR, centers_CR), sizes_N, slack)
        if before_N is not None and np.array_equal(found_N, before_N):
            break
        centers_CR, before_N = means(points_NR, found_N, centers_CR), found_N
    return centers_CR


def assign_balanced(distances_NC: np.ndarray, sizes_N: np.ndarray, slack: float) -> np.ndarray:
    """The cluster of each point, (N,) int64, so that none holds more than ceil(total size / C * slack).

    Points choose in the order of what they would lose by going to their second nearest cluster instead of their
    nearest, those that would lose most first; each takes the nearest that has room for it. A point for which there
    is none goes where most room is left, so that a bound is exceeded by less than that point.
    """
    clusters = distances_NC.shape[1]
    room = [math.ceil(int(sizes_N.sum()) / clusters * slack)] * clusters
    found_N = np.empty(len(distances_NC), np.int64)
    two_N2 = np.partition(distances_NC, 1, axis=1)[:, :2]
    turns = np.argsort(two_N2[:, 0] - two_N2[:, 1], kind="stable")
    for start in range(0, len(turns), CHUNK):
        points = turns[start : start + CHUNK]
        wishes = np.argsort(distances_NC[points], axis=1, kind="stable").tolist()
        for point, size, wished in zip(points.tolist(), sizes_N[points].tolist(), wishes, strict=True):
            cluster = next((wish for wish in wished if room[wish] >= size), None)
            if cluster is None:
                cluster = max(range(clusters), key=room.__getitem__)
            room[cluster] -= size
            found_N[point] = cluster
    return found_N
