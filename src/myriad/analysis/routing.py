"""Which experts a model uses: how many, how unevenly, and how much of that chance alone would show.

A routed layer gives every token some experts, each with a router weight. Over a text this adds up to counts and
to weights per expert. With few tokens most experts of a large pool cannot have been used, and usage looks uneven
whatever the router does; so every figure comes with its value under a router that draws uniformly.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from myriad.data.stream import Stream, TokenSequence
from myriad.ffn import Routing
from myriad.models import LanguageModel

TOKENS_PER_BATCH = 8192


class ExpertShare(NamedTuple):
    """An expert and its share of the draws of its layer."""

    expert: int
    share: float


@dataclass(frozen=True)
class LayerUsage:
    """What a text made of the experts of one routed layer.

    Attributes:
        name: `block 3`, or `block 3.1` for the second routed layer of a block that has several.
        tokens: positions seen.
        counts: (N,) int64: the tokens and heads that gave an expert a weight other than zero.
        weights: (N,) float64: the sum of the router weights that an expert was given.
        squares: the sum of the squares of all router weights.
    """

    name: str
    tokens: int
    counts: Tensor
    weights: Tensor
    squares: float

    @property
    def experts(self) -> int:
        """Experts of the layer."""
        return len(self.counts)

    @property
    def draws(self) -> int:
        """How often the layer gave a token an expert."""
        return int(self.counts.sum())

    @property
    def used(self) -> int:
        """Experts that were given a weight at least once."""
        return int((self.counts > 0).sum())

    @property
    def dead(self) -> int:
        """Experts that no token used; over a short text many of them only had no chance."""
        return self.experts - self.used

    @property
    def share_used(self) -> float:
        """`used` as a share of all experts: the paper's expert usage."""
        return self.used / self.experts

    @property
    def chance_share_used(self) -> float:
        """The expected `share_used` of as many draws from a uniform distribution."""
        return 1 - (1 - 1 / self.experts) ** self.draws

    @property
    def unevenness(self) -> float:
        """KL(z || uniform) in nats, z the normalised accumulated router weights (PEER, arXiv 2407.04153).

        0 where all experts got the same weight, log N where one got all; NaN where none got any.
        """
        z = self.weights / self.weights.sum()
        return math.log(self.experts) + float(torch.special.xlogy(z, z).sum())

    @property
    def chance_unevenness(self) -> float:
        """About the `unevenness` of as many draws from a uniform distribution.

        The weights of one token differ, which makes their sums as uneven as fewer draws of equal weight would
        be: as (sum of weights)**2 / (sum of squares) draws (Kish's effective sample size).
        """
        if not self.squares:
            return math.nan
        return expected_unevenness(float(self.weights.sum()) ** 2 / self.squares / self.experts)

    def top(self, number: int) -> list[ExpertShare]:
        """The experts with the most draws, most first."""
        counts, experts = self.counts.topk(min(number, self.used))
        shares = (counts.double() / max(self.draws, 1)).tolist()
        return [ExpertShare(*pair) for pair in zip(experts.tolist(), shares, strict=True)]

    def record(self) -> dict[str, Any]:
        """The figures, by name, without the counts of all experts."""
        names = ("name", "tokens", "draws", "experts", "used", "dead", "share_used", "chance_share_used")
        figures = {name: getattr(self, name) for name in (*names, "unevenness", "chance_unevenness")}
        return figures | {"top": [expert._asdict() for expert in self.top(5)]}


def expected_unevenness(draws_per_expert: float) -> float:
    """KL to uniform, in nats, expected of the counts of independent uniform draws over many experts.

    Counts are then close to Poisson with mean m = `draws_per_expert`, and each expert adds
    (c / m) log(c / m) / N. For m of 100 and more this is 1 / (2 m), its limit.
    """
    if draws_per_expert > 100:
        return 1 / (2 * draws_per_expert)
    counts = torch.arange(1, 300, dtype=torch.float64)
    log_mean = math.log(draws_per_expert)
    probability = (counts * log_mean - draws_per_expert - torch.lgamma(counts + 1)).exp()
    return float((probability * counts / draws_per_expert * (counts.log() - log_mean)).sum())


def batches(tokens: TokenSequence, context: int, *, limit: int, seed: int = 0) -> Iterator[Tensor]:
    """About `limit` tokens in whole windows (B, context) from random places of a text, each at most once.

    Raises:
        DataError: the text is shorter than a window.
    """
    stream = Stream(tokens, context, seed)
    windows = number_of_windows(len(tokens), context, limit)
    size = max(1, TOKENS_PER_BATCH // context)
    for start in range(0, windows, size):
        yield stream.batch(start, min(size, windows - start))[0]


def number_of_windows(tokens: int, context: int, limit: int) -> int:
    """How many windows `batches` takes from a text of so many tokens: one at least, all at most."""
    return min((tokens - 1) // context, max(1, limit // context))


def usage(model: LanguageModel, ids: Iterable[Tensor]) -> list[LayerUsage]:
    """Run a model over some text and count what every routed layer used.

    Args:
        model: put in eval mode for the while.
        ids: batches of tokens, int64 of shape (B, S).

    Returns:
        One entry for each routed layer, first to last; none for a model without.
    """
    tallies: dict[str, UsageTally] = {}
    for ids_BS, layers in route(model, ids):
        for name, routing in layers.items():
            tallies.setdefault(name, UsageTally(routing.experts)).add(routing, ids_BS.numel())
    return [tally.finish(name) for name, tally in tallies.items()]


def route(model: LanguageModel, ids: Iterable[Tensor]) -> Iterator[tuple[Tensor, dict[str, Routing]]]:
    """Run a model over some text, batch by batch.

    Args:
        model: put in eval mode for the while.
        ids: batches of tokens, int64 of shape (B, S).

    Yields:
        A batch, and the routing of its tokens in every routed layer, first to last, on the CPU.
    """
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        for ids_BS in ids:
            ids_on_device_BS = ids_BS.to(device)
            with torch.inference_mode():
                nothing_BS = torch.full_like(ids_on_device_BS, -1)  # no target, no logits of a whole vocabulary
                output = model(ids_on_device_BS, targets=nothing_BS, with_routing=True)
            layers = _routed_layers(model, output.routing)
            here = {name: each._replace(ids=each.ids.cpu(), weights=each.weights.cpu()) for name, each in layers}
            yield ids_BS.cpu(), here
    finally:
        model.train(was_training)


def _routed_layers(model: LanguageModel, routing: Iterable[tuple[Routing, ...]]) -> Iterator[tuple[str, Routing]]:
    for index, layers in enumerate(routing):
        name = model.layer_name(index)
        for part, layer in enumerate(layers):
            yield name if len(layers) == 1 else f"{name}.{part}", layer


@dataclass
class UsageTally:
    """Sums over batches, held in float64 on the CPU: a million small weights add up."""

    experts: int
    tokens: int = 0
    squares: float = 0.0
    counts: Tensor = field(init=False)
    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.experts, dtype=torch.int64)
        self.weights = torch.zeros(self.experts, dtype=torch.float64)

    def add(self, routing: Routing, tokens: int) -> None:
        given = routing.weights != 0
        ids, weights = routing.ids[given], routing.weights[given].double()
        self.tokens += tokens
        self.squares += float(weights.square().sum())
        self.counts += torch.bincount(ids, minlength=self.experts)
        self.weights += torch.bincount(ids, weights, minlength=self.experts)

    def finish(self, name: str) -> LayerUsage:
        return LayerUsage(name, self.tokens, self.counts, self.weights, self.squares)
