"""A mixture of separately trained transformers, weighted by how well each has predicted the text so far.

    p(x_t | x_<t) = sum_e p(e | x_<t) p_e(x_t | x_<t)
    p(e | x_<t) ~ prior_e prod_{s<t} p_e(x_s | x_<s)

This is Bayes' rule over whole experts, after Branch-Train-Merge (arXiv 2208.03306, section 2.2). No router is trained,
and every expert reads every token. The first token of a sequence is predicted by nobody and tells nothing; padding
neither. Where a document begins in the midst of a sequence, the weights are the prior's again: what came before was
another text.

Legend: `B` batch, `S` sequence, `T` tokens (B * S), `E` experts, `D` width.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from myriad.config import register
from myriad.ffn import Cost, Role
from myriad.models.base import Cache, LanguageModel, LMOutput
from myriad.models.cache import KVCache
from myriad.models.mixing import (
    Experts,
    Read,
    keep_most_probable,
    logits_of,
    mixed_log_probs,
    mixed_loss,
    normalizers,
    real_positions,
    routing_of,
    times,
)
from myriad.models.transformer_experts import ExpertRouting, TransformerExpertsConfig


@register
class PosteriorRouting(ExpertRouting):
    """Every expert reads everything; their likelihoods of the text so far weigh them."""

    kind: Literal["posterior"] = "posterior"
    top_k: int | None = Field(default=None, ge=1)
    """Experts with a weight at each position, the most probable ones; None: all."""
    document_start: int | None = Field(default=None, ge=0)
    """The token that stands before each document; None: a sequence is one. Mixing names that of the experts."""

    def refuse_misfit(self, config: TransformerExpertsConfig) -> None:
        if self.document_start is not None and self.document_start >= (config.vocab_size or math.inf):
            raise ValueError(
                f"routing.document_start = {self.document_start} is no token of vocab_size = {config.vocab_size}"
            )
        if self.top_k is not None and self.top_k > config.experts:
            raise ValueError(f"routing.top_k = {self.top_k} exceeds experts = {config.experts}")

    def build(self, config: TransformerExpertsConfig) -> "PosteriorMixture":
        return PosteriorMixture(config, self)

    def cost(self, config: TransformerExpertsConfig) -> Cost:
        # Beside the experts: each one's logit of the token that came.
        evidence = 2 * config.expert.d_model
        return times(config.experts, config.whole_expert.cost() + Cost(flops=evidence, routing=evidence))

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return [cls(document_start=3), cls(top_k=2)]


class Seen(NamedTuple):
    """What the next token's evidence needs of those before it."""

    log_w_BE: Tensor
    """log p(e | all tokens so far), of all experts."""
    x_BED: Tensor
    """Every expert's last output."""
    log_z_BE: Tensor
    """The normalizer of its logits there."""
    real_B: Tensor
    """Whether the last position is no padding."""


class Head(NamedTuple):
    """An expert's outputs, and what makes logits of them."""

    x_BSD: Tensor
    weight_VD: Tensor


class PosteriorCache:
    """Every expert's keys and values, and what the experts are worth so far."""

    is_compileable = False

    def __init__(self, experts: int) -> None:
        self.experts = [KVCache() for _ in range(experts)]
        self.seen: Seen | None = None

    def get_seq_length(self) -> int:
        """The positions held."""
        return self.experts[0].get_seq_length()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on from what sequence `beam_idx[i]` holds."""
        for expert in self.experts:
            expert.reorder_cache(beam_idx)
        if self.seen is not None:
            self.seen = Seen(*(value.index_select(0, beam_idx) for value in self.seen))


class PosteriorMixture(LanguageModel):
    """Logits are the logarithms of the mixed probabilities.

    Attributes:
        log_prior: (E,), the logarithms of the experts' weights before the first token; equal ones unless set.
    """

    log_prior: Tensor

    def __init__(self, config: TransformerExpertsConfig, routing: PosteriorRouting) -> None:
        super().__init__()
        self.config: TransformerExpertsConfig = config  # pyright: ignore[reportIncompatibleVariableOverride]
        self.top_k, self.document_start = routing.top_k, routing.document_start
        self.experts = Experts(config)
        self.register_buffer("log_prior", torch.zeros(config.experts).log_softmax(dim=0))

    def new_cache(self) -> PosteriorCache:
        return PosteriorCache(self.config.experts)

    def layer_name(self, index: int) -> str:
        return "experts"

    def forward(
        self,
        ids: Tensor,
        *,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        with_routing: bool = False,
    ) -> LMOutput:
        if cache is not None and not isinstance(cache, PosteriorCache):
            raise ValueError("cache: a mixture generates with a cache of its own, which `new_cache` makes")
        caches = [None] * len(self.experts) if cache is None else cache.experts
        encoded = [
            expert.encode(ids, positions=positions, cache=own, mask=mask)
            for expert, own in zip(self.experts.each(), caches, strict=True)
        ]
        weights = [expert.output_embedding for expert in self.experts.each()]
        heads = [Head(output.x_BSD, weight_VD) for output, weight_VD in zip(encoded, weights, strict=True)]
        seen, real_BS = None if cache is None else cache.seen, real_positions(ids, mask)

        logits = loss = count = None
        if targets is None:
            # The last position's come with its logits.
            log_z_BSE = _stack([normalizers(head.x_BSD[:, :-1], head.weight_VD) for head in heads])
            log_w_BSE = self._posterior(ids, real_BS, heads, log_z_BSE, seen)
            kept_BSE = keep_most_probable(log_w_BSE, self.top_k)
            logits, log_z_BSE = _mixed_logits(heads, kept_BSE)
        else:
            log_z_BSE = _stack([normalizers(*head) for head in heads])
            log_w_BSE = self._posterior(ids, real_BS, heads, log_z_BSE, seen)
            kept_BSE = keep_most_probable(log_w_BSE, self.top_k)
            log_p_BSE = _stack([logits_of(targets, *head) for head in heads]) - log_z_BSE
            loss, count = mixed_loss(kept_BSE.flatten(0, 1), log_p_BSE.flatten(0, 1), targets.flatten())
        if cache is not None:
            last_BED = torch.stack([head.x_BSD[:, -1] for head in heads], dim=1)
            cache.seen = Seen(log_w_BSE[:, -1], last_BED, log_z_BSE[:, -1], real_BS[:, -1])
        aux_loss = torch.stack([output.aux_loss for output in encoded]).sum()
        loads = tuple(load for output in encoded for load in output.loads)
        routing = ((routing_of(kept_BSE, self.top_k),),) if with_routing else ()
        return LMOutput(logits, loss, count, aux_loss, loads, routing)

    def _posterior(
        self, ids: Tensor, real_BS: Tensor, heads: Sequence[Head], log_z_BSE: Tensor, seen: Seen | None
    ) -> Tensor:
        """log p(e | tokens up to this one), (B, S, E), of all experts.

        Args:
            ids: the new tokens.
            real_BS: which of them are no padding.
            heads: one of each expert.
            log_z_BSE: the normalizers of the new positions; the last one's are not needed.
            seen: of the tokens before; None: there are none.
        """
        batch, new = ids.shape
        next_BSE = _stack([logits_of(ids[:, 1:], head.x_BSD[:, :-1], head.weight_VD) for head in heads])
        evidence_BSE = next_BSE - log_z_BSE[:, : new - 1]
        if seen is None:
            start_BE = self.log_prior.to(evidence_BSE.dtype).expand(batch, -1)
            first_BE, real_before_B = torch.zeros_like(start_BE), torch.zeros_like(real_BS[:, 0])
        else:
            start_BE, real_before_B = seen.log_w_BE, seen.real_B
            first_BE = _first_evidence(ids[:, 0], heads, seen)
        evidence_BSE = torch.cat((first_BE.unsqueeze(1), evidence_BSE), dim=1)
        tells_BS = real_BS & torch.cat((real_before_B.unsqueeze(1), real_BS[:, :-1]), dim=1)
        # Measured from the best expert's, sums stay small where they decide: digits are not lost on long texts.
        relative_BSE = evidence_BSE - evidence_BSE.amax(dim=-1, keepdim=True).detach()
        told_BSE = torch.where(tells_BS.unsqueeze(-1), relative_BSE, 0).cumsum(dim=1)
        known_BSE = start_BE.unsqueeze(1) + told_BSE
        if self.document_start is not None:
            known_BSE = self._since_document_start(real_BS & (ids == self.document_start), known_BSE)
        return known_BSE.log_softmax(dim=-1)

    def _since_document_start(self, starts_BS: Tensor, known_BSE: Tensor) -> Tensor:
        """What is known where all before the last start of a document is left out."""
        places_S = torch.arange(starts_BS.shape[1], device=starts_BS.device)
        last_BS = torch.where(starts_BS, places_S, -1).cummax(dim=1).values
        before_BSE = known_BSE.gather(1, last_BS.clamp(min=0).unsqueeze(-1).expand_as(known_BSE))
        anew_BSE = self.log_prior.to(known_BSE.dtype) + known_BSE - before_BSE
        return torch.where((last_BS >= 0).unsqueeze(-1), anew_BSE, known_BSE)

    def roles(self) -> dict[str, Role]:
        return {f"experts.{name}": role for name, role in self.experts.roles().items()}

    def after_step(self, loads: Sequence[dict[str, Tensor]]) -> None:
        self.experts.after_step(loads)


def _stack(values_BS: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values_BS), dim=-1)


def _first_evidence(ids_B: Tensor, heads: Sequence[Head], seen: Seen) -> Tensor:
    """log p_e of the first new token, (B, E)."""
    logits = [logits_of(ids_B, x_BD, head.weight_VD) for head, x_BD in zip(heads, seen.x_BED.unbind(1), strict=True)]
    return _stack(logits) - seen.log_z_BE


def _mixed_logits(heads: Sequence[Head], log_w_BSE: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture's log probabilities (B, S, V), and every expert's normalizers (B, S, E)."""
    everywhere_T = torch.arange(log_w_BSE[..., 0].numel(), device=log_w_BSE.device)
    reads = [Read(everywhere_T, head.x_BSD.flatten(0, 1), head.weight_VD) for head in heads]
    mixed = mixed_log_probs(reads, log_w_BSE.flatten(0, 1))
    shape = log_w_BSE.shape[:2]
    return mixed.log_probs_TV.unflatten(0, shape), mixed.log_z_TE.unflatten(0, shape)
