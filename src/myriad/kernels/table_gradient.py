"""The gradient of a table that was looked up in: dense, or sparse where a batch touches few of its rows.

Legend: `T` tokens, `A` rows looked up by each, `N` rows of the table, `D` width, `U` distinct rows of the batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from myriad.kernels.bags import distinct_row_sums, row_sums

_dense_alone = False


def sparse_gradient(tokens: int, active: int, experts: int) -> bool:
    """Whether the tables' gradients are sparse: when a batch can touch at most half of the rows.

    Decided from the sizes alone, so that every step and every rank decides alike.
    """
    return not _dense_alone and 2 * tokens * active <= experts


@contextmanager
def dense_gradients() -> Iterator[None]:
    """Let the gradients of all lookups inside a `with` block be dense, in every thread of the process.

    A sparse one has a size that only the device knows, which CUDA graphs, whose sizes are fixed, cannot wait for.
    """
    global _dense_alone
    before, _dense_alone = _dense_alone, True
    try:
        yield
    finally:
        _dense_alone = before


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
