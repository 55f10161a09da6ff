"""The cross-entropy of a large vocabulary without its logits: computed in chunks of tokens.

The gradient of the cross-entropy is taken chunk by chunk in the forward pass, where the logits are at hand, so that
they are made once and never kept: three products of T x D x V in all, and memory for one chunk.
The normalizer alone, `chunked_logsumexp`, is for losses whose gradient is known only when all tokens are: its logits
are made again in the backward pass.
On CUDA the weight's narrow copy is padded with tokens that do not exist, since the tensor cores' fast products take
rows that start at 16 bytes, which an odd vocabulary's do not.

Legend: `T` tokens, `D` width, `V` vocabulary, `P` the vocabulary with its padding, `C` tokens of a chunk.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from myriad.kernels import cross_entropy, softmax_gradient
from myriad.kernels.dry import is_dry
from myriad.kernels.hardware import multiplies_few_rows_fast

LOGITS_PER_CHUNK = 2**22
"""Logits held at once, 16 MB in float32, unless a large vocabulary makes that too few tokens."""
BYTES_PER_CUDA_CHUNK = 2**28
"""Logits held at once on CUDA, in the dtype in which they are held: 2,048 tokens of GPT-2's vocabulary in bfloat16.
Products of so many fill a large GPU, and a micro-batch takes few launches."""
ALIGNMENT = {"cuda": 128}
"""Device type -> what the padded vocabulary is a multiple of: a tile of a tensor core's product; elsewhere 1."""
NUMBERS_PER_BLOCK = 2**19
"""Numbers that a CPU goes over several times in a row: 2 MB in float32."""
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

    On most CPUs the library takes the product of one to four tokens on a single thread, in an order that reads a large
    weight at a fraction of the memory's rate; with the sides exchanged, and two tokens at least, it does not.
    """
    tokens = hidden.numel() // hidden.shape[-1]
    few = 1 <= tokens <= FEW_TOKENS and weight_VD.numel() >= LARGE_WEIGHT and hidden.device.type == "cpu"
    if not few or multiplies_few_rows_fast():
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
    dtype = _product_dtype(hidden_TD)
    narrow_TD, narrow_PD = hidden_TD.to(dtype), _narrow(weight_VD, dtype)
    total = hidden_TD.new_zeros((), dtype=loss_dtype(hidden_TD))
    for chunk in _chunks(targets_T, len(narrow_PD), dtype):
        total += cross_entropy(F.linear(narrow_TD[chunk], narrow_PD), targets_T[chunk], len(weight_VD))
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


def _narrow(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as products take it, (P, D): rounded once, where autocast would round it for every product, and with
    rows of zeros where the vocabulary is not aligned. One that is right already is not copied."""
    missing = -len(weight_VD) % ALIGNMENT.get(weight_VD.device.type, 1)
    narrow_VD = weight_VD.to(dtype)
    return F.pad(narrow_VD, (0, 0, 0, missing)) if missing else narrow_VD


def _chunks(tokens_T: Tensor, vocabulary: int, dtype: torch.dtype) -> list[slice]:
    """On CUDA a power of two of tokens each, as micro-batches have, so that the last chunk is full, too."""
    if tokens_T.device.type == "cuda":
        step = 2 ** int(math.log2(max(LEAST_TOKENS_PER_CHUNK, BYTES_PER_CUDA_CHUNK // (vocabulary * dtype.itemsize))))
    else:
        step = max(LEAST_TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // vocabulary)
    return [slice(start, start + step) for start in range(0, len(tokens_T), step)]


def _add_product(total_VD: Tensor, grad_CP: Tensor, hidden_CD: Tensor) -> None:
    """Add a chunk's gradient of the weight; as it is made, where that has its dtype and its rows."""
    if grad_CP.dtype == total_VD.dtype and grad_CP.shape[1] == len(total_VD):
        total_VD.addmm_(grad_CP.T, hidden_CD)
        return
    product_VD = (grad_CP.T @ hidden_CD)[: len(total_VD)]
    for block in _blocks(product_VD):
        total_VD[block] += product_VD[block].to(total_VD.dtype)


def _blocks(product_VD: Tensor) -> list[slice]:
    """A CPU adds numbers of two dtypes one by one: rows that stay in its cache while they are cast first and added; in
    a dry run the first alone, since all of them take the same room in turn. Elsewhere all rows."""
    rows, width = product_VD.shape
    step = max(1, NUMBERS_PER_BLOCK // width) if product_VD.device.type == "cpu" else rows
    blocks = [slice(start, start + step) for start in range(0, rows, step)]
    return blocks[:1] if is_dry(product_VD) else blocks


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        dtype = _product_dtype(hidden_TD)  # what autocast would choose
        narrow_TD, narrow_PD = hidden_TD.to(dtype), _narrow(weight_VD, dtype)
        total = hidden_TD.new_zeros((), dtype=loss_dtype(hidden_TD))
        grad_hidden = torch.empty_like(hidden_TD)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # a frozen weight's would be a third of the work, for nothing
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        chunks = _chunks(targets_T, len(narrow_PD), dtype)
        room_CP = narrow_TD.new_empty(min(len(targets_T), chunks[0].stop) if chunks else 0, len(narrow_PD))
        for chunk in chunks:
            hidden_CD, targets_C = narrow_TD[chunk], targets_T[chunk]
            logits_CP = torch.mm(hidden_CD, narrow_PD.T, out=room_CP[: len(targets_C)])
            total += softmax_gradient(logits_CP, targets_C, len(weight_VD))
            grad_hidden[chunk] = logits_CP @ narrow_PD
            if grad_weight is not None:
                _add_product(grad_weight, logits_CP, hidden_CD)
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
        narrow_PD = _narrow(weight_VD, dtype)
        total_T = hidden_TD.new_empty(len(hidden_TD), dtype=loss_dtype(hidden_TD))
        for chunk in _chunks(hidden_TD, len(narrow_PD), total_T.dtype):
            logits_CP = _wide(hidden_TD[chunk].to(dtype), narrow_PD)
            total_T[chunk] = logits_CP[:, : len(weight_VD)].logsumexp(dim=1)
        ctx.save_for_backward(hidden_TD, weight_VD, total_T)
        ctx.product_dtype = dtype
        return total_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        hidden_TD, weight_VD, total_T = ctx.saved_tensors
        dtype, (grad_T,) = ctx.product_dtype, grads
        narrow_PD = _narrow(weight_VD, dtype)
        grad_hidden = torch.empty_like(hidden_TD)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        for chunk in _chunks(hidden_TD, len(narrow_PD), total_T.dtype):
            hidden_CD = hidden_TD[chunk].to(dtype)
            probs_CP = _wide(hidden_CD, narrow_PD).sub_(total_T[chunk].unsqueeze(1)).exp_()
            grad_CP = probs_CP.mul_(grad_T[chunk].unsqueeze(1)).to(dtype)
            grad_CP[:, len(weight_VD) :] = 0
            grad_hidden[chunk] = (grad_CP @ narrow_PD).to(grad_hidden.dtype)
            _add_product(grad_weight, grad_CP, hidden_CD)
        return grad_hidden, grad_weight.to(weight_VD.dtype)


def _wide(hidden_CD: Tensor, narrow_PD: Tensor) -> Tensor:
    """A chunk's logits in the loss's dtype."""
    return torch.mm(hidden_CD, narrow_PD.T).to(loss_dtype(hidden_CD))
