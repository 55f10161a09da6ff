"""What mixtures of whole language models have in common: their experts side by side, and the mixed distribution.

    log p(v | t) = log sum_e exp(log w_te + log p_e(v | t))

Legend: `B` batch, `S` sequence, `T` tokens (B * S), `R` the tokens that one expert read, `E` experts, `D` width,
`V` vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from myriad.ffn import Cost, Role, Routing
from myriad.models.loss import chunked_logsumexp, loss_dtype, vocabulary_logits
from myriad.models.transformer import Transformer
from myriad.models.transformer_experts import TransformerExpertsConfig


class Experts(nn.ModuleList):
    """The transformers of a mixture."""

    def __init__(self, config: TransformerExpertsConfig) -> None:
        super().__init__(Transformer(config.whole_expert) for _ in range(config.experts))

    def each(self) -> Iterator[Transformer]:
        for expert in self:
            assert isinstance(expert, Transformer)
            yield expert

    def roles(self) -> dict[str, Role]:
        """Parameter name -> role."""
        named = [(index, expert.roles()) for index, expert in enumerate(self.each())]
        return {f"{index}.{name}": role for index, roles in named for name, role in roles.items()}

    def after_step(self, loads: Sequence[dict[str, Tensor]]) -> None:
        """Hand every expert its part of all experts' loads."""
        layers = len(loads) // len(self)
        for index, expert in enumerate(self.each()):
            expert.after_step(loads[index * layers : (index + 1) * layers])


def logits_of(ids: Tensor, x: Tensor, weight_VD: Tensor) -> Tensor:
    """The logit of one token at each position: (...) from ids (...) and outputs (..., D). Negative ids: of token 0."""
    rows = F.embedding(ids.clamp(min=0), weight_VD)
    dtype = loss_dtype(x)
    return (x.to(dtype) * rows.to(dtype)).sum(dim=-1)


def normalizers(x: Tensor, weight_VD: Tensor) -> Tensor:
    """log sum exp of the logits at each position: (...) from outputs (..., D); the logits are made in chunks."""
    return chunked_logsumexp(x.flatten(0, -2), weight_VD).view(x.shape[:-1])


class Read(NamedTuple):
    """What an expert made of the tokens at which it has a weight."""

    at_R: Tensor
    """Which ones of all T, int64, each once."""
    x_RD: Tensor
    """Its normalised outputs."""
    weight_VD: Tensor
    """Its output embedding."""


class Mixed(NamedTuple):
    log_probs_TV: Tensor
    log_z_TE: Tensor
    """The normalizers of each expert's logits; -inf where it has not read the token. Without gradient."""


def mixed_log_probs(reads: Sequence[Read], log_w_TE: Tensor) -> Mixed:
    """The mixture's distribution, in the dtype of the weights; one expert's logits are made at a time.

    Args:
        reads: one of each expert. Together they are all tokens.
        log_w_TE: log weights.
    """
    log_w_TE = log_w_TE.clamp(min=torch.finfo(log_w_TE.dtype).min / 2)  # a sum of two -inf has no gradient
    total_TV = log_w_TE.new_full((len(log_w_TE), len(reads[0].weight_VD)), -torch.inf)
    log_z_TE = torch.full_like(log_w_TE, -torch.inf)
    for expert, (at_R, x_RD, weight_VD) in enumerate(reads):
        logits_RV = vocabulary_logits(x_RD, weight_VD).to(log_w_TE.dtype)
        log_z_R = logits_RV.logsumexp(dim=1)
        weighted_RV = logits_RV + (log_w_TE[at_R, expert] - log_z_R).unsqueeze(1)
        total_TV = total_TV.index_copy(0, at_R, torch.logaddexp(total_TV[at_R], weighted_RV))
        log_z_TE[at_R, expert] = log_z_R.detach()
    return Mixed(total_TV, log_z_TE)


def mixed_loss(log_w_TE: Tensor, log_p_TE: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over targets of -log sum_e w_te p_e(target), in nats, and how many targets there are.

    Args:
        log_w_TE: log weights.
        log_p_TE: every expert's log likelihood of the target.
        targets_T: int64; negative ones are not counted.
    """
    counted_T = targets_T >= 0
    nats_T = -(log_w_TE + log_p_TE).logsumexp(dim=1)
    return torch.where(counted_T, nats_T, 0).sum(), counted_T.sum()


def keep_most_probable(log_w: Tensor, top_k: int | None) -> Tensor:
    """Normalised log weights (..., E) of the k largest; -inf for the others."""
    if top_k is not None and top_k < log_w.shape[-1]:
        # Before the first evidence all may be equal: the first of them, whatever the shapes.
        kept = log_w.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        others = torch.ones_like(log_w, dtype=torch.bool).scatter(-1, kept, False)
        log_w = log_w.masked_fill(others, -torch.inf)
    return log_w.log_softmax(dim=-1)


def routing_of(log_w_BSE: Tensor, top_k: int | None) -> Routing:
    """The experts of every token, those with most weight first; a weight that changes no digit of the output is 0."""
    experts = log_w_BSE.shape[-1]
    weights, ids = log_w_BSE.detach().exp().topk(top_k or experts, dim=-1)
    return Routing(ids, torch.where(weights > torch.finfo(torch.float32).eps, weights, 0), experts)


def times(number: int, cost: Cost) -> Cost:
    """So many parts of one cost."""
    return Cost(*(number * each for each in cost))


def real_positions(ids_BS: Tensor, mask: Tensor | None) -> Tensor:
    """Which of the new positions are no padding, bool (B, S)."""
    return torch.ones_like(ids_BS, dtype=torch.bool) if mask is None else mask[:, -ids_BS.shape[1] :]
