"""The cross-entropy in Numba: one row of logits after the other, which stays in the cache from pass to pass.

Legend: `C` tokens, `P` columns, of which the first `V` are the vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from myriad.kernels.cpu.exponential import exp
from myriad.kernels.cpu.simd import array, as_element, compiled, from_ordered, inlined, ordered, wide
from myriad.kernels.cpu.threads import in_parallel
from myriad.kernels.cross_entropy import CrossEntropyFunctions
from myriad.kernels.dry import is_dry

LOGITS_PER_THREAD = 2**16
"""Logits worth a thread of their own."""


def _loss(logits_CP: Tensor, targets_C: Tensor, vocabulary: int) -> Tensor:
    return _losses(logits_CP, targets_C, vocabulary, with_gradient=False).sum()


def _gradient(logits_CP: Tensor, targets_C: Tensor, vocabulary: int) -> Tensor:
    return _losses(logits_CP, targets_C, vocabulary, with_gradient=True).sum()


def _losses(logits_CP: Tensor, targets_C: Tensor, vocabulary: int, *, with_gradient: bool) -> Tensor:
    tokens, columns = logits_CP.shape
    losses_C = torch.empty(tokens)
    if tokens and not is_dry(logits_CP):
        if int(targets_C.max()) >= vocabulary:
            raise IndexError(f"targets must be less than {vocabulary}; found {int(targets_C.max())}")
        stride = logits_CP.stride(0)
        in_parallel(
            _look_at_rows,
            tokens,
            # Rows may lie apart, and are written to: to a kernel all is one row, of which they are parts.
            array(logits_CP.detach().as_strided(((tokens - 1) * stride + columns,), (1,))),
            stride,
            columns,
            vocabulary,
            array(targets_C),
            with_gradient,
            array(losses_C),
            grain=-(-LOGITS_PER_THREAD // columns),
        )
    return losses_C


@compiled
def _look_at_rows(
    start: int,
    stop: int,
    logits: Any,
    stride: int,
    columns: int,
    vocabulary: int,
    targets_C: Any,
    with_gradient: bool,
    losses_C: Any,
) -> None:
    """The loss of each row, and its gradient in its place."""
    powers_V = np.empty(vocabulary, np.float32)
    for row in range(start, stop):
        logits_P = logits[row * stride : row * stride + columns]
        target = targets_C[row]
        if target < 0:
            losses_C[row] = 0
            if with_gradient:
                logits_P[:] = 0
            continue
        largest = _largest(logits_P, vocabulary)
        chosen = wide(logits_P[target])
        total = _exponentials(logits_P, largest, powers_V)
        losses_C[row] = np.log(total) - (chosen - largest)
        if with_gradient:
            _scale(powers_V, np.float32(1) / total, logits_P)
            logits_P[target] = as_element(logits_P, powers_V[target] / total - np.float32(1))
            logits_P[vocabulary:] = 0


@inlined
def _largest(logits_P: Any, vocabulary: int) -> Any:
    """Of the vocabulary's logits; NaN if any is."""
    largest = ordered(np.float32(-np.inf))
    for token in range(vocabulary):
        number = ordered(wide(logits_P[token]))
        largest = number if number > largest else largest  # `max` is compiled to one comparison at a time
    return from_ordered(largest)


@inlined
def _exponentials(logits_P: Any, largest: float, powers_V: Any) -> Any:
    """e to the power of each, relative to the largest, and their sum."""
    total = np.float32(0)
    for token in range(len(powers_V)):
        power = exp(wide(logits_P[token]) - largest)
        powers_V[token] = power
        total += power
    return total


@inlined
def _scale(powers_V: Any, factor: float, logits_P: Any) -> None:
    for token in range(len(powers_V)):
        logits_P[token] = as_element(logits_P, powers_V[token] * factor)


FUNCTIONS = CrossEntropyFunctions(_loss, _gradient)
