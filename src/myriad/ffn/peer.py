"""PEER: parameter-efficient expert retrieval, a mixture of up to a million single neurons (arXiv 2407.04153).

Each of `heads` queries retrieves the `experts_per_head` best of one shared pool of N experts by product keys;
expert n is a neuron with down row u_n and up row v_n:

    y = sum over heads, sum over retrieved n:  weight_n * act(u_n . x) * v_n
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from myriad.config import ConfigError, Count, register
from myriad.ffn.base import FFN, Cost, FFNConfig, FFNOutput, Role, Routing, no_loss
from myriad.ffn.retrieval import Queries, QueryNorm, Router, new_keys, retrieval_cost, retrieve, side_of
from myriad.kernels import expert_lookup
from myriad.kernels.pages import in_large_pages


@register
class PEERConfig(FFNConfig):
    """A pool of single-neuron experts, retrieved by product keys."""

    kind: Literal["peer"] = "peer"
    experts: Count = Field(default=1024**2, ge=1)
    """Experts in the pool, a square."""
    heads: int = Field(default=8, ge=1)
    """Queries per token; all retrieve from the same pool."""
    experts_per_head: int = Field(default=16, ge=1)
    """Experts that each head retrieves."""
    d_key: int = Field(default=128, ge=1)
    """Width of one half of a query, and of a sub-key."""
    shared_keys: bool = True
    """Whether the heads share the sub-keys (the paper) or have their own."""
    query_norm: QueryNorm = "batch"
    """Normalization of the queries: `batch` (the paper), `layer`, `rms` or `none`."""
    router: Router = "softmax"
    """From scores to weights: `softmax` over each head's experts (the paper), `sigmoid` or `relu`."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    gated: bool = False
    """Whether experts have a third row g: the hidden value is then act(g . x) * (u . x)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of hidden values dropped in training."""
    table_dtype: Literal["bfloat16"] | None = None
    """Of the experts' rows; None: the model's own. In bfloat16 rows and moments take a third of float32's memory:
    updates are rounded stochastically, and the second moment is one number a row."""

    @field_validator("experts")
    @classmethod
    def _square(cls, experts: int) -> int:
        try:
            side_of(experts)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return experts

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.experts_per_head > self.experts:
            raise ValueError(f"experts_per_head = {self.experts_per_head} exceeds experts = {self.experts}")
        return self

    def build(self, d_model: int) -> "PEER":
        return PEER(self, d_model)

    def cost(self, d_model: int) -> Cost:
        retrieval = retrieval_cost(d_model, self.experts, self.heads, self.d_key, self.shared_keys, self.query_norm)
        row = d_model * (3 if self.gated else 2)
        active = self.heads * self.experts_per_head * row
        size = 2 if self.table_dtype == "bfloat16" else 4
        return retrieval + Cost(self.experts * row, active, 2 * active, size * active)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        def small(**options) -> Self:
            return cls(**{"experts": 64, "heads": 2, "experts_per_head": 4, "d_key": 8, **options})

        return [
            small(),
            small(shared_keys=False, query_norm="layer", router="sigmoid", activation="silu"),
            small(gated=True, query_norm="rms", router="relu", activation="relu"),
            small(query_norm="none", router="sigmoid", dropout=0.1, experts_per_head=1, heads=3),
            small(table_dtype="bfloat16"),
        ]


class PEER(FFN):
    def __init__(self, config: PEERConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.queries = Queries(d_model, config.heads, config.d_key, config.query_norm)
        self.keys = new_keys(config.experts, config.heads, config.d_key, config.shared_keys)
        dtype = torch.bfloat16 if config.table_dtype == "bfloat16" else None
        self.experts_down = _table(config.experts, d_model, dtype)
        self.experts_up = _table(config.experts, d_model, dtype)
        self.experts_gate = _table(config.experts, d_model, dtype) if config.gated else None

    def forward(self, x: Tensor, *, mask: Tensor | None = None, with_routing: bool = False) -> FFNOutput:
        config = self.config
        x_TD = x.reshape(-1, x.shape[-1])
        q_THPQ, load = self.queries(x_TD, None if mask is None else mask.reshape(-1))
        ids_TA, weights_TA = retrieve(q_THPQ, self.keys, config.experts_per_head, config.router)
        # Dropping a weight is dropping the hidden value that it multiplies.
        y_TD = expert_lookup(
            x_TD,
            ids_TA,
            F.dropout(weights_TA, config.dropout, self.training),
            self.experts_down,
            self.experts_up,
            self.experts_gate,
            activation=config.activation,
        )
        routing: tuple[Routing, ...] = ()
        if with_routing:
            shape = (*x.shape[:-1], ids_TA.shape[-1])
            routing = (Routing(ids_TA.view(shape), weights_TA.detach().view(shape), config.experts, config.heads),)
        return FFNOutput(y_TD.view_as(x), no_loss(x), load, routing)

    def after_step(self, load: Mapping[str, Tensor]) -> None:
        self.queries.after_step(load)

    def roles(self) -> dict[str, Role]:
        matrices = ("queries.proj.weight", "keys")
        return {
            name: "table" if name.startswith("experts_") else "matrix" if name in matrices else "vector"
            for name, _ in self.named_parameters()
        }


def _table(experts: int, d_model: int, dtype: torch.dtype | None) -> nn.Parameter:
    """Rows with a standard deviation of d_model**-0.5: normalised inputs give hidden values of order one."""
    table = nn.Parameter(in_large_pages(torch.empty(experts, d_model, dtype=dtype)))
    return nn.init.normal_(table, std=d_model**-0.5)  # pyright: ignore[reportReturnType]
