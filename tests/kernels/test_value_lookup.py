"""Looked-up values against einsums over gathered rows."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from myriad.kernels import value_lookup
from myriad.kernels.table_gradient import coalesced

quick = settings(deadline=None, max_examples=60)


def problem(tokens=5, active=6, rows=9, width=3, *, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(rows, (tokens, active), generator=generator),
        torch.randn(tokens, active, generator=generator, dtype=dtype).requires_grad_(),
        torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_(),
    )


def naive(ids: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("ta,tad->td", weights, values[ids])


def value_and_gradients(function, case, **options) -> list[Tensor]:
    y = function(*case, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, case[1:], upstream.to(y.dtype))]


@quick
@given(st.integers(0, 6), st.integers(1, 7), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32), st.booleans())
def test_equals_naive_in_outputs_and_all_gradients(tokens, active, rows, width, seed, sparse):
    case = problem(tokens, active, rows, width, seed=seed)
    found = value_and_gradients(value_lookup, case, sparse=sparse)
    for mine, expected in zip(found, value_and_gradients(naive, case), strict=True):
        assert_close(mine.to_dense(), expected)


def test_gradcheck():
    ids, weights, values = problem()
    assert torch.autograd.gradcheck(lambda w, v: value_lookup(ids, w, v, sparse=False), (weights, values))


def test_the_sizes_decide_whether_a_gradient_is_sparse():
    for rows, layout in ((59, torch.strided), (60, torch.sparse_coo)):
        ids, weights, values = problem(rows=rows)
        value_lookup(ids, weights, values).sum().backward()
        assert values.grad is not None
        assert values.grad.layout == layout


def test_a_sparse_gradient_is_not_copied_again():
    ids, weights, values = problem(rows=100)
    value_lookup(ids, weights, values).sum().backward()
    assert values.grad is not None
    assert not values.grad.is_coalesced()  # PyTorch forgot
    rows = values.grad._values().data_ptr()
    found = coalesced(values.grad)
    assert found.is_coalesced()
    assert found.values().data_ptr() == rows
    assert torch.equal(found.indices()[0], ids.unique())


def test_a_gradient_of_two_lookups_is_coalesced_in_earnest():
    ids, weights, values = problem(rows=100)
    (value_lookup(ids, weights, values).sum() + value_lookup(ids, weights, values).sum()).backward()
    assert values.grad is not None
    (once,) = torch.autograd.grad(value_lookup(ids, weights, values).sum(), values)
    assert_close(coalesced(values.grad).to_dense(), 2 * once.to_dense())


def test_a_bfloat16_table_keeps_its_dtype_and_sums_are_float32():
    ids, weights, values = problem(tokens=4, active=64, dtype=torch.float32)
    rounded = values.detach().bfloat16().requires_grad_()
    y, grad_weights, grad_values = value_and_gradients(value_lookup, (ids, weights, rounded))
    exact = value_and_gradients(naive, (ids, weights, rounded.detach().float().requires_grad_()))
    assert (y.dtype, grad_weights.dtype, grad_values.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert_close(y, exact[0], rtol=1e-5, atol=1e-5)
    assert_close(grad_weights, exact[1], rtol=1e-5, atol=1e-5)
    assert_close(grad_values.float(), exact[2], rtol=2**-7, atol=1e-5)


def test_wrong_shapes_and_ids_are_refused():
    ids, weights, values = problem()
    with pytest.raises(ValueError, match=re.escape("not (5, 6), (5, 5) and (9, 3)")):
        value_lookup(ids, weights[:, 1:], values)
    with pytest.raises(IndexError, match="between 0 and 8; found 9 to 9"):
        value_lookup(ids.clone().fill_(9), weights, values)


@pytest.mark.parametrize("tokens", [0, 5])
def test_the_ops_pass_pytorchs_check(tokens):
    case = problem(tokens=tokens)
    torch.library.opcheck(torch.ops.myriad.value_lookup, case)
    ids, weights, values = case[0], case[1].detach(), case[2].detach()
    grad_y = torch.randn(tokens, 3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.myriad.value_lookup_backward, (grad_y, ids, weights, values))
