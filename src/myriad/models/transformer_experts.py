"""A mixture of whole transformers: the experts are language models, or bodies of them, of one shape (Pyper).

How a text is shared among them is the routing's affair; each kind of it is one file. This one holds what they have in
common: the config, and the family that a routing belongs to.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, model_validator

from myriad.config import Variant, register
from myriad.ffn import Cost, DenseConfig, PEERConfig
from myriad.models.base import LanguageModel, ModelConfig
from myriad.models.transformer import TransformerConfig


class ExpertRouting(Variant):
    """How a mixture shares a text among its experts."""

    kinds: ClassVar[dict[str, Any]] = {}

    def refuse_misfit(self, config: "TransformerExpertsConfig") -> None:
        """Check what depends on the mixture's sizes.

        Raises:
            ValueError: names the setting that does not fit.
        """

    def build(self, config: "TransformerExpertsConfig") -> LanguageModel:
        """Make the mixture, with freshly initialised parameters."""
        raise NotImplementedError

    def cost(self, config: "TransformerExpertsConfig") -> Cost:
        """What the mixture costs per token at full context; no tensor is made."""
        raise NotImplementedError

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Routings of four experts that between them use every option: the contract tests run on each."""
        raise NotImplementedError


def _posterior() -> ExpertRouting:
    return ExpertRouting.kinds["posterior"]()  # by name: its module builds on this one


@register
class TransformerExpertsConfig(ModelConfig):
    """A mixture of whole transformers."""

    kind: Literal["transformer_experts"] = "transformer_experts"
    experts: int = Field(default=8, ge=2, le=10_000)
    """How many transformers."""
    expert: TransformerConfig = TransformerConfig()
    """One of them. Its vocabulary and context are the mixture's: they may be left out."""
    routing: ExpertRouting = Field(default_factory=_posterior)
    """How a text is shared among them."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        for name in self.expert.model_fields_set & {"vocab_size", "context"}:
            mine, theirs = getattr(self, name), getattr(self.expert, name)
            if theirs not in (None, mine):
                raise ValueError(f"expert.{name} = {theirs} is not the mixture's {name} = {mine}")
        expert = self.expert.model_copy(update={"vocab_size": None, "context": self.context})
        object.__setattr__(self, "expert", expert)
        self.routing.refuse_misfit(self)
        return self

    @field_serializer("expert", mode="wrap")
    def _without_the_mixtures_own(self, expert: TransformerConfig, dump: SerializerFunctionWrapHandler) -> dict:
        """So that an override of the mixture's is one of the experts', too."""
        return {name: value for name, value in dump(expert).items() if name not in ("vocab_size", "context")}

    @property
    def whole_expert(self) -> TransformerConfig:
        """The config of one expert as a language model of its own.

        Raises:
            ConfigError: the vocabulary size is not known.
        """
        return self.expert.with_vocabulary(self.vocabulary)

    def shape(self) -> dict[str, Any]:
        return super().shape() | {"expert": self.expert.model_copy(update={"vocab_size": self.vocab_size}).shape()}

    def build(self) -> LanguageModel:
        return self.routing.build(self)

    def cost(self) -> Cost:
        return self.routing.cost(self)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        peer = PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8)
        dense = TransformerConfig(layers=2, d_model=16, heads=2, ffns={"dense": DenseConfig(d_hidden=24)})
        sparse = dense.model_copy(update={"layers": 1, "ffns": {"peer": peer}, "pattern": ["peer"]})
        routings = [routing for kind in ExpertRouting.kinds.values() for routing in kind.examples()]
        return [
            cls(vocab_size=50, context=32, experts=4, expert=expert, routing=routing)
            for routing, expert in zip(routings, cycle((dense, sparse)))
        ]
