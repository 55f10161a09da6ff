"""The Triton form of the cross-entropy against the reference."""

import pytest
import torch
import triton_form
from cross_entropy_form import FusedCrossEntropy, any_size, problem
from torch.testing import assert_close

from myriad.kernels import cross_entropy, use
from myriad.models import loss
from myriad.models.loss import chunked_cross_entropy

form = triton_form.form


class TestTriton(FusedCrossEntropy):
    form = "triton"

    @any_size
    def test_equals_the_reference_at_any_size(self, rows, vocabulary, padding, dtype):
        self.assert_equals_reference(*problem(rows, vocabulary, padding, dtype), vocabulary)


def test_a_target_past_the_vocabulary_is_not_hidden():
    with use("triton"):
        assert cross_entropy(torch.randn(2, 48), torch.tensor([5, 37]), 37).isnan()
        assert cross_entropy(torch.randn(2, 48), torch.tensor([5, 2**40]), 37).isnan()


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
