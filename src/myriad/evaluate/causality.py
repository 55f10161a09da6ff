"""Whether a model sees the future, or the other sequences of its batch. Both would make its figures worthless."""

import math

import torch
from torch import Tensor

from myriad.config import RunError
from myriad.models import LanguageModel

TOLERANCE = 1e-3
"""The largest change of a logit, relative to the largest logit, that rounding may make in float32."""
ROUGH_TOLERANCE = 0.03
"""That in bfloat16: a few of its digits."""


@torch.inference_mode()
def future_leak(model: LanguageModel, ids: Tensor, position: int) -> float:
    """How far logits before a position move when every token from it on is changed; 0 for a causal model.

    Args:
        model: in eval mode.
        ids: tokens of shape (B, S), S > position.
        position: the first token that is changed.

    Returns:
        the largest change, relative to the largest logit.
    """
    changed = ids.clone()
    changed[:, position:] = (changed[:, position:] + 1) % model.config.vocabulary
    before, after = _logits(model, ids)[:, :position], _logits(model, changed)[:, :position]
    return _relative_change(before, after)


@torch.inference_mode()
def batch_leak(model: LanguageModel, ids: Tensor) -> float:
    """How far the first sequence's logits move when all others of the batch are changed; 0 if independent."""
    changed = ids.clone()
    changed[1:] = (changed[1:] + 1) % model.config.vocabulary
    return _relative_change(_logits(model, ids)[:1], _logits(model, changed)[:1])


def check_causality(model: LanguageModel, ids: Tensor) -> None:
    """Refuse a model whose evaluation would be dishonest.

    Args:
        model: in eval mode.
        ids: tokens of shape (B, S), B and S at least 2.

    Raises:
        RunError: an earlier logit depends on a later token, or on another sequence.
    """
    rough = next(model.parameters()).dtype == torch.bfloat16
    tolerance = ROUGH_TOLERANCE if rough else TOLERANCE
    leak = future_leak(model, ids, ids.shape[1] // 2)
    if math.isnan(leak):
        raise RunError("the model's logits are not finite: its weights are broken")
    if not leak <= tolerance:
        raise RunError(f"the model sees the future: later tokens move earlier logits by {leak:.1e} of the largest")
    leak = batch_leak(model, ids)
    if not leak <= tolerance:
        raise RunError(f"the model mixes the sequences of a batch: logits move by {leak:.1e} of the largest")


def _logits(model: LanguageModel, ids: Tensor) -> Tensor:
    logits = model(ids).logits
    assert logits is not None
    return logits


def _relative_change(before: Tensor, after: Tensor) -> float:
    return ((before - after).abs().max() / before.abs().max().clamp(min=1e-30)).item()
