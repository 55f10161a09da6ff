"""The forward and backward pass of a micro-batch, as the loop asks for it, and the plain way to go through it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from myriad.kernels.table_gradient import lone_gradients
from myriad.train.replica import Replica


class PassOutput(NamedTuple):
    """What a micro-batch adds to its step, without gradient; sums over micro-batches and processes are the step's."""

    loss: Tensor
    """Its share of the mean loss over the step's targets, a scalar."""
    aux_loss: Tensor
    """Its share of the mean auxiliary loss, a scalar."""
    loads: tuple[dict[str, Tensor], ...]
    """Each layer's additive statistics."""


ForwardBackward = Callable[[Tensor, Tensor], PassOutput]
"""Takes ids and targets, int64 of shape (B, S), on any device, and adds gradients to the parameters' `.grad`."""


class Launched:
    """Passes whose kernels are launched one by one.

    Args:
        replica: the model in training.
        autocast: makes the context of the forward pass.
        device: the model's.
        targets: of a step, over all micro-batches and processes.
        passes: of a step, over all processes.
    """

    def __init__(
        self,
        replica: Replica,
        autocast: Callable[[], AbstractContextManager[object]],
        device: torch.device,
        *,
        targets: int,
        passes: int,
    ) -> None:
        self._replica, self._autocast, self._device = replica, autocast, device
        self._targets, self._passes = targets, passes

    def __call__(self, ids: Tensor, targets: Tensor) -> PassOutput:
        with self._autocast(), lone_gradients(self._device) if self._passes == 1 else nullcontext():
            output = self._replica(ids.to(self._device), targets.to(self._device))
        assert output.loss is not None
        loss, aux_loss = output.loss / self._targets, output.aux_loss / self._passes
        (loss + aux_loss).backward()
        return PassOutput(loss.detach(), aux_loss.detach(), output.loads)
