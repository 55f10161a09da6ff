"""What keeps the experts of a mixture evenly used: shares of a batch, losses, a bias; values and pure functions.

Legend: `T` tokens, `E` experts.
"""

from fractions import Fraction
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

N = TypeVar("N", int, Tensor)


class Share(NamedTuple):
    """A share of some tokens as a ratio of whole numbers: 49 * (1 / 49) < 1, and compiled graphs count in integers."""

    numerator: int
    denominator: int

    @classmethod
    def of(cls, value: float) -> Self:
        exact = Fraction(value)
        return cls(*(exact.limit_denominator(10**6) or exact).as_integer_ratio())

    def floor(self, tokens: N) -> N:
        """The share, rounded down."""
        return tokens * self.numerator // self.denominator

    def ceil(self, tokens: N) -> N:
        """The share, rounded up."""
        return -(-tokens * self.numerator // self.denominator)

    def least(self) -> int:
        """The fewest tokens of which the share, rounded down, is one."""
        return -(-self.denominator // self.numerator)


def load_balance_loss(counts_E: Tensor, shares_TE: Tensor, tokens: Tensor) -> Tensor:
    """E * sum over e of f_e P_e (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    f_e is the share of tokens that chose expert e, so that the f_e add up to the experts a token, K; P_e is the
    mean share of e in a token's scores. Even use gives K, all tokens on the same K experts up to E.

    Args:
        counts_E: tokens that chose each expert, without gradient.
        shares_TE: of each expert in a token's scores, zero for padding.
        tokens: how many both are over.
    """
    tokens = tokens.clamp(min=1)
    return shares_TE.shape[1] * (counts_E / tokens * (shares_TE.sum(0) / tokens)).sum()


def router_z_loss(logits_TE: Tensor, mask_T: Tensor | None, tokens: Tensor) -> Tensor:
    """The mean over tokens of logsumexp(logits)**2: keeps logits small (arXiv 2202.08906, equation 5)."""
    squares_T = logits_TE.logsumexp(1).square()
    if mask_T is not None:
        squares_T = squares_T.masked_fill(~mask_T, 0)
    return squares_T.sum() / tokens.clamp(min=1)


def moved_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """A step of loss-free balancing: the bias of experts under the mean rises, of those over it falls.

    (arXiv 2408.15664, algorithm 1.)
    """
    counts_E = counts_E.to(bias_E.dtype)
    return bias_E + rate * torch.sign(counts_E.mean() - counts_E)
