"""The whole benchmark: the machine's rates, then each size of the layer, then whole models."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from myriad import __version__, distributed, kernels
from myriad.analysis.bench.layer import measure_layer
from myriad.analysis.bench.model import measure_model
from myriad.analysis.bench.rates import measure_rates
from myriad.analysis.bench.report import THEIRS, Measurement, Rates, Report, with_growth
from myriad.analysis.bench.settings import BenchConfig, ModelShape
from myriad.kernels.hardware import processor


def run_bench(
    settings: BenchConfig, models: Sequence[ModelShape], say: Callable[[str], None] = lambda stage: None
) -> Report:
    """Measure all that the settings ask for.

    Args:
        settings: sizes and numbers of runs.
        models: the whole models, measured if the settings ask for them.
        say: called with each stage that begins.

    Raises:
        KernelError: the kernels that were asked for cannot run here.
    """
    device = distributed.device()
    with kernels.use(settings.kernels):
        chosen = kernels.choices(device.type)
        say("bandwidth and arithmetic of this machine")
        rates = measure_rates(settings.megabytes, settings.matrix, device)
        found = list(_measure(settings, models, rates, device, say))
    return Report(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        processor=processor(),
        threads=torch.get_num_threads(),
        versions=versions(),
        kernels=chosen,
        settings=settings.model_dump(mode="json"),
        models=[shape.model_dump(mode="json") for shape in models] if "model" in settings.parts else [],
        rates=rates,
        measurements=with_growth(found),
    )


def _measure(
    settings: BenchConfig,
    models: Sequence[ModelShape],
    rates: Rates,
    device: torch.device,
    say: Callable[[str], None],
) -> Iterator[Measurement]:
    for side in sorted(settings.sides):
        yield from measure_layer(settings, side, rates, device, say)
    for shape in models if "model" in settings.parts else ():
        yield from measure_model(shape, settings, rates, device, say)


def versions() -> dict[str, str | None]:
    """Of all that computes here."""
    found: dict[str, str | None] = {"myriad": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "numba", "triton", THEIRS):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
