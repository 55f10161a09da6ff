"""What a layer must compute and move, counted from its shape, and the time that takes at the measured rates.

A step falls into phases that must follow each other: a token's rows are known when its scores are, the rows of a
gradient when the backward pass has come so far. In a phase memory and arithmetic may overlap, so that it lasts at
least as long as the slower of the two (the roofline of Williams et al., 2009); phases add up.

Counted are the multiply-adds of products, two operations each, and the rows of tables, each distinct one once,
however many tokens use it: nothing forbids visiting experts in order. Not counted, so that the sum stays a bound: what
may stay in the caches (queries, sub-keys, activations, ids), pointwise functions, selections and sorting.

Legend: `T` tokens, `A` active experts a token, `D` width, `U` distinct experts of the batch, `H` heads, `S` side, `Q`
d_key, `K` experts per head.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from myriad.analysis.bench.report import Rates
from myriad.ffn import PEERConfig
from myriad.ffn.retrieval import side_of

FLOAT_BYTES = 4

UPDATE_MOVES = 7
"""Passes over a row in its update: the gradient read; the row and both moments read and written."""


class Phase(NamedTuple):
    """Work that may overlap."""

    bytes: float = 0
    flops: float = 0


class Batch(NamedTuple):
    """What goes through a layer at once."""

    tokens: int
    distinct: float
    """Distinct experts that the tokens use; a mean, where several batches are counted as one."""


def forward_phases(config: PEERConfig, d_model: int, batch: Batch) -> list[Phase]:
    """Queries and scores, then the lookup: each row of each table is read."""
    retrieval = Phase(flops=query_flops(config, d_model, batch) + score_flops(config, batch))
    return [retrieval, Phase(row_bytes(config, d_model, batch), lookup_flops(config, d_model, batch))]


def step_phases(config: PEERConfig, d_model: int, batch: Batch) -> list[Phase]:
    """Forward, backward and update.

    The backward pass of the lookup reads the rows again and writes those of the gradient: gradients of the input and
    of the weights, and of the tables, are twice the forward's products. That of the retrieval has the gradients of
    the winners only, and both products of the query map. The update reads the gradient's rows, which lie in memory
    between two calls, and moves the row and its moments in and out.
    """
    rows = row_bytes(config, d_model, batch)
    # Each of the K winners of a head gives to its query and to its key, in both halves.
    winners = 2 * 2 * 2 * batch.tokens * config.heads * config.experts_per_head * config.d_key
    return [
        *forward_phases(config, d_model, batch),
        Phase(2 * rows, 2 * lookup_flops(config, d_model, batch)),
        Phase(flops=winners + 2 * query_flops(config, d_model, batch)),
        Phase(UPDATE_MOVES * rows),
    ]


def seconds(phases: Iterable[Phase], rates: Rates, precision: str) -> float:
    """The least time of phases one after the other."""
    flops = rates.flops(precision)
    return sum(max(phase.bytes / rates.bytes, phase.flops / flops) for phase in phases)


def query_flops(config: PEERConfig, d_model: int, batch: Batch) -> float:
    """The linear map to queries: T x D times D x 2HQ."""
    return 2 * batch.tokens * d_model * config.heads * 2 * config.d_key


def score_flops(config: PEERConfig, batch: Batch) -> float:
    """Every head's two halves against S sub-keys each."""
    return 2 * batch.tokens * config.heads * 2 * side_of(config.experts) * config.d_key


def lookup_flops(config: PEERConfig, d_model: int, batch: Batch) -> float:
    """A product of width D per table, token and active expert."""
    return 2 * _tables(config) * batch.tokens * config.heads * config.experts_per_head * d_model


def row_bytes(config: PEERConfig, d_model: int, batch: Batch) -> float:
    """The distinct rows of all tables, in float32."""
    return _tables(config) * batch.distinct * d_model * FLOAT_BYTES


def model_step_phases(
    tokens: int, flops_per_token: float, layers: Sequence[PEERConfig], d_model: int, batches: Sequence[Batch]
) -> list[Phase]:
    """A training step of a whole model: its PEER layers, and the rest, whose backward is twice its forward.

    Args:
        tokens: of the step.
        flops_per_token: of the whole model's forward.
        layers: the PEER layers.
        d_model: their width.
        batches: what went through each.
    """
    peer = sum(layer.cost(d_model).flops for layer in layers)
    rest = Phase(flops=3 * tokens * (flops_per_token - peer))
    parts = [step_phases(layer, d_model, batch) for layer, batch in zip(layers, batches, strict=True)]
    return [rest, *(phase for part in parts for phase in part)]


def _tables(config: PEERConfig) -> int:
    return 3 if config.gated else 2
