"""Experts that are whole feed-forward layers: their weights, and the rows of tokens that each is given.

A token is copied into a row for every expert that it goes to; rows stand expert by expert, so that each expert
multiplies one block. Nothing here loops over experts but the fallback for what `grouped_mm` does not take.

Legend: `T` tokens, `D` width of the model, `E` experts, `F` width of an expert, `R` rows, `K` experts a token.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from myriad.ffn.base import Cost
from myriad.kernels.dry import is_dry

Activation = Literal["gelu", "relu", "swiglu"]
Product = Callable[[Tensor, Tensor], Tensor]
"""(rows, weights (E, out, in)) -> each row times its own expert's matrix."""


class Experts(nn.Module):
    """E feed-forward layers of one shape: two linear maps each, or SwiGLU's three."""

    def __init__(self, experts: int, d_model: int, d_expert: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up = _weights(experts, d_expert, d_model)
        self.down = _weights(experts, d_model, d_expert)
        self.gate = _weights(experts, d_expert, d_model) if activation == "swiglu" else None

    def forward(self, x: Tensor, product: Product) -> Tensor:
        """Every row through its expert.

        Args:
            x: rows of width D, in whatever layout `product` takes.
            product: such as `torch.bmm` on weights transposed, or `grouped_linear`.
        """
        hidden = product(x, self.up)
        if self.gate is not None:
            hidden = F.silu(product(x, self.gate)) * hidden
        else:
            hidden = F.gelu(hidden) if self.activation == "gelu" else F.relu(hidden)
        return product(hidden, self.down)


def _weights(experts: int, outputs: int, inputs: int) -> nn.Parameter:
    """Normal with a standard deviation of inputs**-0.5, as in the dense layer."""
    weights = nn.Parameter(torch.empty(experts, outputs, inputs))
    return nn.init.normal_(weights, std=inputs**-0.5)  # pyright: ignore[reportReturnType]


def expert_width(d_expert: int | None, d_model: int, used: float, activation: Activation) -> int:
    """The width of an expert; None: `used` of them cost what the default dense layer costs."""
    if d_expert is not None:
        return d_expert
    return max(1, int((8 * d_model / 3 if activation == "swiglu" else 4 * d_model) / used))


def experts_cost(experts: int, used: float, d_model: int, d_expert: int, activation: Activation) -> Cost:
    """The router, and experts of which a token uses so many on average."""
    expert = (3 if activation == "swiglu" else 2) * d_model * d_expert
    active = round(used * expert)
    router = Cost.of_matrix(d_model, experts).as_routing()
    return router + Cost(experts * expert, active, 2 * active, 4 * active)


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Scores of every expert (T, E) in float32 at least: bfloat16 has too few digits to rank them with."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))


def in_product_dtype(x: Tensor) -> Tensor:
    """In the dtype that autocast multiplies in, where it is on: before rows are copied, fewer bytes are."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


class Rows(NamedTuple):
    """Copies of tokens, and the way back."""

    tokens_R: Tensor
    """The token of each row."""
    by_token_R: Tensor
    """Row numbers, token by token."""
    starts_T: Tensor
    """Where each token's begin in `by_token_R`."""


def rows_of(tokens_R: Tensor, tokens: int) -> Rows:
    """Rows for a list of tokens, each of which may stand there any number of times."""
    ordered_R, by_token_R = tokens_R.sort(stable=True)
    return Rows(tokens_R, by_token_R, torch.searchsorted(ordered_R, torch.arange(tokens, device=tokens_R.device)))


def take_rows(x_TD: Tensor, rows: Rows) -> Tensor:
    """Each row's token, (R, D)."""
    return _TakeRows.apply(x_TD, *rows)  # pyright: ignore[reportReturnType]


def add_rows(x_RD: Tensor, rows: Rows) -> Tensor:
    """The sum of each token's rows, (T, D)."""
    return _AddRows.apply(x_RD, *rows)  # pyright: ignore[reportReturnType]


class _TakeRows(torch.autograd.Function):
    """Its gradient sums each token's rows in order: a scattered sum would round differently every time on CUDA."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tokens_R: Tensor, by_token_R: Tensor, starts_T: Tensor) -> Tensor:
        ctx.save_for_backward(by_token_R, starts_T)
        return x_TD.index_select(0, tokens_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_bags(grads[0], *ctx.saved_tensors), None, None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, tokens_R: Tensor, by_token_R: Tensor, starts_T: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_R)
        return _sum_bags(x_RD, by_token_R, starts_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0].index_select(0, *ctx.saved_tensors), None, None, None


def _sum_bags(x_RD: Tensor, by_token_R: Tensor, starts_T: Tensor) -> Tensor:
    if by_token_R.numel() == 0 or starts_T.numel() == 0:
        return x_RD.new_zeros(len(starts_T), x_RD.shape[1])
    return F.embedding_bag(by_token_R, x_RD.contiguous(), starts_T, mode="sum")


class Groups(NamedTuple):
    """Pairs of a token and an expert, expert by expert."""

    pairs_R: Tensor
    """Numbers of the pairs in (T, K)."""
    ends_E: Tensor
    """int32: one past each expert's last row; the last is R."""


def group_by_expert(ids_TK: Tensor, experts: int, *, complete: bool = True) -> Groups:
    """Sort pairs by expert, the pairs of an expert by token.

    Args:
        ids_TK: experts; `experts` itself is none.
        experts: how many there are.
        complete: whether no pair is without an expert. Those without are left out, which a compiled graph,
            whose shapes are fixed, and a dry run cannot do: they give them to the last expert. Their weights must
            be zero.
    """
    ordered_R, pairs_R = ids_TK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(ordered_R, torch.arange(experts, device=ids_TK.device), right=True)
    if not complete and not torch.compiler.is_compiling() and not is_dry(ids_TK):
        pairs_R = pairs_R[: int(ends_E[-1])]
    elif not complete:
        ends_E = torch.cat((ends_E[:-1], ends_E.new_full((1,), len(pairs_R))))
    return Groups(pairs_R, ends_E.to(torch.int32))


def mix(experts: Experts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, complete: bool = True) -> Tensor:
    """The weighted sum of the outputs of each token's experts, (T, D) in the dtype of products.

    Args:
        experts: the layers.
        x_TD: inputs.
        ids_TK: the experts of each token; as many as there are experts stands for none.
        weights_TK: what each output is multiplied with, zero for none.
        complete: whether every pair has an expert.
    """
    pairs_R, ends_E = group_by_expert(ids_TK, len(experts.up), complete=complete)
    rows = rows_of(pairs_R // max(1, ids_TK.shape[1]), len(x_TD))
    x_RD = take_rows(in_product_dtype(x_TD), rows)
    y_RD = experts(x_RD, lambda x, weights: grouped_linear(x, weights, ends_E))
    weights_R = weights_TK.flatten().index_select(0, pairs_R)
    return add_rows(y_RD * weights_R.to(y_RD.dtype).unsqueeze(1), rows)


def mix_batched(experts: Experts, x_TD: Tensor, tokens_EC: Tensor, weights_EC: Tensor) -> Tensor:
    """The same where every expert has C tokens: plain batched products."""
    rows = rows_of(tokens_EC.flatten(), len(x_TD))
    x_ECD = take_rows(in_product_dtype(x_TD), rows).view(*tokens_EC.shape, -1)
    y_ECD = experts(x_ECD, lambda x, weights: torch.bmm(x, weights.to(x.dtype).transpose(1, 2)))
    return add_rows((y_ECD * weights_EC.to(y_ECD.dtype).unsqueeze(2)).flatten(0, 1), rows)


def grouped_linear(x_RI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the matrix of its expert: y[r] = weights[e] @ x[r] for ends[e - 1] <= r < ends[e].

    Args:
        x_RI: rows, expert by expert.
        weights_EOI: cast to the dtype of the rows.
        ends_E: int32, not decreasing, the last one R.

    Returns:
        (R, O) in the dtype of the rows.
    """
    return torch.ops.myriad.grouped_linear(x_RI, weights_EOI.to(x_RI.dtype), ends_E)


@torch.library.custom_op("myriad::grouped_linear", mutates_args=())
def _op(x_RI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
    if not _grouped(x_RI):
        parts = zip(_parts(x_RI, ends_E), weights_EOI, strict=True)
        return torch.cat([part @ weights.T for part, weights in parts])
    outputs = weights_EOI.shape[1]
    y_RO = F.grouped_mm(_aligned(x_RI), _aligned(weights_EOI, 2).transpose(1, 2), offs=ends_E)
    return y_RO if y_RO.shape[1] == outputs else y_RO[:, :outputs].contiguous()


@_op.register_fake
def _(x_RI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(len(x_RI), weights_EOI.shape[1])


@torch.library.custom_op("myriad::grouped_linear_backward", mutates_args=())
def _backward_op(grad_RO: Tensor, x_RI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    if not _grouped(x_RI):
        parts = list(zip(_parts(grad_RO, ends_E), _parts(x_RI, ends_E), weights_EOI, strict=True))
        grad_x = torch.cat([grad @ weights for grad, _, weights in parts])
        return grad_x, torch.stack([grad.T @ x for grad, x, _ in parts])
    _, outputs, inputs = weights_EOI.shape
    grad_RO, x_RI, weights_EOI = _aligned(grad_RO), _aligned(x_RI), _aligned(weights_EOI, 2)
    grad_x = F.grouped_mm(grad_RO, weights_EOI, offs=ends_E)[:, :inputs]
    grad_weights = F.grouped_mm(grad_RO.T, x_RI, offs=ends_E)[:, :outputs, :inputs]
    return grad_x.contiguous(), grad_weights.contiguous()


@_backward_op.register_fake
def _(grad_RO: Tensor, x_RI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    return x_RI.new_empty(x_RI.shape), weights_EOI.new_empty(weights_EOI.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x, grad_weights = torch.ops.myriad.grouped_linear_backward(grad_RO.contiguous(), *ctx.saved_tensors)
    return grad_x, grad_weights, None


_op.register_autograd(_backward, setup_context=_setup_context)


@cache
def takes_grouped(device: str, dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies groups of this dtype there: no version takes float64, older ones take less."""
    try:
        eye = torch.eye(16, device=device, dtype=dtype)
        F.grouped_mm(eye, eye.unsqueeze(0), offs=torch.tensor([16], dtype=torch.int32, device=device))
    except (RuntimeError, ValueError, AttributeError):
        return False
    return True


def _grouped(x_RI: Tensor) -> bool:
    return len(x_RI) > 0 and takes_grouped(x_RI.device.type, x_RI.dtype)


def _aligned(x: Tensor, dims: int = 1) -> Tensor:
    """Zeros added to the last dimensions until rows are whole multiples of 16 bytes, which `grouped_mm` asks for."""
    unit = 16 // x.element_size()
    missing = [-size % unit for size in reversed(x.shape[-dims:])]
    return F.pad(x, [pad for size in missing for pad in (0, size)]) if any(missing) else x.contiguous()


def _parts(x_RI: Tensor, ends_E: Tensor) -> tuple[Tensor, ...]:
    return x_RI.tensor_split(ends_E[:-1].cpu().long())
