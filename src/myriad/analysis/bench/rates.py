"""The rates that lower bounds are counted with, measured on the machine at hand."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from myriad.analysis.bench.report import Rates
from myriad.analysis.bench.timing import interleaved

ROW = 256
"""Width of a gathered row, in float32: that of the benchmark's tables."""
BAG = 128
RUNS = 10
"""Of each rate: one that was slowed by other work would make a bound of what is none."""


def measure_rates(megabytes: int, side: int, device: torch.device) -> Rates:
    """Measure bandwidth and arithmetic; each rate is that of its fastest run.

    Args:
        megabytes: size of the tensors that are moved, many times the caches' size.
        side: of the square matrices that are multiplied.
        device: where.
    """
    if device.type == "cuda":  # which smaller sizes do not keep busy
        megabytes, side = 16 * megabytes, 4 * side
    source = torch.ones(megabytes * 2**20 // (4 * ROW), ROW, device=device)
    target = torch.zeros_like(source)
    moved = source.numel() * 4
    ids = torch.randint(len(source), (len(source) // BAG, BAG), device=device)
    left = torch.randn(side, side, device=device)
    narrow = left.bfloat16()
    runs: dict[str, tuple[float, Callable[[], object]]] = {
        "copy_bytes": (2 * moved, lambda: target.copy_(source)),
        "read_bytes": (moved, source.sum),
        "gather_bytes": (ids.numel() * ROW * 4, lambda: F.embedding_bag(ids, source, mode="sum")),
        "float32_flops": (2 * side**3, lambda: left @ left),
        "bfloat16_flops": (2 * side**3, lambda: narrow @ narrow),
    }
    seconds = interleaved({name: run for name, (_, run) in runs.items()}, repeats=RUNS, warmup=1, device=device)
    return Rates(**{name: amount / min(seconds[name]) for name, (amount, _) in runs.items()})
