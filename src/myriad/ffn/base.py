"""What every feed-forward layer is: a config that builds it, and a module that returns values.

A layer changes nothing while it computes. What training depends on travels in `FFNOutput`: the output, the
auxiliary loss, additive statistics (`load`), and the routing if asked for. The loop sums the statistics over
micro-batches and ranks and hands them to `after_step` once a step.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from myriad.config import Config, Variant
from myriad.ffn.tables import Tables, TableUse

Role = Literal["matrix", "vector", "table"]
"""How a parameter is optimised: `matrix` with weight decay, `vector` without, `table` lazily by rows."""


class Cost(NamedTuple):
    """What a module costs, counted from its config; costs of parts add up."""

    parameters: int = 0
    active_parameters: int = 0
    """Parameters that take part in one token's output."""
    flops: int = 0
    """Floating point operations of one token's forward, two for each multiply-add; pointwise functions, norms
    and selections are not counted."""
    bytes: int = 0
    """Bytes of parameters that one token's forward reads when it is computed alone."""
    routing: int = 0
    """Those of the `flops` that choose experts rather than compute with them: a router's, or a retrieval's."""

    def __add__(self, other: "Cost") -> "Cost":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Cost(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @classmethod
    def of_matrix(cls, inputs: int, outputs: int) -> "Cost":
        """A linear map without bias."""
        size = inputs * outputs
        return cls(size, size, 2 * size, 4 * size)

    @classmethod
    def of_vector(cls, size: int) -> "Cost":
        """A gain, a bias or another parameter that is used pointwise."""
        return cls(size, size, 0, 4 * size)

    def as_routing(self) -> "Cost":
        """This cost as that of choosing experts."""
        return self._replace(routing=self.flops)


class Routing(NamedTuple):
    """Which experts each token used.

    `ids`: int64 of shape (..., A); `weights`: of the same shape, as the outputs were weighted, 0 where a token has
    fewer experts; `experts`: how many there are; `heads`: how many routers chose among them, each for an equal part
    of A, one part after the other.
    """

    ids: Tensor
    weights: Tensor
    experts: int
    heads: int = 1


class FFNOutput(NamedTuple):
    y: Tensor
    """Of the input's shape (..., D) and dtype."""
    aux_loss: Tensor
    """A scalar, added to the mean loss of the targets."""
    load: dict[str, Tensor]
    """Additive statistics: sums and counts, without gradient."""
    routing: tuple[Routing, ...]
    """One entry for each routed layer inside, if it was asked for; else empty."""


class FFN(nn.Module, ABC):
    """A feed-forward layer. Families are final: none inherits from another."""

    @abstractmethod
    def forward(self, x: Tensor, *, mask: Tensor | None = None, with_routing: bool = False) -> FFNOutput:
        """Apply the layer.

        Args:
            x: inputs of shape (..., D).
            mask: bool of shape (...), False for padding, which must not influence other tokens.
            with_routing: whether to return the experts that were used.
        """

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """Parameter name -> role, for every parameter."""

    def after_step(self, load: Mapping[str, Tensor]) -> None:
        """Take in one step's statistics, summed over micro-batches and ranks."""

    def causal_in_training(self) -> bool:
        """Whether a token's experts are chosen without a look at others in training mode, too, as things stand."""
        return True


class FFNConfig(Variant):
    """The config of a feed-forward layer."""

    kinds: ClassVar[dict[str, Any]] = {}
    causal: ClassVar[bool] = True
    """False: the training view chooses experts by looking at other tokens, later ones too, so that its loss is no
    measure of quality. (Batch statistics of queries do not choose among tokens.)"""

    def build(self, d_model: int) -> FFN:
        """Make the layer, with freshly initialised parameters.

        Raises:
            ConfigError: a size that does not fit the width.
        """
        raise NotImplementedError

    def build_sharing(self, d_model: int, tables: Tables) -> FFN:
        """Make the layer in a model that owns tables. A family that can share them overrides this."""
        return self.build(d_model)

    def table_uses(self) -> Sequence[TableUse]:
        """The shared tables that the layer uses."""
        return ()

    def cost(self, d_model: int) -> Cost:
        """What the layer costs; no tensor is made. The parameters of shared tables are counted by the model."""
        raise NotImplementedError

    def least_tokens(self) -> int:
        """The fewest tokens that can be computed at once in training."""
        return 1

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Small configs that between them use every option of a layer alone: the contract tests run on each."""
        raise NotImplementedError


def ffn_configs(config: Config) -> Iterator[FFNConfig]:
    """Every feed-forward layer that a config holds, itself and those inside others included."""
    if isinstance(config, FFNConfig):
        yield config
    for name in type(config).model_fields:
        value = getattr(config, name)
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        for part in inner:
            if isinstance(part, Config):
                yield from ffn_configs(part)


def no_loss(x: Tensor) -> Tensor:
    """The auxiliary loss of a layer that has none."""
    return torch.zeros((), dtype=torch.float32, device=x.device)
