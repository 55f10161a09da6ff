"""Looked-up values: sums over rows as they are read.

Legend: `T` tokens, `A` values a token, `N` rows of the table, `D` width.
"""

from typing import Any

import torch
from torch import Tensor

from myriad.kernels.cpu.rows import AHEAD, GRAIN, add_row, dot
from myriad.kernels.cpu.simd import array, compiled, prefetch_row
from myriad.kernels.cpu.table_gradient import ids_tensor, segments, table_gradient
from myriad.kernels.cpu.threads import in_parallel
from myriad.kernels.value_lookup import ValueGradients, ValueLookupFunctions


def _forward(ids: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    y_TD = torch.empty(len(ids), values.shape[1])
    in_parallel(_sum, len(ids), array(ids), array(weights.float()), array(values), array(y_TD), grain=GRAIN)
    return y_TD.to(weights.dtype)


def _backward(grad_y: Tensor, ids: Tensor, weights: Tensor, values: Tensor, sparse: bool) -> ValueGradients:
    dots_TA, grad_y_TD = torch.empty(ids.shape), array(grad_y.float())
    in_parallel(_dots, len(ids), array(ids), grad_y_TD, array(values), array(dots_TA), grain=GRAIN)
    found = segments(ids, len(values))
    coefficients = array(weights.float()).reshape(-1)
    grad_values = table_gradient(values, found, coefficients, grad_y_TD, sparse)
    return ValueGradients(dots_TA.to(weights.dtype), ids_tensor(found, sparse), grad_values)


@compiled
def _sum(start: int, stop: int, ids: Any, weights: Any, values: Any, y: Any) -> None:
    active = ids.shape[1]
    for token in range(start, stop):
        y[token] = 0
        for a in range(active):
            if a + AHEAD < active:
                prefetch_row(values, ids[token, a + AHEAD])
            add_row(y, token, weights[token, a], values, ids[token, a])


@compiled
def _dots(start: int, stop: int, ids: Any, x: Any, values: Any, dots: Any) -> None:
    active = ids.shape[1]
    for token in range(start, stop):
        for a in range(active):
            if a + AHEAD < active:
                prefetch_row(values, ids[token, a + AHEAD])
            dots[token, a] = dot(x, token, values, ids[token, a])


FUNCTIONS = ValueLookupFunctions(_forward, _backward)
