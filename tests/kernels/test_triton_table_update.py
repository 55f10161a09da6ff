"""The Triton form of the lazy optimizer step against the reference."""

import pytest
import torch
import triton_form
from torch import Tensor
from torch.testing import assert_close
from triton_form import by_both

from myriad.kernels import lazy_adam, new_moments, use

form = triton_form.form
ROWS = 12
OPTIONS = {"lr": 0.03, "eps": 1e-3, "seed": 2**32 - 5}
layouts = pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo])


def gradient(width: int, dtype: torch.dtype, layout: torch.layout, seed: int) -> Tensor:
    """Half of the rows are zero; a sparse gradient stores one of these."""
    grad = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    grad[seed % 2 :: 2] = 0
    if layout == torch.strided:
        return grad
    ids = torch.cat([grad.any(dim=1).nonzero().squeeze(1), torch.tensor([seed % 2])]).sort().values
    return torch.sparse_coo_tensor(ids.unsqueeze(0), grad[ids], grad.shape, is_coalesced=True, check_invariants=False)


def after(steps: int, width: int, dtype: torch.dtype, layout: torch.layout, betas=(0.8, 0.95)) -> tuple[Tensor, ...]:
    table = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    moments = new_moments(table)
    for step in range(1, steps + 1):
        lazy_adam(table, *moments, gradient(width, dtype, layout, step), **OPTIONS, betas=betas, step=step)
    return table, *moments


@layouts
@pytest.mark.parametrize("width", [1, 5, 300, 2100])
def test_the_full_form_equals_the_reference(width, layout):
    mine, expected = by_both(lambda: after(4, width, torch.float32, layout))
    assert_close(mine, expected, rtol=2e-6, atol=1e-7)


@layouts
@pytest.mark.parametrize("width", [1, 5, 300, 2100])
def test_the_rounded_form_draws_the_references_bits(width, layout):
    """Sums in another order may tip a number whose random bits lie at the edge; all others are equal bit for bit."""
    mine, expected = by_both(lambda: after(1, width, torch.bfloat16, layout))
    assert_close(mine, expected, rtol=2**-7, atol=1e-6)
    for one, other in zip(mine[:2], expected[:2], strict=True):
        assert (one != other).float().mean() <= 1e-3


@layouts
def test_the_rounded_form_stays_with_the_reference_over_steps(layout):
    mine, expected = by_both(lambda: after(6, 40, torch.bfloat16, layout))
    assert_close(mine[2], expected[2], rtol=1e-5, atol=0)
    for one, other in zip(mine[:2], expected[:2], strict=True):
        assert_close(one, other, rtol=2**-7, atol=1e-6)


def test_large_shares_move_from_the_nearer_end_as_lerp_does():
    mine, expected = by_both(lambda: after(3, 5, torch.float32, torch.strided, betas=(0.0, 0.3)))
    assert_close(mine, expected, rtol=2e-6, atol=1e-7)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_zeros_stay_untouched_bit_for_bit(dtype, layout):
    with use("triton"):
        state = after(2, 7, dtype, layout)
        before = [tensor.clone() for tensor in state]
        lazy_adam(*state, gradient(7, dtype, layout, 3), **OPTIONS, betas=(0.8, 0.95), step=3)
    for now, then in zip(state, before, strict=True):
        changed = (now != then).view(ROWS, -1).any(dim=1).nonzero().flatten().tolist()
        assert changed == [0, 2, 4, 6, 8, 10]


def test_numbers_that_are_not_finite_stay_what_they_are():
    def moved() -> Tensor:
        table = torch.tensor([[float("inf"), -float("inf"), float("nan"), 1.0]]).bfloat16()
        lazy_adam(table, *new_moments(table), torch.ones_like(table), **OPTIONS, betas=(0.8, 0.95), step=1)
        return table

    mine, expected = by_both(moved)
    assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)


def test_is_bit_equal_from_run_to_run():
    with use("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            first, again = (after(2, 40, dtype, torch.strided) for _ in range(2))
            assert all(map(torch.equal, first, again))
