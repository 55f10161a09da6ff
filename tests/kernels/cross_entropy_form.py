"""What every fused form of the cross-entropy must do: a test file has a class of its own that says which."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from myriad.kernels import cross_entropy, softmax_gradient, use

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def any_size(test: Callable) -> Callable:
    """Give a test rows, vocabulary, padding and a dtype; each class has one of its own, as Hypothesis asks."""
    sizes = st.integers(0, 6), st.integers(1, 600), st.integers(0, 64)
    return settings(max_examples=20, deadline=None)(
        given(*sizes, st.sampled_from([torch.float32, torch.bfloat16]))(test)
    )


def problem(rows: int, vocabulary: int, padding: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits whose padding holds what no result may show, in rows that are further apart than they are long."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    logits = scale * torch.randn(rows, vocabulary + padding + 8, generator=generator).to(dtype)
    logits[:, vocabulary:] = float("nan")
    return logits[:, : vocabulary + padding], torch.randint(-2, vocabulary, (rows,), generator=generator)


def value_and_gradient(form: str, logits: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    wider = logits.new_full((len(logits), logits.shape[1] + 3), 7.0)
    grad = wider[:, :-3].copy_(logits)
    with use(form):
        total = softmax_gradient(grad, targets, vocabulary)
        assert (wider[:, -3:] == 7).all()  # no row is left
        return cross_entropy(logits, targets, vocabulary), total, grad


class FusedCrossEntropy:
    form: str

    def assert_equals_reference(self, logits: Tensor, targets: Tensor, vocabulary: int) -> None:
        mine, theirs = (value_and_gradient(form, logits, targets, vocabulary) for form in (self.form, "reference"))
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
    def test_equals_the_reference(self, rows, vocabulary, padding, dtype):
        self.assert_equals_reference(*problem(rows, vocabulary, padding, dtype), vocabulary)

    @dtypes
    def test_without_a_counted_target_nothing_is_read(self, dtype):
        logits = torch.full((3, 5000), float("nan")).to(dtype)
        with use(self.form):
            assert cross_entropy(logits, torch.full((3,), -1), 4999) == 0
            assert softmax_gradient(logits, torch.full((3,), -100), 4999) == 0
        assert not logits.any()

    @dtypes
    @pytest.mark.parametrize("scale", [0.0, 1e3, 1e30])
    def test_huge_logits(self, scale, dtype):
        self.assert_equals_reference(*problem(6, 5000, 24, dtype, scale), 5000)

    @dtypes
    def test_logits_of_minus_infinity(self, dtype):
        logits, targets = problem(6, 5000, 24, dtype)
        targets = targets.clamp(min=0)
        logits[:, :4500] = float("-inf")  # whole lanes, for whole blocks
        targets[:5] = 4700
        self.assert_equals_reference(logits[:5], targets[:5], 5000)
        targets[5] = 7
        with use(self.form):
            assert cross_entropy(logits, targets, 5000) == float("inf")

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_not_hidden(self, number):
        logits = torch.randn(3, 40)
        logits[1, 20] = number
        with use(self.form):
            assert cross_entropy(logits, torch.tensor([1, 2, 3]), 37).isnan()
            softmax_gradient(logits, torch.tensor([1, 2, 3]), 37)
        assert logits[:, :37].isnan().any(dim=1).tolist() == [False, True, False]

    def test_is_bit_equal_from_run_to_run(self):
        case = *problem(9, 700, 4, torch.bfloat16), 700
        first, second = (value_and_gradient(self.form, *case) for _ in range(2))
        assert all(map(torch.equal, first, second))

    def test_a_dry_run_computes_nothing(self):
        with FakeTensorMode(), use(self.form):
            found = softmax_gradient(torch.empty(3, 64), torch.zeros(3, dtype=torch.int64), 50)
        assert (found.shape, found.dtype) == ((), torch.float32)
