"""The Triton form of value lookups against the reference, in values and all gradients."""

import pytest
import torch
import triton_form
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_form import assert_near, by_both, digits

from myriad.kernels import use, value_lookup

form = triton_form.form
few = settings(deadline=None, max_examples=12)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def problem(
    tokens=5, active=6, rows=9, width=3, dtype=torch.float32, weights_dtype=torch.float32, seed=0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(rows, (tokens, active), generator=generator)
    weights = torch.randn(tokens, active, generator=generator).to(weights_dtype).requires_grad_()
    return ids, weights, torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()


def value_and_gradients(case: tuple[Tensor, Tensor, Tensor], sparse: bool) -> list[Tensor]:
    y = value_lookup(*case, sparse=sparse)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, case[1:], upstream)]


def assert_equals_reference(case: tuple[Tensor, Tensor, Tensor], sparse: bool) -> None:
    mine, expected = by_both(lambda: value_and_gradients(case, sparse))
    for one, other in zip(mine, expected, strict=True):
        assert_near(one, other, max(digits(tensor.dtype) for tensor in case[1:]))


@st.composite
def problems(draw) -> tuple[Tensor, Tensor, Tensor]:
    sizes = {"tokens": (0, 6), "active": (1, 7), "rows": (1, 9), "width": (1, 40), "seed": (0, 2**32)}
    drawn = {name: draw(st.integers(*bounds)) for name, bounds in sizes.items()}
    return problem(**drawn, dtype=draw(dtypes), weights_dtype=draw(dtypes))


@few
@given(problems(), st.booleans())
def test_equals_the_reference(case, sparse):
    assert_equals_reference(case, sparse)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("sizes", [(0, 6, 9, 3), (1, 1, 1, 1), (1, 40, 9, 17), (3, 5, 9, 300), (3, 2, 500, 16)])
def test_sizes_at_the_edges(sizes, sparse):
    assert_equals_reference(problem(*sizes), sparse)


@pytest.mark.parametrize("sparse", [False, True])
def test_one_row_of_all_tokens(sparse, monkeypatch):
    monkeypatch.setattr(triton_form.module("segments"), "CHUNK", 8)
    ids, *rest = problem(tokens=13, active=5)
    assert_equals_reference((torch.full_like(ids, 8), *rest), sparse)


@pytest.mark.parametrize("sparse", [False, True])
def test_is_bit_equal_from_run_to_run(sparse):
    case = problem(tokens=30, active=8, rows=11, width=20)
    with use("triton"):
        first, again = (value_and_gradients(case, sparse) for _ in range(2))
    assert all(torch.equal(one.to_dense(), other.to_dense()) for one, other in zip(first, again, strict=True))
