"""The lazy optimizer step against `torch.optim.SparseAdam`."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from myriad.kernels import lazy_adam, new_moments
from myriad.kernels.rounding import random_bits, rounded_by
from myriad.kernels.table_update import AdamStep, used_rows

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


def test_the_gradient_is_left_as_it_was():
    grad = gradient([2, 5], 0, torch.float64)
    before = grad.to_dense()
    after([grad, grad], torch.float64)
    assert torch.equal(grad.to_dense(), before)


def test_used_rows_are_those_with_a_number_other_than_zero():
    grad = torch.zeros(4, 2)
    grad[1, 1], grad[3, 0], grad[2] = -1e-30, float("nan"), -0.0
    ids, rows = used_rows(None, grad)
    assert ids.tolist() == [1, 3]
    assert torch.equal(rows[0], grad[1])
    assert used_rows(torch.tensor([10, 20, 30, 40]), grad)[0].tolist() == [20, 40]


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.strided])
def test_a_row_of_zeros_is_not_used_however_it_is_stored(layout):
    state = after([gradient(list(range(ROWS)), 0, torch.float32)], torch.float32)
    before = [tensor.clone() for tensor in state]
    grad = gradient([2, 9], 1, torch.float32)
    grad.values()[0] = 0
    lazy_adam(*state, grad if layout == torch.sparse_coo else grad.to_dense(), **OPTIONS, step=2)
    for now, then in zip(state, before, strict=True):
        assert (now != then).any(dim=1).nonzero().flatten().tolist() == [9]


def rounded_start(rows: int = ROWS, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    table = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    return table, *new_moments(table)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.strided])
def test_the_rounded_form_stays_within_a_digit_of_exact_arithmetic(layout):
    table, mean, square = rounded_start()
    assert (mean.dtype, square.dtype, square.shape) == (torch.bfloat16, torch.float32, (ROWS,))
    ids = [1, 4, 11]
    grad = gradient(ids, 1, torch.bfloat16)
    g = grad.values().double()
    before = table.double()
    lazy_adam(table, mean, square, grad if layout == torch.sparse_coo else grad.to_dense(), **OPTIONS, step=1)
    exact_mean, exact_square = 0.2 * g, 0.05 * g.square().mean(dim=1)
    size = 0.03 * 0.05**0.5 / 0.2
    exact = before[ids] - size * exact_mean / (exact_square.sqrt() + 1e-3).unsqueeze(1)
    assert_close(square[ids].double(), exact_square)
    assert_close(mean[ids].double(), exact_mean, rtol=2**-7, atol=0)
    assert_close(table[ids].double(), exact, rtol=2**-7, atol=0)
    rest = [row for row in range(ROWS) if row not in ids]
    assert torch.equal(table[rest].double(), before[rest])
    assert not mean[rest].any()
    assert not square[rest].any()


def test_stochastic_rounding_is_right_on_average():
    x = torch.full((4096, 64), 1.0 + 2**-7 * 0.3)  # three tenths of the way to the next bfloat16
    bits = random_bits(torch.arange(x.numel()).view_as(x), AdamStep(0.1, (0.9, 0.99), 1e-8, 3, 7).salt)
    for part in (bits & 0xFFFF, bits >> 16):
        up = (rounded_by(x, part) > 1).double().mean()
        assert abs(up - 0.3) < 5 * (0.3 * 0.7 / x.numel()) ** 0.5


def test_small_steps_are_lost_by_no_table_on_average():
    table = torch.ones(256, 64, dtype=torch.bfloat16)
    moments = new_moments(table)
    grad = torch.ones_like(table)
    for step in range(1, 51):  # each moves by a thousandth, an eighth of what rounding to nearest would keep
        lazy_adam(table, *moments, grad, lr=1e-3, betas=(0.9, 0.999), eps=1e-12, step=step)
    assert_close(table.double().mean(), torch.tensor(0.95, dtype=torch.float64), rtol=0, atol=2e-3)


def test_the_rounding_is_a_function_of_seed_step_and_place():
    def bits(step=1, seed=0):
        return random_bits(torch.arange(1000), AdamStep(0.1, (0.9, 0.99), 1e-8, step, seed).salt)

    assert torch.equal(bits(), bits())
    assert (bits() == bits(step=2)).float().mean() < 0.01
    assert (bits() == bits(seed=1)).float().mean() < 0.01
    assert bits().unique().numel() == 1000


def test_rounding_keeps_what_is_not_finite_and_what_needs_none():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -2.5, 3.0])
    found = rounded_by(x, torch.full((6,), 0xFFFF))
    assert_close(found, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_moments_that_do_not_fit_are_refused():
    table, mean, square = start(torch.float32)
    grad = gradient([2], 0, torch.float32)
    with pytest.raises(ValueError, match="takes moments of shapes"):
        lazy_adam(table, mean, square[:, 0], grad, **OPTIONS, step=1)
    with pytest.raises(ValueError, match=r"takes moments of torch\.bfloat16 and torch\.float32"):
        lazy_adam(table.bfloat16(), mean, square[:, 0], grad, **OPTIONS, step=1)
    with pytest.raises(ValueError, match="a gradient of its own"):
        lazy_adam(table, mean, square, torch.zeros(ROWS + 1, WIDTH), **OPTIONS, step=1)
    with pytest.raises(ValueError, match="they must be contiguous"):
        lazy_adam(table.T.contiguous().T, mean, square, grad, **OPTIONS, step=1)
