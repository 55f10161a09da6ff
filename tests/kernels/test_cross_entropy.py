"""The reference of the cross-entropy against PyTorch's own, and the loss of a padded vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from myriad.kernels import cross_entropy, softmax_gradient, use
from myriad.models import loss
from myriad.models.loss import chunked_cross_entropy, chunked_logsumexp

TARGETS = torch.tensor([3, -1, 0, 10, -100, 10])


def expected(logits_CP: Tensor, targets_C: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and its gradient by autograd in float64."""
    wide = logits_CP.detach().double().requires_grad_()
    losses = F.cross_entropy(wide[:, :vocabulary], targets_C.clamp(min=-1), ignore_index=-1, reduction="none")
    return losses.sum().detach(), torch.autograd.grad(losses.sum(), wide)[0]


@pytest.mark.parametrize("columns", [11, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_reference_is_the_cross_entropy_and_its_gradient(dtype, columns):
    logits = 3 * torch.randn(6, columns + 3).to(dtype)[:, :columns]
    total, grad = expected(logits, TARGETS, 11)
    with use("reference"):
        found = cross_entropy(logits, TARGETS, 11)
        again = softmax_gradient(logits, TARGETS, 11)
    assert found.dtype == again.dtype == torch.promote_types(dtype, torch.float32)
    digits = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    assert_close(found.double(), total, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=0)
    assert_close(again, found, rtol=1e-6, atol=0)
    assert_close(logits.double(), grad, rtol=digits, atol=digits)
    assert not logits[TARGETS < 0].any()
    assert not logits[:, 11:].any()


def test_no_rows_have_no_loss():
    logits, targets = torch.randn(0, 5), torch.empty(0, dtype=torch.int64)
    assert cross_entropy(logits, targets, 5) == softmax_gradient(logits, targets, 5) == 0


@pytest.mark.parametrize(
    ("logits", "targets", "vocabulary", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2), 3, "expected logits"),
        (torch.zeros(2, 3), torch.zeros(3), 3, "expected logits"),
        (torch.zeros(2, 3), torch.zeros(2), 4, "vocabulary of 1 to P"),
        (torch.zeros(2, 3), torch.zeros(2), 0, "vocabulary of 1 to P"),
        (torch.zeros(3, 2).T, torch.zeros(2), 3, "side by side"),
    ],
)
def test_what_does_not_fit_is_refused(logits, targets, vocabulary, message):
    for function in (cross_entropy, softmax_gradient):
        with pytest.raises(ValueError, match=message):
            function(logits, targets, vocabulary)


class TestPaddedVocabulary:
    """What a GPU's products do, on the CPU: nothing of the padding shows."""

    @pytest.fixture(autouse=True)
    def padding(self, monkeypatch) -> None:
        monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 64 * 5)  # chunks of 5 tokens
        monkeypatch.setattr(loss, "LEAST_TOKENS_PER_CHUNK", 1)
        monkeypatch.setattr(loss, "ALIGNMENT", {"cpu": 64})

    @pytest.fixture
    def case(self) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = (torch.randn(rows, 4, dtype=torch.float64, requires_grad=True) for rows in (12, 37))
        return x, weight, torch.randint(-10, 37, (12,))

    def test_the_loss_and_its_gradients_are_those_of_all_logits(self, case):
        x, weight, targets = case
        plain = F.cross_entropy(x @ weight.T, targets.clamp(min=-1), ignore_index=-1, reduction="sum")
        found = chunked_cross_entropy(x, weight, targets)
        assert_close(found, plain)
        theirs = torch.autograd.grad(plain, (x, weight))
        assert_close(torch.autograd.grad(found, (x, weight)), theirs)
        with torch.no_grad():
            assert_close(chunked_cross_entropy(x, weight, targets), plain)
        for frozen in (0, 1):
            inputs = [one.detach().requires_grad_(place != frozen) for place, one in enumerate((x, weight))]
            (mine,) = torch.autograd.grad(chunked_cross_entropy(*inputs, targets), [inputs[1 - frozen]])
            assert_close(mine, theirs[1 - frozen])

    def test_the_normalizer_too(self, case):
        x, weight, _ = case
        assert_close(chunked_logsumexp(x, weight), (x @ weight.T).logsumexp(dim=1))
        assert torch.autograd.gradcheck(chunked_logsumexp, (x, weight))

    def test_logits_far_below_those_of_the_padding(self):
        x, weight = torch.ones(3, 1), torch.full((37, 1), -200.0, requires_grad=True)
        (grad,) = torch.autograd.grad(chunked_logsumexp(x, weight).sum(), weight)
        assert_close(grad, torch.full((37, 1), 3 / 37))
        (grad,) = torch.autograd.grad(chunked_cross_entropy(x, weight, torch.zeros(3).long()), weight)
        assert_close(grad, (torch.full((37, 1), 3 / 37) - 3 * F.one_hot(torch.tensor(0), 37).unsqueeze(1)))

    def test_a_weight_that_is_aligned_and_narrow_is_not_copied(self):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(128, 4, dtype=dtype)
            assert loss._narrow(weight, dtype) is weight


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 1024), (torch.bfloat16, 2048)])
def test_on_cuda_a_chunk_is_as_large_as_it_may_be(dtype, tokens):
    with FakeTensorMode():
        targets = torch.zeros(5000, dtype=torch.int64, device="cuda")
        chunks = loss._chunks(targets, 50304, dtype)
        assert chunks[0] == slice(0, tokens)
        assert chunks[-1].stop >= 5000 > chunks[-1].start
        assert loss._chunks(targets, 64, dtype)[0].stop >= 5000
        assert loss._chunks(targets, 2**24, dtype)[0].stop == 512
