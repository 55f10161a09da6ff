"""Random routings, as layers of any family may return them."""

import torch
from hypothesis import strategies

from myriad.ffn import Routing


def routing(ids, weights, experts, heads=1):
    return Routing(torch.tensor(ids), torch.tensor(weights, dtype=torch.float64), experts, heads)


@strategies.composite
def routings(draw, batch=None):
    """Of (B, S) tokens; the experts of a head differ, some weights are zero, and where one is, the id may be any."""
    heads, slots = draw(strategies.integers(1, 4)), draw(strategies.integers(1, 4))
    experts = draw(strategies.integers(slots, 12))
    shape = batch or (draw(strategies.integers(1, 3)), draw(strategies.integers(1, 5)))
    random = torch.Generator().manual_seed(draw(strategies.integers(0, 2**32)))
    scores = torch.rand(*shape, heads, experts, generator=random)
    ids = scores.topk(slots).indices.flatten(-2)
    weights = torch.rand(ids.shape, generator=random, dtype=torch.float64)
    weights[torch.rand(ids.shape, generator=random) < draw(strategies.sampled_from([0, 0.3, 1]))] = 0
    ids[weights == 0] = draw(strategies.sampled_from([-1, 0]))
    return Routing(ids, weights, experts, heads)
