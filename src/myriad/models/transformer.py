"""A decoder-only transformer whose blocks hold feed-forward layers of any kind.

- RMSNorm before attention and before the feed-forward layer; no biases
- rotary positions; grouped-query heads and query-key normalization if asked for
- input and output embedding tied unless told otherwise
- `ffns` names the feed-forward layers, `pattern` places them: it is repeated over the blocks
- `tables` names those that layers share
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from myriad.config import nearest, register, validate
from myriad.ffn import (
    FFN,
    Cost,
    DenseConfig,
    FFNConfig,
    FFNOutput,
    PEERConfig,
    ProductKeyMemoryConfig,
    Role,
    Routing,
    StackConfig,
)
from myriad.ffn.tables import SharedTable, TableConfig, Tables, refuse_misfits
from myriad.models.attention import Attention, attention_cost, attention_mask
from myriad.models.base import Cache, LanguageModel, LayerCache, LMOutput, ModelConfig
from myriad.models.loss import predict
from myriad.models.rotary import rotary_angles


@register
class TransformerConfig(ModelConfig):
    """A decoder-only transformer."""

    kind: Literal["transformer"] = "transformer"
    layers: int = Field(default=8, ge=1, le=10_000)
    """Blocks."""
    d_model: int = Field(default=256, ge=2)
    """Width of the residual stream."""
    heads: int = Field(default=8, ge=1)
    """Attention heads."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Heads of keys and values, a divisor of `heads`; None: as many."""
    head_dim: int | None = Field(default=None, ge=2)
    """Width of a head, even; None: d_model / heads."""
    qk_norm: bool = False
    """Whether queries and keys are normalised."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary wavelengths."""
    tie_embeddings: bool = True
    """Whether the output embedding is the input embedding."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share dropped, in training, of the embedding's and of each sublayer's output."""
    ffns: dict[str, FFNConfig] = Field(default={"dense": DenseConfig()}, min_length=1)
    """Feed-forward layers by name."""
    pattern: list[str] = Field(default=["dense"], min_length=1, max_length=10_000)
    """Names of `ffns`, block by block, repeated over the blocks."""
    tables: dict[str, TableConfig] = {}
    """Tables by name that layers share; a layer names one in its field `table`."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.head_dim is None and self.d_model % self.heads:
            raise ValueError(f"d_model = {self.d_model} is not a multiple of heads = {self.heads}; set head_dim")
        if self.head_width % 2:
            raise ValueError(f"rotary positions need an even width of heads, not {self.head_width}")
        if self.heads % self.key_value_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}")
        for name in self.pattern:
            if name not in self.ffns:
                known = ", ".join(self.ffns)
                raise ValueError(f"pattern names '{name}', not one of ffns{nearest(name, self.ffns)} (known: {known})")
        for name in self.ffns:
            if name not in self.placement:
                raise ValueError(f"ffns.{name} is placed in no block: pattern is {self.pattern} over {self.layers}")
        return self

    @model_validator(mode="after")
    def _tables_fit(self) -> Self:
        uses = {f"ffns.{ffn}.{use.field}": use for ffn, config in self.ffns.items() for use in config.table_uses()}
        refuse_misfits(self.tables, uses, self.d_model)
        return self

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def placement(self) -> list[str]:
        """The name of each block's feed-forward layer."""
        return [self.pattern[layer % len(self.pattern)] for layer in range(self.layers)]

    def shape(self) -> dict[str, Any]:
        """With defaults resolved: a pattern may be written in several ways."""
        resolved = {"kv_heads": self.key_value_heads, "head_dim": self.head_width, "placement": self.placement}
        return {name: value for name, value in super().shape().items() if name != "pattern"} | resolved

    def build(self) -> "Transformer":
        return Transformer(self)

    def cost(self) -> Cost:
        shared = Cost(sum(table.parameters(self.d_model) for table in self.tables.values()))
        return self.blocks_cost(self.context) + self.embeddings_cost(self.vocabulary) + shared

    def blocks_cost(self, seen: int) -> Cost:
        """What the blocks cost a token in a sequence of so many."""
        attention = attention_cost(self.d_model, self.heads, self.key_value_heads, self.head_width, self.qk_norm, seen)
        norms = Cost.of_vector(2 * self.d_model)
        blocks = [attention + norms + self.ffns[name].cost(self.d_model) for name in self.placement]
        return reduce(add, blocks)

    def embeddings_cost(self, vocabulary: int) -> Cost:
        """What stands before and after the blocks: the embeddings and the last norm."""
        head = Cost.of_matrix(self.d_model, vocabulary)
        # An embedding is looked up: one of its rows takes part.
        size = self.d_model * vocabulary
        embedding = Cost() if self.tie_embeddings else Cost(size, self.d_model, 0, 4 * self.d_model)
        return head + embedding + Cost.of_vector(self.d_model)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        peer = PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8)
        two = StackConfig(layers=[peer, peer])
        memory = ProductKeyMemoryConfig.memory_plus(memories=64, heads=2, memories_per_head=4, d_key=8, table="values")
        small = cls(vocab_size=50, context=32, layers=2, d_model=32, heads=2)
        others: Sequence[dict[str, Any]] = [
            {"layers": 3, "ffns": {"peer": peer, "dense": DenseConfig()}, "pattern": ["dense", "peer"]},
            {"heads": 4, "kv_heads": 2, "qk_norm": True, "tie_embeddings": False, "head_dim": 6},
            {"ffns": {"two": two}, "pattern": ["two"], "rope_theta": 100.0},
            {"ffns": {"memory": memory}, "pattern": ["memory"], "tables": {"values": TableConfig(rows=64)}},
        ]
        return [small, *(validate(cls, {**small.model_dump(mode="json"), **other}) for other in others)]


class BlockOutput(NamedTuple):
    x_BSD: Tensor
    ffn: FFNOutput


class Block(nn.Module):
    """Attention and one feed-forward layer, each on the normalised residual stream."""

    def __init__(self, config: TransformerConfig, layer: int, tables: Tables) -> None:
        super().__init__()
        sizes = (config.d_model, config.heads, config.key_value_heads, config.head_width)
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.attention = Attention(*sizes, config.qk_norm, layer)
        self.ffn_norm = nn.RMSNorm(config.d_model)
        self.ffn: FFN = config.ffns[config.placement[layer]].build_sharing(config.d_model, tables)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BSD: Tensor,
        angles: tuple[Tensor, Tensor],
        allowed: Tensor | None,
        cache: LayerCache | None,
        mask_BS: Tensor | None,
        with_routing: bool,
    ) -> BlockOutput:
        attended = self.attention(self.attention_norm(x_BSD), angles, allowed, cache)
        x_BSD = x_BSD + self.dropout(attended)
        output: FFNOutput = self.ffn(self.ffn_norm(x_BSD), mask=mask_BS, with_routing=with_routing)
        return BlockOutput(x_BSD + self.dropout(output.y), output)


class BlocksOutput(NamedTuple):
    x_BSD: Tensor
    ffns: list[FFNOutput]
    """Of each block."""


def through_blocks(
    blocks: nn.ModuleList,
    x_BSD: Tensor,
    angles: tuple[Tensor, Tensor],
    *,
    allowed: Tensor | None = None,
    cache: LayerCache | None = None,
    mask_BS: Tensor | None = None,
    with_routing: bool = False,
    checkpointing: bool = False,
) -> BlocksOutput:
    """Go through blocks, first to last; with checkpointing, the backward pass computes each again."""
    outputs: list[FFNOutput] = []
    for block in blocks:
        inputs = (x_BSD, angles, allowed, cache, mask_BS, with_routing)
        if checkpointing and torch.is_grad_enabled() and cache is None:
            x_BSD, output = checkpoint(block, *inputs, use_reentrant=False)  # pyright: ignore
        else:
            x_BSD, output = block(*inputs)
        outputs.append(output)
    return BlocksOutput(x_BSD, outputs)


def block_roles(blocks: nn.ModuleList, prefix: str) -> dict[str, Role]:
    """Parameter name -> role, for every parameter of blocks whose names begin with a prefix."""
    roles: dict[str, Role] = {
        f"{prefix}.{name}": "matrix" if parameter.ndim == 2 else "vector"
        for name, parameter in blocks.named_parameters()
    }
    for index, block in enumerate(blocks):
        assert isinstance(block, Block)
        roles |= {f"{prefix}.{index}.ffn.{name}": role for name, role in block.ffn.roles().items()}
    return roles


def after_step_of_blocks(blocks: Iterable[nn.Module], loads: Iterable[dict[str, Tensor]]) -> None:
    """Hand each block's layer its statistics of one step."""
    for block, load in zip(blocks, loads, strict=True):
        assert isinstance(block, Block)
        block.ffn.after_step(load)


class Encoded(NamedTuple):
    """A transformer's output before its head; the other fields are those of `LMOutput`."""

    x_BSD: Tensor
    """The last block's, normalised."""
    aux_loss: Tensor
    loads: tuple[dict[str, Tensor], ...]
    routing: tuple[tuple[Routing, ...], ...]


class Transformer(LanguageModel):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config: TransformerConfig = config  # pyright: ignore[reportIncompatibleVariableOverride]
        self.embedding = nn.Embedding(config.vocabulary, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        tables = {name: SharedTable(table, config.d_model) for name, table in config.tables.items()}
        self.tables = nn.Module()  # a ModuleDict could hold none of the name `values`
        for name, table in tables.items():
            self.tables.add_module(name, table)
        self.blocks = nn.ModuleList(Block(config, layer, tables) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

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
        encoded = self.encode(ids, positions=positions, cache=cache, mask=mask, with_routing=with_routing)
        prediction = predict(encoded.x_BSD, self.output_embedding, targets)
        return LMOutput(*prediction, encoded.aux_loss, encoded.loads, encoded.routing)

    def encode(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        with_routing: bool = False,
    ) -> Encoded:
        """All but the product with the output embedding. Arguments are those of `forward`."""
        batch, new = ids.shape
        cached = 0 if cache is None else cache.get_seq_length()
        total = cached + new
        if total > self.config.context:
            raise ValueError(f"{total} positions exceed the model's context of {self.config.context}")
        if positions is None:
            positions = torch.arange(cached, total, device=ids.device).expand(batch, new)
        assert cache is None or isinstance(cache, LayerCache)
        angles = rotary_angles(positions, self.config.head_width, self.config.rope_theta)
        allowed = attention_mask(batch, new, total, mask, ids.device)
        mask_BS = None if mask is None else mask[:, -new:]

        x_BSD, outputs = through_blocks(
            self.blocks,
            self.dropout(self.embedding(ids)),
            angles,
            allowed=allowed,
            cache=cache,
            mask_BS=mask_BS,
            with_routing=with_routing,
            checkpointing=self.activation_checkpointing,
        )
        aux_loss = torch.stack([output.aux_loss for output in outputs]).sum()
        loads = tuple(output.load for output in outputs)
        routing = tuple(output.routing for output in outputs) if with_routing else ()
        return Encoded(self.norm(x_BSD), aux_loss, loads, routing)

    @property
    def output_embedding(self) -> Tensor:
        """The weight (V, D) whose products with the encoded positions are the logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def roles(self) -> dict[str, Role]:
        roles: dict[str, Role] = {
            name: "matrix" if parameter.ndim == 2 else "vector" for name, parameter in self.named_parameters()
        }
        roles |= {f"tables.{name}": "table" for name, _ in self.tables.named_parameters()}
        return roles | block_roles(self.blocks, "blocks")

    def after_step(self, loads: Sequence[dict[str, Tensor]]) -> None:
        after_step_of_blocks(self.blocks, loads)
