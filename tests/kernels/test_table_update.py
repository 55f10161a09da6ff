"""The lazy optimizer step against `torch.optim.SparseAdam`."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from myriad.kernels import lazy_adam
from myriad.kernels.table_update import used_rows

OPTIONS = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3}
ROWS, WIDTH = 12, 5
# Rows return after steps in which they rested; the last step uses one row alone.
STEPS = [[0, 3, 4], [3], [1, 4, 11], [0, 1, 2, 3], [11]]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def gradient(ids: list[int], seed: int, dtype: torch.dtype) -> Tensor:
    """A sparse gradient of some rows."""
    rows = torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.sparse_coo_tensor(torch.tensor([ids]), rows, (ROWS, WIDTH), check_invariants=True).coalesce()


def start(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A table and its moments, which are zero."""
    table = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return table, torch.zeros_like(table), torch.zeros_like(table)


def after(steps: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    state = start(dtype)
    for number, grad in enumerate(steps, 1):
        lazy_adam(*state, grad, **OPTIONS, step=number)
    return state


@both_dtypes
def test_equals_sparse_adam_over_steps_of_changing_rows(dtype):
    table, mean, square = start(dtype)
    parameter = torch.nn.Parameter(table.clone())
    theirs = torch.optim.SparseAdam([parameter], **OPTIONS)
    for number, ids in enumerate(STEPS, 1):
        parameter.grad = gradient(ids, number, dtype)
        theirs.step()
        lazy_adam(table, mean, square, gradient(ids, number, dtype), **OPTIONS, step=number)
        assert_close(table, parameter.data)
        assert_close(mean, theirs.state[parameter]["exp_avg"])
        assert_close(square, theirs.state[parameter]["exp_avg_sq"])


@both_dtypes
def test_a_dense_gradient_equals_its_sparse_form(dtype):
    grads = [gradient(ids, number, dtype) for number, ids in enumerate(STEPS)]
    dense = [grad.to_dense() for grad in grads]
    assert all(map(torch.equal, after(grads, dtype), after(dense, dtype)))


def test_a_gradient_that_is_not_coalesced_counts_once():
    halves = gradient([1, 4], 0, torch.float64), gradient([4, 7], 1, torch.float64)
    ids = torch.cat([half.indices() for half in halves], dim=1)
    rows = torch.cat([half.values() for half in halves])
    doubled = torch.sparse_coo_tensor(ids, rows, (ROWS, WIDTH), check_invariants=True)
    assert not doubled.is_coalesced()
    coalesced = halves[0].to_dense() + halves[1].to_dense()
    assert_close(after([doubled], torch.float64), after([coalesced], torch.float64))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.strided])
def test_unused_rows_stay_untouched_bit_for_bit(layout):
    state = after([gradient(list(range(ROWS)), 0, torch.float32)], torch.float32)
    before = [tensor.clone() for tensor in state]
    grad = gradient([2, 9], 1, torch.float32)
    lazy_adam(*state, grad if layout == torch.sparse_coo else grad.to_dense(), **OPTIONS, step=2)
    for now, then in zip(state, before, strict=True):
        changed = (now != then).any(dim=1).nonzero().flatten().tolist()
        assert changed == [2, 9]


@pytest.mark.parametrize("grad", [torch.zeros(ROWS, WIDTH), gradient([], 0, torch.float32)])
def test_a_gradient_without_rows_moves_nothing(grad):
    state = after([gradient(STEPS[0], 0, torch.float32)], torch.float32)
    before = [tensor.clone() for tensor in state]
    lazy_adam(*state, grad, **OPTIONS, step=2)
    assert all(map(torch.equal, state, before))


def test_moments_may_be_finer_than_the_table():
    table, mean, square = start(torch.float32)
    rounded = table.bfloat16()
    lazy_adam(rounded, mean, square, gradient([2], 0, torch.bfloat16), **OPTIONS, step=1)
    exact, exact_mean, _ = start(torch.float32)
    exact = exact.bfloat16().float()
    lazy_adam(exact, exact_mean, torch.zeros_like(exact), gradient([2], 0, torch.bfloat16), **OPTIONS, step=1)
    assert torch.equal(mean, exact_mean)
    assert_close(rounded.float(), exact, rtol=2**-7, atol=0)
    assert rounded.dtype == torch.bfloat16


def test_the_gradient_is_left_as_it_was():
    grad = gradient([2, 5], 0, torch.float64)
    before = grad.to_dense()
    after([grad, grad], torch.float64)
    assert torch.equal(grad.to_dense(), before)


def test_used_rows_are_those_with_a_number_other_than_zero():
    grad = torch.zeros(4, 2)
    grad[1, 1], grad[3, 0], grad[2] = -1e-30, float("nan"), -0.0
    ids, rows = used_rows(grad)
    assert ids.tolist() == [1, 3]
    assert torch.equal(rows[0], grad[1])
