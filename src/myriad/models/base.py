"""What every language model is: a config that builds it, and a module that returns values."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

from pydantic import Field
from torch import Tensor, nn

from myriad.config import ConfigError, Count, Variant
from myriad.ffn import Cost, Role, Routing
from myriad.models.cache import KVCache


class Cache(Protocol):
    """What a model remembers of earlier positions."""

    def get_seq_length(self) -> int:
        """The positions held."""
        ...


@runtime_checkable
class LayerCache(Cache, Protocol):
    """Keys and values of earlier positions, by layer. The caches of `transformers` fit."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append (B, H, S, Q) tensors to a layer and return all that it holds."""
        ...


class LMOutput(NamedTuple):
    logits: Tensor | None
    """(B, S, V), without targets."""
    loss: Tensor | None
    """The sum over targets of the negative log likelihood in nats, float32, with targets."""
    targets: Tensor | None
    """How many targets were counted, int64, with targets."""
    aux_loss: Tensor
    """The sum of the layers' auxiliary losses."""
    loads: tuple[dict[str, Tensor], ...]
    """Each layer's additive statistics."""
    routing: tuple[tuple[Routing, ...], ...]
    """Each layer's routing, if it was asked for."""


class ModelConfig(Variant):
    """The config of a language model."""

    kinds: ClassVar[dict[str, Any]] = {}

    vocab_size: Count | None = Field(default=None, ge=2)
    """Rows of the embedding; None: follows the tokenizer of the data."""
    context: int = Field(default=256, ge=2)
    """The longest sequence, in tokens."""

    @property
    def vocabulary(self) -> int:
        """`vocab_size`, when it is known.

        Raises:
            ConfigError: it is not set yet.
        """
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size: not set; it follows the data when training, else name it")
        return self.vocab_size

    def build(self) -> "LanguageModel":
        """Make the model, with freshly initialised parameters."""
        raise NotImplementedError

    def cost(self) -> Cost:
        """What the model costs per token at full context; no tensor is made."""
        raise NotImplementedError

    def with_vocabulary(self, size: int) -> Self:
        """This config with a vocabulary size."""
        return self.model_copy(update={"vocab_size": size})

    def shape(self) -> dict[str, Any]:
        """The settings on which trained weights depend: models whose shapes are equal can exchange theirs."""
        return self.model_dump(mode="json", exclude={"context", "dropout"})

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Small configs of 50 tokens and a context of 32 that between them use every option: the contract tests
        run on each."""
        raise NotImplementedError


class LanguageModel(nn.Module, ABC):
    """A model of the next token."""

    config: ModelConfig
    _activation_checkpointing: bool = False

    @property
    def activation_checkpointing(self) -> bool:
        """Run-time choice: whether the backward pass computes each block again instead of keeping its values.

        It is set in the language models inside this one, too.
        """
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, LanguageModel):
                module._activation_checkpointing = enabled

    def new_cache(self) -> Cache:
        """An empty cache of the kind that this model generates with."""
        return KVCache()

    @abstractmethod
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
        """Predict the token after each position.

        Args:
            ids: tokens, int64 of shape (B, S).
            targets: the tokens to predict, (B, S), already shifted: targets[b, s] follows ids[b, s]. Negative
                ones are not counted. With targets the loss is returned and no logits.
            positions: of shape (B, S); None: those after the cache's.
            cache: earlier positions, in a cache that `new_cache` made; this call's are appended.
            mask: bool of shape (B, cached + S), False for padding; None: no padding.
            with_routing: whether to return every layer's routing.

        Raises:
            ValueError: more positions than the context.
        """

    def layer_name(self, index: int) -> str:
        """What reports call an entry of `LMOutput.routing`."""
        return f"block {index}"

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """Parameter name -> role, for every parameter."""

    def causal_in_training(self) -> bool:
        """Whether the model itself chooses experts without a look at later tokens in training, too, as things stand.

        Its feed-forward layers answer for themselves.
        """
        return True

    @abstractmethod
    def after_step(self, loads: Sequence[dict[str, Tensor]]) -> None:
        """Hand each layer its statistics of one step, summed over micro-batches and ranks."""
