"""Data parallelism: every process holds the model and sees its share of each batch.

Dense parameters go through DistributedDataParallel. Tables stay outside: their gradients are (ids, rows), or whole
tables, that are summed when the step's last backward pass is done. All sums, no means: the loss that a process
takes gradients of is already divided by the whole step's targets.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from myriad import distributed
from myriad.models import LanguageModel, LMOutput


class Replica:
    """A process's copy of a model in training; one process alone has the model itself.

    Args:
        model: the same in every process; parameters and buffers are made equal to the first's.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._module: nn.Module = model
        if distributed.world_size() > 1:
            distributed.share([*model.parameters(), *model.buffers()])
            tables = [name for name, role in model.roles().items() if role == "table"]
            # Buffers need no exchange: running statistics are updated from the same sums everywhere.
            self._module = _in_parallel(model, [*tables, *(name for name, _ in model.named_buffers())])

    def __call__(self, ids: Tensor, targets: Tensor) -> LMOutput:
        return self._module(ids, targets=targets)

    def settle(self, ids: Tensor, targets: Tensor) -> None:
        """Go through a backward pass that changes nothing.

        The first one makes DistributedDataParallel lay out its buckets anew. Without this, a resumed run would add
        some gradients in another order than one that was not stopped.
        """
        if isinstance(self._module, DistributedDataParallel):
            output = self(ids, targets)
            assert output.loss is not None
            (output.loss + output.aux_loss).backward()
            self._module.zero_grad(set_to_none=True)

    def collecting(self, *, last: bool) -> AbstractContextManager[None]:
        """The context of one of a step's micro-batches: gradients are exchanged with the last one's."""
        if isinstance(self._module, DistributedDataParallel) and not last:
            return self._module.no_sync()
        return nullcontext()

    def total_tables(self) -> None:
        """Sum the tables' gradients over all processes."""
        for table in self._tables():
            if table.grad is not None:
                table.grad = distributed.total_rows(table.grad)

    def _tables(self) -> Iterator[nn.Parameter]:
        roles = self._model.roles()
        return (parameter for name, parameter in self._model.named_parameters() if roles[name] == "table")


def _in_parallel(model: LanguageModel, left_out: list[str]) -> DistributedDataParallel:
    # PyTorch's only way to leave parameters out; it has no public name.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left_out)
    module = DistributedDataParallel(model, gradient_as_bucket_view=True)
    module.register_comm_hook(None, _sum_bucket)
    return module


def _sum_bucket(
    _: None,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[Tensor]:
    reduced = dist.all_reduce(bucket.buffer(), async_op=True)
    assert reduced is not None
    return reduced.get_future().then(lambda future: future.value()[0])
