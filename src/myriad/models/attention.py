"""Causal self-attention with rotary positions, optional grouped-query heads and query-key normalization.

Legend: `B` batch, `S` new positions, `L` all positions, `H` heads, `G` key-value heads, `Q` width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from myriad.ffn import Cost
from myriad.models.base import LayerCache
from myriad.models.rotary import rotate


class Attention(nn.Module):
    """Maps (B, S, D) to (B, S, D).

    Args:
        d_model: width D.
        heads: query heads H.
        kv_heads: heads of keys and values, a divisor of H; each serves H / G query heads (arXiv 2305.13245).
        head_dim: width Q of a head.
        qk_norm: whether queries and keys get an RMSNorm each before rotation (arXiv 2302.05442).
        layer: this layer's number, for the cache.
    """

    def __init__(self, d_model: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.layer = heads, kv_heads, head_dim, layer
        self.qkv = nn.Linear(d_model, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, d_model, bias=False)
        self.q_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        for linear in (self.qkv, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(
        self, x_BSD: Tensor, angles: tuple[Tensor, Tensor], allowed: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """Attend.

        Args:
            x_BSD: normalised inputs.
            angles: the rotary cosines and sines of the new positions.
            allowed: bool, broadcastable to (B, 1, S, L), where a query may look; None: at all not later, for
                S = L or S = 1.
            cache: where to append this call's keys and values.
        """
        batch, length, _ = x_BSD.shape
        qkv = self.qkv(x_BSD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(_normalized(self.q_norm, q), angles), rotate(_normalized(self.k_norm, k), angles)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        # One new position may look at all: `is_causal` would let it see the first alone.
        causal = allowed is None and length > 1
        grouped = self.kv_heads != self.heads
        y_BHSQ = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, enable_gqa=grouped)
        return self.out(y_BHSQ.transpose(1, 2).reshape(batch, length, -1))


def _normalized(norm: nn.Module, x_BHSQ: Tensor) -> Tensor:
    """The norm with its gain in the dtype of x: PyTorch has no fused form for two dtypes."""
    if not isinstance(norm, nn.RMSNorm):
        return x_BHSQ
    return F.rms_norm(x_BHSQ, x_BHSQ.shape[-1:], norm.weight.to(x_BHSQ.dtype))


def attention_mask(batch: int, new: int, total: int, mask_BL: Tensor | None, device: torch.device) -> Tensor | None:
    """Where the last `new` of `total` positions may look, (B or 1, 1, S, L); None: at all not later.

    A padded position may look at itself, so that no row is empty: an empty softmax is not a number.
    """
    if mask_BL is None and new in (1, total):
        return None
    causal_SL = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
    if mask_BL is None:
        return causal_SL.view(1, 1, new, total)
    itself_SL = torch.ones(new, total, dtype=torch.bool, device=device).triu(total - new) & causal_SL
    return ((causal_SL & mask_BL[:, None, :]) | itself_SL).unsqueeze(1)


def attention_cost(d_model: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool, context: int) -> Cost:
    """The maps, and scores and sums over the mean number of positions that a token sees in a full context."""
    maps = Cost.of_matrix(d_model, (heads + 2 * kv_heads) * head_dim) + Cost.of_matrix(heads * head_dim, d_model)
    seen = (context + 1) / 2
    return maps + Cost(flops=int(2 * 2 * heads * head_dim * seen)) + Cost.of_vector(2 * head_dim * qk_norm)
