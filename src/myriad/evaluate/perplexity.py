"""Perplexity per token and per word, and bits per byte, with every target counted once.

Conventions: targets are shifted by one. End tokens are not targets; a document's first token is predicted from
the end token before it. Windows overlap so that a target sees at least `context - stride` tokens before it (the
first ones of the text as many as there are); the last window ends with the text.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from myriad import distributed
from myriad.config import ConfigError
from myriad.data.store import Split
from myriad.evaluate.views import View, causal_view
from myriad.models import LanguageModel

TOKENS_PER_BATCH = 8192


class Perplexity(NamedTuple):
    """What a model makes of a text; `loss` is in nats per token."""

    loss: float
    tokens: int
    """Targets counted."""
    words: int
    bytes: int
    context: int
    stride: int

    @property
    def token_perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        return _exp(self.loss * self.tokens / self.words) if self.words else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.bytes

    def record(self) -> dict[str, Any]:
        """All of it, by name."""
        return {
            "token_perplexity": self.token_perplexity,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
            **self._asdict(),
        }


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


class Window(NamedTuple):
    start: int
    """The first input token."""
    end: int
    """One past the last input token."""
    first_target: int
    """The first target that this window counts; earlier ones belong to the windows before."""


def windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows over a text of a number of tokens: each target 1 .. tokens - 1 is counted by exactly one."""
    counted = 1
    while counted < tokens:
        fresh = context if counted == 1 else stride
        last = min(tokens - 1, counted + fresh - 1)
        yield Window(max(0, last - context), last, counted)
        counted = last + 1


def evaluate(
    model: LanguageModel,
    splits: Sequence[Split],
    *,
    end_id: int,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    view: View = causal_view,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Measure a model on the text of some splits. Where there are many processes, each takes its share of the windows.

    Args:
        model: put in eval mode for the while, or as `view` says.
        splits: of a store.
        end_id: the token between documents.
        context: tokens that a window holds; None: the model's context.
        stride: tokens by which windows advance; None: half the context.
        limit: evaluate only about so many tokens of each split, from its start; words and bytes are then
            counted from the split's means.
        view: `causal_view`, or `training_view`, whose figures are no measure of quality.
        progress: called with the tokens evaluated since the last call.

    Raises:
        ConfigError: a context or stride that the model or each other do not allow.
    """
    context = model.config.context if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    _check_windows(context, stride, model.config.context)
    nats, targets, words, size = 0.0, 0, 0.0, 0.0
    for split in splits:
        tokens = split.tokens[: len(split.tokens) if limit is None else min(limit + 1, len(split.tokens))]
        share = len(tokens) / len(split.tokens)
        found, count = _sum_losses(model, tokens, end_id, context, stride, view, progress)
        nats, targets = nats + found, targets + count
        words, size = words + share * split.words, size + share * split.bytes
    nats, targets = _total(nats, targets)
    if not targets:
        raise ConfigError("nothing to evaluate: the text has no tokens")
    return Perplexity(nats / targets, targets, round(words), round(size), context, stride)


def _total(nats: float, targets: int) -> tuple[float, int]:
    """The sums over all processes."""
    if distributed.world_size() == 1:
        return nats, targets
    device = distributed.device()
    sums = [torch.tensor(nats, dtype=torch.float64, device=device), torch.tensor(targets, device=device)]
    found, count = distributed.total(sums)
    return found.item(), int(count)


def _check_windows(context: int, stride: int, longest: int) -> None:
    if not 1 <= context <= longest:
        raise ConfigError(f"context: expected 1 to {longest} (the model's), found {context}")
    if not 1 <= stride <= context:
        raise ConfigError(f"stride: expected 1 to {context} (the context), found {stride}")


def _sum_losses(
    model: LanguageModel,
    tokens: np.ndarray,
    end_id: int,
    context: int,
    stride: int,
    view: View,
    progress: Callable[[int], None] | None,
) -> tuple[float, int]:
    """The sum of the losses in nats, and how many targets it is over."""
    nats, count = 0.0, 0
    with view(model):
        mine = islice(windows(len(tokens), context, stride), distributed.rank(), None, distributed.world_size())
        for batch in _batches(mine, max(1, TOKENS_PER_BATCH // context)):
            ids, targets = _tensors(batch, tokens, end_id)
            device = next(model.parameters()).device
            with torch.inference_mode():
                output = model(ids.to(device), targets=targets.to(device))
            assert output.loss is not None
            assert output.targets is not None
            nats, count = nats + output.loss.double().item(), count + int(output.targets)
            if progress is not None:
                progress(sum(window.end - window.first_target + 1 for window in batch))
    return nats, count


def _batches(all_windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Consecutive windows of one length."""
    batch: list[Window] = []
    for window in all_windows:
        if batch and (len(batch) == size or window.end - window.start != batch[0].end - batch[0].start):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _tensors(batch: list[Window], tokens: np.ndarray, end_id: int) -> tuple[Tensor, Tensor]:
    """Inputs and shifted targets (B, S); -1 where a target is an end token or counted elsewhere."""
    rows = np.stack([tokens[window.start : window.end + 1] for window in batch]).astype(np.int64)
    ids, targets = rows[:, :-1], rows[:, 1:].copy()
    for row, window in zip(targets, batch, strict=True):
        row[: window.first_target - window.start - 1] = -1
    targets[targets == end_id] = -1
    return torch.from_numpy(ids), torch.from_numpy(targets)
