"""Product-key retrieval against brute force over all N = side**2 sums."""

import importlib
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from myriad.kernels import product_key

# `myriad.kernels.product_key` is the function; the module of that name is found by import alone.
module = importlib.import_module("myriad.kernels.product_key")
quick = settings(deadline=None, max_examples=60)


def all_sums(queries_THPQ: Tensor, keys: Tensor) -> Tensor:
    """The scores of all experts, shape (T, H, N): expert i * side + j has sub-keys i and j."""
    keys_HPSQ = keys if keys.ndim == 4 else keys.expand(queries_THPQ.shape[1], *keys.shape)
    halves_THPS = torch.einsum("thpq,hpsq->thps", queries_THPQ, keys_HPSQ)
    return (halves_THPS[:, :, 0, :, None] + halves_THPS[:, :, 1, None, :]).flatten(2)


@st.composite
def shapes(draw) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Shapes of queries and keys, k and a seed; k often exceeds side, and reaches N."""
    tokens, heads, side, width = (draw(st.integers(low, high)) for low, high in ((0, 7), (1, 3), (1, 9), (1, 5)))
    k = draw(st.sampled_from([1, side, side * side]) | st.integers(1, side * side))
    keys = (2, side, width) if draw(st.booleans()) else (heads, 2, side, width)
    return (tokens, heads, 2, width), keys, k, draw(st.integers(0, 2**32))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(tokens=5, heads=2, side=6, width=3, shared=True, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    keys = (2, side, width) if shared else (heads, 2, side, width)
    return normal(tokens, heads, 2, width, seed=0, dtype=dtype), normal(*keys, seed=1, dtype=dtype)


def assert_are_the_best(scores: Tensor, ids: Tensor, sums: Tensor, **tolerance: float) -> None:
    """The scores are the k largest sums in order, and the ids are distinct experts with those scores."""
    k = scores.shape[-1]
    assert ids.dtype == torch.int64
    assert_close(scores, sums.topk(k, dim=-1).values, **tolerance)
    assert_close(scores, sums.gather(-1, ids), **tolerance)
    assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()


@quick
@given(shapes())
def test_equals_brute_force(case):
    queries_shape, keys_shape, k, seed = case
    queries, keys = normal(*queries_shape, seed=seed), normal(*keys_shape, seed=seed + 1)
    scores, ids = product_key(queries, keys, k)
    assert scores.shape == ids.shape == (*queries_shape[:2], k)
    sums = all_sums(queries, keys)
    assert_are_the_best(scores, ids, sums)
    assert torch.equal(ids, sums.topk(k, dim=-1).indices)  # normal float64 numbers have no ties


@quick
@given(shapes())
def test_equals_brute_force_in_float32(case):
    queries_shape, keys_shape, k, seed = case
    queries = normal(*queries_shape, seed=seed, dtype=torch.float32)
    keys = normal(*keys_shape, seed=seed + 1, dtype=torch.float32)
    scores, ids = product_key(queries, keys, k)
    assert scores.dtype == torch.float32
    assert_are_the_best(scores, ids, all_sums(queries, keys), rtol=1e-5, atol=1e-5)


@quick
@given(shapes())
def test_is_exact_among_ties(case):
    queries_shape, keys_shape, k, seed = case
    queries = normal(*queries_shape, seed=seed).sign()
    keys = normal(*keys_shape, seed=seed + 1).round().clamp(-1, 1)
    scores, ids = product_key(queries, keys, k)
    assert_are_the_best(scores, ids, all_sums(queries, keys), rtol=0, atol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_every_expert_is_found_by_the_query_that_points_at_it(shared):
    side, width = 7, 4
    half_keys = torch.nn.functional.normalize(normal(1, 2, side, width, seed=0), dim=-1)
    first, second = half_keys[0, 0], half_keys[0, 1]
    pairs = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    queries = torch.stack((first[pairs[:, 0]], second[pairs[:, 1]]), dim=1).unsqueeze(1)
    _, ids = product_key(queries, half_keys[0] if shared else half_keys, 1)
    assert torch.equal(ids.flatten(), torch.arange(side * side))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens_per_block", [1, 3, 7, 8])
def test_blocks_join_without_a_seam(shared, tokens_per_block, monkeypatch):
    queries, keys = problem(tokens=7, shared=shared)
    heads = 1 if shared else 2  # heads that share keys are folded into the tokens
    monkeypatch.setattr(module, "SCORES_PER_BLOCK", tokens_per_block * heads * 2 * 6)
    scores, ids = product_key(queries, keys, 4)
    assert_are_the_best(scores, ids, all_sums(queries, keys))


@quick
@given(shapes())
def test_gradients_equal_those_of_brute_force(case):
    queries_shape, keys_shape, k, seed = case
    queries = normal(*queries_shape, seed=seed).requires_grad_()
    keys = normal(*keys_shape, seed=seed + 1).requires_grad_()
    scores, ids = product_key(queries, keys, k)
    upstream = normal(*scores.shape, seed=seed + 2)
    found = torch.autograd.grad(scores, (queries, keys), upstream)
    expected = torch.autograd.grad(all_sums(queries, keys).gather(-1, ids), (queries, keys), upstream)
    assert_close(found, expected)


@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck(shared):
    queries, keys = (tensor.requires_grad_() for tensor in problem(shared=shared))
    assert torch.autograd.gradcheck(lambda q, c: product_key(q, c, 9)[0], (queries, keys))


def test_only_the_winners_get_a_gradient():
    queries, keys = problem(tokens=1, heads=1, side=8)
    keys.requires_grad_()
    scores, ids = product_key(queries, keys, 1)
    scores.sum().backward()
    assert not ids.requires_grad
    expected = torch.zeros_like(keys)
    expected[0, int(ids) // 8], expected[1, int(ids) % 8] = queries[0, 0]
    assert torch.equal(keys.grad, expected)


def test_mixed_dtypes_are_promoted_and_gradients_keep_their_own():
    queries, keys = problem(dtype=torch.float32)
    queries = queries.bfloat16().requires_grad_()
    keys.requires_grad_()
    scores, ids = product_key(queries, keys, 4)
    assert scores.dtype == torch.float32
    assert_are_the_best(scores, ids, all_sums(queries.float(), keys))
    scores.sum().backward()
    assert (queries.grad.dtype, keys.grad.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_does_not_round_the_scores():
    queries, keys = problem(tokens=50, side=16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = product_key(queries, keys, 4)
    assert all(map(torch.equal, inside, product_key(queries, keys, 4)))


def test_layout_of_the_inputs_does_not_matter():
    queries, keys = problem(shared=False)
    strided = queries.transpose(0, 3).contiguous().transpose(0, 3), keys.mT.contiguous().mT
    assert not any(tensor.is_contiguous() for tensor in strided)
    for found, expected in zip(product_key(*strided, 4), product_key(queries, keys, 4), strict=True):
        assert_close(found, expected)


def test_is_bit_equal_from_run_to_run():
    queries, keys = problem(tokens=64, side=20, dtype=torch.float32)
    first = product_key(queries, keys, 8)
    assert all(map(torch.equal, first, product_key(queries, keys, 8)))


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("k", [1, 9])
def test_the_ops_pass_pytorchs_check(tokens, k):
    queries, keys = (tensor.requires_grad_() for tensor in problem(tokens, shared=False))
    torch.library.opcheck(torch.ops.myriad.product_key, (queries, keys, k))
    scores, ids = product_key(queries, keys, k)
    arguments = torch.randn_like(scores), ids, queries.detach(), keys.detach()
    torch.library.opcheck(torch.ops.myriad.product_key_backward, arguments)


@pytest.mark.parametrize(
    ("queries", "keys", "k", "message"),
    [
        ((3, 2, 4), (2, 5, 4), 1, "queries must have shape (T, H, 2, d_key), not (3, 2, 4)"),
        ((3, 1, 3, 4), (2, 5, 4), 1, "queries must have shape (T, H, 2, d_key), not (3, 1, 3, 4)"),
        ((3, 2, 2, 4), (5, 4), 1, "keys must have shape (2, side, 4) or (2, 2, side, 4), not (5, 4)"),
        ((3, 2, 2, 4), (3, 5, 4), 1, "keys must have shape (2, side, 4) or (2, 2, side, 4), not (3, 5, 4)"),
        ((3, 2, 2, 4), (2, 5, 3), 1, "keys must have shape (2, side, 4) or (2, 2, side, 4), not (2, 5, 3)"),
        ((3, 2, 2, 4), (1, 2, 5, 4), 1, "not (1, 2, 5, 4)"),
        ((3, 2, 2, 4), (2, 5, 4), 0, "k must lie between 1 and 25 (the number of experts), not 0"),
        ((3, 2, 2, 4), (2, 5, 4), 26, "k must lie between 1 and 25 (the number of experts), not 26"),
    ],
)
def test_wrong_shapes_and_k_are_refused(queries, keys, k, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        product_key(torch.zeros(queries), torch.zeros(keys), k)
