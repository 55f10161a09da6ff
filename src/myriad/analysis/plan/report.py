"""A plan: what a run takes under every layout, what of it fits, and how long it would last."""

import torch
from pydantic import Field
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from myriad.analysis.plan.layouts import Layout, Memory, Numbers, layouts, memory_of
from myriad.config import Config, ConfigError, RunError
from myriad.train.run import RunConfig


class Machine(Config):
    """A device, as it is planned with; what is not known is None."""

    memory: float | None = Field(default=None, gt=0)
    """Bytes."""
    flops: float | None = Field(default=None, gt=0)
    """Peak floating point operations a second, of the numbers that are planned with."""
    bandwidth: float | None = Field(default=None, gt=0)
    """Bytes a second to and from its memory."""
    utilisation: float = Field(default=0.4, gt=0, le=1)
    """Share of the peak that is reached, an assumption."""


class Line(Config):
    """A layout."""

    numbers: Numbers
    activation_checkpointing: bool
    devices: int
    weights: int
    moments: int
    gradients: int
    activations: int
    peak: int
    """Bytes of a device, as in `Memory`."""
    missing: int | None
    """By how much the peak exceeds the memory, zero where it fits; None: the memory is not known."""
    training_flops_per_token: int
    tokens_per_second: float | None
    days: float | None


class Plan(Config):
    """What `myriad plan --json` writes."""

    parameters: int
    active_parameters: int
    flops_per_token: int
    """Of a forward pass."""
    tokens_per_step: int
    micro_tokens: int
    """Computed at once by a device."""
    tokens: int | None
    """The budget."""
    machine: Machine
    operations: str
    """The type of device whose operations were counted."""
    lines: list[Line]


def make_plan(
    run: RunConfig, machine: Machine, *, devices: int = 1, tokens: int | None = None, device: torch.device | None = None
) -> Plan:
    """Count a run under every layout of a number of devices.

    Args:
        run: what to train.
        machine: one of the devices.
        devices: how many share every micro-batch.
        tokens: the budget; None: the run's, if it is known without data.
        device: whose operations are counted; None: the CPU's.

    Raises:
        ConfigError: the vocabulary is not known, or the devices cannot share a micro-batch.
        RunError: the model cannot be run without values.
    """
    run.model.vocabulary  # noqa: B018 (says what is missing)
    _refuse_uneven_shares(run, devices)
    device = device or torch.device("cpu")
    tokens = tokens or run.budget.tokens or (run.budget.steps or 0) * run.batch.tokens or None
    cost = run.model.cost()
    lines = []
    for layout in layouts(devices):
        memory = _memory_of(run, layout, device)
        flops = (4 if layout.activation_checkpointing else 3) * cost.flops
        speed = _tokens_per_second(run, machine, devices, flops, memory)
        lines.append(
            Line(
                **layout._asdict(),
                **memory._asdict(),
                missing=None if machine.memory is None else max(0, round(memory.peak - machine.memory)),
                training_flops_per_token=flops,
                tokens_per_second=speed,
                days=None if speed is None or tokens is None else tokens / speed / 86_400,
            )
        )
    return Plan(
        parameters=cost.parameters,
        active_parameters=cost.active_parameters,
        flops_per_token=cost.flops,
        tokens_per_step=run.batch.tokens,
        micro_tokens=run.micro_tokens // devices,
        tokens=tokens,
        machine=machine,
        operations=device.type,
        lines=lines,
    )


def _refuse_uneven_shares(run: RunConfig, devices: int) -> None:
    if run.micro_windows % devices:
        raise ConfigError(
            f"--devices: {run.micro_windows} sequences computed at once ({run.micro_tokens} tokens at a context of "
            f"{run.model.context}) cannot be shared by {devices}"
        )


def _memory_of(run: RunConfig, layout: Layout, device: torch.device) -> Memory:
    try:
        return memory_of(run, layout, device)
    except (DataDependentOutputException, DynamicOutputShapeException, NotImplementedError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise RunError(f"model: cannot be counted without values, which decide what it holds ({first})") from None


def _tokens_per_second(run: RunConfig, machine: Machine, devices: int, flops: int, memory: Memory) -> float | None:
    """At the stated utilisation; an update moves every gradient, and its weight and moments twice."""
    if machine.flops is None:
        return None
    seconds = run.batch.tokens * flops / (devices * machine.flops * machine.utilisation)
    if machine.bandwidth is not None:
        lasting = (memory.weights + memory.moments) / memory.weights
        seconds += (1 + 2 * lasting) * memory.gradients / machine.bandwidth
    return run.batch.tokens / seconds
