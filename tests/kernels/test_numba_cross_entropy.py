"""The Numba form of the cross-entropy against the reference, and its exponential function against NumPy's."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cross_entropy_form import FusedCrossEntropy, any_size, problem, value_and_gradient
from on_threads import on_threads

from myriad.kernels import cross_entropy, softmax_gradient, use

pytest.importorskip("numba", reason="the Numba forms need numba")
from myriad.kernels.cpu.exponential import exp
from myriad.kernels.cpu.simd import compiled


class TestNumba(FusedCrossEntropy):
    form = "numba"

    @any_size
    def test_equals_the_reference_at_any_size(self, rows, vocabulary, padding, dtype):
        self.assert_equals_reference(*problem(rows, vocabulary, padding, dtype), vocabulary)

    def test_many_rows_on_all_threads_and_on_one(self):
        logits, targets = problem(300, 1000, 0, torch.float32)
        self.assert_equals_reference(logits, targets, 1000)
        found = on_threads((1, 2, 3), lambda: value_and_gradient("numba", logits, targets, 1000))
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))

    def test_callers_in_several_threads_get_the_values_of_one(self):
        def values(rows: int) -> torch.Tensor:
            return value_and_gradient("numba", *problem(rows, 3000, 8, torch.float32), 3000)[2]

        alone = [values(rows) for rows in range(30, 38)]
        # The choice of a form is the process's: each thread finds and leaves this one.
        with use("numba"), ThreadPoolExecutor(4) as pool:
            assert all(map(torch.equal, alone, pool.map(values, range(30, 38))))


def test_a_target_past_the_vocabulary_is_refused_before_anything_is_written():
    for target in (37, 2**40):
        logits = torch.randn(2, 48)
        before = logits.clone()
        for function in (cross_entropy, softmax_gradient):
            with use("numba"), pytest.raises(IndexError, match="less than 37"):
                function(logits, torch.tensor([5, target]), 37)
        assert torch.equal(logits, before)


def test_the_exponential_is_numpys_to_its_last_digits():
    @compiled
    def powers(numbers, out):
        for place in range(len(numbers)):
            out[place] = exp(numbers[place])

    def found(numbers):
        out = np.empty(len(numbers), np.float32)
        powers(numbers, out)
        return out

    numbers = np.linspace(-87.29, 88.29, 1_000_003, dtype=np.float32)
    numbers = np.concatenate((numbers, np.float32([0.0, -0.0, 1e-30, -1e-7])))
    expected = np.exp(numbers.astype(np.float64))
    assert (np.abs(found(numbers) / expected - 1) < 1.5e-7).all()
    assert (found(np.float32([0.0, -0.0])) == 1).all()
    assert not found(np.float32([-87.4, -1e30, -np.inf])).any()
    assert (found(np.float32([88.4, 1e30, np.inf])) > 2e38).all()
    assert np.isnan(found(np.float32([np.nan, -np.nan]))).all()
