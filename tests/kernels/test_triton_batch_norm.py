"""The Triton form of batch normalization against the reference, in values, moments and all gradients."""

import pytest
import torch
import triton_form
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from triton_form import assert_near, by_both, digits

from myriad.kernels import batch_norm, use

form = triton_form.form
Case = tuple[Tensor, Tensor, Tensor, Tensor]
few = settings(deadline=None, max_examples=12)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def problem(tokens=5, features=6, dtype=torch.float32, weight_dtype=torch.float32, mean=0.0, seed=0) -> Case:
    """Tokens, weight, bias, and a center near the means."""
    generator = torch.Generator().manual_seed(seed)
    x = (mean + torch.randn(tokens, features, generator=generator)).to(dtype).requires_grad_()
    weight, bias, away = torch.randn(3, features, generator=generator).to(weight_dtype).unbind()
    return x, weight.requires_grad_(), bias.requires_grad_(), mean + away


def value_and_gradients(case: Case) -> list[Tensor]:
    y, moments = batch_norm(*case)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, moments, *torch.autograd.grad(y, case[:3], upstream)]


def assert_equals_reference(case: Case) -> None:
    """A few tokens may lie nearer to each other than to the center, which costs digits."""
    mine, expected = by_both(lambda: value_and_gradients(case))
    for one, other in zip(mine, expected, strict=True):
        assert_near(one, other, max(digits(other.dtype), 1e-5 if len(case[0]) > 9 else 1e-3))


@st.composite
def problems(draw) -> Case:
    sizes = {"tokens": (10, 150), "features": (1, 70), "seed": (0, 2**32)}
    drawn = {name: draw(st.integers(*bounds)) for name, bounds in sizes.items()}
    return problem(**drawn, dtype=draw(dtypes), weight_dtype=draw(dtypes))


@few
@given(problems())
def test_equals_the_reference(case):
    assert_equals_reference(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 1), (1500, 1), (3, 300), (65, 257), (33, 512), (2100, 16)], ids=str)
def test_sizes_at_the_edges(sizes, dtype):
    assert_equals_reference(problem(*sizes, dtype=dtype))


@pytest.mark.parametrize("features", [1, 17])
def test_one_token_is_its_own_mean(features):
    """What the gradients would be but for rounding: zero for x, and for weight."""
    case = x, _, bias, center = problem(1, features)
    with use("triton"):
        y, moments, *gradients = value_and_gradients(case)
    away = x.detach()[0] - center
    assert_close(moments, torch.stack((torch.ones_like(away), away, away * away)))
    assert_close(y[0], bias, rtol=1e-5, atol=1e-3)  # a digit of the mean, times 1 / sqrt(eps)
    assert_close(gradients[:2], [torch.zeros_like(x), torch.zeros_like(bias)], rtol=0, atol=1e-3)


def test_many_tokens_are_added_up_in_runs(monkeypatch):
    """More runs than a block of partial sums has rows, the last of them short."""
    monkeypatch.setattr(triton_form.module("batch_norm"), "SUM_BYTES", 64)
    assert_equals_reference(problem(721, 5))


def test_rows_that_do_not_fit_into_one_wave_of_programs(monkeypatch):
    monkeypatch.setattr(triton_form.module("batch_norm"), "PROGRAMS", 2)
    assert_equals_reference(problem(700, 20))


def test_features_far_from_zero_lose_no_digits():
    """Means of a thousand standard deviations, which the center is near."""
    case = problem(400, 20, mean=1000.0)
    x, weight, bias, center = (tensor.detach().double() for tensor in case)
    wide = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), center
    with use("triton"):
        mine = value_and_gradients(case)
    with use("reference"):
        expected = value_and_gradients(wide)
    # A mean of 1,000 is known to half a digit, 3e-5; so is what is less it.
    assert_close(mine[0].double(), expected[0], rtol=1e-4, atol=2e-4)
    for one, other in zip(mine[1:], expected[1:], strict=True):
        assert_near(one, other.to(one.dtype), 1e-4)


def test_a_constant_feature_is_finite():
    x, weight, bias, center = problem(40, 3)
    x = (x.detach() * torch.tensor([0.0, 1.0, 0.0]) + 0.1).requires_grad_()
    with use("triton"):
        found = value_and_gradients((x, weight, bias, center))
    assert all(tensor.isfinite().all() for tensor in found)


def test_what_is_not_a_number_stays_in_its_feature():
    x, weight, bias, center = problem(40, 3)
    x = x.detach().index_fill(1, torch.tensor([1]), float("nan"))
    with use("triton"):
        y, moments = batch_norm(x, weight, bias, center)
    assert y.isnan().any(dim=0).tolist() == moments[1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_bit_equal_from_run_to_run(dtype):
    case = problem(300, 40, dtype)
    with use("triton"):
        first, again = (value_and_gradients(case) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_rows_and_numbers_that_do_not_lie_side_by_side():
    x, weight, bias, center = (torch.stack((t.detach(), t.detach()), dim=-1)[..., 0] for t in problem(20, 30))
    assert not any(tensor.is_contiguous() for tensor in (x, weight, bias, center))
    assert_equals_reference((x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), center))
