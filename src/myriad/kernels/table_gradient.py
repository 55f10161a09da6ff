"""The gradient of a table that was looked up in: dense, or sparse where a batch touches few of its rows.

Legend: `T` tokens, `A` rows looked up by each, `N` rows of the table, `D` width, `U` distinct rows of the batch.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from myriad.kernels.bags import distinct_row_sums, row_sums

NEVER, HALF, TWICE = -1.0, 0.5, 2.0
"""Up to how many entries for each row of a table its gradient is sparse."""

_most_entries = HALF


def sparse_gradient(tokens: int, active: int, experts: int) -> bool:
    """Whether the tables' gradients are sparse: when a batch can touch at most half of the rows, or as
    `dense_gradients` and `lone_gradients` have it.

    Decided from the sizes alone, so that every step and every rank decides alike.
    """
    return tokens * active <= _most_entries * experts


def dense_gradients() -> AbstractContextManager[None]:
    """Let the gradients of all lookups inside a `with` block be dense, in every thread of the process.

    A sparse one has a size that only the device knows, which CUDA graphs, whose sizes are fixed, cannot wait for.
    """
    return _sparse_up_to(NEVER)


def lone_gradients(device: torch.device) -> AbstractContextManager[None]:
    """Let the gradients of all lookups inside a `with` block be sparse up to two entries for each row of a table, on a
    CPU and where they need not be dense.

    For gradients that are neither added to others nor exchanged: unused rows of dense ones would be written, read for
    the norm and read again for the update. But rows of several sparse ones lie behind each other until they are added
    up, and are gathered from every process.
    """
    return _sparse_up_to(TWICE) if device.type == "cpu" and _most_entries != NEVER else nullcontext()


@contextmanager
def _sparse_up_to(entries: float) -> Iterator[None]:
    global _most_entries
    before, _most_entries = _most_entries, entries
    try:
        yield
    finally:
        _most_entries = before


def table_gradient(
    table_ND: Tensor, ids_TA: Tensor, coefficients_TA: Tensor, source_TD: Tensor, sparse: bool
) -> tuple[Tensor, Tensor]:
    """The reference: for every row n, the sum over its entries of coefficients[t, a] * source[t].

    Returns:
        ids of shape (U,), increasing, and rows of shape (U, D), or no ids and all rows, in the table's dtype.
    """
    source_TD = source_TD.to(coefficients_TA.dtype)
    if sparse:
        ids_U, rows_UD = distinct_row_sums(len(table_ND), ids_TA, coefficients_TA, source_TD)
        return ids_U, rows_UD.to(table_ND.dtype)
    return ids_TA.new_empty(0), row_sums(len(table_ND), ids_TA, coefficients_TA, source_TD).to(table_ND.dtype)


def as_sparse(ids_U: Tensor, rows_UD: Tensor, table_ND: Tensor) -> Tensor:
    """A coalesced sparse tensor of the table's shape."""
    return torch.sparse_coo_tensor(
        ids_U.unsqueeze(0), rows_UD, table_ND.shape, check_invariants=False, is_coalesced=True
    )


def coalesced(grad_ND: Tensor) -> Tensor:
    """A sparse gradient with increasing ids.

    Accumulating into `.grad` forgets that a gradient was coalesced already; looking at the ids is far cheaper than
    sorting them and copying the rows again.
    """
    ids_U = grad_ND._indices()[0]
    if not grad_ND.is_coalesced() and bool((ids_U[1:] > ids_U[:-1]).all()):
        return grad_ND._coalesced_(True)
    return grad_ND.coalesce()


def check_ids(ids: Tensor, rows: int) -> None:
    """Refuse ids outside a table; only on the CPU: on an accelerator the look would wait for the device.

    Raises:
        IndexError: an id outside the table.
    """
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= rows:
            raise IndexError(f"ids must lie between 0 and {rows - 1}; found {low} to {high}")
