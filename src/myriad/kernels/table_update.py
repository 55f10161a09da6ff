"""The lazy optimizer step: rows of a table and their moments move only where a row was used.

Equal to `torch.optim.SparseAdam` on the same gradients, without its checks against dense ones: a dense
gradient counts a row as used where it is not all zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from myriad.kernels.registry import register, resolve


class TableUpdateFunctions(NamedTuple):
    lazy_adam: Callable[..., None]


def used_rows(grad_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The ids (U,) and rows (U, D) of a table's gradient, sparse or dense."""
    if grad_ND.layout == torch.sparse_coo:
        grad_ND = grad_ND.coalesce()
        return grad_ND.indices()[0], grad_ND.values()
    ids_U = (grad_ND != 0).any(dim=1).nonzero().squeeze(1)
    return ids_U, grad_ND[ids_U]


def lazy_adam(
    table_ND: Tensor,
    exp_avg_ND: Tensor,
    exp_avg_sq_ND: Tensor,
    grad_ND: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    """One step of Adam on the rows in use, in place (Kingma and Ba, arXiv 1412.6980).

    Args:
        table_ND, exp_avg_ND, exp_avg_sq_ND: the table and its moments, of shape (N, D).
        grad_ND: the table's gradient, sparse over the rows or dense.
        lr, betas, eps: as in `torch.optim.SparseAdam`.
        step: the number of this step, from 1, for the bias corrections.
    """
    ids, rows = used_rows(grad_ND)
    if not len(ids):
        return
    functions = resolve("table_update", table_ND.device.type)
    functions.lazy_adam(table_ND, exp_avg_ND, exp_avg_sq_ND, ids, rows, lr, betas, eps, step)


def _reference(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ids: Tensor,
    rows: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    rows = rows.to(exp_avg.dtype)
    mean = exp_avg[ids].lerp_(rows, 1 - betas[0])
    square = exp_avg_sq[ids].lerp_(rows * rows, 1 - betas[1])
    exp_avg[ids], exp_avg_sq[ids] = mean, square
    step_size = lr * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
    change = mean.div_(square.sqrt_().add_(eps)).mul_(-step_size)
    table.index_add_(0, ids, change.to(table.dtype))


register("table_update", "reference", TableUpdateFunctions(_reference))
