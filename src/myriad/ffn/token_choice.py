"""Token choice: every token goes to the few experts that its router scores highest.

    s = softmax(W x)  or  sigmoid(W x);    y = sum over the K experts e of largest s_e (+ bias_e):  g_e * f_e(x)

f_e is a feed-forward layer, g_e is s_e, divided by the sum over the K if `normalize` (arXiv 2401.04088).

Legend: `T` tokens, `D` width, `E` experts, `K` experts a token.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from myriad.config import register
from myriad.distributed import total, world_size
from myriad.ffn.balance import Share, load_balance_loss, moved_bias, router_z_loss
from myriad.ffn.base import FFN, Cost, FFNConfig, FFNOutput, Role, Routing
from myriad.ffn.dense import DenseConfig
from myriad.ffn.experts import Activation, Experts, expert_width, experts_cost, mix, router_logits


@register
class TokenChoiceConfig(FFNConfig):
    """A mixture of experts in which tokens choose."""

    kind: Literal["token_choice"] = "token_choice"
    experts: int = Field(default=8, ge=1)
    """Experts to choose among."""
    experts_per_token: int = Field(default=2, ge=1)
    """Experts that each token chooses."""
    shared_experts: int = Field(default=0, ge=0)
    """Experts beside these that every token uses, with weight one."""
    d_expert: int | None = Field(default=None, ge=1)
    """Width of an expert's hidden layer; None: all that a token uses cost what the default dense layer costs."""
    activation: Activation = "gelu"
    router: Literal["softmax", "sigmoid"] = "softmax"
    """From logits to scores."""
    normalize: bool = True
    """Whether the weights of a token's chosen experts are divided by their sum."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """In training, an expert takes at most this multiple of its even share of the tokens; those that come later
    are dropped. None: none is."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the load-balance loss, which is `experts_per_token` under even use."""
    z_loss: float = Field(default=0.001, ge=0)
    """Coefficient of the mean square of the logits' logsumexp."""
    balance_bias: float | None = Field(default=None, gt=0)
    """Step by which the bias that balances the choice without a loss moves; None: there is none."""

    @model_validator(mode="after")
    def _choice_is_possible(self) -> Self:
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token = {self.experts_per_token} exceeds experts = {self.experts}")
        if self.experts_per_token == 1 and self.normalize:
            raise ValueError(
                "normalize: with experts_per_token = 1 every weight is 1, and the router learns nothing; set it false"
            )
        return self

    @property
    def used(self) -> int:
        """Experts that take part in a token's output."""
        return self.experts_per_token + self.shared_experts

    def width(self, d_model: int) -> int:
        """The width of an expert at a width of the model."""
        return expert_width(self.d_expert, d_model, self.used, self.activation)

    def capacity(self) -> Share | None:
        """Of the tokens that an expert takes at most in training."""
        if self.capacity_factor is None:
            return None
        return Share.of(self.capacity_factor * self.experts_per_token / self.experts)

    def shared(self, d_model: int) -> DenseConfig | None:
        """The shared experts side by side are one dense layer."""
        if not self.shared_experts:
            return None
        return DenseConfig(d_hidden=self.shared_experts * self.width(d_model), activation=self.activation)

    def build(self, d_model: int) -> "TokenChoice":
        return TokenChoice(self, d_model)

    def cost(self, d_model: int) -> Cost:
        routed = experts_cost(self.experts, self.experts_per_token, d_model, self.width(d_model), self.activation)
        shared = self.shared(d_model)
        return routed + (Cost() if shared is None else shared.cost(d_model))

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return [
            cls(experts=4),
            cls(experts=4, experts_per_token=1, normalize=False, d_expert=5, activation="relu", z_loss=0),
            cls(experts=8, experts_per_token=3, shared_experts=2, d_expert=8, activation="swiglu", balance_loss=0),
            cls(experts=4, router="sigmoid", balance_bias=0.01, balance_loss=0, z_loss=0),
            cls(experts=4, router="sigmoid", normalize=False, capacity_factor=0.75, d_expert=8, balance_bias=0.1),
        ]


class Choice(NamedTuple):
    """What a router made of some tokens."""

    logits_TE: Tensor
    scores_TE: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    chosen_TE: Tensor
    """bool: the tokens of each expert, padding left out."""


class TokenChoice(FFN):
    balance_bias: Tensor | None

    def __init__(self, config: TokenChoiceConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.capacity = config.capacity()
        self.router = nn.Parameter(torch.empty(config.experts, d_model))
        nn.init.normal_(self.router, std=d_model**-0.5)
        self.experts = Experts(config.experts, d_model, config.width(d_model), config.activation)
        shared = config.shared(d_model)
        self.shared = None if shared is None else shared.build(d_model)
        self.register_buffer("balance_bias", torch.zeros(config.experts) if config.balance_bias else None)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, with_routing: bool = False) -> FFNOutput:
        x_TD = x.reshape(-1, x.shape[-1])
        mask_T = None if mask is None else mask.reshape(-1)
        choice = self._choose(x_TD, mask_T)
        counts_E = choice.chosen_TE.sum(0)
        ids_TK, weights_TK = self._within_capacity(choice, mask_T)
        complete = mask_T is None and self._limit is None
        y_TD = mix(self.experts, x_TD, ids_TK, weights_TK, complete=complete)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD).y
        routing: tuple[Routing, ...] = ()
        if with_routing:
            shape = (*x.shape[:-1], self.config.experts_per_token)
            routing = (Routing(choice.ids_TK.view(shape), weights_TK.detach().view(shape), self.config.experts),)
        aux_loss = self._aux_loss(choice, counts_E, mask_T)
        return FFNOutput(y_TD.view_as(x), aux_loss, {"counts": counts_E}, routing)

    def _choose(self, x_TD: Tensor, mask_T: Tensor | None) -> Choice:
        config = self.config
        logits_TE = router_logits(x_TD, self.router)
        scores_TE = logits_TE.softmax(1) if config.router == "softmax" else logits_TE.sigmoid()
        ranked_TE = scores_TE.detach() if self.balance_bias is None else scores_TE.detach() + self.balance_bias
        ids_TK = ranked_TE.topk(config.experts_per_token, sorted=False).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if config.normalize:
            weights_TK = _divided_by_sum(weights_TK)
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
        if mask_T is not None:
            chosen_TE &= mask_T.unsqueeze(1)
        return Choice(logits_TE, scores_TE, ids_TK, weights_TK, chosen_TE)

    @property
    def _limit(self) -> Share | None:
        """In training alone: whether a token is dropped depends on the other tokens of its batch."""
        return self.capacity if self.training else None

    def _within_capacity(self, choice: Choice, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts and weights of each token: padding has none, and of tokens that come late some are dropped."""
        if mask_T is None and self._limit is None:
            return choice.ids_TK, choice.weights_TK
        kept_TE = choice.chosen_TE
        if self._limit is not None:
            place_TE = kept_TE.cumsum(0)  # among the tokens of each expert, from 1
            kept_TE = kept_TE & (place_TE <= self._limit.ceil(_count(kept_TE, mask_T)))
        kept_TK = kept_TE.gather(1, choice.ids_TK)
        ids_TK = choice.ids_TK.masked_fill(~kept_TK, self.config.experts)
        return ids_TK, choice.weights_TK.masked_fill(~kept_TK, 0)

    def _aux_loss(self, choice: Choice, counts_E: Tensor, mask_T: Tensor | None) -> Tensor:
        """Both losses over the tokens of all processes: means of what the processes return are what one would."""
        config, scores_TE = self.config, choice.scores_TE
        tokens = _count(scores_TE, mask_T)
        if self.training:
            counts_E, tokens = (value / world_size() for value in total([counts_E, tokens]))
        loss = scores_TE.new_zeros(())
        if config.balance_loss:
            shares_TE = scores_TE if config.router == "softmax" else _divided_by_sum(scores_TE)
            if mask_T is not None:
                shares_TE = shares_TE.masked_fill(~mask_T.unsqueeze(1), 0)
            loss = loss + config.balance_loss * load_balance_loss(counts_E, shares_TE, tokens)
        if config.z_loss:
            loss = loss + config.z_loss * router_z_loss(choice.logits_TE, mask_T, tokens)
        return loss

    def after_step(self, load: Mapping[str, Tensor]) -> None:
        if self.balance_bias is not None and self.config.balance_bias is not None:
            self.balance_bias.copy_(moved_bias(self.balance_bias, load["counts"], self.config.balance_bias))

    def roles(self) -> dict[str, Role]:
        return {name: "matrix" for name, _ in self.named_parameters()}


def _divided_by_sum(scores: Tensor) -> Tensor:
    """Sigmoids can all be zero."""
    return scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def _count(rows_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """How many tokens are no padding."""
    if mask_T is not None:
        return mask_T.sum()
    return torch.full((), len(rows_TE), dtype=torch.int64, device=rows_TE.device)
