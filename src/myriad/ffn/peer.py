"""PEER: parameter-efficient expert retrieval, a mixture of up to a million single neurons (arXiv 2407.04153).

Each of `heads` queries retrieves the `experts_per_head` best of one shared pool of N experts by product keys;
expert n is a neuron with down row u_n and up row v_n:

    y = sum over heads, sum over retrieved n:  weight_n * act(u_n . x) * v_n
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from myriad.config import register
from myriad.ffn.base import FFN, Cost, FFNConfig, FFNOutput, Role, no_loss
from myriad.ffn.experts import in_product_dtype
from myriad.ffn.retrieval import (
    Queries,
    QueryNorm,
    Router,
    Square,
    new_keys,
    retrieval_cost,
    routing_of,
)
from myriad.ffn.tables import NO_TABLES, TableConfig, TableDtype, Tables, TableUse, borrow, bytes_of, new_table
from myriad.kernels import retrieved_lookup


@register
class PEERConfig(FFNConfig):
    """A pool of single-neuron experts, retrieved by product keys."""

    kind: Literal["peer"] = "peer"
    experts: Square = 1024**2
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
    activation: Literal["gelu", "relu", "silu", "none"] = "gelu"
    """Of the hidden values; `none` leaves them linear (UltraMemV2, arXiv 2508.18756)."""
    gated: bool = False
    """Whether experts have a third row g: the hidden value is then act(g . x) * (u . x)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of hidden values dropped in training."""
    table: str | None = None
    """The model's table of parts [down, up], or [down, up, gate], that holds the experts; None: the layer's own."""
    table_dtype: TableDtype | None = None
    """Of the experts' rows; None: the model's own. In bfloat16 rows and moments take a third of float32's memory:
    updates are rounded stochastically, and the second moment is one number a row."""

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.experts_per_head > self.experts:
            raise ValueError(f"experts_per_head = {self.experts_per_head} exceeds experts = {self.experts}")
        return self

    def build(self, d_model: int) -> "PEER":
        return self.build_sharing(d_model, NO_TABLES)

    def build_sharing(self, d_model: int, tables: Tables) -> "PEER":
        return PEER(self, d_model, tables)

    @property
    def _pool(self) -> TableConfig:
        """The experts' rows."""
        parts = ["down", "up", "gate"] if self.gated else ["down", "up"]
        return TableConfig(rows=self.experts, parts=parts, dtype=self.table_dtype)

    def table_uses(self) -> Sequence[TableUse]:
        return [] if self.table is None else [TableUse("table", self.table, self._pool)]

    def cost(self, d_model: int) -> Cost:
        retrieval = retrieval_cost(d_model, self.experts, self.heads, self.d_key, self.shared_keys, self.query_norm)
        own = self._pool.parameters(d_model) if self.table is None else 0
        active = self.heads * self.experts_per_head * len(self._pool.parts) * d_model
        return retrieval + Cost(own, active, 2 * active, bytes_of(self.table_dtype) * active)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        def small(**options) -> Self:
            return cls(**{"experts": 64, "heads": 2, "experts_per_head": 4, "d_key": 8, **options})

        return [
            small(),
            small(shared_keys=False, query_norm="layer", router="sigmoid", activation="silu"),
            small(gated=True, query_norm="rms", router="relu", activation="relu"),
            small(query_norm="none", router="sigmoid", activation="none", dropout=0.1, experts_per_head=1, heads=3),
            small(table_dtype="bfloat16"),
        ]


class PEER(FFN):
    def __init__(self, config: PEERConfig, d_model: int, tables: Tables) -> None:
        super().__init__()
        self.config = config
        self.queries = Queries(d_model, config.heads, config.d_key, config.query_norm)
        self.keys = new_keys(config.experts, config.heads, config.d_key, config.shared_keys)
        self.shared = borrow(tables, config.table)
        own = (config.experts, d_model, config.table_dtype)
        self.experts_down = new_table(*own) if self.shared is None else None
        self.experts_up = new_table(*own) if self.shared is None else None
        self.experts_gate = new_table(*own) if self.shared is None and config.gated else None

    def tables(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The experts' rows: down, up and, of gated experts, gate."""
        if self.shared is not None:
            gate = self.shared.part("gate") if self.config.gated else None
            return self.shared.part("down"), self.shared.part("up"), gate
        assert self.experts_down is not None
        assert self.experts_up is not None
        return self.experts_down, self.experts_up, self.experts_gate

    def forward(self, x: Tensor, *, mask: Tensor | None = None, with_routing: bool = False) -> FFNOutput:
        config = self.config
        x_TD = x.reshape(-1, x.shape[-1])
        q_THPQ, load = self.queries(x_TD, None if mask is None else mask.reshape(-1))
        y_TD, ids_TA, weights_TA = retrieved_lookup(
            _as_looked_up(x_TD),
            q_THPQ,
            self.keys,
            config.experts_per_head,
            config.router,
            *self.tables(),
            activation=config.activation,
            dropout=config.dropout if self.training else 0.0,
        )
        routing = (routing_of(x, ids_TA, weights_TA, config.experts, config.heads),) if with_routing else ()
        return FFNOutput(y_TD.view_as(x), no_loss(x), load, routing)

    def after_step(self, load: Mapping[str, Tensor]) -> None:
        self.queries.after_step(load)

    def roles(self) -> dict[str, Role]:
        matrices = ("queries.proj.weight", "keys")
        return {
            name: "table" if name.startswith("experts_") else "matrix" if name in matrices else "vector"
            for name, _ in self.named_parameters()
        }


def _as_looked_up(x_TD: Tensor) -> Tensor:
    """On a GPU, in the dtype of products: a token's row is read once for each of its experts."""
    return in_product_dtype(x_TD) if x_TD.is_cuda else x_TD
