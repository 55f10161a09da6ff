"""What a forward and backward pass would hold, from running it on tensors that have shapes and no values.

The model's own code says what autograd keeps, for every kind of model and of layer, those of users included: nothing is
estimated that PyTorch knows. Not seen are scratch arrays inside of kernels, and libraries.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from myriad.kernels.table_gradient import sparse_gradient
from myriad.models import LanguageModel
from myriad.train.precision import Precision, autocast

TABLE_GRADIENTS: dict[str, Callable[[tuple[Any, ...]], tuple[Tensor, int]]] = {
    "myriad::expert_lookup_backward": lambda arguments: (arguments[2], len(arguments[4])),
    "myriad::value_lookup_backward": lambda arguments: (arguments[1], len(arguments[3])),
}
"""Ops that return gradients of tables: arguments -> the ids looked up, (T, A), and the rows of the table."""


class DryStep(NamedTuple):
    """Bytes of a micro-batch's forward and backward pass."""

    kept: int
    """Held between the forward and the backward pass, beyond what was there before: activations, and copies of weights
    that autocast made."""
    gradients: int
    """Of matrices and vectors."""
    tables: int
    """Gradients of tables; of sparse ones the most that they can be."""
    largest_rows: int
    """Of one table's sparse gradient."""
    peak: int
    """The most held beyond weights and gradients of tables."""


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest_rows = self.tables = 0
        self._held: dict[int, tuple[weakref.ref[Any], int]] = {}

    def add(self, tensor: Tensor, size: int | None = None) -> None:
        """Count a tensor, if its memory is not counted yet."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._held:
            size = storage.nbytes() if size is None else size
            self._held[key] = weakref.ref(storage, lambda _: self._drop(key)), size
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._held.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in TABLE_GRADIENTS:
            self._add_table_gradients(*TABLE_GRADIENTS[func.name()](args), result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def _add_table_gradients(self, ids_TA: Tensor, rows: int, results: tuple[Tensor, ...]) -> None:
        """Count gradients of tables apart. A dry run makes all of them dense: those that would be sparse count as
        their ids and rows."""
        tokens, active = ids_TA.shape
        for result in results:
            if result.ndim == 2 and len(result) == rows:
                self.add(result, 0)
                if sparse_gradient(tokens, active, rows):
                    size = min(tokens * active, rows) * (result.shape[1] * result.element_size() + 8)
                    self.largest_rows = max(self.largest_rows, size)
                else:
                    size = result.nbytes
                self.tables += size


def dry_step(
    build: Callable[[], LanguageModel],
    sequences: int,
    length: int,
    *,
    precision: Precision = "float32",
    device: torch.device | None = None,
    with_gradients: bool = False,
) -> DryStep:
    """Run a micro-batch on nothing.

    Args:
        build: makes the model in training; called where tensors take no memory.
        sequences, length: of a micro-batch.
        precision: `bfloat16` is autocast.
        device: whose operations are run; None: the CPU's.
        with_gradients: whether those of matrices and vectors are there before, of an earlier micro-batch or in
            DistributedDataParallel's buckets.
    """
    device = device or torch.device("cpu")
    with torch.device("meta"):
        model = build()
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        model = model.to_empty(device=device).train()
        before = _count_only(live, model)
        if with_gradients:
            _make_gradients(model)
        kept = _pass(live, model, torch.zeros(sequences, length, dtype=torch.int64, device=device), precision)
        return DryStep(kept, live.now - before, live.tables, live.largest_rows, live.peak - before)


def _count_only(live: LiveBytes, model: nn.Module) -> int:
    """Forget what making the model took; the bytes of its parameters and buffers."""
    for tensor in (*model.parameters(), *model.buffers()):
        live.add(tensor)
    live.peak = live.now
    return live.now


def _make_gradients(model: LanguageModel) -> None:
    roles = model.roles()
    for name, parameter in model.named_parameters():
        if roles[name] != "table" and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def _pass(live: LiveBytes, model: LanguageModel, ids: Tensor, precision: Precision) -> int:
    """A forward and a backward pass; what was held between them."""
    before = live.now
    with autocast(precision, ids.device):
        output = model(ids, targets=ids)
    assert output.loss is not None
    kept = live.now - before
    (output.loss / ids.numel() + output.aux_loss).backward()
    return kept
