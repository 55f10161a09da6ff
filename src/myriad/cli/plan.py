"""`myriad plan`: what a run would take, before it is tried."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from myriad.analysis.plan import Line, Machine, Plan

PREFIXES = {
    "": 1,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
WIDTH = 140
"""Columns where the output is no terminal."""


def plan(
    target: str = typer.Argument(metavar="PRESET|CONFIG.yaml|RUN", help="What would be trained."),
    overrides: list[str] = typer.Argument(None, metavar="[key.path=value ...]", help="Settings to change."),
    devices: int = typer.Option(1, min=1, help="Processes with a device each that share every micro-batch."),
    memory: str = typer.Option(None, metavar="80GB", help="Memory of a device; default: what is free here."),
    flops: str = typer.Option(None, metavar="990TFLOPS", help="Peak of a device, for the time that training takes."),
    bandwidth: str = typer.Option(None, metavar="4.8TB/s", help="Of a device's memory, for the time of updates."),
    utilisation: float = typer.Option(0.4, help="Share of the peak that is reached: an assumption."),
    tokens: str = typer.Option(None, metavar="200e9", help="Training tokens; default: the run's own budget."),
    json: Path = typer.Option(None, metavar="FILE", help="Also write all figures as JSON."),
) -> None:
    """Count parameters, memory under every layout, and time. Nothing is trained, and no weights are made."""
    from rich.console import Console

    from myriad.analysis.plan import make_plan
    from myriad.cli.train import resolve_run
    from myriad.distributed import device

    run, name = resolve_run(target, overrides or [])
    machine = _machine(memory, flops, bandwidth, utilisation)
    found = make_plan(run, machine, devices=devices, tokens=_count("--tokens", tokens), device=device())
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    for line in _head(name, found):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_table(found))
    if json is not None:
        _write(json, found)
        console.print(f"{json}: written", markup=False, soft_wrap=True)


def _machine(memory: str | None, flops: str | None, bandwidth: str | None, utilisation: float) -> Machine:
    from myriad.analysis.bench.memory import available_bytes
    from myriad.analysis.plan import Machine
    from myriad.config import validate
    from myriad.distributed import device

    return validate(
        Machine,
        {
            "memory": available_bytes(device()) if memory is None else _quantity("--memory", memory, "B", "80GB"),
            "flops": None if flops is None else _quantity("--flops", flops, "FLOPS", "990TFLOPS"),
            "bandwidth": None if bandwidth is None else _quantity("--bandwidth", bandwidth, "B/s", "4.8TB/s"),
            "utilisation": utilisation,
        },
    )


def _quantity(option: str, text: str, unit: str, example: str) -> float:
    """A number with its unit.

    Raises:
        ConfigError: not one, or without the unit.
    """
    from myriad.config import ConfigError

    found = re.fullmatch(rf"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kMGTP]|[KMGT]i|){re.escape(unit)}", text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"{option}: expected a number with its unit, such as {example}, found '{text}'")
    return float(found[1]) * PREFIXES[found[2]]


def _count(option: str, text: str | None) -> int | None:
    from myriad.config import ConfigError

    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (1 <= value < 1e18 and value == int(value)):
        raise ConfigError(f"{option}: expected a number of tokens, such as 200e9, found '{text}'")
    return int(value)


def _head(name: str, found: Plan) -> Iterator[str]:
    """What is counted, and what is assumed."""
    machine = found.machine
    yield f"{name}: {found.parameters:,} parameters, {found.active_parameters:,} of them active for a token"
    yield (
        f"{found.tokens_per_step:,} tokens a step, {found.micro_tokens:,} at once on a device; "
        f"{found.flops_per_token:.3g} FLOPs per token forward, three times as many in training, "
        "four times with activation checkpointing"
    )
    if machine.memory is not None:
        yield f"memory of a device: {machine.memory / 1e9:,.1f} GB; libraries and the device's own take some of it"
    if machine.flops is None:
        yield "no --flops: no times"
        return
    yield f"times at {machine.utilisation:.0%} of {machine.flops / 1e12:,.0f} TFLOPS, which is assumed, not measured"
    yield "no budget in tokens: no days" if found.tokens is None else f"budget: {found.tokens:,} tokens"


def _table(found: Plan) -> Table:
    from rich import box
    from rich.table import Table

    devices = found.lines[0].devices
    title = None if devices == 1 else f"each of {devices} devices, data parallel"
    table = Table("numbers", "activation checkpointing", title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("weights", "moments", "gradients", "activations", "peak", "fits", "tokens/s", "days"):
        table.add_column(column, justify="right")
    for line in found.lines:
        sizes = (line.weights, line.moments, line.gradients, line.activations, line.peak)
        table.add_row(
            line.numbers,
            "on" if line.activation_checkpointing else "off",
            *(_bytes(size) for size in sizes),
            _verdict(line),
            "" if line.tokens_per_second is None else f"{line.tokens_per_second:,.0f}",
            "" if line.days is None else f"{line.days:,.1f}" if line.days >= 1 else f"{line.days:.2g}",
        )
    return table


def _verdict(line: Line) -> str:
    if line.missing is None:
        return "unknown"
    return f"{_bytes(line.missing)} too large" if line.missing else "yes"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def _write(path: Path, found: Plan) -> None:
    from myriad.checkpoint import naming

    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        path.write_text(found.model_dump_json(indent=1) + "\n")
