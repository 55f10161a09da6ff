"""Experts retrieved by product keys and looked up at once: the op, and the two ops that it stands for.

    y = sum over retrieved n:  router(score)_n * hidden(down[n] . x) * up[n]

(arXiv 2407.04153, equations 3 and 6). Gradients and graphs are those of the two ops. Where nothing is to be recorded, a
form may do both in one call: of one token each op has little to do, and what is around them takes longer.

Legend: `T` tokens, `H` heads, `P` = 2 halves, `Q` width of a half (d_key), `K` retrieved per head, `A` = H K, `N`
experts, `D` width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from myriad.kernels.expert_lookup import expert_lookup, form_dtype
from myriad.kernels.product_key import product_key
from myriad.kernels.registry import computes_directly, register, resolve

ROUTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores_THK: scores_THK.softmax(dim=-1),
    "sigmoid": Tensor.sigmoid,
    "relu": Tensor.relu,
}
"""From scores to weights; softmax is over the K of each head."""


class Retrieved(NamedTuple):
    y_TD: Tensor
    ids_TA: Tensor
    weights_TA: Tensor


class RetrievedLookupFunctions(NamedTuple):
    forward: Callable[..., Retrieved]
    """Takes what `retrieved_lookup` takes, up to the activation and by position, and refuses the same."""


def retrieve(queries_THPQ: Tensor, keys: Tensor, k: int, router: str) -> tuple[Tensor, Tensor]:
    """Each token's rows over all heads and their weights, both of shape (T, A); arguments as of `product_key`.

    Raises:
        ValueError: shapes that do not fit, k out of range, or an unknown router.
    """
    if router not in ROUTERS:
        raise ValueError(f"unknown router '{router}' (known: {', '.join(ROUTERS)})")
    scores_THK, ids_THK = product_key(queries_THPQ, keys, k)
    return ids_THK.flatten(1), ROUTERS[router](scores_THK).flatten(1)


def retrieved_lookup(
    x_TD: Tensor,
    queries_THPQ: Tensor,
    keys: Tensor,
    k: int,
    router: str,
    down_ND: Tensor,
    up_ND: Tensor,
    gate_ND: Tensor | None = None,
    activation: str = "gelu",
    dropout: float = 0.0,
) -> Retrieved:
    """The weighted sum of the outputs of the experts that each token's queries retrieve.

    Args:
        x_TD: inputs of shape (T, D).
        queries_THPQ: queries of shape (T, H, 2, d_key).
        keys: sub-keys of shape (2, side, d_key), shared by the heads, or (H, 2, side, d_key).
        k: experts that each head retrieves.
        router: `softmax`, `sigmoid` or `relu`.
        down_ND, up_ND, gate_ND: tables of shape (N, D), N = side * side.
        activation: `gelu` (exact), `relu`, `silu` or `none`.
        dropout: share of the weights that y goes without; to drop one is to drop the hidden value that it multiplies.

    Returns:
        y of shape (T, D) in the dtype of x; ids, int64, and the weights before any was dropped, of shape (T, A).

    Raises:
        ValueError: shapes that do not fit, k out of range, or an unknown router or activation.
        IndexError: an id outside the tables.
    """
    inputs = x_TD, queries_THPQ, keys, k, router, down_ND, up_ND, gate_ND, activation
    if dropout or not computes_directly(x_TD, queries_THPQ, keys, down_ND, up_ND):
        return one_after_the_other(*inputs, dropout)
    return resolve("retrieved_lookup", x_TD.device.type, form_dtype(x_TD, down_ND)).forward(*inputs)


def one_after_the_other(
    x_TD: Tensor,
    queries_THPQ: Tensor,
    keys: Tensor,
    k: int,
    router: str,
    down_ND: Tensor,
    up_ND: Tensor,
    gate_ND: Tensor | None,
    activation: str,
    dropout: float = 0.0,
) -> Retrieved:
    """The same by the two ops, in whatever form each has."""
    ids_TA, weights_TA = retrieve(queries_THPQ, keys, k, router)
    kept_TA = F.dropout(weights_TA, dropout) if dropout else weights_TA
    y_TD = expert_lookup(x_TD, ids_TA, kept_TA, down_ND, up_ND, gate_ND, activation=activation)
    return Retrieved(y_TD, ids_TA, weights_TA)


register("retrieved_lookup", "reference", RetrievedLookupFunctions(one_after_the_other), serves=("triton",))
