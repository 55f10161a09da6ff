"""Passes captured once as CUDA graphs and replayed: a small micro-batch need not wait for thousands of launches.

What is captured are the launched passes themselves, so that a replay runs the same kernels in the same order. Its
tensors lie where they lay when it was captured:

- ids and targets are copied to where the graph reads them, and results are copied from where it leaves them.
- gradients are written by one graph, the step's first. Where a step has several micro-batches, a second graph adds to
  the same tensors. Putting gradients away (`zero_grad(set_to_none=True)`) starts a new step.
- parameters and buffers are read where they are: whatever changes them does so in place.
- random numbers are drawn from the seed that is set when a graph is replayed.

Gradients of tables are dense whatever their sizes, since a sparse one waits for the device to count its rows.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from myriad.config import ConfigError
from myriad.kernels.table_gradient import dense_gradients
from myriad.train.passes import ForwardBackward, PassOutput

REHEARSALS = 3
"""Passes before the first capture: libraries set themselves up, and kernels are compiled. The first writes gradients,
the others add to them, so that both have been done."""


class Recording(NamedTuple):
    """A captured pass."""

    replay: Callable[[], None]
    output: PassOutput
    """Where each replay leaves its results."""


class Recorder(Protocol):
    """Captures what functions do on a device."""

    def aside(self) -> AbstractContextManager[None]:
        """The context of rehearsals and captures."""
        ...

    def record(self, function: Callable[[], PassOutput]) -> Recording:
        """Capture a function, which is called once; those captured later know the tensors of those before."""
        ...


class CudaGraphs:
    """Captures on a stream of its own, into one pool of memory.

    Recordings share the pool: they must not be replayed side by side.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, function: Callable[[], PassOutput]) -> Recording:
        """Capture a function that launches kernels.

        Raises:
            ConfigError: it waits for the device, or does something else that cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                output = function()
        except RuntimeError as error:
            # A capture that failed cannot be ended either: the second error would hide the first.
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            reason = (str(first).splitlines() or [""])[0]
            raise ConfigError(
                "train.cuda_graph: this model's passes cannot be captured, since something in them waits for the "
                f"device or copies from the CPU ({reason})"
            ) from first
        return Recording(graph.replay, output)


class Captured:
    """Passes that are captured when this is made, and replayed from then on.

    Args:
        launched: what is captured. Autocast, if there is any, begins and ends in it: the copies of weights that it
            keeps are then made anew by every replay.
        ids, targets: a micro-batch on the model's device; all others have its shape.
        parameters: the model's; their gradients are put away.
        recorder: captures.
        accumulates: whether a step has several micro-batches.

    Raises:
        ConfigError: the passes cannot be captured, or leave sparse gradients.
    """

    def __init__(
        self,
        launched: ForwardBackward,
        ids: Tensor,
        targets: Tensor,
        parameters: Iterable[nn.Parameter],
        recorder: Recorder,
        *,
        accumulates: bool,
    ) -> None:
        self._ids, self._targets = ids.clone(), targets.clone()
        parameters = list(parameters)

        def go_through() -> PassOutput:
            return launched(self._ids, self._targets)

        with dense_gradients(), recorder.aside():
            for _ in range(REHEARSALS):
                go_through()
            _put_away_gradients(parameters)
            self._writes = recorder.record(go_through)
            self._gradients = _gradients_of(parameters)
            self._adds = recorder.record(go_through) if accumulates else None
        _put_away_gradients(parameters)

    def __call__(self, ids: Tensor, targets: Tensor) -> PassOutput:
        """Replay the passes on another micro-batch.

        Raises:
            ValueError: it has another shape, or it is one too many for its step.
        """
        if not ids.shape == targets.shape == self._ids.shape:
            raise ValueError(
                f"captured for micro-batches of shape {tuple(self._ids.shape)}, not {tuple(ids.shape)} and "
                f"{tuple(targets.shape)}"
            )
        recording = self._next()
        self._ids.copy_(ids, non_blocking=True)
        self._targets.copy_(targets, non_blocking=True)
        recording.replay()
        return _copy(recording.output)

    def _next(self) -> Recording:
        """The recording that writes gradients, which it brings back, or the one that adds to those that are there."""
        if next(iter(self._gradients)).grad is None:
            for parameter, gradient in self._gradients.items():
                parameter.grad = gradient
            return self._writes
        if self._adds is None:
            raise ValueError("captured for steps of one micro-batch; put gradients away before the next")
        return self._adds


def _put_away_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _gradients_of(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The gradients that there are."""
    gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    if any(gradient.layout != torch.strided for gradient in gradients.values()):
        raise ConfigError("train.cuda_graph: this model has sparse gradients, to which a graph cannot add in place")
    return gradients


def _copy(output: PassOutput) -> PassOutput:
    """Results where the next replay does not reach them."""
    loads = tuple({name: value.clone() for name, value in load.items()} for load in output.loads)
    return PassOutput(output.loss.clone(), output.aux_loss.clone(), loads)
