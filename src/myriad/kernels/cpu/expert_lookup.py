"""Looked-up single-neuron experts: token by token where most experts rest, else expert by expert.

What a pass costs is the reading of rows of a kilobyte or so from memory: token by token T x A of them, in no
order; expert by expert each distinct one once, in increasing order, for which the ids are sorted. The rows ahead
are asked for while the present one is computed with.

Legend: `T` tokens, `A` active experts a token, `N` experts, `D` width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from myriad.kernels.cpu.activations import CODES, activate, slope
from myriad.kernels.cpu.memory import new_tensor
from myriad.kernels.cpu.rows import AHEAD, GRAIN, ROWS, add_row, add_rows, dot, dot_rows, sum_row
from myriad.kernels.cpu.simd import array, compiled, inlined, prefetch_row
from myriad.kernels.cpu.table_gradient import (
    bits_below,
    bounds_of_pieces,
    gradient_rows,
    grouped,
    ids_tensor,
    past_cache,
    segments,
    write_row,
)
from myriad.kernels.cpu.threads import in_parallel
from myriad.kernels.expert_lookup import ExpertLookupFunctions, Gradients

FAR_AHEAD = 2 * AHEAD
"""Experts, and tokens, that are on their way where experts are visited in order: each has few rows."""


def _forward(
    x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    down_dots_TA = new_tensor(ids.shape)
    gate_dots_TA = torch.empty(0) if gate is None else new_tensor(ids.shape)
    arguments = (
        array(x.float()),
        array(ids).reshape(-1),
        array(weights.float()).reshape(-1),
        array(down),
        array(up),
        array(down if gate is None else gate),
        gate is not None,
        CODES[activation],
        array(down_dots_TA).reshape(-1),
        array(down_dots_TA if gate is None else gate_dots_TA).reshape(-1),
    )
    y_TD = new_tensor(x.shape)
    if ids.numel() < len(down):
        in_parallel(visit_tokens, len(x), *arguments, array(y_TD), grain=GRAIN)
    else:
        pieces, bits = torch.get_num_threads(), bits_below(len(down))
        in_parallel(_visit_experts, pieces, pieces, bits, *arguments, array(y_TD), grain=1)
    return y_TD.to(x.dtype), down_dots_TA, gate_dots_TA


@compiled
def visit_tokens(
    start: int,
    stop: int,
    x: Any,
    ids: Any,
    weights: Any,
    down: Any,
    up: Any,
    gate: Any,
    gated: bool,
    code: int,
    down_dots: Any,
    gate_dots: Any,
    y: Any,
) -> None:
    """All products of a token with rows of one table, then the sum of rows of the other; entries lie one after another.

    Rows are asked for in that order, some ahead of those that are computed with: beyond a table's last for a token, and
    beyond a token's.
    """
    active = len(ids) // max(1, len(x))
    hidden = np.empty(active, np.float32)
    for entry in range(start * active, min(start * active + AHEAD, len(ids))):
        _prefetch_inner(ids[entry], down, gate, gated)
    for token in range(start, stop):
        base = token * active
        for a in range(0, active, ROWS):
            for ahead in range(a + AHEAD, a + AHEAD + ROWS):
                if ahead < active:
                    _prefetch_inner(ids[base + ahead], down, gate, gated)
                elif ahead < 2 * active:
                    prefetch_row(up, ids[base + ahead - active])
            entry, count = base + a, min(ROWS, active - a)
            dot_rows(x, token, down, ids, entry, count, down_dots, entry)
            if gated:
                dot_rows(x, token, gate, ids, entry, count, gate_dots, entry)
        for a in range(active):
            value = _value(code, gated, down_dots, gate_dots, base + a)
            hidden[a] = weights[base + a] * value
        y[token] = 0
        for a in range(0, active, ROWS):
            for ahead in range(a + AHEAD, a + AHEAD + ROWS):
                if ahead < active:
                    prefetch_row(up, ids[base + ahead])
                elif base + ahead < len(ids):
                    _prefetch_inner(ids[base + ahead], down, gate, gated)
            add_rows(y, token, hidden, a, up, ids, base + a, min(ROWS, active - a))


@inlined
def _value(code: int, gated: bool, down_dots: Any, gate_dots: Any, entry: int) -> Any:
    """Of a neuron, from its products."""
    if gated:
        return activate(code, gate_dots[entry]) * down_dots[entry]
    return activate(code, down_dots[entry])


@inlined
def _prefetch_inner(expert: int, down: Any, gate: Any, gated: bool) -> None:
    prefetch_row(down, expert)
    if gated:
        prefetch_row(gate, expert)


@compiled
def _visit_experts(
    start: int,
    stop: int,
    pieces: int,
    bits: int,
    x: Any,
    ids: Any,
    weights: Any,
    down: Any,
    up: Any,
    gate: Any,
    gated: bool,
    code: int,
    down_dots: Any,
    gate_dots: Any,
    y: Any,
) -> None:
    """The same expert by expert: where most are used, and by several tokens, each row is read once, in order.

    A piece of the work is some of the tokens. So a token's outputs are added up in the order of its experts, whatever
    the other tokens are and however many threads there are: its logits depend on the rest of a batch in no digit.
    """
    tokens, active = len(x), len(ids) // max(1, len(x))
    for piece in range(start, stop):
        first, last = tokens * piece // pieces, tokens * (piece + 1) // pieces
        y[first:last] = 0
        order, starts, experts = grouped(ids[first * active : last * active], bits)
        for segment in range(len(experts)):
            if segment + FAR_AHEAD < len(experts):
                _prefetch(experts[segment + FAR_AHEAD], down, up, gate, gated)
            expert = experts[segment]
            for place in range(starts[segment], starts[segment + 1]):
                entry = first * active + order[place]
                token = entry // active
                if place + FAR_AHEAD < len(order):
                    later = first + order[place + FAR_AHEAD] // active
                    prefetch_row(x, later)
                    prefetch_row(y, later)
                down_dots[entry] = dot(x, token, down, expert)
                if gated:
                    gate_dots[entry] = dot(x, token, gate, expert)
                value = _value(code, gated, down_dots, gate_dots, entry)
                add_row(y, token, weights[entry] * value, up, expert)


@inlined
def _prefetch(expert: int, down: Any, up: Any, gate: Any, gated: bool) -> None:
    _prefetch_inner(expert, down, gate, gated)
    prefetch_row(up, expert)


def _backward(
    grad_y: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    down: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down_dots: Tensor,
    gate_dots: Tensor,
    activation: str,
    sparse: bool,
) -> Gradients:
    found = segments(ids, len(down))
    tables = [down, up] if gate is None else [down, up, gate]
    rows = [gradient_rows(table, found, sparse) for table in tables]
    pieces = torch.get_num_threads()
    grad_weights_TA = new_tensor(ids.shape)
    grads_x_PTD = new_tensor((pieces, *x.shape))
    in_parallel(
        _look_back,
        pieces,
        bounds_of_pieces(found, pieces),
        *found,
        array(x.float()),
        array(grad_y.float()),
        array(weights.float()).reshape(-1),
        array(down),
        array(up),
        array(down if gate is None else gate),
        gate is not None,
        CODES[activation],
        array(down_dots).reshape(-1),
        array(down_dots if gate is None else gate_dots).reshape(-1),
        array(grads_x_PTD),
        array(grad_weights_TA).reshape(-1),
        *(array(table) for table in rows),
        *([array(rows[0])] if gate is None else []),
        sparse,
        all(past_cache(table) for table in rows),
        grain=1,
    )
    return Gradients(
        grads_x_PTD.sum(0).to(x.dtype),
        grad_weights_TA.to(weights.dtype),
        ids_tensor(found, sparse),
        *rows,
        *([down.new_empty(0)] if gate is None else []),
    )


@compiled
def _look_back(
    start: int,
    stop: int,
    bounds: Any,
    order: Any,
    starts: Any,
    ids: Any,
    x: Any,
    grad_y: Any,
    weights: Any,
    down: Any,
    up: Any,
    gate: Any,
    gated: bool,
    code: int,
    down_dots: Any,
    gate_dots: Any,
    grads_x: Any,
    grad_weights: Any,
    grad_down: Any,
    grad_up: Any,
    grad_gate: Any,
    sparse: bool,
    past_cache: bool,
) -> None:
    """All gradients of some experts, one after another: each row is read and each gradient row written once.

    Tokens are what is read again and again, and they are few enough to stay in the cache. Each piece of the work
    has gradients of the tokens of its own, which are added up in order.
    """
    active, width = len(order) // max(1, len(x)), x.shape[1]
    for_down = np.empty((1, width), np.float32)
    for_up, for_gate = np.empty_like(for_down), np.empty_like(for_down)
    for piece in range(start, stop):
        grad_x = grads_x[piece]
        grad_x[:] = 0
        for segment in range(bounds[piece], bounds[piece + 1]):
            if segment + FAR_AHEAD < bounds[piece + 1]:
                _prefetch(ids[segment + FAR_AHEAD], down, up, gate, gated)
            expert = ids[segment]
            for place in range(starts[segment], starts[segment + 1]):
                entry = order[place]
                token, weight, value = entry // active, weights[entry], down_dots[entry]
                is_first = place == starts[segment]
                if place + FAR_AHEAD < len(order):
                    later = order[place + FAR_AHEAD] // active
                    prefetch_row(x, later)
                    prefetch_row(grad_y, later)
                    prefetch_row(grad_x, later)
                out_dot = dot(grad_y, token, up, expert)
                if gated:
                    gate_dot = gate_dots[entry]
                    share = activate(code, gate_dot)
                    hidden = share * value
                    to_down = weight * out_dot * share
                    to_gate = weight * out_dot * value * slope(code, gate_dot)
                    add_row(grad_x, token, to_gate, gate, expert)
                    sum_row(for_gate, to_gate, x, token, is_first)
                else:
                    hidden = activate(code, value)
                    to_down = weight * out_dot * slope(code, value)
                grad_weights[entry] = hidden * out_dot
                add_row(grad_x, token, to_down, down, expert)
                sum_row(for_down, to_down, x, token, is_first)
                sum_row(for_up, weight * hidden, grad_y, token, is_first)
            row = segment if sparse else expert
            write_row(grad_down, row, for_down, 0, past_cache)
            write_row(grad_up, row, for_up, 0, past_cache)
            if gated:
                write_row(grad_gate, row, for_gate, 0, past_cache)


FUNCTIONS = ExpertLookupFunctions(_forward, _backward)
