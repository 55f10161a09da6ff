"""Product-key memories: a large table of values, found by product keys (arXiv 1907.05242), also in the form of
Memory+ (arXiv 2412.09764).

Each of `heads` queries retrieves the `memories_per_head` best of N memories; memory n has a value v_n:

    m = sum over heads, sum over retrieved n:  weight_n * v_n
    y = m,  or  W_o m,  or, gated,  W_o (m * silu(W_g x))

A memory is what a mixture calls an expert, without a function of the input.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from myriad.config import register
from myriad.ffn.base import FFN, Cost, FFNConfig, FFNOutput, Role, no_loss
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
from myriad.kernels import retrieve, value_lookup


@register
class ProductKeyMemoryConfig(FFNConfig):
    """A table of values, retrieved by product keys."""

    kind: Literal["product_key_memory"] = "product_key_memory"
    memories: Square = 512**2
    """Rows of the table, a square."""
    heads: int = Field(default=4, ge=1)
    """Queries per token; all retrieve from the same table."""
    memories_per_head: int = Field(default=32, ge=1)
    """Memories that each head retrieves."""
    d_key: int = Field(default=256, ge=1)
    """Width of one half of a query, and of a sub-key."""
    d_value: int | None = Field(default=None, ge=1)
    """Width of a value; None: d_model. If set, and if gated, a linear map leads from it to d_model."""
    shared_keys: bool = False
    """Whether the heads share the sub-keys or have their own (both papers)."""
    query_norm: QueryNorm = "batch"
    """Normalization of the queries: `batch` (the first paper), `layer`, `rms` or `none`."""
    key_norm: bool = False
    """Whether sub-keys are scaled to length one; with query_norm `rms` it is Memory+'s query-key normalization."""
    router: Router = "softmax"
    """From scores to weights: `softmax` over each head's memories (both papers), `sigmoid` or `relu`."""
    gated: bool = False
    """Whether the sum of values is multiplied by silu(W_g x), as Memory+ does."""
    table: str | None = None
    """The model's table of parts [values] that holds the memories, as Memory+ has it; None: the layer's own."""
    table_dtype: TableDtype | None = None
    """Of the values; None: the model's own. In bfloat16 rows and moments take a third of float32's memory: updates
    are rounded stochastically, and the second moment is one number a row."""

    @model_validator(mode="after")
    def _enough_memories(self) -> Self:
        if self.memories_per_head > self.memories:
            raise ValueError(f"memories_per_head = {self.memories_per_head} exceeds memories = {self.memories}")
        return self

    @classmethod
    def memory_plus(cls, **options: Any) -> Self:
        """The layer of Memory+: gated, with query-key normalization.

        Args:
            options: other fields, and what shall differ; `table` for values that several layers share.
        """
        return cls(**{"gated": True, "query_norm": "rms", "key_norm": True, **options})

    @property
    def projected(self) -> bool:
        """Whether a linear map follows the sum of values."""
        return self.gated or self.d_value is not None

    def build(self, d_model: int) -> "ProductKeyMemory":
        return self.build_sharing(d_model, NO_TABLES)

    def build_sharing(self, d_model: int, tables: Tables) -> "ProductKeyMemory":
        return ProductKeyMemory(self, d_model, tables)

    @property
    def _values(self) -> TableConfig:
        return TableConfig(rows=self.memories, width=self.d_value, dtype=self.table_dtype)

    def table_uses(self) -> Sequence[TableUse]:
        return [] if self.table is None else [TableUse("table", self.table, self._values)]

    def cost(self, d_model: int) -> Cost:
        width = self.d_value or d_model
        retrieval = retrieval_cost(d_model, self.memories, self.heads, self.d_key, self.shared_keys, self.query_norm)
        own = self._values.parameters(d_model) if self.table is None else 0
        active = self.heads * self.memories_per_head * width
        values = Cost(own, active, 2 * active, bytes_of(self.table_dtype) * active)
        return retrieval + values + Cost.of_matrix(d_model, width * (self.gated + self.projected))

    @classmethod
    def examples(cls) -> Sequence[Self]:
        def small(**options: Any) -> Self:
            return cls(**{"memories": 64, "heads": 2, "memories_per_head": 4, "d_key": 8, **options})

        return [
            small(),
            small(shared_keys=True, query_norm="layer", router="sigmoid", d_value=6),
            small(query_norm="none", key_norm=True, router="relu", heads=3, memories_per_head=1, gated=True),
            small(query_norm="rms", key_norm=True, gated=True, d_value=24),
            small(table_dtype="bfloat16"),
        ]


class ProductKeyMemory(FFN):
    def __init__(self, config: ProductKeyMemoryConfig, d_model: int, tables: Tables) -> None:
        super().__init__()
        self.config = config
        width = config.d_value or d_model
        self.queries = Queries(d_model, config.heads, config.d_key, config.query_norm)
        self.keys = new_keys(config.memories, config.heads, config.d_key, config.shared_keys)
        self.shared = borrow(tables, config.table)
        self.values = new_table(config.memories, width, config.table_dtype) if self.shared is None else None
        self.gate = _linear(d_model, width) if config.gated else None
        self.out = _linear(width, d_model) if config.projected else None

    def table(self) -> Tensor:
        """The values, own or shared."""
        if self.shared is not None:
            return self.shared.part("values")
        assert self.values is not None
        return self.values

    def forward(self, x: Tensor, *, mask: Tensor | None = None, with_routing: bool = False) -> FFNOutput:
        config = self.config
        x_TD = x.reshape(-1, x.shape[-1])
        q_THPQ, load = self.queries(x_TD, None if mask is None else mask.reshape(-1))
        keys = F.normalize(self.keys, dim=-1) if config.key_norm else self.keys
        ids_TA, weights_TA = retrieve(q_THPQ, keys, config.memories_per_head, config.router)
        y = value_lookup(ids_TA, weights_TA, self.table()).to(x.dtype)
        if self.gate is not None:
            y = y * F.silu(self.gate(x_TD))
        if self.out is not None:
            y = self.out(y)
        routing = (routing_of(x, ids_TA, weights_TA, config.memories, config.heads),) if with_routing else ()
        return FFNOutput(y.view_as(x), no_loss(x), load, routing)

    def after_step(self, load: Mapping[str, Tensor]) -> None:
        self.queries.after_step(load)

    def roles(self) -> dict[str, Role]:
        matrices = ("queries.proj.weight", "keys", "gate.weight", "out.weight")
        return {
            name: "table" if name == "values" else "matrix" if name in matrices else "vector"
            for name, _ in self.named_parameters()
        }


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=inputs**-0.5)
    return linear
