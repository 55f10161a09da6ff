"""Ranges of a kernel's work on several threads.

Kernels release the GIL, and take the range that they work on as their first two arguments. Python's own threads
carry them: they need no OpenMP runtime beside PyTorch's (two of them would wait for work on the same cores), and
any number of threads may call at once.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

PIECES_PER_THREAD = 4
"""Ranges that a thread works through, so that one that is held up does not hold up all."""


def in_parallel(kernel: Callable[..., None], count: int, *arguments: Any, grain: int) -> None:
    """Call kernel(start, stop, *arguments) on ranges that together are range(count).

    Args:
        grain: the smallest range worth a thread of its own; ranges begin at multiples of it.
    """
    threads = torch.get_num_threads()
    pieces = min(threads * PIECES_PER_THREAD, -(-count // grain))
    if pieces <= 1 or threads == 1:
        kernel(0, count, *arguments)
        return
    step = -(-count // (pieces * grain)) * grain
    starts = range(0, count, step)
    left = iter(starts)

    def work() -> None:
        for start in left:
            kernel(start, min(start + step, count), *arguments)

    helpers = [_pool(os.getpid(), threads - 1).submit(work) for _ in range(min(threads, len(starts)) - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            helper.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Idle threads; a forked process has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="myriad-kernels")
