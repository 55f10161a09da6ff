"""The lazy optimizer step: rows of a table and their moments move only where a row was used.

A row is used where its gradient is not all zero, whether the gradient is dense or sparse. On gradients without
stored rows of zeros the float32 form is `torch.optim.SparseAdam`.

Two forms:
- *full*: the moments have the table's shape and dtype.
- *rounded*: a bfloat16 table with a bfloat16 first moment, and one float32 second moment a row: the mean of the
  row's squares. Both are rounded stochastically (`rounding.py`).

Legend: `N` rows, `D` width, `U` rows of a sparse gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from myriad.kernels.pages import in_large_pages
from myriad.kernels.registry import register, resolve
from myriad.kernels.rounding import random_bits, rounded_by, salt_of
from myriad.kernels.table_gradient import coalesced


class AdamStep(NamedTuple):
    """The numbers of one step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int
    """Its number, from 1."""
    seed: int
    """Of the rounding: below 2**32."""

    @property
    def size(self) -> float:
        """The learning rate with both bias corrections in it."""
        return self.lr * (1 - self.betas[1] ** self.step) ** 0.5 / (1 - self.betas[0] ** self.step)

    @property
    def salt(self) -> int:
        """What tells this step's random bits from others', below 2**32."""
        return salt_of(self.seed, self.step)


class TableUpdateFunctions(NamedTuple):
    """Each takes the table, its moments, the ids of the gradient's rows (None: all of a dense one), the rows and
    the step, and passes over rows that are all zero."""

    full: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, AdamStep], None]
    rounded: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, AdamStep], None]


def new_moments(table_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The first and second moments of a table that has not been updated: zeros, by its dtype full or rounded."""
    if table_ND.dtype == torch.bfloat16:
        return _zeros_like(table_ND), table_ND.new_zeros(len(table_ND), dtype=torch.float32)
    return _zeros_like(table_ND), _zeros_like(table_ND)


def _zeros_like(table_ND: Tensor) -> Tensor:
    return in_large_pages(torch.empty_like(table_ND, memory_format=torch.contiguous_format)).zero_()


def lazy_adam(
    table_ND: Tensor,
    exp_avg_ND: Tensor,
    exp_avg_sq: Tensor,
    grad_ND: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    seed: int = 0,
) -> None:
    """One step of Adam on the rows in use, in place (Kingma and Ba, arXiv 1412.6980).

    Args:
        table_ND: the table, of shape (N, D).
        exp_avg_ND, exp_avg_sq: its moments, as `new_moments` makes them.
        grad_ND: the table's gradient, sparse over the rows or dense.
        lr, betas, eps: as in `torch.optim.SparseAdam`.
        step: the number of this step, from 1, for the bias corrections.
        seed: of the stochastic rounding, below 2**32; float32 tables are not rounded.

    Raises:
        ValueError: moments or a gradient that do not fit the table.
    """
    _check(table_ND, exp_avg_ND, exp_avg_sq, grad_ND)
    ids, rows = _rows_of(grad_ND)
    if not len(rows):
        return
    functions = resolve("table_update", table_ND.device.type, table_ND.dtype)
    form = functions.rounded if table_ND.dtype == torch.bfloat16 else functions.full
    form(table_ND, exp_avg_ND, exp_avg_sq, ids, rows, AdamStep(lr, betas, eps, step, seed))


def _check(table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor) -> None:
    rounded = table.dtype == torch.bfloat16
    square_shape, square_dtype = (table.shape[:1], torch.float32) if rounded else (table.shape, table.dtype)
    if exp_avg.shape != table.shape or exp_avg_sq.shape != square_shape or grad.shape != table.shape:
        raise ValueError(
            f"a {table.dtype} table of shape {tuple(table.shape)} takes moments of shapes {tuple(table.shape)} and "
            f"{tuple(square_shape)} and a gradient of its own, not {tuple(exp_avg.shape)}, "
            f"{tuple(exp_avg_sq.shape)} and {tuple(grad.shape)}"
        )
    if exp_avg.dtype != table.dtype or exp_avg_sq.dtype != square_dtype:
        raise ValueError(
            f"a {table.dtype} table takes moments of {table.dtype} and {square_dtype}, not "
            f"{exp_avg.dtype} and {exp_avg_sq.dtype}"
        )
    if not (table.is_contiguous() and exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()):
        raise ValueError("a table and its moments are updated in place: they must be contiguous")


def _rows_of(grad_ND: Tensor) -> tuple[Tensor | None, Tensor]:
    if grad_ND.layout == torch.sparse_coo:
        grad_ND = coalesced(grad_ND)
        return grad_ND.indices()[0], grad_ND.values()
    return None, grad_ND


def used_rows(ids: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The ids and rows of a gradient without the rows that are all zero."""
    used = (rows != 0).any(dim=1).nonzero().squeeze(1)
    return used if ids is None else ids[used], rows[used]


def _reference_full(
    table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ids: Tensor | None, rows: Tensor, step: AdamStep
) -> None:
    ids, rows = used_rows(ids, rows)
    rows = rows.to(exp_avg.dtype)
    mean = exp_avg[ids].lerp_(rows, 1 - step.betas[0])
    square = exp_avg_sq[ids].lerp_(rows * rows, 1 - step.betas[1])
    exp_avg[ids], exp_avg_sq[ids] = mean, square
    table.index_add_(0, ids, mean.div_(square.sqrt_().add_(step.eps)).mul_(-step.size))


def _reference_rounded(
    table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ids: Tensor | None, rows: Tensor, step: AdamStep
) -> None:
    ids, rows = used_rows(ids, rows)
    rows = rows.float()
    mean = exp_avg[ids].float().lerp_(rows, 1 - step.betas[0])
    square = exp_avg_sq[ids].lerp_((rows * rows).mean(dim=1), 1 - step.betas[1])
    places = ids.unsqueeze(1) * table.shape[1] + torch.arange(table.shape[1], device=ids.device)
    bits = random_bits(places, step.salt)
    scale = step.size / (square.sqrt() + step.eps)
    new = table[ids].float() - scale.unsqueeze(1) * mean
    table[ids] = rounded_by(new, bits & 0xFFFF)
    exp_avg[ids] = rounded_by(mean, bits >> 16)
    exp_avg_sq[ids] = square


register("table_update", "reference", TableUpdateFunctions(_reference_full, _reference_rounded))
