"""The sums that lookups are made of, against loops."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from myriad.kernels.bags import bag_dot, bag_sum, distinct_row_sums, row_sums

quick = settings(deadline=None, max_examples=50)


@st.composite
def bags(draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A table, ids with duplicates (all the same when the table has one row), weights and tokens."""
    count, size, rows, width = (draw(st.integers(low, high)) for low, high in ((0, 6), (0, 5), (1, 7), (1, 5)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    table, weights, x = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((rows, width), (count, size), (count, width))
    )
    return table, torch.randint(rows, (count, size), generator=generator), weights, x


def entries(ids: Tensor):
    return ((m, a, int(n)) for m, bag in enumerate(ids) for a, n in enumerate(bag))


@quick
@given(bags())
def test_bag_sum_weighs_rows(case):
    table, ids, weights, x = case
    expected = torch.zeros_like(x)
    for m, a, n in entries(ids):
        expected[m] += weights[m, a] * table[n]
    assert_close(bag_sum(table, ids, weights), expected)


@quick
@given(bags())
def test_bag_dot_multiplies_rows_with_the_bags_vector(case):
    table, ids, weights, x = case
    expected = torch.zeros_like(weights)
    for m, a, n in entries(ids):
        expected[m, a] = table[n] @ x[m]
    assert_close(bag_dot(table, ids, x), expected)


@quick
@given(bags())
def test_row_sums_collect_the_bags_of_a_row(case):
    table, ids, weights, x = case
    expected = torch.zeros_like(table)
    for m, a, n in entries(ids):
        expected[n] += weights[m, a] * x[m]
    assert_close(row_sums(len(table), ids, weights, x), expected)
    used, rows = distinct_row_sums(len(table), ids, weights, x)
    assert torch.equal(used, ids.unique())  # each once, increasing
    assert_close(rows, expected[used])


def test_the_tables_dtype_decides():
    table, x = torch.randn(4, 3), torch.randn(2, 3, dtype=torch.bfloat16)
    ids, weights = torch.tensor([[0, 3], [3, 3]]), torch.randn(2, 2, dtype=torch.bfloat16)
    assert_close(bag_sum(table, ids, weights), bag_sum(table, ids, weights.float()))
    assert_close(bag_dot(table, ids, x), bag_dot(table, ids, x.float()))
    assert bag_sum(table, ids, weights).dtype == bag_dot(table, ids, x).dtype == torch.float32


def test_ids_may_be_a_slice():
    table, x, ids, weights = torch.randn(4, 3), torch.randn(5, 3), torch.randint(4, (5, 2)), torch.randn(5, 2)
    sliced, copied = (ids[:, :1], weights[:, :1]), (ids[:, :1].clone(), weights[:, :1].clone())
    assert torch.equal(bag_sum(table, *sliced), bag_sum(table, *copied))
    assert torch.equal(bag_dot(table, sliced[0], x), bag_dot(table, copied[0], x))
    assert torch.equal(row_sums(4, *sliced, x), row_sums(4, *copied, x))
