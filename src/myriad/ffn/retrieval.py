"""Queries and product keys: how PEER and product-key memories find their rows.

Legend: `T` tokens, `H` heads, `P` = 2 halves, `Q` width of a half (d_key), `K` retrieved per head, `A` = H K.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from myriad.config import ConfigError, Count
from myriad.distributed import all_reduce_sum, world_size
from myriad.ffn.base import Cost, Routing
from myriad.kernels import batch_norm

QueryNorm = Literal["batch", "layer", "rms", "none"]
Router = Literal["softmax", "sigmoid", "relu"]


def side_of(rows: int) -> int:
    """The sub-keys of each half for a number of experts or memories.

    Raises:
        ConfigError: the number is not a square; the text names the nearest ones.
    """
    side = math.isqrt(rows)
    if side * side != rows:
        low, high = f"{side}**2 = {side**2}", f"{side + 1}**2 = {(side + 1) ** 2}"
        raise ConfigError(f"product keys need a square; nearest to {rows}: {low} and {high}")
    return side


def _square(rows: int) -> int:
    try:
        side_of(rows)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return rows


Square = Annotated[Count, Field(ge=1), AfterValidator(_square)]
"""A number of rows that product keys can find."""


class BatchNorm(nn.Module):
    """Batch normalization over tokens whose running statistics change only in `update`.

    In training it normalises with the statistics of the micro-batch over all ranks, differentiably; in
    evaluation with running ones. Its load is the count, sum and sum of squares of what it saw, shape (3, F),
    around the running mean, so that features far from zero lose no digits.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x_TF: Tensor, mask_T: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalise tokens of shape (T, F), of which a mask of shape (T,) may leave some out.

        Statistics are taken in float32 at least; the result has the dtype of the tokens.
        """
        if self.training and mask_T is None and world_size() == 1 and len(x_TF):
            y_TF, moments_3F = batch_norm(x_TF, self.weight, self.bias, self.running_mean, self.eps)
            return y_TF, {"moments": moments_3F}
        dtype, x_TF = x_TF.dtype, x_TF.to(torch.promote_types(x_TF.dtype, torch.float32))
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return torch.addcmul(self.bias - self.running_mean * scale, x_TF, scale).to(dtype), {}
        x_TF = x_TF - self.running_mean
        mine = _moments(x_TF, mask_T)
        shift, var = _mean_and_variance(all_reduce_sum(mine))
        scale = self.weight * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.bias - shift * scale, x_TF, scale).to(dtype), {"moments": mine.detach()}

    def update(self, load: Mapping[str, Tensor]) -> None:
        """Move the running statistics towards one step's sums, as `torch.nn.BatchNorm1d` does."""
        count = load["moments"][0]
        if count[0] < 2:
            return
        shift, var = _mean_and_variance(load["moments"])
        unbiased = var * count / (count - 1)
        self.running_mean.add_(shift.to(self.running_mean), alpha=self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)


def _moments(x_TF: Tensor, mask_T: Tensor | None) -> Tensor:
    """Count, sum and sum of squares over tokens, as rows of one tensor of shape (3, F)."""
    if mask_T is not None:
        x_TF = x_TF.masked_fill(~mask_T.unsqueeze(1), 0)
        count = mask_T.sum()
    else:
        count = torch.full((), float(len(x_TF)), device=x_TF.device)
    counts = count.to(x_TF.dtype).expand(x_TF.shape[1])
    return torch.stack((counts, x_TF.sum(0), (x_TF * x_TF).sum(0)))


def _mean_and_variance(moments_3F: Tensor) -> tuple[Tensor, Tensor]:
    count, total, squares = moments_3F.unbind(0)
    count = count.clamp(min=1)
    mean = total / count
    return mean, (squares / count - mean * mean).clamp(min=0)


class Queries(nn.Module):
    """The query network: a linear map to H heads of two halves, normalised.

    `batch` normalises every feature over the tokens (the paper's); `layer` and `rms` every query.
    """

    def __init__(self, d_model: int, heads: int, d_key: int, norm: QueryNorm) -> None:
        super().__init__()
        self.shape = (heads, 2, d_key)
        self.proj = nn.Linear(d_model, heads * 2 * d_key, bias=False)
        nn.init.normal_(self.proj.weight, std=d_model**-0.5)
        self.norm: nn.Module | None = None
        if norm == "batch":
            self.norm = BatchNorm(heads * 2 * d_key)
        elif norm == "layer":
            self.norm = nn.LayerNorm([2, d_key])
        elif norm == "rms":
            self.norm = nn.RMSNorm([2, d_key])

    def forward(self, x_TD: Tensor, mask_T: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Queries of shape (T, H, 2, d_key) and the load of the normalization.

        The queries are float32 at least, but for products in bfloat16 on CUDA: there float32 scores take two to three
        times as long as bfloat16's, which tensor cores add up in float32, too.
        """
        q_TF = self.proj(x_TD)
        if not q_TF.is_cuda:
            q_TF = q_TF.to(torch.promote_types(q_TF.dtype, torch.float32))
        load: dict[str, Tensor] = {}
        if isinstance(self.norm, BatchNorm):
            q_TF, load = self.norm(q_TF, mask_T)
        return _normalized(self.norm, q_TF.view(-1, *self.shape)), load

    def after_step(self, load: Mapping[str, Tensor]) -> None:
        if isinstance(self.norm, BatchNorm) and load:
            self.norm.update(load)


def _normalized(norm: nn.Module | None, q_THPQ: Tensor) -> Tensor:
    """Every query by a norm over it, if that is what the norm is, with parameters in the dtype of the queries."""
    if isinstance(norm, nn.LayerNorm):
        weight, bias = norm.weight.to(q_THPQ.dtype), norm.bias.to(q_THPQ.dtype)
        return F.layer_norm(q_THPQ, norm.normalized_shape, weight, bias, norm.eps)
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(q_THPQ, norm.normalized_shape, norm.weight.to(q_THPQ.dtype), norm.eps)
    return q_THPQ


def new_keys(rows: int, heads: int, d_key: int, shared: bool) -> nn.Parameter:
    """Sub-keys of shape (2, side, d_key), or (heads, 2, side, d_key) where each head has its own.

    Normal with a standard deviation of d_key**-0.5, so that normalised queries give scores of order one.
    """
    shape = (2, side_of(rows), d_key)
    keys = nn.Parameter(torch.empty(shape if shared else (heads, *shape)))
    return nn.init.normal_(keys, std=d_key**-0.5)  # pyright: ignore[reportReturnType]


def routing_of(x: Tensor, ids_TA: Tensor, weights_TA: Tensor, rows: int, heads: int) -> Routing:
    """What each head retrieved for inputs of shape (..., D), in their leading shape."""
    shape = (*x.shape[:-1], ids_TA.shape[-1])
    return Routing(ids_TA.view(shape), weights_TA.detach().view(shape), rows, heads)


def retrieval_cost(d_model: int, rows: int, heads: int, d_key: int, shared: bool, norm: QueryNorm) -> Cost:
    """Queries, their normalization, and scores against every sub-key of both halves."""
    side = side_of(rows)
    query = Cost.of_matrix(d_model, heads * 2 * d_key)
    gains = {"batch": 2 * heads * 2 * d_key, "layer": 2 * 2 * d_key, "rms": 2 * d_key, "none": 0}[norm]
    key_parameters = 2 * side * d_key * (1 if shared else heads)
    keys = Cost(key_parameters, key_parameters, 2 * heads * 2 * side * d_key, 4 * key_parameters)
    return (query + Cost.of_vector(gains) + keys).as_routing()
