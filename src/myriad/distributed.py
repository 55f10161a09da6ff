"""Many processes behind a few functions; one process is the trivial case.

- `joined` joins the processes that a launcher such as torchrun started. Library code that runs in a process
  group of the user's own needs no more than the group: the functions follow it.
- `once` does something in one process while the others wait; `share`, `total` and `total_rows` exchange tensors.
- `all_reduce_sum` is differentiable, for statistics that every process's loss depends on.

Processes fail together: the first to end by an error says why, the others end without a word.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from myriad.config import MyriadError, RunError

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and its like tell every process."""


class ToldElsewhere(RunError):
    """Another process has said what went wrong."""


def rank() -> int:
    """This process's number, 0 when there is one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def device() -> torch.device:
    """Where this process computes: its own CUDA device where there are any, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank() % torch.cuda.device_count())))


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that a launcher started, while the block lasts; alone, or in a group already, do nothing.

    Raises:
        ToldElsewhere: the block failed, and another process has said why.
        RunError: another process of the run has ended.
    """
    launched = all(name in os.environ for name in LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1
    starts = launched and dist.is_available() and not dist.is_initialized()
    if starts:
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    except BaseException as error:
        if starts:
            _speak_once(error)
        raise
    if starts:
        dist.destroy_process_group()


def _speak_once(error: BaseException) -> None:
    """Let an error pass in the process that fails first; raise another in its place in those that fail with it."""
    try:
        first = _store().add("myriad/failures", 1) == 1
    except Exception:  # the process that kept the store is gone
        first = True
    if not first:
        raise ToldElsewhere("") from None
    if _is_lost_contact(error):
        raise RunError(
            "another process of this run has ended, so this one ends too; the last checkpoint is kept, and "
            "--resume goes on from it"
        ) from None


def _is_lost_contact(error: BaseException) -> bool:
    named = re.search(r"gloo|nccl|connection (closed|reset)|broken pipe", str(error), re.IGNORECASE)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and named is not None)


def _store() -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """The key-value store through which the group was formed. PyTorch has no public name for it."""
    return dist.distributed_c10d._get_default_store()


T = TypeVar("T")
_occasions = itertools.count()


def once(action: Callable[[], T]) -> T:
    """Do something in the first process while the others wait, however long it takes.

    Args:
        action: returns what JSON can carry.

    Returns:
        what the action returned, in every process.

    Raises:
        MyriadError: what the action raised; the others raise one of the same text.
    """
    if world_size() == 1:
        return action()
    key = f"myriad/once/{next(_occasions)}"
    if rank() == 0:
        return _do_and_tell(action, key)
    while True:  # a collective would time out
        try:
            _store().wait([key], timedelta(minutes=1))
            break
        except dist.DistStoreError:
            continue
    told = json.loads(_store().get(key))
    if "error" in told:
        raise MyriadError(told["error"])
    return told["result"]


def _do_and_tell(action: Callable[[], T], key: str) -> T:
    try:
        result = action()
    except BaseException as error:
        _store().set(key, json.dumps({"error": str(error) or type(error).__name__}))
        raise
    _store().set(key, json.dumps({"result": result}))
    return result


def share(tensors: Sequence[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def total(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of tensors over all processes, in one exchange for each dtype."""
    if world_size() == 1 or not tensors:
        return list(tensors)
    sums = list(tensors)
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[place].reshape(-1) for place in places])
        dist.all_reduce(flat)
        parts = flat.split([tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            sums[place] = part.view(tensors[place].shape)
    return sums


def total_rows(rows_ND: Tensor) -> Tensor:
    """The sum over all processes of tables: dense ones in place, sparse ones (coalesced) as (ids, rows).

    The same in every process, to the last bit.
    """
    if world_size() == 1:
        return rows_ND
    if rows_ND.layout != torch.sparse_coo:
        dist.all_reduce(rows_ND)
        return rows_ND
    rows_ND = rows_ND.coalesce()
    ids = torch.cat(_gather(rows_ND.indices()[0]))
    rows = torch.cat(_gather(rows_ND.values()))
    return torch.sparse_coo_tensor(ids.unsqueeze(0), rows, rows_ND.shape, check_invariants=False).coalesce()


def _gather(mine: Tensor) -> list[Tensor]:
    """Every process's tensor, of lengths that may differ, in order."""
    length = torch.tensor([len(mine)], device=mine.device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    counts = [int(count) for count in lengths]
    padded = mine.new_zeros(max(counts), *mine.shape[1:])
    padded[: len(mine)] = mine
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    return [part[:count] for part, count in zip(found, counts, strict=True)]


class _SumOverRanks(torch.autograd.Function):
    """Its gradient is summed over the ranks too: every rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)  # ranks may hold other strides
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over all ranks, differentiably."""
    if world_size() == 1:
        return x
    return _SumOverRanks.apply(x)  # pyright: ignore[reportReturnType]
