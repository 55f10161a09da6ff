"""Retrieval and lookup of a few tokens in one call, by the caller's thread alone; of more one after the other.

Legend: `T` tokens, `H` heads, `P` = 2 halves, `S` sub-keys, `Q` width of a half, `K` retrieved, `A` = H K.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from myriad.kernels.cpu.activations import CODES, ONE, activate
from myriad.kernels.cpu.expert_lookup import visit_tokens
from myriad.kernels.cpu.exponential import exp
from myriad.kernels.cpu.product_key import FEW, choose_for_few
from myriad.kernels.cpu.simd import array, compiled, inlined
from myriad.kernels.retrieved_lookup import Retrieved, RetrievedLookupFunctions, one_after_the_other

SOFTMAX, SIGMOID, RELU = 0, 1, 2
POSITIVE = CODES["relu"]
ROUTER_CODES = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "relu": RELU}


def _forward(
    x: Tensor,
    queries: Tensor,
    keys: Tensor,
    k: int,
    router: str,
    down: Tensor,
    up: Tensor,
    gate: Tensor | None,
    activation: str,
) -> Retrieved:
    tables = [down, up] if gate is None else [down, up, gate]
    if not _fits(x, queries, keys, k, router, tables, activation):
        return one_after_the_other(x, queries, keys, k, router, down, up, gate, activation)
    tokens, heads, _, width = queries.shape
    own = _heads_with_keys(queries, keys)
    asking = tokens * heads // own
    ids_TA = torch.empty(tokens, heads * k, dtype=torch.int64)
    weights_TA, y_TD = torch.empty(tokens, heads * k), torch.empty(x.shape)
    keys_PSQ = array(keys.float())
    _look_up(
        array(queries.float()).reshape(-1, width),
        keys_PSQ.reshape(own, *keys_PSQ.shape[-3:]),
        np.empty((asking, own, k), np.float32),
        array(ids_TA).reshape(asking, own, k),
        ROUTER_CODES[router],
        array(weights_TA).reshape(-1),
        array(x.float()),
        array(down),
        array(up),
        array(down if gate is None else gate),
        gate is not None,
        CODES[activation],
        array(y_TD),
    )
    return Retrieved(y_TD.to(x.dtype), ids_TA, weights_TA)


def _fits(x: Tensor, queries: Tensor, keys: Tensor, k: int, router: str, tables: list[Tensor], activation: str) -> bool:
    """Whether the tokens are few and all is as the kernel takes it; of what is not, the two ops say why."""
    if queries.ndim != 4 or keys.ndim not in (3, 4):
        return False
    tokens, heads, _, width = queries.shape
    side = keys.shape[-2]
    shape = (2, side, width) if keys.ndim == 3 else (heads, 2, side, width)
    return (
        0 < tokens * heads <= FEW * _heads_with_keys(queries, keys)
        and queries.shape[2] == 2
        and keys.shape == shape
        and 1 <= k <= side**2 <= len(tables[0])
        and x.shape == (tokens, *tables[0].shape[1:])
        and x.ndim == 2
        and all(table.shape == tables[0].shape for table in tables)
        and torch.promote_types(queries.dtype, keys.dtype) == torch.float32
        and router in ROUTER_CODES
        and activation in CODES
    )


def _heads_with_keys(queries: Tensor, keys: Tensor) -> int:
    """Heads that share their keys are more tokens of one head."""
    return 1 if keys.ndim == 3 else queries.shape[1]


@compiled
def _look_up(
    queries_MQ: Any,
    keys_HPSQ: Any,
    scores_THK: Any,
    ids_THK: Any,
    router: int,
    weights: Any,
    x: Any,
    down: Any,
    up: Any,
    gate: Any,
    gated: bool,
    code: int,
    y: Any,
) -> None:
    choose_for_few(queries_MQ, keys_HPSQ, scores_THK, ids_THK)
    _weigh(router, scores_THK.reshape(-1), scores_THK.shape[2], weights)
    down_dots = np.empty_like(weights)
    gate_dots = np.empty_like(weights) if gated else down_dots
    visit_tokens(0, len(x), x, ids_THK.reshape(-1), weights, down, up, gate, gated, code, down_dots, gate_dots, y)


@inlined
def _weigh(router: int, scores: Any, k: int, weights: Any) -> None:
    """The weights of scores, of which each k are a head's, best first."""
    for first in range(0, len(scores), k):
        total = np.float32(0)
        for place in range(first, first + k):
            if router == SOFTMAX:
                weights[place] = exp(scores[place] - scores[first])
                total += weights[place]
            elif router == SIGMOID:
                weights[place] = ONE / (ONE + exp(-scores[place]))
            else:
                weights[place] = activate(POSITIVE, scores[place])
        if router == SOFTMAX:
            for place in range(first, first + k):
                weights[place] /= total


FUNCTIONS = RetrievedLookupFunctions(_forward)
