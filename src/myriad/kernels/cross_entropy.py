"""The cross-entropy of a chunk of logits, and its gradient in the logits' own memory: the op and its reference.

    loss = sum over counted targets of log sum exp(logits) - logits[target]

Columns past the vocabulary are padding, for the sake of aligned products: whatever stands there is no logit.

Legend: `C` tokens of a chunk, `P` columns, of which the first `V` are the vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from myriad.kernels.registry import register, resolve


class CrossEntropyFunctions(NamedTuple):
    """Each takes logits, targets and the vocabulary's size, and returns the sum of the losses."""

    loss: Callable[[Tensor, Tensor, int], Tensor]
    gradient: Callable[[Tensor, Tensor, int], Tensor]
    """Leaves the sum's gradient in place of the logits."""


def cross_entropy(logits_CP: Tensor, targets_C: Tensor, vocabulary: int) -> Tensor:
    """The sum of the targets' negative log likelihoods, in nats, without a gradient.

    Args:
        logits_CP: of shape (C, P); a row's numbers lie side by side.
        targets_C: int64; negative ones are not counted.
        vocabulary: columns that are logits, at most P; those behind them do not take part.

    Returns:
        a scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that do not fit.
    """
    return _functions(logits_CP, targets_C, vocabulary).loss(logits_CP, targets_C, vocabulary)


def softmax_gradient(logits_CP: Tensor, targets_C: Tensor, vocabulary: int) -> Tensor:
    """`cross_entropy`, whose gradient, softmax less one at the target, takes the place of the logits.

    It is zero in the rows of targets that are not counted, and in columns past the vocabulary.
    """
    return _functions(logits_CP, targets_C, vocabulary).gradient(logits_CP, targets_C, vocabulary)


def _functions(logits: Tensor, targets: Tensor, vocabulary: int) -> CrossEntropyFunctions:
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not 1 <= vocabulary <= logits.shape[1]:
        raise ValueError(
            f"expected logits (C, P), targets (C,) and a vocabulary of 1 to P, not {tuple(logits.shape)}, "
            f"{tuple(targets.shape)} and {vocabulary}"
        )
    if logits.stride(1) != 1:
        raise ValueError("the logits of a token must lie side by side")
    return resolve("cross_entropy", logits.device.type, logits.dtype)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _reference_loss(logits_CP: Tensor, targets_C: Tensor, vocabulary: int) -> Tensor:
    logits_CV = _wide(logits_CP[:, :vocabulary])
    return F.cross_entropy(logits_CV, targets_C.clamp(min=-1), ignore_index=-1, reduction="sum")


def _reference_gradient(logits_CP: Tensor, targets_C: Tensor, vocabulary: int) -> Tensor:
    logits_CP[:, vocabulary:] = 0
    logits_CV = logits_CP[:, :vocabulary]
    log_probs_CV = _wide(logits_CV).log_softmax(dim=1)
    loss = F.nll_loss(log_probs_CV, targets_C.clamp(min=-1), ignore_index=-1, reduction="sum")
    grad_CV = log_probs_CV.exp_()
    grad_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C.clamp(min=0)] -= 1
    logits_CV.copy_(grad_CV.mul_((targets_C >= 0).unsqueeze(1)))
    return loss


register("cross_entropy", "reference", CrossEntropyFunctions(_reference_loss, _reference_gradient))
