"""The three sums that lookups in tables are made of, in PyTorch's embedding bags.

Legend: `M` bags, `A` entries a bag, `N` rows of the table, `D` width, `U` distinct rows.
A bag sum reads each row and adds it where it stands, so that nothing of size M x A x D is ever held.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bag_sum(table_ND: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> Tensor:
    """out[m] = sum over a of weights[m, a] * table[ids[m, a]], of shape (M, D) and the table's dtype."""
    if ids_MA.numel() == 0:
        return table_ND.new_zeros(len(ids_MA), table_ND.shape[1])
    return F.embedding_bag(ids_MA, table_ND, per_sample_weights=weights_MA.to(table_ND.dtype), mode="sum")


def bag_dot(table_ND: Tensor, ids_MA: Tensor, x_MD: Tensor) -> Tensor:
    """out[m, a] = table[ids[m, a]] . x[m], of shape (M, A) and the table's dtype.

    It is the gradient of a bag sum with respect to its weights, and PyTorch has that as an op.
    """
    bags, size = ids_MA.shape
    if ids_MA.numel() == 0:
        return table_ND.new_zeros(bags, size)
    starts = torch.arange(0, bags * size, size, device=ids_MA.device)
    owner = torch.arange(bags, device=ids_MA.device).repeat_interleave(size)
    x_MD = x_MD.to(table_ND.dtype).contiguous()
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_MD, table_ND, ids_MA.contiguous().view(-1), starts, owner, 0
    )
    return dots.view(bags, size)


def in_full_precision(table_ND: Tensor, ids_MA: Tensor) -> tuple[Tensor, Tensor]:
    """A table that takes sums in at least float32, and ids that point into it: of a narrower one, the used rows."""
    if table_ND.dtype in (torch.float32, torch.float64):
        return table_ND, ids_MA
    used_U, places_MA = ids_MA.unique(return_inverse=True)
    return table_ND[used_U].float(), places_MA


def distinct_row_sums(rows: int, ids_MA: Tensor, weights_MA: Tensor, x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """For every distinct id n < rows, the sum over its entries of weights[m, a] * x[m].

    The gradient of a table: entries are sorted by id, so that each row is one bag of tokens and is written
    once. The sort is stable: the same input gives the same bits.

    Returns:
        ids of shape (U,), increasing, and rows of shape (U, D).
    """
    flat = ids_MA.reshape(-1)
    if flat.numel() == 0:
        return flat, x_MD.new_zeros(0, x_MD.shape[1])
    ordered, order = torch.sort(flat.to(_narrowest(rows)), stable=True)
    ids_U, counts_U = torch.unique_consecutive(ordered, return_counts=True)
    starts_U = counts_U.cumsum(0) - counts_U
    rows_UD = F.embedding_bag(
        order // ids_MA.shape[1],
        x_MD,
        starts_U,
        per_sample_weights=weights_MA.to(x_MD.dtype).reshape(-1)[order],
        mode="sum",
    )
    return ids_U.long(), rows_UD


def _narrowest(rows: int) -> torch.dtype:
    """The smallest integers that hold the ids of so many rows: fewer bytes to sort."""
    return torch.int16 if rows <= 2**15 else torch.int32 if rows <= 2**31 else torch.int64


def row_sums(rows: int, ids_MA: Tensor, weights_MA: Tensor, x_MD: Tensor) -> Tensor:
    """`distinct_row_sums` spread over a whole table of shape (rows, D), zero where no entry points."""
    ids_U, sums_UD = distinct_row_sums(rows, ids_MA, weights_MA, x_MD)
    return x_MD.new_zeros(rows, x_MD.shape[1]).index_copy_(0, ids_U, sums_UD)
