"""The cross-entropy in Triton: one program a row of logits, which is read twice and written once.

Every lane of a program keeps the maximum of its own columns, and the sum of exponentials relative to it: no lane waits
for another before the row's end. The gradient is written from the row's end to its beginning, since what was read last
is what the cache still holds. Columns past the vocabulary are loaded and stored with the rest, so that all accesses
are wide though the vocabulary is odd. Each row's loss goes to a place of its own: the sum has the same bits in every
run.

Legend: `C` tokens, `P` columns, of which the first `V` are the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from myriad.kernels.cross_entropy import CrossEntropyFunctions
from myriad.kernels.dry import is_dry
from myriad.kernels.triton.launch import launch

EACH = 8
"""Neighbouring columns of a lane: 16 bytes of bfloat16, a thread's widest load."""
LANES = 512
"""Lanes of a program: two for each thread of eight warps."""


def loss(logits_CP: Tensor, targets_C: Tensor, vocabulary: int) -> Tensor:
    """The sum of the losses."""
    return _losses(logits_CP, targets_C, vocabulary, gradient=False).sum()


def gradient(logits_CP: Tensor, targets_C: Tensor, vocabulary: int) -> Tensor:
    """The sum of the losses; its gradient takes the place of the logits."""
    return _losses(logits_CP, targets_C, vocabulary, gradient=True).sum()


FUNCTIONS = CrossEntropyFunctions(loss, gradient)


def _losses(logits: Tensor, targets: Tensor, vocabulary: int, *, gradient: bool) -> Tensor:
    """Each row's, float32; zero where the target is not counted."""
    losses_C = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if is_dry(logits):  # what would be held is all that it asks, and that is here
        return losses_C
    columns = logits.shape[1]
    lanes = min(LANES, triton.next_power_of_2(triton.cdiv(columns, EACH)))
    sizes = {"V": vocabulary, "P": columns, "STRIDE": logits.stride(0), "LANES": lanes, "EACH": EACH}
    options = {"GRADIENT": gradient, **sizes, "num_warps": max(1, lanes // 64)}
    launch(_cross_entropy, (len(logits),), logits, targets.contiguous(), losses_C, **options)
    return losses_C


@triton.jit
def _cross_entropy(
    logits,
    targets,
    losses,
    GRADIENT: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    STRIDE: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * STRIDE
    target = tl.load(targets + row)
    if target < 0:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            _clear(logits, P, LANES, EACH)
    else:
        # Before the gradient takes its place. A target past the vocabulary has no loss: not a number.
        chosen = tl.load(logits + target, mask=target < V, other=float("nan")).to(tl.float32)
        largest, log_sum = _normalizer(logits, V, P, LANES, EACH)
        tl.store(losses + row, log_sum - (chosen - largest))
        if GRADIENT:
            _differentiate(logits, target, largest, log_sum, V, P, LANES, EACH)


@triton.jit
def _columns(start, LANES: tl.constexpr, EACH: tl.constexpr):
    """The columns of one block, (LANES, EACH)."""
    return start + tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]


@triton.jit
def _clear(logits, P: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr):
    for start in range(0, P, LANES * EACH):
        column = _columns(start, LANES, EACH)
        tl.store(logits + column, 0.0, mask=column < P)


@triton.jit
def _normalizer(logits, V: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr):
    """A row's largest logit, and the logarithm of the sum of exponentials relative to it."""
    largest = tl.full((LANES,), -3.4028234663852886e38, tl.float32)  # finite: -inf less -inf is not a number
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, P, LANES * EACH):
        column = _columns(start, LANES, EACH)
        x = tl.load(logits + column, mask=column < P, other=0.0).to(tl.float32)
        x = tl.where(column < V, x, float("-inf"))
        above = tl.maximum(largest, tl.max(x, 1))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(x - above[:, None]), 1)
        largest = above
    above = tl.max(largest, 0)
    return above, tl.log(tl.sum(total * tl.exp(largest - above), 0))


@triton.jit
def _differentiate(
    logits, target, largest, log_sum, V: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr
):
    """Softmax less one at the target, in place; zero past the vocabulary."""
    last: tl.constexpr = (P - 1) // (LANES * EACH) * (LANES * EACH)
    for start in range(0, P, LANES * EACH):
        column = _columns(last - start, LANES, EACH)
        x = tl.load(logits + column, mask=column < P, other=0.0).to(tl.float32)
        grad = tl.exp((x - largest) - log_sum) - (column == target.to(tl.int32)).to(tl.float32)
        tl.store(logits + column, tl.where(column < V, grad, 0.0), mask=column < P)
