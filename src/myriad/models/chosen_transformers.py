"""One language model whose experts are stacks of blocks, and in which the experts choose their tokens.

    x        = trunk(embedding(ids))                  some blocks that all tokens go through: the router sees context
    s        = softmax(W rmsnorm(x))                  over the E experts, in float32 at least
    C        = floor(S capacity_factor / E)           of the S tokens of a sequence that are no padding
    I_e      = the C tokens of the largest s_e, in the order of the text          in training, in each sequence
               every token with s_e >= h_e                                        in evaluation and generation
    z_e      = blocks_e(x[I_e])                       attending among these tokens alone, at their true positions
    y[t]     = x[t] + sum over the experts e with t in I_e of  s_e[t] (z_e[t] - x[t])
    logits   = embedding (or head) times rmsnorm(y)

    h_e     <- d h_e + (1 - d) (the smallest s_e in I_e, mean over the step)      d = threshold_decay, once a step

Experts that choose are those of arXiv 2202.09368, there feed-forward layers. A token that no expert takes goes from the
trunk to the norm. The choice and its causal rule are those of the feed-forward layer `expert_choice` (thresholds.py):
training looks at later tokens, so that its loss is no measure of quality; evaluation goes by thresholds.

An expert's tokens stand dense and in order, so that attention needs no mask: places that are left empty, where another
sequence has more tokens, stand behind.

Legend: `B` batch, `S` sequence, `T` = B*S tokens, `D` width, `E` experts, `C` capacity, `M` most tokens that an expert
takes of a sequence, `R` rows: tokens of all experts, expert by expert.
"""

from collections.abc import Sequence
from itertools import islice
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from myriad.config import ConfigError, first_difference, register
from myriad.ffn import Cost, FFNOutput, Role, Routing
from myriad.ffn.balance import Share
from myriad.ffn.experts import add_rows, router_logits, rows_of, take_rows
from myriad.ffn.tables import NO_TABLES
from myriad.ffn.thresholds import RunningThresholds, chosen_routing, reaches, take_best
from myriad.models.attention import attention_mask
from myriad.models.base import Cache, LanguageModel, LMOutput
from myriad.models.cache import KVCache
from myriad.models.loss import predict
from myriad.models.rotary import rotary_angles
from myriad.models.transformer import (
    Block,
    Transformer,
    TransformerConfig,
    after_step_of_blocks,
    block_roles,
    through_blocks,
)
from myriad.models.transformer_experts import ExpertRouting, TransformerExpertsConfig


@register
class ExpertChoiceRouting(ExpertRouting):
    """One model: behind a shared trunk, every expert takes the tokens that it scores highest."""

    kind: Literal["expert_choice"] = "expert_choice"
    causal: ClassVar[bool] = False

    trunk_layers: int = Field(default=2, ge=1, le=10_000)
    """Blocks before the experts, like those of `expert`, that all tokens go through."""
    capacity_factor: float = Field(default=1.0, gt=0)
    """Experts that a token has on average: in training, each takes context * capacity_factor / experts tokens."""
    threshold_decay: float = Field(default=0.9, ge=0, lt=1)
    """What remains of the thresholds after a step."""
    threshold_after: int | None = Field(default=None, ge=1)
    """Steps after which training, too, chooses by the thresholds; None: it never does."""

    def share(self, experts: int) -> Share:
        """Of a sequence's tokens that each of so many experts takes in training."""
        return Share.of(self.capacity_factor / experts)

    def refuse_misfit(self, config: TransformerExpertsConfig) -> None:
        if self.capacity_factor > config.experts:
            raise ValueError(
                f"routing.capacity_factor = {self.capacity_factor:g} exceeds experts = {config.experts}: "
                "an expert would take more tokens than there are"
            )
        least = self.share(config.experts).least()
        if config.context < least:
            raise ValueError(
                f"context = {config.context} is shorter than experts / routing.capacity_factor = {config.experts} / "
                f"{self.capacity_factor:g} needs ({least}): an expert would take no token of a sequence"
            )
        if config.expert.tables:
            raise ValueError("expert.tables: routing expert_choice has no tables that layers share")

    def build(self, config: TransformerExpertsConfig) -> "ChosenTransformers":
        return ChosenTransformers(config, self)

    def cost(self, config: TransformerExpertsConfig) -> Cost:
        expert = config.expert.blocks_cost(self.share(config.experts).floor(config.context))
        experts = Cost(
            config.experts * expert.parameters,
            round(self.capacity_factor * expert.active_parameters),
            round(self.capacity_factor * expert.flops),
            round(self.capacity_factor * expert.bytes),
            round(self.capacity_factor * expert.routing),
        )
        d_model = config.expert.d_model
        router = Cost.of_matrix(d_model, config.experts).as_routing() + Cost.of_vector(d_model)
        trunk = self.trunk(config).blocks_cost(config.context)
        return trunk + router + experts + config.expert.embeddings_cost(config.vocabulary)

    def trunk(self, config: TransformerExpertsConfig) -> TransformerConfig:
        """The trunk's blocks."""
        return config.expert.model_copy(update={"layers": self.trunk_layers})

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return [
            cls(trunk_layers=1),
            cls(capacity_factor=1.5, threshold_decay=0.5),
            cls(trunk_layers=1, capacity_factor=4, threshold_after=1),
        ]


class ChosenCache:
    """Keys and values of the trunk's and of every expert's tokens, each sequence's own.

    Keys are held as rotated to their true positions. A step adds a place to the experts that take one of its tokens,
    and to no other; where only some sequences of the batch give it one, it stays empty in the others.

    Args:
        experts: how many.
    """

    is_compileable = False
    """Transformers' word for a cache of fixed length."""

    def __init__(self, experts: int) -> None:
        self.trunk = KVCache()
        self.experts = [KVCache() for _ in range(experts)]
        self._taken: list[Tensor | None] = [None] * experts
        self._one_sequence = True

    def get_seq_length(self) -> int:
        """The tokens seen, whoever took them."""
        return self.trunk.get_seq_length()

    def add_places(self, expert: int, taken_BM: Tensor) -> Tensor | None:
        """Note which of an expert's new places hold a token.

        Returns:
            of all that it has then, bool (B, L); None where no empty place can stand before a token.
        """
        before = self._taken[expert]
        taken_BL = taken_BM if before is None else torch.cat((before, taken_BM), 1)
        self._taken[expert] = taken_BL
        self._one_sequence &= len(taken_BM) == 1  # it has had no other to leave a place empty for
        return None if before is None or self._one_sequence else taken_BL

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on from what sequence `beam_idx[i]` holds; there may be fewer or more of them then."""
        for cache in (self.trunk, *self.experts):
            cache.reorder_cache(beam_idx)
        self._taken = [None if taken is None else taken.index_select(0, beam_idx) for taken in self._taken]


class Choice(NamedTuple):
    """Which tokens go to which experts."""

    places: list[Tensor]
    """Of each expert, int64 (B, M): tokens of a sequence in order; S behind the last, where another has more."""
    load: dict[str, Tensor]
    """In training: what the thresholds follow."""


class ChosenTransformers(LanguageModel):
    def __init__(self, config: TransformerExpertsConfig, routing: ExpertChoiceRouting) -> None:
        super().__init__()
        self.config: TransformerExpertsConfig = config  # pyright: ignore[reportIncompatibleVariableOverride]
        self.routing, expert = routing, config.expert
        self.share = routing.share(config.experts)
        self.embedding = nn.Embedding(config.vocabulary, expert.d_model)
        self.dropout = nn.Dropout(expert.dropout)
        self.trunk = _blocks(routing.trunk(config))
        self.router_norm = nn.RMSNorm(expert.d_model)
        self.router = nn.Parameter(torch.empty(config.experts, expert.d_model))
        self.experts = nn.ModuleList(_blocks(expert) for _ in range(config.experts))
        self.norm = nn.RMSNorm(expert.d_model)
        self.head = None if expert.tie_embeddings else nn.Linear(expert.d_model, config.vocabulary, bias=False)
        # Before the first step: the score that a router without a preference gives.
        self.thresholds = RunningThresholds(config.experts, routing.threshold_decay, 1 / config.experts)
        nn.init.normal_(self.router, std=expert.d_model**-0.5)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    def new_cache(self) -> ChosenCache:
        return ChosenCache(self.config.experts)

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
        if cache is not None and not isinstance(cache, ChosenCache):
            raise ValueError(f"cache: expected one that this model's new_cache made, not a {type(cache).__name__}")
        batch, new = ids.shape
        cached = 0 if cache is None else cache.get_seq_length()
        if cached + new > self.config.context:
            raise ValueError(f"{cached + new} positions exceed the model's context of {self.config.context}")
        if positions is None:
            positions = torch.arange(cached, cached + new, device=ids.device)
        positions_BS = positions.expand(batch, new)
        mask_BS = None if mask is None else mask[:, -new:]

        x_BSD, trunk = through_blocks(
            self.trunk,
            self.dropout(self.embedding(ids)),
            self._angles(positions_BS),
            allowed=attention_mask(batch, new, cached + new, mask, ids.device),
            cache=None if cache is None else cache.trunk,
            mask_BS=mask_BS,
            with_routing=with_routing,
            checkpointing=self.activation_checkpointing,
        )
        scores_BSE = router_logits(self.router_norm(x_BSD), self.router).softmax(-1)
        choice = self._choose(scores_BSE, mask_BS)
        x_BSD, experts = self._through_experts(x_BSD, scores_BSE, positions_BS, choice, cache)

        weight_VD = self.embedding.weight if self.head is None else self.head.weight
        prediction = predict(self.norm(x_BSD), weight_VD, targets)
        aux_loss = torch.stack([output.aux_loss for output in (*trunk, *experts)]).sum()
        loads = (*(output.load for output in trunk), choice.load, *(output.load for output in experts))
        routing: tuple[tuple[Routing, ...], ...] = ()
        if with_routing:
            chosen = chosen_routing(scores_BSE, _chosen(choice.places, scores_BSE))
            routing = (*(output.routing for output in trunk), (chosen,))
        return LMOutput(*prediction, aux_loss, loads, routing)

    def _angles(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_angles(positions_BS, self.config.expert.head_width, self.config.expert.rope_theta)

    def _choose(self, scores_BSE: Tensor, mask_BS: Tensor | None) -> Choice:
        """By training's rule, or by the thresholds."""
        load: dict[str, Tensor] = {}
        _, length, experts = scores_BSE.shape
        if self.training:
            self._refuse_few(length)
            taken = take_best(scores_BSE, self.share, mask_BS)
            load = self.thresholds.load(taken.cutoffs_E, length if mask_BS is None else mask_BS.sum(1))
            if not self.causal_in_training():
                tokens_BEC = torch.where(taken.scores_EC > 0, taken.tokens_EC, length)
                return Choice(list(tokens_BEC.sort().values.unbind(1)), load)
        reached_BSE = reaches(scores_BSE, self.thresholds.value, mask_BS)
        ids_S = torch.arange(length, device=scores_BSE.device)
        tokens_BES = torch.where(reached_BSE.mT, ids_S, length).sort().values
        sizes = reached_BSE.sum(1).amax(0).tolist()
        least = int(self.training)  # every parameter has a gradient, in every process
        return Choice([tokens_BES[:, e, : max(least, sizes[e])] for e in range(experts)], load)

    def _refuse_few(self, length: int) -> None:
        if length < self.share.least():
            raise ConfigError(
                f"routing expert_choice: a sequence of {length} tokens is shorter than experts / capacity_factor = "
                f"{self.config.experts} / {self.routing.capacity_factor:g} needs in training ({self.share.least()}): "
                "an expert would take no token of it"
            )

    def _through_experts(
        self, x_BSD: Tensor, scores_BSE: Tensor, positions_BS: Tensor, choice: Choice, cache: ChosenCache | None
    ) -> tuple[Tensor, list[FFNOutput]]:
        """The residual stream with what the experts change of it, and what their feed-forward layers returned."""
        batch, length, d_model = x_BSD.shape
        tokens = [places.clamp(max=length - 1) for places in choice.places]  # an empty place holds any token
        firsts_B = torch.arange(0, batch * length, length, device=x_BSD.device)
        rows = rows_of(torch.cat([(each + firsts_B.unsqueeze(1)).flatten() for each in tokens]), batch * length)
        parts = take_rows(x_BSD.flatten(0, 1), rows).split([each.numel() for each in tokens])
        changes, outputs = [x_BSD.new_empty(0, d_model)], []
        for e, (x_RD, tokens_BM) in enumerate(zip(parts, tokens, strict=True)):
            if not tokens_BM.shape[1]:
                continue
            x_BMD = x_RD.view(*tokens_BM.shape, d_model)
            taken_BM = choice.places[e] < length
            z_BMD, ffns = self._through_expert(e, x_BMD, positions_BS.gather(1, tokens_BM), taken_BM, cache)
            weights_BM = scores_BSE[..., e].gather(1, tokens_BM) * taken_BM
            changes.append(((z_BMD - x_BMD) * weights_BM.to(x_BMD.dtype).unsqueeze(2)).flatten(0, 1))
            outputs += ffns
        return x_BSD + add_rows(torch.cat(changes), rows).view_as(x_BSD), outputs

    def _through_expert(
        self, expert: int, x_BMD: Tensor, positions_BM: Tensor, taken_BM: Tensor, cache: ChosenCache | None
    ) -> tuple[Tensor, list[FFNOutput]]:
        """The tokens of one expert through its blocks; empty places are behind all that looks back."""
        allowed = None
        if cache is not None:
            batch, new = taken_BM.shape
            total = cache.experts[expert].get_seq_length() + new
            allowed = attention_mask(batch, new, total, cache.add_places(expert, taken_BM), x_BMD.device)
        blocks = self.experts[expert]
        assert isinstance(blocks, nn.ModuleList)
        return through_blocks(
            blocks,
            x_BMD,
            self._angles(positions_BM),
            allowed=allowed,
            cache=None if cache is None else cache.experts[expert],
            mask_BS=taken_BM,
            checkpointing=self.activation_checkpointing,
        )

    def causal_in_training(self) -> bool:
        after = self.routing.threshold_after
        return after is not None and int(self.thresholds.steps) >= after

    def layer_name(self, index: int) -> str:
        return f"block {index}" if index < len(self.trunk) else "router"

    def after_step(self, loads: Sequence[dict[str, Tensor]]) -> None:
        left = iter(loads)
        after_step_of_blocks(self.trunk, islice(left, len(self.trunk)))
        self.thresholds.after_step(next(left))
        after_step_of_blocks([block for blocks in self._experts() for block in blocks], left)

    def roles(self) -> dict[str, Role]:
        roles: dict[str, Role] = {
            name: "matrix" if parameter.ndim == 2 else "vector" for name, parameter in self.named_parameters()
        }
        roles |= block_roles(self.trunk, "trunk")
        for index, blocks in enumerate(self._experts()):
            roles |= block_roles(blocks, f"experts.{index}")
        return roles

    def _experts(self) -> list[nn.ModuleList]:
        return [blocks for blocks in self.experts if isinstance(blocks, nn.ModuleList)]


def _blocks(config: TransformerConfig) -> nn.ModuleList:
    return nn.ModuleList(Block(config, layer, NO_TABLES) for layer in range(config.layers))


def _chosen(places: list[Tensor], scores_BSE: Tensor) -> Tensor:
    """bool (B, S, E): who chose whom."""
    batch, length, experts = scores_BSE.shape
    chosen_BSE = torch.zeros(batch, length + 1, experts, dtype=torch.bool, device=scores_BSE.device)
    for e, places_BM in enumerate(places):
        chosen_BSE[..., e].scatter_(1, places_BM, True)
    return chosen_BSE[:, :length]


def from_seed(config: TransformerExpertsConfig, seed: Transformer) -> ChosenTransformers:
    """Grow a mixture from one transformer: its first blocks become the trunk, the others every expert.

    With experts that are equal, what a token gets is a share of the seed's: exactly the seed's where every expert takes
    every token (`capacity_factor` = experts). Router and thresholds are fresh.

    Args:
        config: a mixture with `routing` expert_choice, whose trunk and experts together have the seed's blocks.
        seed: trained, of the same shape.

    Raises:
        ConfigError: sizes that differ; the text names the first.
    """
    if not isinstance(config.routing, ExpertChoiceRouting):
        raise ConfigError(f"routing: a seed grows into expert_choice alone, not {config.routing.model_dump()['kind']}")
    trunk = config.routing.trunk_layers
    _refuse_other_shape(config, config.routing, seed.config)
    model = config.build()
    assert isinstance(model, ChosenTransformers)
    theirs = seed.state_dict()
    fresh = ("router", "router_norm", "thresholds")
    names = [name for name in model.state_dict() if name.split(".")[0] not in fresh]
    model.load_state_dict({name: theirs[_name_in_seed(name, trunk)] for name in names}, strict=False)
    return model


def _name_in_seed(name: str, trunk_layers: int) -> str:
    room, *rest = name.split(".")
    if room == "trunk":
        return ".".join(("blocks", *rest))
    if room == "experts":
        _, layer, *rest = rest
        return ".".join(("blocks", str(trunk_layers + int(layer)), *rest))
    return name


def _refuse_other_shape(
    config: TransformerExpertsConfig, routing: ExpertChoiceRouting, seed: TransformerConfig
) -> None:
    expert = config.expert
    if seed.layers != routing.trunk_layers + expert.layers:
        raise ConfigError(
            f"seed: has {seed.layers} blocks; routing.trunk_layers + expert.layers are "
            f"{routing.trunk_layers} + {expert.layers}"
        )
    whole = {"vocab_size": config.vocabulary, "layers": seed.layers}
    placement = routing.trunk(config).placement + expert.placement
    wanted = expert.model_copy(update=whole | {"pattern": placement}).shape()
    found = seed.shape()
    if wanted != found:
        raise ConfigError(f"seed: {first_difference(found, wanted)}")
