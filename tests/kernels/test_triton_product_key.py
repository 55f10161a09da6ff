"""The Triton form of product-key retrieval against brute force and the reference."""

import pytest
import torch
import triton_form
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from triton_form import assert_near, by_both, digits

from myriad.kernels import product_key, use

form = triton_form.form
few = settings(deadline=None, max_examples=15)


def problem(
    tokens=5, heads=2, side=6, width=3, shared=True, dtype=torch.float32, keys_dtype=None, seed=0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = (2, side, width) if shared else (heads, 2, side, width)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return normal(tokens, heads, 2, width, dtype=dtype), normal(*keys, dtype=keys_dtype or dtype)


def all_sums(queries_THPQ: Tensor, keys: Tensor) -> Tensor:
    """The scores of all experts in float64, shape (T, H, N)."""
    keys_HPSQ = keys if keys.ndim == 4 else keys.expand(queries_THPQ.shape[1], *keys.shape)
    halves_THPS = torch.einsum("thpq,hpsq->thps", queries_THPQ.double(), keys_HPSQ.double())
    return (halves_THPS[:, :, 0, :, None] + halves_THPS[:, :, 1, None, :]).flatten(2)


def assert_are_the_best(queries: Tensor, keys: Tensor, k: int, **tolerance: float) -> None:
    """The scores are the k largest sums in order, and the ids are distinct experts with those scores."""
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-5}
    with use("triton"):
        scores, ids = product_key(queries, keys, k)
    assert (scores.dtype, ids.dtype) == (torch.promote_types(queries.dtype, keys.dtype), torch.int64)
    assert scores.shape == ids.shape == (*queries.shape[:2], k)
    # Queries that were rounded to bfloat16 are multiplied with keys that are rounded, too.
    sums = all_sums(queries, keys.bfloat16() if queries.dtype == torch.bfloat16 else keys)
    assert_close(scores.double(), sums.topk(k, dim=-1).values, **tolerance)
    assert_close(scores.double(), sums.gather(-1, ids), **tolerance)
    assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()


@st.composite
def shapes(draw) -> tuple[tuple[Tensor, Tensor], int]:
    """k often exceeds side, and reaches N."""
    sizes = {"tokens": (0, 7), "heads": (1, 3), "side": (1, 9), "width": (1, 40), "seed": (0, 2**32)}
    drawn = {name: draw(st.integers(*bounds)) for name, bounds in sizes.items()}
    side = drawn["side"]
    k = draw(st.sampled_from([1, side, side * side]) | st.integers(1, side * side))
    return problem(**drawn, shared=draw(st.booleans())), k


@few
@given(shapes())
def test_equals_brute_force(case):
    (queries, keys), k = case
    assert_are_the_best(queries, keys, k)


@few
@given(shapes())
def test_is_exact_among_ties(case):
    (queries, keys), k = case
    assert_are_the_best(queries.sign(), keys.round().clamp(-1, 1), k, rtol=0, atol=0)


def gradients(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, ...]:
    queries, keys = queries.requires_grad_(), keys.requires_grad_()
    scores, ids = product_key(queries, keys, k)
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2)).to(scores)
    return scores.detach(), ids, *torch.autograd.grad(scores, (queries, keys), upstream)


@few
@given(shapes())
def test_gradients_equal_the_references(case):
    (queries, keys), k = case
    mine, expected = by_both(lambda: gradients(queries, keys, k))
    if torch.equal(mine[1], expected[1]):  # but for numbers that differ in their last digit
        for one, other in zip(mine[2:], expected[2:], strict=True):
            assert_near(one, other, digits(torch.float32))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 4, 6, 7, 36])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_scores_ids_and_gradients_equal_the_references(tokens, k, shared):
    mine, expected = by_both(lambda: gradients(*problem(tokens, shared=shared), k))
    assert torch.equal(mine[1], expected[1])
    for one, other in zip((mine[0], *mine[2:]), (expected[0], *expected[2:]), strict=True):
        assert_near(one, other, digits(torch.float32))


def test_one_token_of_one_head_and_one_expert():
    assert_are_the_best(*problem(tokens=1, heads=1, side=1, width=1), 1)


def test_more_winners_or_sub_keys_than_a_row_holds_go_to_the_reference(monkeypatch):
    queries, keys = problem(side=9)
    for most, value in (("MOST_WINNERS", 5), ("MOST_SUB_KEYS", 8)):
        with monkeypatch.context() as patch:
            patch.setattr(triton_form.module("product_key"), most, value)
            mine, expected = by_both(lambda: product_key(queries, keys, 6))
            assert all(map(torch.equal, mine, expected))
    assert_are_the_best(queries, keys, 65)


@pytest.mark.parametrize("tokens_per_block", [1, 3, 7])
def test_blocks_join_without_a_seam(tokens_per_block, monkeypatch):
    monkeypatch.setattr(triton_form.module("product_key"), "SCORES_PER_BLOCK", tokens_per_block * 2 * 2 * 6)
    assert_are_the_best(*problem(tokens=7, shared=False), 4)


@pytest.mark.parametrize(("side", "k"), [(300, 16), (64, 3), (130, 64), (1024, 1)])
def test_finds_the_best_of_many_groups_of_columns(side, k):
    assert_are_the_best(*problem(tokens=3, heads=1, side=side, width=16), k)


MIXED = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("dtypes", MIXED)
def test_narrow_dtypes_are_ranked_in_float32_and_gradients_keep_their_own(dtypes):
    queries, keys = problem(tokens=8, width=20, dtype=dtypes[0], keys_dtype=dtypes[1])
    narrow = torch.promote_types(*dtypes) == torch.bfloat16
    tolerance = {"rtol": 2**-8, "atol": 1e-5} if narrow else {}
    assert_are_the_best(queries, keys, 4, **tolerance)
    with use("triton"):
        _, ids, grad_queries, grad_keys = gradients(queries, keys, 4)
    assert (grad_queries.dtype, grad_keys.dtype) == dtypes
    exact = [tensor.detach().double().requires_grad_() for tensor in (queries, keys)]
    found = all_sums(*exact).gather(-1, ids)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    if narrow:
        upstream = upstream.bfloat16()
    for mine, expected in zip((grad_queries, grad_keys), torch.autograd.grad(found, exact, upstream), strict=True):
        assert_near(mine, expected.to(mine.dtype), max(digits(mine.dtype), 1e-5))


def top(scores_RS: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The best of rows of scores and their columns, ranked as scores of queries of a dtype are."""
    module = triton_form.module("product_key")
    rows, side = scores_RS.shape
    groups, size = module._grouping(side, count)
    padded = torch.full((rows, groups * size), -float("inf"))
    padded[:, :side] = scores_RS
    maxima_GR = padded.view(rows, groups, size).amax(2).T
    halves = (tensor.expand(1, 2, *tensor.shape).contiguous() for tensor in (scores_RS, maxima_GR))
    best, columns = (tensor[0, 1].T for tensor in module._top(*halves, count, dtype))
    return best, columns


def test_numbers_that_are_not_finite_are_ranked_as_topk_ranks_them():
    scores = torch.tensor([[1.0, float("inf"), float("nan"), -float("inf"), -0.5, 0.0]])
    for dtype in (torch.float32, torch.bfloat16):
        best, columns = top(scores, 6, dtype)
        assert columns.tolist() == [[2, 1, 0, 5, 4, 3]]
        assert_close(best, scores.topk(6).values, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_many_groups_is_ranked_as_topk_ranks_it_with_numbers_that_are_not_finite(dtype):
    scores = torch.randn(5, 700, generator=torch.Generator().manual_seed(0))
    scores[:, ::97] = float("nan")
    scores[1, 3::50] = float("inf")
    scores[2] = -float("inf")
    scores[3] = 0.5
    best, columns = top(scores, 16, dtype)
    near = 0 if dtype == torch.float32 else 2**-15  # whose last digits are not ranked
    assert_close(best, scores.topk(16).values, equal_nan=True, rtol=near, atol=0)
    assert_close(best, scores.gather(1, columns.long()), equal_nan=True, rtol=0, atol=0)
    assert (columns.sort(dim=1).values.diff(dim=1) > 0).all()


def test_ids_stay_inside_the_table_when_no_score_is_a_number():
    queries, keys = problem(tokens=3)
    with use("triton"):
        scores, ids = product_key(torch.full_like(queries, float("nan")), keys, 20)
    assert scores.isnan().all()
    assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()
    assert 0 <= ids.min() <= ids.max() < 36


def test_autocast_does_not_round_the_scores():
    queries, keys = problem(tokens=9, side=16)
    with use("triton"):
        with torch.autocast("cpu", torch.bfloat16):
            inside = product_key(queries, keys, 4)
        assert all(map(torch.equal, inside, product_key(queries, keys, 4)))


def test_layout_of_the_inputs_does_not_matter():
    queries, keys = problem(shared=False)
    strided = queries.transpose(0, 3).contiguous().transpose(0, 3), keys.mT.contiguous().mT
    assert not any(tensor.is_contiguous() for tensor in strided)
    with use("triton"):
        for found, expected in zip(gradients(*strided, 4), gradients(queries, keys, 4), strict=True):
            assert_close(found, expected)


def test_is_bit_equal_from_run_to_run():
    queries, keys = problem(tokens=30, side=20)
    with use("triton"):
        assert all(map(torch.equal, gradients(queries, keys, 8), gradients(queries, keys, 8)))
