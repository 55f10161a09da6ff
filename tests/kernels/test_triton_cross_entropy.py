"""The Triton form of the cross-entropy against the reference."""

import pytest
import torch
import triton_form
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from triton_form import by_both

from myriad.kernels import cross_entropy, softmax_gradient, use
from myriad.models import loss
from myriad.models.loss import chunked_cross_entropy

form = triton_form.form
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def problem(rows: int, vocabulary: int, padding: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits whose padding holds what no result may show, in rows that are further apart than they are long."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    logits = scale * torch.randn(rows, vocabulary + padding + 8, generator=generator).to(dtype)
    logits[:, vocabulary:] = float("nan")
    return logits[:, : vocabulary + padding], torch.randint(-2, vocabulary, (rows,), generator=generator)


def value_and_gradient(logits: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    wider = logits.new_full((len(logits), logits.shape[1] + 3), 7.0)
    grad = wider[:, :-3].copy_(logits)
    total = softmax_gradient(grad, targets, vocabulary)
    assert (wider[:, -3:] == 7).all()  # no row is left
    return cross_entropy(logits, targets, vocabulary), total, grad


def assert_equals_reference(logits: Tensor, targets: Tensor, vocabulary: int) -> None:
    mine, theirs = by_both(lambda: value_and_gradient(logits, targets, vocabulary))
    assert mine[0].dtype == torch.float32
    assert torch.equal(mine[0], mine[1])
    assert_close(mine[:2], theirs[:2], rtol=1e-6, atol=1e-5)
    digits = {"rtol": 2**-7, "atol": 1e-7} if logits.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    assert_close(mine[2], theirs[2], **digits)
    assert not mine[2][targets < 0].any()
    assert not mine[2][:, vocabulary:].any()


@dtypes
@pytest.mark.parametrize(
    ("rows", "vocabulary", "padding"),
    [(5, 1, 0), (7, 11, 5), (1, 300, 0), (3, 4096, 0), (4, 4099, 125), (4, 8191, 1), (3, 13000, 56)],
)
def test_equals_the_reference(rows, vocabulary, padding, dtype):
    assert_equals_reference(*problem(rows, vocabulary, padding, dtype), vocabulary)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 6), st.integers(1, 600), st.integers(0, 64), st.sampled_from([torch.float32, torch.bfloat16]))
def test_equals_the_reference_at_any_size(rows, vocabulary, padding, dtype):
    assert_equals_reference(*problem(rows, vocabulary, padding, dtype), vocabulary)


@dtypes
def test_without_a_counted_target_nothing_is_read(dtype):
    logits = torch.full((3, 5000), float("nan")).to(dtype)
    with use("triton"):
        assert cross_entropy(logits, torch.full((3,), -1), 4999) == 0
        assert softmax_gradient(logits, torch.full((3,), -100), 4999) == 0
    assert not logits.any()


@dtypes
@pytest.mark.parametrize("scale", [0.0, 1e3, 1e30])
def test_huge_logits(scale, dtype):
    assert_equals_reference(*problem(6, 5000, 24, dtype, scale), 5000)


@dtypes
def test_logits_of_minus_infinity(dtype):
    logits, targets = problem(6, 5000, 24, dtype)
    targets = targets.clamp(min=0)
    logits[:, :4500] = float("-inf")  # whole lanes, for whole blocks
    targets[:5] = 4700
    assert_equals_reference(logits[:5], targets[:5], 5000)
    targets[5] = 7
    with use("triton"):
        assert cross_entropy(logits, targets, 5000) == float("inf")


def test_what_is_not_finite_is_not_hidden():
    for number in (float("nan"), float("inf")):
        logits = torch.randn(3, 40)
        logits[1, 20] = number
        with use("triton"):
            assert cross_entropy(logits, torch.tensor([1, 2, 3]), 37).isnan()
            softmax_gradient(logits, torch.tensor([1, 2, 3]), 37)
        assert logits[:, :37].isnan().any(dim=1).tolist() == [False, True, False]


def test_a_target_past_the_vocabulary_is_not_hidden():
    with use("triton"):
        assert cross_entropy(torch.randn(2, 48), torch.tensor([5, 37]), 37).isnan()
        assert cross_entropy(torch.randn(2, 48), torch.tensor([5, 2**40]), 37).isnan()


def test_is_bit_equal_from_run_to_run():
    case = *problem(9, 700, 4, torch.bfloat16), 700
    with use("triton"):
        assert all(map(torch.equal, value_and_gradient(*case), value_and_gradient(*case)))


def test_a_dry_run_launches_nothing():
    with FakeTensorMode(), use("triton"):
        found = softmax_gradient(torch.empty(3, 64), torch.zeros(3, dtype=torch.int64), 50)
    assert (found.shape, found.dtype) == ((), torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_of_a_padded_vocabulary(autocast, monkeypatch):
    """All of what a GPU does, in chunks, against all logits in float64."""
    monkeypatch.setattr(loss, "ALIGNMENT", {"cpu": 64})
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 448 * 7)
    monkeypatch.setattr(loss, "LEAST_TOKENS_PER_CHUNK", 1)
    x, weight = (torch.randn(rows, 32).div_(32**0.25).requires_grad_() for rows in (17, 401))
    targets = torch.randint(-40, 401, (17,))
    wide = [one.detach().double().requires_grad_() for one in (x, weight)]
    with use("reference"):
        expected = chunked_cross_entropy(*wide, targets)
    with use("triton"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = chunked_cross_entropy(x, weight, targets)
        with torch.no_grad():
            alone = chunked_cross_entropy(x, weight, targets)
    share = 1e-2 if autocast else 2e-6
    assert_close(found.double(), expected, rtol=share, atol=0)
    assert_close(alone.double(), expected, rtol=share, atol=0)
    for one, other in zip(torch.autograd.grad(found, (x, weight)), torch.autograd.grad(expected, wide), strict=True):
        triton_form.assert_near(one, other.float(), share)
