"""A layer's training step: forward, backward and update; and the memory that it takes at its peak.

The tokens are always the same, so that after the warm-up all of their moments are there. Ours in both precisions is
one layer. PEER-pytorch's has tables of its own and `torch.optim.Adam`, as its users train it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from myriad import kernels
from myriad.analysis.bench import bounds, peer_pytorch
from myriad.analysis.bench.bounds import Batch
from myriad.analysis.bench.case import Case, calls, difference, gathered_bytes, table_bytes
from myriad.analysis.bench.memory import lack, peak_above
from myriad.analysis.bench.report import BASE, OURS, THEIRS, Contender, Difference, Measurement, absent, compared
from myriad.kernels.table_gradient import sparse_gradient
from myriad.train.optim import build_optimizer
from myriad.train.precision import autocast

LEARNING_RATE = 1e-4
MEMORY_RUNS = 3
NO_PEAK = "this system does not tell the peak of a part of a run"


class Trained(NamedTuple):
    """A layer with its optimizer."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer


class Step:
    """The training step of each contender on the same input and the same gradient of the output."""

    def __init__(self, case: Case, trained: dict[str, Trained]) -> None:
        self.case, self.trained = case, trained
        self.x_TD = case.x_TD.clone().requires_grad_()
        self.grad_TD = torch.randn_like(case.x_TD)

    def __call__(self, contender: Contender) -> None:
        self._backward(contender)
        optimizer = self.trained[contender.who].optimizer
        optimizer.step()
        optimizer.zero_grad()
        self.x_TD.grad = None

    def _backward(self, contender: Contender) -> None:
        with autocast(contender.precision, self.case.device):
            y_TD = self.trained[contender.who].call(self.x_TD)
        y_TD.backward(self.grad_TD)

    def gradients(self, contender: Contender) -> dict[str, Tensor]:
        """Of the input and of every parameter, in PEER-pytorch's layout."""
        self._backward(contender)
        module = self.trained[contender.who].module
        found = {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
        if contender.who == OURS:
            found = peer_pytorch.in_their_layout(self.case.layer.config, found)
        assert self.x_TD.grad is not None
        found["x"] = self.x_TD.grad
        module.zero_grad()
        self.x_TD.grad = None
        return found


def training_step(case: Case) -> Iterator[Measurement]:
    """Time and peak memory of the step."""
    if why := lack(_our_bytes(case), case.device):
        yield from _absent(case, OURS, why)
        return
    why = None if peer_pytorch.installed() else peer_pytorch.ABSENT
    if why := why or lack(_our_bytes(case) + _their_bytes(case), case.device):
        yield from _absent(case, THEIRS, why)
    step = Step(case, _trained(case, with_theirs=why is None))
    contenders = [BASE] if why is None else []
    contenders += [Contender(OURS, precision) for precision in case.precisions]
    yield from _time(step, contenders)
    yield from _peak_memory(step, contenders)


def _our_bytes(case: Case) -> int:
    """What our step needs beside the weights: moments, gradients that may be dense, and what a forward pass holds."""
    config = case.layer.config
    sparse = sparse_gradient(len(case.x_TD), config.heads * config.experts_per_head, config.experts)
    return (2 if sparse else 3) * table_bytes(case.settings, case.side) + gathered_bytes(case.settings)


def _their_bytes(case: Case) -> int:
    """What theirs needs: weights, dense gradients, moments and temporaries of Adam's; gathered rows and their
    gradients."""
    return 5 * table_bytes(case.settings, case.side) + 2 * gathered_bytes(case.settings)


def _trained(case: Case, with_theirs: bool) -> dict[str, Trained]:
    case.layer.train()
    theirs = peer_pytorch.their_layer(case.layer) if with_theirs else None
    by_name = calls(case.layer, theirs)
    optimizer = build_optimizer(case.layer, lr=LEARNING_RATE)
    trained = {OURS: Trained(case.layer, by_name[OURS], optimizer)}
    if theirs is not None:
        adam = torch.optim.Adam(theirs.parameters(), lr=LEARNING_RATE)
        trained[THEIRS] = Trained(theirs, by_name[THEIRS], adam)
    return trained


def _differences(step: Step, contenders: list[Contender]) -> dict[Contender, Difference]:
    """Of the gradients, before any update."""
    with kernels.use("reference"):
        expected = step.gradients(Contender(OURS, "float32"))
    return {contender: difference(step.gradients(contender), expected) for contender in contenders}


def _time(step: Step, contenders: list[Contender]) -> Iterator[Measurement]:
    case = step.case
    differences = _differences(step, contenders)
    batch = Batch(len(case.x_TD), case.distinct(case.x_TD))
    least = case.least(bounds.step_phases(case.layer.config, case.settings.d_model, batch))
    seconds = case.time({contender: partial(step, contender) for contender in contenders})
    yield from compared(
        "layer training step", case.shape, seconds, "ms", scale=1e3, differences=differences, bounds=least
    )


def _peak_memory(step: Step, contenders: list[Contender]) -> Iterator[Measurement]:
    """The peak above what lies there between two steps: weights, moments and input."""
    taken: dict[Contender, list[float]] = {}
    for contender in contenders:
        peaks = [peak_above(partial(step, contender), step.case.device) for _ in range(MEMORY_RUNS)]
        taken[contender] = [peak for peak in peaks if peak is not None]
    if not all(taken.values()):
        yield absent("layer peak memory", step.case.shape, "MB", OURS, NO_PEAK)
        return
    yield from compared("layer peak memory", step.case.shape, taken, "MB", scale=1e-6)


def _absent(case: Case, who: str, why: str) -> Iterator[Measurement]:
    yield absent("layer training step", case.shape, "ms", who, why)
    yield absent("layer peak memory", case.shape, "MB", who, why)
