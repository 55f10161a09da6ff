"""A mixture of separately trained transformers, weighted by the cluster that a text's beginning is nearest to.

    p(x_t | x_<t) = sum_e w_te p_e(x_t | x_<t),   w_t ~ top_k exp(-|f(x_<=min(t, P)) - c_e|^2 / temperature)

f are the TF-IDF features of the tokens so far, projected and normalised, and c_e the centre of the cluster that
expert e was trained on (c-BTM, arXiv 2303.14177, section 2.4). The paper takes the weights of a context; here the
context is a text's first P tokens, `prompt_tokens`, padding not counted: up to there the weights follow the text, each
from the tokens that it has, and from there on they stay. That is causal whatever the lengths, and the same with and
without a cache; and from the P-th token on a text is read by its k experts alone, which the others never join again.

Legend: `B` batch, `S` sequence, `T` tokens (B * S), `E` experts, one for each cluster, `F` features, `V` vocabulary.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from myriad.config import register
from myriad.ffn import Cost, Role
from myriad.models.base import Cache, LanguageModel, LMOutput
from myriad.models.cache import KVCache
from myriad.models.clusters import Clusters
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
from myriad.models.transformer import Encoded, Transformer
from myriad.models.transformer_experts import ExpertRouting, TransformerExpertsConfig


@register
class ClusterRouting(ExpertRouting):
    """A cluster model picks the experts from a text's first tokens."""

    kind: Literal["cluster"] = "cluster"
    top_k: int = Field(default=2, ge=1)
    """Experts with a weight, those of the nearest clusters."""
    temperature: float = Field(default=0.1, gt=0)
    """Of the weights: a low one gives the nearest cluster all."""
    features: int = Field(default=100, ge=1, le=10_000)
    """Of the TF-IDF vectors' projection: the cluster model's."""
    prompt_tokens: int = Field(default=64, ge=1)
    """Tokens at a text's beginning that pick its experts; all experts read these, the picked ones the rest."""

    def refuse_misfit(self, config: TransformerExpertsConfig) -> None:
        if self.top_k > config.experts:
            raise ValueError(f"routing.top_k = {self.top_k} exceeds experts = {config.experts}")

    def build(self, config: TransformerExpertsConfig) -> "ClusterMixture":
        return ClusterMixture(config, self)

    def cost(self, config: TransformerExpertsConfig) -> Cost:
        one = config.whole_expert.cost()
        total = times(self.top_k, one)
        choosing = 2 * self.features * config.experts + self._reading_of_others(config)
        return total._replace(
            parameters=config.experts * one.parameters,
            flops=total.flops + choosing,
            routing=total.routing + choosing,
        )

    def _reading_of_others(self, config: TransformerExpertsConfig) -> int:
        """FLOPs per token of a full context that the other experts spend on its beginning, which gets no logits."""
        prompt = min(self.prompt_tokens - 1, config.context)  # the last one of it picks: they need not read it
        if not prompt:
            return 0
        reading = config.whole_expert.model_copy(update={"context": prompt}).cost().flops
        head = Cost.of_matrix(config.expert.d_model, config.vocabulary).flops
        return int((config.experts - self.top_k) * (reading - head) * prompt / config.context)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return [cls(features=6, prompt_tokens=8), cls(top_k=1, features=3, prompt_tokens=40, temperature=0.5)]


class Beginning(NamedTuple):
    """What the weights of the tokens to come depend on."""

    log_w_BE: Tensor
    """The weights at the last position."""
    projection_BF: Tensor
    """Of the tokens that count, `prompt_tokens` at most."""
    tokens_B: Tensor
    """How many there were so far, padding not counted."""


class ClusterCache:
    """The keys and values of the experts that still read a text, and what its weights depend on.

    An expert's cache holds those sequences alone that it reads, in their order.
    """

    is_compileable = False

    def __init__(self, experts: int, prompt_tokens: int) -> None:
        self.experts = [KVCache() for _ in range(experts)]
        self.prompt_tokens = prompt_tokens
        self.length = 0
        self.beginning: Beginning | None = None

    def get_seq_length(self) -> int:
        """The positions held."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on from what sequence `beam_idx[i]` holds."""
        if self.beginning is None:
            return
        readers_BE = readers_of(self.beginning, self.prompt_tokens)
        rows_BE = readers_BE.cumsum(0) - 1
        for expert, cache in enumerate(self.experts):
            beams = beam_idx[readers_BE[beam_idx, expert]]
            cache.reorder_cache(rows_BE[beams, expert])
        self.beginning = Beginning(*(value.index_select(0, beam_idx) for value in self.beginning))


def readers_of(beginning: Beginning, prompt_tokens: int) -> Tensor:
    """Which experts read on, (B, E): all, until a text's experts are picked."""
    return (beginning.tokens_B < prompt_tokens).unsqueeze(1) | beginning.log_w_BE.isfinite()


class Share(NamedTuple):
    """What one expert reads in a call: the whole of some sequences, and the first columns of others."""

    whole: Tensor
    """Rows, int64."""
    begun: Tensor
    """Rows of which it reads no more afterwards, int64."""
    columns: int
    """How many of theirs."""
    places_B: Tensor
    """Where its cache holds a row."""


class ClusterMixture(LanguageModel):
    """Logits are the logarithms of the mixed probabilities.

    In training every expert reads everything, whatever its weight, so that all processes have all gradients.
    """

    def __init__(self, config: TransformerExpertsConfig, routing: ClusterRouting) -> None:
        super().__init__()
        self.config: TransformerExpertsConfig = config  # pyright: ignore[reportIncompatibleVariableOverride]
        self.routing = routing
        self.experts = Experts(config)
        self.clusters = Clusters(config.vocabulary, routing.features, config.experts)

    def new_cache(self) -> ClusterCache:
        return ClusterCache(self.config.experts, self.routing.prompt_tokens)

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
        if cache is not None and not isinstance(cache, ClusterCache):
            raise ValueError("cache: a mixture generates with a cache of its own, which `new_cache` makes")
        before = None if cache is None else cache.beginning
        log_w_BSE, after, undecided_B = self._weigh(ids, real_positions(ids, mask), before)
        log_w_TE = log_w_BSE.flatten(0, 1)
        shares = self._shares(before, after, undecided_B, everything=self.training and cache is None)
        caches = [None] * len(self.experts) if cache is None else cache.experts
        reads: list[Read] = []
        whole: list[Encoded | None] = []
        for number, (expert, share, own) in enumerate(zip(self.experts.each(), shares, caches, strict=True)):
            read, output = _read(expert, share, Text(ids, positions, mask), own)
            weighed_R = log_w_TE[read.at_R, number].isfinite()
            reads.append(read._replace(at_R=read.at_R[weighed_R], x_RD=read.x_RD[weighed_R]))
            whole.append(output)
        if cache is not None:
            cache.beginning, cache.length = after, cache.length + ids.shape[1]

        logits = loss = count = None
        if targets is None:
            logits = mixed_log_probs(reads, log_w_TE).log_probs_TV.unflatten(0, ids.shape)
        else:
            log_p_TE = _log_likelihoods(reads, targets.flatten(), log_w_TE)
            loss, count = mixed_loss(log_w_TE, log_p_TE, targets.flatten())
        aux_losses = [output.aux_loss for output in whole if output is not None]
        aux_loss = torch.stack(aux_losses).sum() if aux_losses else log_w_TE.new_zeros(())
        nothing: tuple[dict[str, Tensor], ...] = ({},) * self.config.expert.layers
        loads = tuple(load for output in whole for load in (nothing if output is None else output.loads))
        routing = ((routing_of(log_w_BSE, self.routing.top_k),),) if with_routing else ()
        return LMOutput(logits, loss, count, aux_loss, loads, routing)

    def _weigh(self, ids: Tensor, real_BS: Tensor, before: Beginning | None) -> tuple[Tensor, Beginning, Tensor]:
        """Log weights (B, S, E), what those to come depend on, and how many columns stand before a text's picking."""
        picking = self.routing.prompt_tokens
        tokens_B = torch.zeros_like(ids[:, 0]) if before is None else before.tokens_B
        order_BS = tokens_B.unsqueeze(1) + real_BS.cumsum(dim=1)
        counted_BS = real_BS & (order_BS <= picking)
        projection_BSF = torch.where(counted_BS.unsqueeze(-1), self.clusters.project(ids), 0).cumsum(dim=1)
        if before is not None:
            projection_BSF = projection_BSF + before.projection_BF.unsqueeze(1)
        distances_BSE = self.clusters.squared_distances(projection_BSF)
        log_w_BSE = keep_most_probable(-distances_BSE / self.routing.temperature, self.routing.top_k)
        # From the picking on weights are copied, not computed again: a last bit could pick another expert.
        undecided_B = (order_BS < picking).sum(dim=1)
        source_BS = torch.arange(ids.shape[1], device=ids.device).minimum(undecided_B.unsqueeze(1))
        log_w_BSE = log_w_BSE.gather(1, source_BS.unsqueeze(-1).expand_as(log_w_BSE))
        if before is not None:
            picked_B = before.tokens_B >= picking
            log_w_BSE = torch.where(picked_B.view(-1, 1, 1), before.log_w_BE.unsqueeze(1), log_w_BSE)
        return log_w_BSE, Beginning(log_w_BSE[:, -1], projection_BSF[:, -1], order_BS[:, -1]), undecided_B

    def _shares(
        self, before: Beginning | None, after: Beginning, undecided_B: Tensor, *, everything: bool
    ) -> list[Share]:
        """What each expert reads; `everything`: all of it, also where it will have no weight."""
        picking = self.routing.prompt_tokens
        readers_BE = readers_of(after, picking)
        held_BE = torch.ones_like(readers_BE) if before is None else readers_of(before, picking)
        whole_BE = held_BE if everything else held_BE & readers_BE
        begun_BE = held_BE & ~whole_BE
        columns = int(torch.where(begun_BE.any(dim=1), undecided_B, 0).max())
        places_BE = held_BE.cumsum(dim=0) - 1
        parts = zip(_rows(whole_BE), _rows(begun_BE), places_BE.unbind(1), strict=True)
        return [Share(whole, begun, columns, places_B) for whole, begun, places_B in parts]

    def roles(self) -> dict[str, Role]:
        return {f"experts.{name}": role for name, role in self.experts.roles().items()}

    def after_step(self, loads: Sequence[dict[str, Tensor]]) -> None:
        self.experts.after_step(loads)


def _rows(chosen_BE: Tensor) -> Sequence[Tensor]:
    """Each expert's rows, ascending."""
    return chosen_BE.T.nonzero()[:, 1].split(chosen_BE.sum(dim=0).tolist())


class Text(NamedTuple):
    """What a forward was given to read."""

    ids: Tensor
    positions: Tensor | None
    mask: Tensor | None


def _read(expert: Transformer, share: Share, text: Text, cache: KVCache | None) -> tuple[Read, Encoded | None]:
    """Let an expert read its share; of the sequences that it leaves, its cache lets go.

    Returns:
        the tokens that it read, and its output for those sequences that it read whole.
    """
    new, at, x = text.ids.shape[1], [], []
    if len(share.begun) and share.columns:
        own = None if cache is None else cache.select(share.places_B[share.begun])
        at.append(_tokens(share.begun, share.columns, new))
        x.append(_encode(expert, text, share.begun, share.columns, own).x_BSD.flatten(0, 1))
    if len(share.begun) and cache is not None:
        cache.reorder_cache(share.places_B[share.whole])
    output = None
    if len(share.whole):
        output = _encode(expert, text, share.whole, new, cache)
        at.append(_tokens(share.whole, new, new))
        x.append(output.x_BSD.flatten(0, 1))
    weight_VD = expert.output_embedding
    if not at:
        return Read(share.whole, weight_VD[:0], weight_VD), None
    return Read(torch.cat(at), torch.cat(x), weight_VD), output


def _tokens(rows: Tensor, columns: int, length: int) -> Tensor:
    """The places of the first columns of some rows among all B * S tokens."""
    return (rows.unsqueeze(1) * length + torch.arange(columns, device=rows.device)).flatten()


def _encode(expert: Transformer, text: Text, rows: Tensor, columns: int, cache: KVCache | None) -> Encoded:
    ids, positions, mask = text
    held = 0 if cache is None else cache.get_seq_length()
    return expert.encode(
        ids[rows, :columns],
        positions=None if positions is None else positions.expand_as(ids)[rows, :columns],
        cache=cache,
        mask=None if mask is None else mask[rows, : held + columns],
    )


def _log_likelihoods(reads: Sequence[Read], targets_T: Tensor, log_w_TE: Tensor) -> Tensor:
    """Every expert's log likelihoods of the targets, (T, E); -inf where it has no weight."""
    columns: list[Tensor] = []
    for at_R, x_RD, weight_VD in reads:
        log_p_R = logits_of(targets_T[at_R], x_RD, weight_VD) - normalizers(x_RD, weight_VD)
        columns.append(log_w_TE.new_full((len(log_w_TE),), -torch.inf).index_copy(0, at_R, log_p_R.to(log_w_TE.dtype)))
    return torch.stack(columns, dim=1)
