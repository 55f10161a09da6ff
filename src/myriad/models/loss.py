"""The cross-entropy of a large vocabulary without its logits: computed in chunks of tokens.

The gradient of the cross-entropy is taken chunk by chunk in the forward pass, where the logits are at hand, so that
they are made once and never kept: three products of T x D x V in all, and memory for one chunk.
The normalizer alone, `chunked_logsumexp`, is for losses whose gradient is known only when all tokens are: its logits
are made again in the backward pass.

Legend: `T` tokens, `D` width, `V` vocabulary, `C` tokens of a chunk.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from myriad.kernels.dry import is_dry

LOGITS_PER_CHUNK = 2**22
"""Logits held at once, 16 MB in float32, unless a large vocabulary makes that too few tokens."""
LOGITS_PER_BLOCK = 2**19
"""Logits that a CPU goes over several times in a row: 2 MB in float32."""
FEW_TOKENS = 4
"""Tokens whose product with a large weight is faster with its sides exchanged."""
LARGE_WEIGHT = 2**22
"""Numbers of a weight that no cache holds: 16 MB in float32."""
LEAST_TOKENS_PER_CHUNK = 512
"""Each chunk reads the weight and adds to its gradient once, which fewer tokens would not pay for."""


class Prediction(NamedTuple):
    logits: Tensor | None
    """(B, S, V), without targets."""
    loss: Tensor | None
    """With targets: the sum of the negative log likelihood in nats."""
    targets: Tensor | None
    """With targets: how many were counted."""


def predict(hidden_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor | None) -> Prediction:
    """The logits, or the loss of targets; negative ones are not counted."""
    if targets_BS is None:
        return Prediction(vocabulary_logits(hidden_BSD, weight_VD), None, None)
    loss = chunked_cross_entropy(hidden_BSD.flatten(0, 1), weight_VD, targets_BS.flatten())
    return Prediction(None, loss, (targets_BS >= 0).sum())


def vocabulary_logits(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    """The logits of every token of the vocabulary: (..., V) from outputs (..., D).

    A CPU's library takes the product of one to four tokens on a single thread, in an order that reads a large weight
    at a fraction of the memory's rate; with the sides exchanged, and two tokens at least, it does not.
    """
    tokens = hidden.numel() // hidden.shape[-1]
    if not 1 <= tokens <= FEW_TOKENS or weight_VD.numel() < LARGE_WEIGHT or hidden.device.type != "cpu":
        return F.linear(hidden, weight_VD)
    hidden_TD = hidden.reshape(tokens, -1)
    logits_VT = weight_VD @ F.pad(hidden_TD, (0, 0, 0, max(0, 2 - tokens))).T
    return logits_VT[:, :tokens].T.reshape(*hidden.shape[:-1], -1)


def chunked_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """The sum over targets of -log softmax(hidden @ weight.T)[target], in nats.

    Args:
        hidden_TD: the last layer's normalised outputs.
        weight_VD: the output embedding.
        targets_T: int64; negative ones are not counted.

    Returns:
        a scalar, float32 (float64 for float64 inputs). Its gradient cannot be differentiated again.
    """
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T)  # pyright: ignore[reportReturnType]
    counted_T = targets_T >= 0
    hidden_TD, targets_T = hidden_TD[counted_T], targets_T[counted_T]  # no logits where nothing is counted
    total = hidden_TD.new_zeros((), dtype=loss_dtype(hidden_TD))
    for chunk in _chunks(targets_T, len(weight_VD)):
        total += _loss(F.linear(hidden_TD[chunk], weight_VD), targets_T[chunk])
    return total


def chunked_logsumexp(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """log sum exp (hidden @ weight.T) over the vocabulary.

    Args:
        hidden_TD: the last layer's normalised outputs.
        weight_VD: the output embedding.

    Returns:
        of shape (T,), float32 (float64 for float64 inputs). Its gradient cannot be differentiated again.
    """
    return _ChunkedLogSumExp.apply(hidden_TD, weight_VD)  # pyright: ignore[reportReturnType]


def loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    casts = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else hidden.dtype


def _chunks(tokens_T: Tensor, vocabulary: int) -> list[slice]:
    step = max(LEAST_TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // vocabulary)
    return [slice(start, start + step) for start in range(0, len(tokens_T), step)]


def _loss(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    logits_CV = logits_CV.to(loss_dtype(logits_CV))
    return F.cross_entropy(logits_CV, targets_C, reduction="sum")


def _blocks(logits_CV: Tensor) -> list[slice]:
    """Rows that stay in a CPU's cache from one pass over them to the next; elsewhere all at once."""
    on_cpu = logits_CV.device.type == "cpu"
    return _slices(logits_CV, max(1, LOGITS_PER_BLOCK // logits_CV.shape[1]) if on_cpu else len(logits_CV))


def _slices(rows: Tensor, step: int) -> list[slice]:
    """Of a number of rows each; in a dry run the first alone, since all of them take the same room in turn."""
    slices = [slice(start, start + step) for start in range(0, len(rows), step)]
    return slices[:1] if is_dry(rows) else slices


def _loss_to_gradient(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """The sum of some rows' losses; their gradient takes the place of the logits."""
    log_probs_RV = logits_RV.to(loss_dtype(logits_RV)).log_softmax(dim=1)
    loss = F.nll_loss(log_probs_RV, targets_R.clamp(min=-1), ignore_index=-1, reduction="sum")
    grad_RV = log_probs_RV.exp_()
    grad_RV[torch.arange(len(targets_R), device=targets_R.device), targets_R.clamp(min=0)] -= 1
    logits_RV.copy_(grad_RV.mul_((targets_R >= 0).unsqueeze(1)))
    return loss


def _add(total_VD: Tensor, product_VD: Tensor) -> None:
    """In blocks: a CPU adds numbers of two dtypes one by one."""
    for block in _blocks(product_VD):
        total_VD[block] += product_VD[block].to(total_VD.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        # What autocast would choose, but once: it would round the weight for every product.
        dtype = _product_dtype(hidden_TD)
        narrow_TD, narrow_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
        total = hidden_TD.new_zeros((), dtype=loss_dtype(hidden_TD))
        grad_hidden = torch.empty_like(hidden_TD)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # a frozen weight's would be a third of the work, for nothing
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        chunks = _chunks(targets_T, len(weight_VD))
        room_CV = narrow_TD.new_empty(min(len(targets_T), chunks[0].stop) if chunks else 0, len(weight_VD))
        for chunk in chunks:
            hidden_CD, targets_C = narrow_TD[chunk], targets_T[chunk]
            logits_CV = torch.mm(hidden_CD, narrow_VD.T, out=room_CV[: len(targets_C)])
            for block in _blocks(logits_CV):
                total += _loss_to_gradient(logits_CV[block], targets_C[block])
            grad_hidden[chunk] = logits_CV @ narrow_VD
            if grad_weight is not None:
                _add(grad_weight, logits_CV.T @ hidden_CD)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grads[0].to(grad_hidden.dtype) * grad_hidden,
            None if grad_weight is None else grads[0].to(grad_weight.dtype) * grad_weight,
            None,
        )


class _ChunkedLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        dtype = _product_dtype(hidden_TD)
        narrow_VD = weight_VD.to(dtype)
        total_T = hidden_TD.new_empty(len(hidden_TD), dtype=loss_dtype(hidden_TD))
        for chunk in _chunks(hidden_TD, len(weight_VD)):
            total_T[chunk] = _wide(hidden_TD[chunk].to(dtype), narrow_VD).logsumexp(dim=1)
        ctx.save_for_backward(hidden_TD, weight_VD, total_T)
        ctx.product_dtype = dtype
        return total_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        hidden_TD, weight_VD, total_T = ctx.saved_tensors
        dtype, (grad_T,) = ctx.product_dtype, grads
        narrow_VD = weight_VD.to(dtype)
        grad_hidden = torch.empty_like(hidden_TD)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        for chunk in _chunks(hidden_TD, len(weight_VD)):
            hidden_CD = hidden_TD[chunk].to(dtype)
            probs_CV = _wide(hidden_CD, narrow_VD).sub_(total_T[chunk].unsqueeze(1)).exp_()
            grad_CV = probs_CV.mul_(grad_T[chunk].unsqueeze(1)).to(dtype)
            grad_hidden[chunk] = (grad_CV @ narrow_VD).to(grad_hidden.dtype)
            grad_weight += (grad_CV.T @ hidden_CD).to(grad_weight.dtype)
        return grad_hidden, grad_weight.to(weight_VD.dtype)


def _wide(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """A chunk's logits in the loss's dtype."""
    return torch.mm(hidden_CD, weight_VD.T).to(loss_dtype(hidden_CD))
