"""The logits of few tokens, whose product goes another way."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from myriad.models import loss
from myriad.models.loss import vocabulary_logits


@pytest.fixture(autouse=True)
def any_processor(monkeypatch):
    monkeypatch.setattr(loss, "multiplies_few_rows_fast", lambda: False)


@pytest.mark.parametrize("shape", [(0, 1), (1, 1), (2, 1), (1, 3), (2, 2), (5, 1), (3,), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_number_of_tokens_has_the_logits_of_the_plain_product(shape, dtype, monkeypatch):
    monkeypatch.setattr(loss, "LARGE_WEIGHT", 1)
    x, weight = torch.randn(*shape, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype)
    found = vocabulary_logits(x, weight)
    assert found.shape == (*shape, 11)
    assert_close(found, F.linear(x, weight))


def test_gradients_flow_through_either_product(monkeypatch):
    x, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (3, 11))
    expected = torch.autograd.grad(vocabulary_logits(x, weight).square().sum(), (x, weight))
    monkeypatch.setattr(loss, "LARGE_WEIGHT", 1)
    found = torch.autograd.grad(vocabulary_logits(x, weight).square().sum(), (x, weight))
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)


def test_where_the_plain_product_is_fast_it_is_taken(monkeypatch):
    monkeypatch.setattr(loss, "LARGE_WEIGHT", 1)
    monkeypatch.setattr(loss, "multiplies_few_rows_fast", lambda: True)
    x, weight = torch.randn(1, 6), torch.randn(11, 6)
    assert torch.equal(vocabulary_logits(x, weight), F.linear(x, weight))
