"""The stream: training windows in a seeded order, whose whole state is one integer.

`position` counts the windows dealt so far, over all ranks and epochs. A batch is a pure function of it:
a resumed run, and one on another number of processes, read on where the first stopped.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from myriad.data import DataError


class TokenSequence(Protocol):
    """What the stream reads: `store.Tokens`, or a one-dimensional array."""

    def __len__(self) -> int: ...
    def __getitem__(self, window: slice, /) -> np.ndarray: ...


class Stream:
    """Windows of `context` tokens and their targets.

    An epoch lays disjoint windows over the tokens and deals them in a random order. Its first window begins
    at a random place among the tokens that are left over, so that each of them is seen in some epoch.

    Attributes:
        windows: how many an epoch has.

    Raises:
        DataError: there are not enough tokens for one window.
    """

    def __init__(self, tokens: TokenSequence, context: int, seed: int):
        if len(tokens) < context + 1:
            raise DataError(f"the split has {len(tokens)} tokens; a context of {context} needs {context + 1} or more")
        self._tokens = tokens
        self._context = context
        self._seed = seed
        self.windows = (len(tokens) - 1) // context
        self._shuffle(0)

    def batch(self, position: int, count: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """The windows `position` to `position + count`, of which a rank gets every `world`-th.

        Returns:
            ids and targets, (count / world, context) int64; the targets are the ids that follow.

        Raises:
            ValueError: the ranks cannot share `count` windows equally.
        """
        if count % world:
            raise ValueError(f"{count} windows cannot be shared by {world} ranks")
        positions = range(position + rank, position + count, world)
        windows = [self._tokens[start : start + self._context + 1] for start in self._starts(positions)]
        tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _starts(self, positions: range) -> Iterator[int]:
        """Where the windows at these positions begin."""
        for position in positions:
            epoch, place = divmod(position, self.windows)
            if epoch != self._epoch:
                self._shuffle(epoch)
            yield int(self._order[place])

    def _shuffle(self, epoch: int) -> None:
        """Order the starts of an epoch's windows; kept until another epoch is asked for."""
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch])))
        left_over = len(self._tokens) - 1 - self.windows * self._context
        self._order = random.integers(left_over + 1) + random.permutation(self.windows) * self._context
        self._epoch = epoch
