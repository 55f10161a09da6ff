"""Runs that take turns, so that what the machine does meanwhile falls on all alike."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

PAUSE = 0.002
"""Seconds before a run in which the threads of another library's pool stop spinning for work."""

CLOCK = 1e-9
"""Seconds that a run takes at least: clocks have been seen to stand still."""

K = TypeVar("K")


def interleaved(
    runs: Mapping[K, Callable[[], object]], *, repeats: int, warmup: int, device: torch.device
) -> dict[K, list[float]]:
    """The seconds of each run, which take turns of two, of which the second is timed.

    So a timed run follows one of its own, as a training step does: after another's run its data are in no cache, and
    what that one gave back to the system has to be had anew.

    Args:
        runs: key -> what to time.
        repeats: how often each is timed.
        warmup: how often each is run before: first calls compile, allocate and fill caches.
        device: waited for before and after each run.
    """
    seconds: dict[K, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        for _ in range(warmup):
            run()
    with _without_collector():
        for _ in range(repeats):
            for key, run in runs.items():
                seconds[key].append(_seconds(run, device))
    return seconds


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    wait_for(device)
    time.sleep(PAUSE)
    start = time.perf_counter()
    run()
    wait_for(device)
    return max(CLOCK, time.perf_counter() - start)


def wait_for(device: torch.device) -> None:
    """Let what was given to an accelerator end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _without_collector() -> Iterator[None]:
    """No garbage collection in the middle of a run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
