"""How the heads of routed layers choose: how they spread a token's weight, and which experts they choose in common.

A head is one of the routers that choose for a token from the same experts; most families have a single one. An
expert with a weight of zero is not chosen.

Suffixes: T tokens, H heads, K the experts that a head can give a token, A = H * K, N experts.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from myriad.ffn import Routing


@dataclass(frozen=True)
class LayerHeads:
    """What the heads of one routed layer did with a text; all figures are float64 means over its tokens.

    Attributes:
        name: as in `LayerUsage`.
        experts: of the layer.
        entropy: (H,) nats: of the router weights that a head gives a token, normalised; tokens to which it gives
            none left out. NaN for a head that never gave any.
        weight_by_rank: (K,) the heaviest share of a token's weight from one head, the second, and so on.
        shared: (H, H) experts of a token that both of two heads chose; on the diagonal, all that one chose.
        shared_by_chance: (H, H) the same, expected of heads that draw as many experts from a uniform distribution.
        shared_elsewhere: (H, H) the same between the heads' choices for two different tokens: what they would share
            if they kept their habits and did not look at the token.
        used: (H,) int64: experts that a head chose at least once.
    """

    name: str
    experts: int
    entropy: Tensor
    weight_by_rank: Tensor
    shared: Tensor
    shared_by_chance: Tensor
    shared_elsewhere: Tensor
    used: Tensor

    @property
    def heads(self) -> int:
        """Routers that choose for each token."""
        return len(self.entropy)

    @property
    def slots(self) -> int:
        """The experts that a head can give a token."""
        return len(self.weight_by_rank)

    @property
    def mean_entropy(self) -> float:
        """In nats, the mean of the heads', those that never gave any weight left out."""
        return float(self.entropy.nanmean())

    @property
    def largest_entropy(self) -> float:
        """In nats: of equal weights on as many experts as a head can give."""
        return math.log(self.slots)

    def overlap(self) -> tuple[float, float, float] | None:
        """The means over pairs of heads: shared, by chance, elsewhere; None where there is one head."""
        if self.heads == 1:
            return None
        pairs = ~torch.eye(self.heads, dtype=torch.bool)
        shared, chance, elsewhere = (
            float(of[pairs].mean()) for of in (self.shared, self.shared_by_chance, self.shared_elsewhere)
        )
        return shared, chance, elsewhere

    def record(self) -> dict[str, Any]:
        """All figures, by name."""
        shared, chance, elsewhere = self.overlap() or (None, None, None)
        lists = ("entropy", "weight_by_rank", "shared", "shared_by_chance", "shared_elsewhere", "used")
        return {
            "heads": self.heads,
            "slots": self.slots,
            "mean_entropy": self.mean_entropy,
            "largest_entropy": self.largest_entropy,
            "mean_shared": shared,
            "mean_shared_by_chance": chance,
            "mean_shared_elsewhere": elsewhere,
            "by_head": {name: getattr(self, name).tolist() for name in lists},
        }


@dataclass
class HeadTally:
    """Sums over batches. Of a million experts and eight heads it holds 32 MB."""

    experts: int
    heads: int
    slots: int
    tokens: int = 0
    counts: Tensor = field(init=False)
    entropy: Tensor = field(init=False)
    served: Tensor = field(init=False)
    weight_by_rank: Tensor = field(init=False)
    shared: Tensor = field(init=False)
    products: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.heads, self.experts, dtype=torch.int32)
        self.entropy = torch.zeros(self.heads, dtype=torch.float64)
        self.served = torch.zeros(self.heads, dtype=torch.int64)
        self.weight_by_rank = torch.zeros(self.slots, dtype=torch.float64)
        self.shared = torch.zeros(self.heads, self.heads, dtype=torch.int64)
        self.products = torch.zeros(self.heads, self.heads, dtype=torch.float64)

    @classmethod
    def of(cls, routing: Routing) -> "HeadTally":
        """An empty one for routings such as this."""
        return cls(routing.experts, routing.heads, routing.ids.shape[-1] // routing.heads)

    def add(self, routing: Routing) -> None:
        """Take in a batch."""
        shape = (-1, self.heads, self.slots)
        ids_THK, weights_THK = routing.ids.reshape(shape), routing.weights.reshape(shape).double()
        given_THK = weights_THK != 0
        self.tokens += len(ids_THK)
        self._add_choices(ids_THK, given_THK)
        self._add_weights(weights_THK)
        if self.heads > 1:
            self.shared += count_shared(ids_THK, given_THK, self.experts)

    def _add_choices(self, ids_THK: Tensor, given_THK: Tensor) -> None:
        first_H1 = torch.arange(self.heads).view(-1, 1) * self.experts
        places = (ids_THK + first_H1)[given_THK]
        self.counts.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        number_TH = given_THK.sum(-1).double()
        self.products += number_TH.T @ number_TH

    def _add_weights(self, weights_THK: Tensor) -> None:
        total_TH1 = weights_THK.sum(-1, keepdim=True)
        shares_THK = torch.where(total_TH1 != 0, weights_THK / total_TH1, 0)
        self.served += (total_TH1 != 0).sum(0).view(-1)
        self.entropy -= torch.special.xlogy(shares_THK, shares_THK).sum((0, 2))
        self.weight_by_rank += shares_THK.sort(-1, descending=True).values.sum((0, 1))

    def finish(self, name: str) -> LayerHeads:
        """The figures of all that was added."""
        counts_HN = self.counts.double()
        shared = self.shared + torch.diag(self.counts.sum(1))
        return LayerHeads(
            name=name,
            experts=self.experts,
            entropy=self.entropy / self.served,
            weight_by_rank=self.weight_by_rank / self.served.sum(),
            shared=shared.double() / self.tokens,
            shared_by_chance=self.products / (self.tokens * self.experts),
            shared_elsewhere=counts_HN @ counts_HN.T / self.tokens**2,
            used=(self.counts > 0).sum(1),
        )


def count_shared(ids_THK: Tensor, given_THK: Tensor, experts: int) -> Tensor:
    """How often two heads chose the same expert for the same token.

    Each token's experts are sorted, so that equal ones of H heads stand within H places of each other.

    Args:
        ids_THK: experts; those that one head chose for one token differ.
        given_THK: bool, whether they were chosen.
        experts: how many there are.

    Returns:
        (H, H) int64, symmetric, zero on the diagonal.
    """
    tokens, heads, slots = ids_THK.shape
    # What was not chosen becomes an expert of its own, which no other place has.
    nobody_HK = experts + torch.arange(heads * slots).view(heads, slots)
    codes_THK = torch.where(given_THK, ids_THK, nobody_HK) * heads + torch.arange(heads).view(-1, 1)
    sorted_TA = np.sort(codes_THK.view(tokens, -1).numpy(), axis=1)  # many times as fast as torch's
    ids_TA, heads_TA = np.divmod(sorted_TA, heads)
    shared_HH = np.zeros(heads * heads, dtype=np.int64)
    for apart in range(1, heads):
        same = ids_TA[:, apart:] == ids_TA[:, :-apart]
        pairs = heads_TA[:, :-apart][same] * heads + heads_TA[:, apart:][same]
        shared_HH += np.bincount(pairs, minlength=heads * heads)
    above_HH = torch.from_numpy(shared_HH.reshape(heads, heads))
    return above_HH + above_HH.T
