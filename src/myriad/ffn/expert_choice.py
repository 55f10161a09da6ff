"""Expert choice: every expert takes the tokens that it scores highest (arXiv 2202.09368).

    s = softmax(W x);    y = sum over the experts e that chose x:  s_e * f_e(x)

In training expert e chooses the C = T * capacity_factor / E tokens of the batch with the largest s_e. That looks
at later tokens, so evaluation and generation follow another rule: e takes every token with s_e >= threshold_e, a
running average of the score of the last token that e took in training (compare arXiv 2603.11535).

Legend: `T` tokens, `D` width, `E` experts, `C` capacity.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from myriad.config import ConfigError, register
from myriad.ffn.balance import Share
from myriad.ffn.base import FFN, Cost, FFNConfig, FFNOutput, Role, no_loss
from myriad.ffn.experts import Activation, Experts, expert_width, experts_cost, mix, mix_batched, router_logits
from myriad.ffn.thresholds import RunningThresholds, Taken, best_of_each, chosen_routing, reaches, take_best
from myriad.kernels.dry import is_dry


@register
class ExpertChoiceConfig(FFNConfig):
    """A mixture of experts in which experts choose."""

    kind: Literal["expert_choice"] = "expert_choice"
    causal: ClassVar[bool] = False

    experts: int = Field(default=8, ge=1)
    """Experts that choose."""
    capacity_factor: float = Field(default=2.0, gt=0)
    """Experts that a token has on average: in training, each takes tokens * capacity_factor / experts tokens."""
    max_experts_per_token: int | None = Field(default=None, ge=1)
    """Of the experts that chose a token, it keeps at most so many, those of its highest scores; None: all."""
    d_expert: int | None = Field(default=None, ge=1)
    """Width of an expert's hidden layer; None: `capacity_factor` experts cost what the default dense layer costs."""
    activation: Activation = "gelu"
    threshold_decay: float = Field(default=0.9, ge=0, lt=1)
    """What remains of the thresholds after a step."""
    threshold_after: int | None = Field(default=None, ge=1)
    """Steps after which training, too, chooses by the thresholds; None: it never does."""

    @model_validator(mode="after")
    def _choice_is_possible(self) -> Self:
        if self.capacity_factor > self.experts:
            raise ValueError(
                f"capacity_factor = {self.capacity_factor:g} exceeds experts = {self.experts}: "
                "an expert would take more tokens than there are"
            )
        if self.max_experts_per_token is not None and self.max_experts_per_token > self.experts:
            raise ValueError(f"max_experts_per_token = {self.max_experts_per_token} exceeds experts = {self.experts}")
        return self

    @property
    def share(self) -> Share:
        """Of the tokens that an expert takes in training."""
        return Share.of(self.capacity_factor / self.experts)

    @property
    def used(self) -> float:
        """Experts that a token has on average, at most."""
        return min(self.capacity_factor, self.max_experts_per_token or self.experts)

    def width(self, d_model: int) -> int:
        """The width of an expert at a width of the model."""
        return expert_width(self.d_expert, d_model, self.used, self.activation)

    def least_tokens(self) -> int:
        return self.share.least()

    def build(self, d_model: int) -> "ExpertChoice":
        return ExpertChoice(self, d_model)

    def cost(self, d_model: int) -> Cost:
        return experts_cost(self.experts, self.used, d_model, self.width(d_model), self.activation)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return [
            cls(experts=4),
            cls(experts=4, capacity_factor=1.5, d_expert=5, activation="swiglu", max_experts_per_token=2),
            cls(experts=8, capacity_factor=8, d_expert=8, activation="relu", threshold_after=1, threshold_decay=0),
        ]


class ExpertChoice(FFN):
    def __init__(self, config: ExpertChoiceConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.share = config.share
        self.router = nn.Parameter(torch.empty(config.experts, d_model))
        nn.init.normal_(self.router, std=d_model**-0.5)
        self.experts = Experts(config.experts, d_model, config.width(d_model), config.activation)
        # Before the first step: the score that a router without a preference gives.
        self.thresholds = RunningThresholds(config.experts, config.threshold_decay, 1 / config.experts)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, with_routing: bool = False) -> FFNOutput:
        x_TD = x.reshape(-1, x.shape[-1])
        mask_T = None if mask is None else mask.reshape(-1)
        scores_TE = router_logits(x_TD, self.router).softmax(1)
        load: dict[str, Tensor] = {}
        taken = None
        if self.training:
            taken = self._take(scores_TE, mask_T)
            load = self.thresholds.load(taken.cutoffs_E, len(x_TD) if mask_T is None else mask_T.sum())
        if taken is not None and not self.causal_in_training():
            y_TD, chosen_TE = self._mix_taken(x_TD, scores_TE, taken)
        else:
            y_TD, chosen_TE = self._mix_reaching(x_TD, scores_TE, mask_T)
        chosen = (part.view(*x.shape[:-1], -1) for part in (scores_TE, chosen_TE))
        routing = (chosen_routing(*chosen),) if with_routing else ()
        return FFNOutput(y_TD.view_as(x), no_loss(x), load, routing)

    def _take(self, scores_TE: Tensor, mask_T: Tensor | None) -> Taken:
        least = self.share.least()
        if len(scores_TE) < least:
            raise ConfigError(
                f"expert_choice: {len(scores_TE)} tokens computed at once are fewer than experts / capacity_factor = "
                f"{self.config.experts} / {self.config.capacity_factor:g} needs in training ({least}): "
                "an expert would take none"
            )
        return take_best(scores_TE, self.share, mask_T)

    def _mix_taken(self, x_TD: Tensor, scores_TE: Tensor, taken: Taken) -> tuple[Tensor, Tensor]:
        """The training view: every expert on the tokens that it took. Also bool (T, E), who was chosen."""
        tokens_EC, weights_EC = taken.tokens_EC, taken.scores_EC
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        chosen_TE = chosen_TE.T.scatter(1, tokens_EC, weights_EC.detach() > 0).T
        if self.config.max_experts_per_token is not None:
            chosen_TE = best_of_each(scores_TE, chosen_TE, self.config.max_experts_per_token)
            weights_EC = weights_EC * chosen_TE.T.gather(1, tokens_EC)
        return mix_batched(self.experts, x_TD, tokens_EC, weights_EC), chosen_TE

    def _mix_reaching(self, x_TD: Tensor, scores_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """The causal rule. Also bool (T, E), who was chosen."""
        experts = self.config.experts
        reached_TE = reaches(scores_TE, self.thresholds.value, mask_T)
        chosen_TE = best_of_each(scores_TE, reached_TE, self.config.max_experts_per_token)
        ids_E = torch.arange(experts, device=x_TD.device)
        ids_TE = torch.where(chosen_TE, ids_E, experts)
        return mix(self.experts, x_TD, ids_TE, scores_TE * chosen_TE, complete=False), chosen_TE

    def causal_in_training(self) -> bool:
        after, steps = self.config.threshold_after, self.thresholds.steps
        return after is not None and not is_dry(steps) and int(steps) >= after

    def after_step(self, load: Mapping[str, Tensor]) -> None:
        self.thresholds.after_step(load)

    def roles(self) -> dict[str, Role]:
        return {name: "matrix" for name, _ in self.named_parameters()}
