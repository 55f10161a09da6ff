"""Choosing tokens by score: the best of a batch for each expert, and the causal rule that stands for it.

In training an expert may take the best C tokens of a batch. The score of the last of these is a threshold that
can be remembered; a later token goes to every expert whose threshold its score reaches, whatever tokens there are
beside it. What the chosen are then given to is no concern of this module.

An expert chooses within a group: a whole batch (T, E), or each sequence of one by itself (B, T, E). Shapes are given
for a single group; any number of leading dimensions may stand before them.

Legend: `T` tokens (or whatever is chosen), `E` experts, `C` capacity.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from myriad.ffn.balance import Share
from myriad.ffn.base import Routing


class Taken(NamedTuple):
    """The tokens that each expert took from a group."""

    tokens_EC: Tensor
    """int64, best first."""
    scores_EC: Tensor
    """Their scores; zero where a place stays empty."""
    cutoffs_E: Tensor
    """The score of the last token taken, without gradient."""


def take_best(scores_TE: Tensor, share: Share, mask_T: Tensor | None = None) -> Taken:
    """Each expert takes the tokens of its highest scores.

    Args:
        scores_TE: not negative.
        share: of the tokens, rounded down, that an expert takes: at least one, at most all. Padding is no token.
        mask_T: False for padding, which is never taken.
    """
    capacity = share.floor(scores_TE.shape[-2])
    if mask_T is None:
        scores_EC, tokens_EC = scores_TE.mT.topk(capacity)
        return Taken(tokens_EC, scores_EC, scores_EC[..., -1].detach())
    ranked_EC, tokens_EC = scores_TE.mT.masked_fill(~mask_T.unsqueeze(-2), -1).topk(capacity)
    there = mask_T.sum(-1)[..., None, None]
    places = share.floor(there).clamp(min=1).minimum(there)
    taken_C = torch.arange(capacity, device=mask_T.device) < places
    last = (places - 1).clamp(min=0).expand(*ranked_EC.shape[:-1], 1)
    return Taken(tokens_EC, ranked_EC * taken_C, ranked_EC.detach().gather(-1, last).squeeze(-1).clamp(min=0))


def reaches(scores_TE: Tensor, thresholds_E: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """bool (T, E): where a token's score reaches an expert's threshold; nowhere for padding."""
    reached_TE = scores_TE.detach() >= thresholds_E
    return reached_TE if mask_T is None else reached_TE & mask_T.unsqueeze(-1)


def best_of_each(scores_TE: Tensor, chosen_TE: Tensor, most: int | None) -> Tensor:
    """bool (T, E): of the experts chosen for a token, at most so many, those of its highest scores."""
    if most is None or most >= scores_TE.shape[-1]:
        return chosen_TE
    best_TM = scores_TE.detach().masked_fill(~chosen_TE, -1).topk(most).indices
    return chosen_TE & torch.zeros_like(chosen_TE).scatter_(-1, best_TM, True)


def chosen_routing(scores_TE: Tensor, chosen_TE: Tensor) -> Routing:
    """As many experts for each token as the token with the most has, the others filled up with weight zero."""
    most = max(1, int(chosen_TE.sum(-1).max())) if chosen_TE.numel() else 1
    weights_TA, ids_TA = (scores_TE.detach() * chosen_TE).topk(most)
    return Routing(ids_TA, weights_TA, scores_TE.shape[-1])


class RunningThresholds(nn.Module):
    """A threshold for each expert: the exponential average of its cutoffs, moved once a step.

    The weights of the average always add up to one, so that the first step's cutoffs replace the initial value.

    Args:
        experts: how many.
        decay: what remains of a threshold after a step.
        initial: all thresholds before the first step.
    """

    value: Tensor
    steps: Tensor

    def __init__(self, experts: int, decay: float, initial: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("value", torch.full((experts,), initial))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def load(self, cutoffs_E: Tensor, tokens: int | Tensor) -> dict[str, Tensor]:
        """A micro-batch's additive statistics: every group's cutoffs, weighted by the tokens that they are of."""
        tokens = torch.zeros_like(cutoffs_E[..., 0]) + tokens
        cutoffs_GE = (cutoffs_E * tokens.unsqueeze(-1)).reshape(-1, len(self.value))
        return {"cutoffs": cutoffs_GE.sum(0), "tokens": tokens.sum()}

    def after_step(self, load: Mapping[str, Tensor]) -> None:
        """Move towards the mean of one step's cutoffs; nothing moves without tokens."""
        if not load or not load["tokens"]:
            return
        self.steps += 1
        share = (1 - self.decay) / (1 - self.decay ** int(self.steps))
        self.value.lerp_((load["cutoffs"] / load["tokens"]).to(self.value), share)
