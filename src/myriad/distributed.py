"""Many processes behind a few functions; one process is the trivial case.

`torch.distributed` is never started here: who launches a run starts it, and these functions follow.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, 0 when there is one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    """Its gradient is summed over the ranks too: every rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)  # ranks may hold other strides
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over all ranks, differentiably."""
    if world_size() == 1:
        return x
    return _SumOverRanks.apply(x)  # pyright: ignore[reportReturnType]
