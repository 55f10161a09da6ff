"""Calls of the Numba forms on several numbers of threads."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from myriad.kernels import use


def on_threads(counts: Iterable[int], call: Callable[[], Any]) -> list[Any]:
    """What a call of the Numba forms gives on each number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            with use("numba"):
                results.append(call())
    finally:
        torch.set_num_threads(before)
    return results
