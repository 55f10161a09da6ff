"""The ways in which a run can be laid out here, and the memory that each takes of a device."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import nn

from myriad.analysis.plan.dry_run import dry_step
from myriad.kernels.rounded_adamw import CHUNK, LARGE_CHUNK
from myriad.kernels.table_gradient import dense_gradients, lone_gradients
from myriad.models import LanguageModel
from myriad.train.optim import freeze, hold_weights
from myriad.train.run import RunConfig

Numbers = Literal["float32", "bfloat16 products", "bfloat16 weights"]
"""Everything in float32; products by autocast in bfloat16 (`train.precision`); everything in bfloat16
(`optim.weights`)."""
BYTES_PER_ROUNDED = 100
"""Temporaries of the rounded update for each number of a chunk."""


class Layout(NamedTuple):
    numbers: Numbers
    activation_checkpointing: bool
    devices: int
    """Processes, each with a device of its own and the whole model, that share every micro-batch."""


def layouts(devices: int) -> Iterator[Layout]:
    """All that a number of devices can do, the fastest of each kind of numbers first."""
    kinds: tuple[Numbers, ...] = ("float32", "bfloat16 products", "bfloat16 weights")
    for numbers in kinds:
        for checkpointing in (False, True):
            yield Layout(numbers, checkpointing, devices)


class Memory(NamedTuple):
    """Bytes of one device; the process's libraries and the device's own are apart."""

    weights: int
    moments: int
    gradients: int
    activations: int
    """Held between the forward and the backward pass of a micro-batch."""
    peak: int
    """The most at any moment. Activations are freed while gradients appear: less than the sum, or more by what the
    backward pass works with."""


def memory_of(run: RunConfig, layout: Layout, device: torch.device) -> Memory:
    """The memory that a run takes of each device.

    Args:
        run: its model knows its vocabulary; precision, weights and activation checkpointing are the layout's.
        layout: the devices must divide the sequences of a micro-batch.
        device: whose operations are counted.
    """
    passes = run.batch.tokens // run.micro_tokens
    alone = passes == layout.devices == 1
    with dense_gradients() if run.train.cuda_graph else lone_gradients(device) if alone else nullcontext():
        step = dry_step(
            lambda: _build(run, layout),
            run.micro_windows // layout.devices,
            run.model.context,
            precision="bfloat16" if layout.numbers == "bfloat16 products" else "float32",
            device=device,
            with_gradients=passes > 1 or layout.devices > 1,
        )
    with torch.device("meta"):
        model = _build(run, layout)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    moments = _moments(model)
    # Gradients of tables count all the time: the CPU's kernels keep their memory from one step to the next; elsewhere
    # it is the most that they add. Over micro-batches rows are put behind rows.
    tables = (passes if step.largest_rows else min(2, passes)) * step.tables
    joined = passes * step.largest_rows if passes > 1 else 0
    gathered = 3 * layout.devices * step.largest_rows if layout.devices > 1 else 0
    update = max(_update(model, device), joined, gathered)
    # What a graph works with stays its own between its replays.
    peak = (step.peak + update if run.train.cuda_graph else max(step.peak, step.gradients + update)) + tables
    return Memory(weights, moments, step.gradients + tables, step.kept, weights + moments + peak)


def _build(run: RunConfig, layout: Layout) -> LanguageModel:
    model = run.model.build()
    hold_weights(model, "bfloat16" if layout.numbers == "bfloat16 weights" else "float32")
    freeze(model, run.optim.frozen)
    model.activation_checkpointing = layout.activation_checkpointing
    return model


def _dense(model: LanguageModel) -> list[nn.Parameter]:
    """Matrices and vectors that are trained."""
    roles = model.roles()
    named = model.named_parameters()
    return [parameter for name, parameter in named if roles[name] != "table" and parameter.requires_grad]


def _moments(model: LanguageModel) -> int:
    """Of all that is trained, tables included: a table has moments for every row from its first step on."""
    roles = model.roles()
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return sum(_moment_bytes(roles[name] == "table", parameter) for name, parameter in trained)


def _moment_bytes(is_table: bool, parameter: nn.Parameter) -> int:
    if is_table and parameter.dtype == torch.bfloat16:
        return parameter.nbytes + 4 * len(parameter)
    return 2 * parameter.nbytes


def _update(model: LanguageModel, device: torch.device) -> int:
    """What the optimizer's step works with, beside weights, moments and gradients.

    PyTorch's fused update needs no room, and neither does the rounded one in Triton; this is the reference's.
    """
    sizes = (parameter.numel() for parameter in _dense(model) if parameter.dtype == torch.bfloat16)
    chunk = CHUNK if device.type == "cpu" else LARGE_CHUNK
    return BYTES_PER_ROUNDED * min(max(sizes, default=0), chunk)
