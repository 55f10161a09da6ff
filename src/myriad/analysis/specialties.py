"""What the most used experts are used for: the tokens that were given them more often than tokens are on average.

A token is the one that a layer computes on, the last that it has seen. Its lift is its share of an expert's draws
over its share of the text: 1 where the expert does not care. Tokens are ordered by `share * log(lift)`, their part of
the KL divergence of the expert's tokens from the text's: neither a frequent token that every expert gets comes first,
nor a rare one that came once.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from myriad.ffn import Routing


class TokenShare(NamedTuple):
    """A token among those that were given an expert."""

    token: int
    share: float
    """Of the expert's draws."""
    lift: float
    """`share` over the token's share of the text."""


class Specialty(NamedTuple):
    """An expert, and what it was used for."""

    expert: int
    share: float
    """Of the layer's draws."""
    tokens: list[TokenShare]
    """Those that set it apart, most first."""


@dataclass
class TokenTally:
    """Which tokens were given some experts of a layer: sums over batches.

    Attributes:
        chosen: (M,) int64: the experts that are looked at.
        counts: (M, V) int64: draws by expert and token.
    """

    chosen: Tensor
    experts: int
    vocabulary: int
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(len(self.chosen), self.vocabulary, dtype=torch.int64)
        self._row_of = torch.full((self.experts,), -1)
        self._row_of[self.chosen] = torch.arange(len(self.chosen))

    def add(self, ids_BS: Tensor, routing: Routing) -> None:
        """Take in a batch of tokens and the experts that they were given, (B, S, A)."""
        given = routing.weights != 0
        tokens = ids_BS.unsqueeze(-1).expand_as(given)[given]
        rows = self._row_of[routing.ids[given]]
        kept = rows >= 0
        places = rows[kept] * self.vocabulary + tokens[kept]
        self.counts += torch.bincount(places, minlength=self.counts.numel()).view_as(self.counts)


def characteristic(counts: Tensor, text: Tensor, number: int) -> list[TokenShare]:
    """The tokens that set an expert apart, by their part of the KL divergence.

    Args:
        counts: (V,) int64: the expert's draws by token.
        text: (V,) int64: how often each token occurs in the same text.
        number: of tokens, at most; those with a lift of 1 or less are left out.
    """
    share = counts.double() / max(int(counts.sum()), 1)
    lift = share / (text.double() / text.sum())
    part = torch.where(counts > 0, torch.special.xlogy(share, lift), 0)
    best = part.topk(min(number, int((part > 0).sum()))).indices
    return [TokenShare(*each) for each in zip(best.tolist(), share[best].tolist(), lift[best].tolist(), strict=True)]
