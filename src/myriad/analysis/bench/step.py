"""A layer's training step: forward, backward and update.

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
from myriad.analysis.bench.case import Case, call_ours, call_theirs, difference, gathered_bytes, table_bytes
from myriad.analysis.bench.memory import lack
from myriad.analysis.bench.report import BASE, OURS, THEIRS, Contender, Difference, Measurement, absent, compared
from myriad.analysis.bench.settings import BenchConfig
from myriad.ffn.peer import PEER
from myriad.kernels.table_gradient import lone_gradients, sparse_gradient
from myriad.train.optim import build_optimizer
from myriad.train.precision import autocast

LEARNING_RATE = 1e-4


class Trained(NamedTuple):
    """A layer with its optimizer."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer


def our_training(layer: PEER) -> Trained:
    """Ours, with lazy Adam for the tables."""
    return Trained(layer.train(), call_ours(layer), build_optimizer(layer, lr=LEARNING_RATE))


def their_training(layer: PEER, *, share: bool = False) -> Trained:
    """PEER-pytorch's layer with the weights of ours, and dense Adam."""
    theirs = peer_pytorch.their_layer(layer.train(), share=share)
    return Trained(theirs, call_theirs(theirs), torch.optim.Adam(theirs.parameters(), lr=LEARNING_RATE))


class Step:
    """The training step of each contender on the same input and the same gradient of the output."""

    def __init__(self, trained: dict[str, Trained], x_TD: Tensor) -> None:
        self.trained = trained
        self.x_TD = x_TD.clone().requires_grad_()
        self.grad_TD = torch.randn_like(x_TD)

    def __call__(self, contender: Contender) -> None:
        self._backward(contender)
        optimizer = self.trained[contender.who].optimizer
        optimizer.step()
        optimizer.zero_grad()
        self.x_TD.grad = None

    def _backward(self, contender: Contender) -> None:
        device = self.x_TD.device
        with autocast(contender.precision, device), lone_gradients(device):
            y_TD = self.trained[contender.who].call(self.x_TD)
        y_TD.backward(self.grad_TD)

    def gradients(self, contender: Contender) -> dict[str, Tensor]:
        """Of every parameter and of the input, `x`; without an update."""
        self._backward(contender)
        module = self.trained[contender.who].module
        found = {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
        assert self.x_TD.grad is not None
        found["x"] = self.x_TD.grad
        module.zero_grad()
        self.x_TD.grad = None
        return found


def training_step(case: Case) -> Iterator[Measurement]:
    """Those that the memory holds together take turns."""
    what, settings = "layer training step", case.settings
    mine, theirs = our_bytes(settings, case.side, case.device), their_bytes(settings, case.side)
    if why := lack(mine, case.device):
        yield absent(what, case.shape, "ms", OURS, why)
        return
    trained = {OURS: our_training(case.layer)}
    if why := peer_pytorch.missing() or lack(mine + theirs, case.device):
        yield absent(what, case.shape, "ms", THEIRS, why)
    else:
        trained[THEIRS] = their_training(case.layer)
    contenders = [BASE] if THEIRS in trained else []
    contenders += [Contender(OURS, precision) for precision in case.precisions]
    step = Step(trained, case.x_TD)
    differences = _differences(step, contenders, case.layer)
    batch = Batch(len(case.x_TD), case.distinct(case.x_TD))
    least = case.least(bounds.step_phases(case.layer.config, settings.d_model, batch))
    seconds = case.time({contender: partial(step, contender) for contender in contenders})
    yield from compared(what, case.shape, seconds, "ms", scale=1e3, differences=differences, bounds=least)


def _differences(step: Step, contenders: list[Contender], layer: PEER) -> dict[Contender, Difference]:
    """Of the gradients, before any update."""

    def gradients(contender: Contender) -> dict[str, Tensor]:
        found = step.gradients(contender)
        if contender.who == THEIRS:
            return found
        return {"x": found.pop("x"), **peer_pytorch.in_their_layout(layer.config, found)}

    with kernels.use("reference"):
        expected = gradients(Contender(OURS, "float32"))
    return {contender: difference(gradients(contender), expected) for contender in contenders}


def our_bytes(settings: BenchConfig, side: int, device: torch.device) -> int:
    """What our step needs beside the weights: moments, gradients that may be dense, and what a forward pass holds."""
    with lone_gradients(device):
        sparse = sparse_gradient(settings.tokens, settings.heads * settings.experts_per_head, side**2)
    return (2 if sparse else 3) * table_bytes(settings, side) + gathered_bytes(settings)


def their_bytes(settings: BenchConfig, side: int) -> int:
    """What theirs needs: weights, dense gradients, moments and temporaries of Adam's; gathered rows and their
    gradients."""
    return 5 * table_bytes(settings, side) + 2 * gathered_bytes(settings)
