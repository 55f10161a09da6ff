"""Dry runs: a step on tensors that have shapes and no values, which tells what it would hold."""

from torch import Tensor
from torch._subclasses import FakeTensor


def is_dry(x: Tensor) -> bool:
    """Whether a tensor has no values, so that sizes which values decide cannot be known: the most is taken."""
    return isinstance(x, FakeTensor)
