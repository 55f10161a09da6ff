"""`batch_norm` in Triton: each way, partial sums over runs of rows, their totals, and one pass that writes the result.

A program adds its rows up in place and across only once, at the end, and leaves its sums in a place of their own: the
same bits in every run. The last pass begins with the rows that the first one read last, which the cache still holds.

Legend: `T` tokens, `F` features, `S` runs of rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from myriad.kernels.batch_norm import BatchNormFunctions, BatchNormGradients, Normalized
from myriad.kernels.triton.launch import PROGRAMS, ROW, launch

SUM_BYTES, STAGES = 4096, 4
"""A tile that 4 warps add up, two 16-byte loads a thread, and how many of them are in hand: while one is added the next
are on their way, and all are added to the same sums, so that these take few registers."""
BYTES, TILES = 8192, 2
"""A tile that is written, and how many of them a program writes with the numbers of its columns at hand."""
BLOCK_S, COLUMNS = 32, 32
"""Rows and columns of a block of partial sums."""


def forward(x_TF: Tensor, weight: Tensor, bias: Tensor, center: Tensor, eps: float) -> Normalized:
    """y in the dtype of x; moments, means and inverses in float32."""
    tokens, features = x_TF.shape
    sums_S2F = _partial_sums(_moment_sums, x_TF, center)
    moments_3F, mean, inverse = (_numbers(x_TF, *shape) for shape in ((3, features), (features,), (features,)))
    _per_feature(_statistics, sums_S2F, center, moments_3F, mean, inverse, float(tokens), eps)
    y_TF = torch.empty_like(x_TF)
    _per_tile(_normalise, x_TF, weight, bias, mean, inverse, y_TF)
    return Normalized(y_TF, moments_3F, mean, inverse)


def backward(
    grad_y_TF: Tensor, x_TF: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> BatchNormGradients:
    """The gradients of x, weight and bias, each in its own dtype."""
    tokens, features = x_TF.shape
    sums_S2F = _partial_sums(_gradient_sums, x_TF, mean, grad_y_TF)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    factors_3F = _numbers(x_TF, 3, features)
    _per_feature(_factors, sums_S2F, weight, inverse, grad_weight, grad_bias, factors_3F, float(tokens))
    grad_x_TF = torch.empty_like(x_TF)
    _per_tile(_differentiate, x_TF, grad_y_TF, mean, factors_3F, grad_x_TF)
    return BatchNormGradients(grad_x_TF, grad_weight, grad_bias)


FUNCTIONS = BatchNormFunctions(forward, backward)


def _numbers(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _tile(x_TF: Tensor, size: int) -> dict[str, int]:
    """The width, and the rows and columns of a tile of so many bytes."""
    features = x_TF.shape[1]
    columns = min(ROW, max(16, triton.next_power_of_2(features)))
    return {"F": features, "BLOCK_T": size // x_TF.element_size() // columns, "BLOCK_F": columns}


def _partial_sums(kernel: Any, x_TF: Tensor, *others: Tensor) -> Tensor:
    """Two sums over each of several runs of rows, as many as fill a GPU, of shape (S, 2, F)."""
    tile = _tile(x_TF, SUM_BYTES)
    tokens, blocks = len(x_TF), triton.cdiv(tile["F"], tile["BLOCK_F"])
    step = tile["BLOCK_T"] * STAGES
    rows = triton.cdiv(triton.cdiv(tokens, max(1, PROGRAMS // blocks)), step) * step
    sums_S2F = _numbers(x_TF, triton.cdiv(tokens, rows), 2, tile["F"])
    launch(kernel, (blocks, len(sums_S2F)), x_TF, *others, sums_S2F, tokens, rows, STAGES=STAGES, **tile, num_warps=4)
    return sums_S2F


def _per_feature(kernel: Any, sums_S2F: Tensor, *arguments: Any) -> None:
    """Add the partial sums up, and compute what follows from them."""
    runs, _, features = sums_S2F.shape
    sizes = {"F": features, "BLOCK_S": BLOCK_S, "BLOCK_F": COLUMNS}
    launch(kernel, (triton.cdiv(features, COLUMNS),), sums_S2F, *arguments, runs, **sizes, num_warps=4)


def _per_tile(kernel: Any, x_TF: Tensor, *others: Tensor) -> None:
    """Compute each number of (T, F) from what its column has in common."""
    tile = _tile(x_TF, BYTES)
    blocks = triton.cdiv(tile["F"], tile["BLOCK_F"])
    runs = triton.cdiv(len(x_TF), tile["BLOCK_T"] * TILES)
    options = {"TILES": TILES, "BLOCKS": blocks, **tile, "num_warps": 4}
    launch(kernel, (runs * blocks,), x_TF, *others, len(x_TF), **options)


@triton.jit
def _rows(start, T, column, F: tl.constexpr, BLOCK_T: tl.constexpr):
    """The places in (T, F) of a tile, and which of its numbers exist: rows past the end have the places of the last.

    So rows are loaded without a mask: the compiler would wait for one masked load before it begins another.
    """
    row = start + tl.arange(0, BLOCK_T)
    place = tl.minimum(row, T - 1).to(tl.int64)[:, None] * F + column[None, :]
    return place, (row < T)[:, None] & (column < F)[None, :]


@triton.jit
def _load(x, place, column, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """A tile, float32."""
    if F % BLOCK_F == 0:
        numbers = tl.load(x + place)
    else:
        numbers = tl.load(x + place, mask=(column < F)[None, :], other=0.0)
    return numbers.to(tl.float32)


@triton.jit
def _of_columns(numbers, column, F: tl.constexpr):
    """One number a column, float32."""
    return tl.load(numbers + column, mask=column < F, other=0.0).to(tl.float32)


@triton.jit
def _store_sums(sums, first, second, run, column, F: tl.constexpr):
    place = sums + run.to(tl.int64) * 2 * F + column
    tl.store(place, tl.sum(first, 0), mask=column < F)
    tl.store(place + F, tl.sum(second, 0), mask=column < F)


@triton.jit(do_not_specialize=["T", "rows"])
def _moment_sums(
    x,
    center,
    sums,
    T,
    rows,
    STAGES: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The sums of x - center and of its square."""
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    run = tl.program_id(1)
    middle = _of_columns(center, column, F)
    total = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    stop = min((run + 1) * rows, T)
    for start in tl.range(run * rows, stop, BLOCK_T, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        place, exists = _rows(start, T, column, F, BLOCK_T)
        away = tl.where(exists, _load(x, place, column, F, BLOCK_F) - middle[None, :], 0.0)
        total += away
        squares += away * away
    _store_sums(sums, total, squares, run, column, F)


@triton.jit(do_not_specialize=["T", "rows"])
def _gradient_sums(
    x,
    mean,
    grad_y,
    sums,
    T,
    rows,
    STAGES: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The sums of the gradient of y, and of it times x - mean."""
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    run = tl.program_id(1)
    middle = _of_columns(mean, column, F)
    total = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    products = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    stop = min((run + 1) * rows, T)
    for start in tl.range(run * rows, stop, BLOCK_T, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        place, exists = _rows(start, T, column, F, BLOCK_T)
        numbers, gradient = _load(x, place, column, F, BLOCK_F), _load(grad_y, place, column, F, BLOCK_F)
        gradient = tl.where(exists, gradient, 0.0)
        total += gradient
        products += gradient * (numbers - middle[None, :])
    _store_sums(sums, total, products, run, column, F)


@triton.jit
def _totals(sums, runs, column, F: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr):
    """Both sums over all runs, of the columns of a block."""
    first = tl.zeros((BLOCK_S, BLOCK_F), tl.float32)
    second = tl.zeros((BLOCK_S, BLOCK_F), tl.float32)
    for start in range(0, runs, BLOCK_S):
        run = start + tl.arange(0, BLOCK_S)
        exists = (run < runs)[:, None] & (column < F)[None, :]
        place = sums + run.to(tl.int64)[:, None] * 2 * F + column[None, :]
        first += tl.load(place, mask=exists, other=0.0)
        second += tl.load(place + F, mask=exists, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=["count", "eps", "runs"])
def _statistics(
    sums,
    center,
    moments,
    mean,
    inverse,
    count,
    eps,
    runs,
    F: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < F
    total, squares = _totals(sums, runs, column, F, BLOCK_S, BLOCK_F)
    tl.store(moments + column, count, mask=inside)
    tl.store(moments + F + column, total, mask=inside)
    tl.store(moments + 2 * F + column, squares, mask=inside)
    shift = total / count
    var = squares / count - shift * shift
    var = tl.where(var < 0, 0.0, var)  # not the maximum, which would lose a NaN
    tl.store(mean + column, _of_columns(center, column, F) + shift, mask=inside)
    tl.store(inverse + column, tl.rsqrt(var + eps), mask=inside)


@triton.jit(do_not_specialize=["count", "runs"])
def _factors(
    sums,
    weight,
    inverse,
    grad_weight,
    grad_bias,
    factors,
    count,
    runs,
    F: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The vectors' gradients, and a, b and c of the tokens' gradient a * grad_y + b * (x - mean) + c."""
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < F
    total, products = _totals(sums, runs, column, F, BLOCK_S, BLOCK_F)
    inverse_F = _of_columns(inverse, column, F)
    tl.store(grad_weight + column, products * inverse_F, mask=inside)
    tl.store(grad_bias + column, total, mask=inside)
    scale = _of_columns(weight, column, F) * inverse_F
    tl.store(factors + column, scale, mask=inside)
    tl.store(factors + F + column, -scale * inverse_F * inverse_F * (products / count), mask=inside)
    tl.store(factors + 2 * F + column, -scale * (total / count), mask=inside)


@triton.jit
def _from_the_end(BLOCKS: tl.constexpr, BLOCK_F: tl.constexpr):
    """This program's run of rows and its columns: the first program's are the last ones."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    return program // BLOCKS, program % BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)


@triton.jit(do_not_specialize=["T"])
def _normalise(
    x,
    weight,
    bias,
    mean,
    inverse,
    y,
    T,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    run, column = _from_the_end(BLOCKS, BLOCK_F)
    middle, shift = _of_columns(mean, column, F), _of_columns(bias, column, F)
    scale = _of_columns(weight, column, F) * _of_columns(inverse, column, F)
    for tile in range(TILES):
        place, exists = _rows((run * TILES + tile) * BLOCK_T, T, column, F, BLOCK_T)
        away = _load(x, place, column, F, BLOCK_F) - middle[None, :]
        tl.store(y + place, away * scale[None, :] + shift[None, :], mask=exists)


@triton.jit(do_not_specialize=["T"])
def _differentiate(
    x,
    grad_y,
    mean,
    factors,
    grad_x,
    T,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    run, column = _from_the_end(BLOCKS, BLOCK_F)
    middle = _of_columns(mean, column, F)
    a, b = _of_columns(factors, column, F), _of_columns(factors + F, column, F)
    c = _of_columns(factors + 2 * F, column, F)
    for tile in range(TILES):
        place, exists = _rows((run * TILES + tile) * BLOCK_T, T, column, F, BLOCK_T)
        numbers, gradient = _load(x, place, column, F, BLOCK_F), _load(grad_y, place, column, F, BLOCK_F)
        away = numbers - middle[None, :]
        tl.store(grad_x + place, gradient * a[None, :] + away * b[None, :] + c[None, :], mask=exists)
