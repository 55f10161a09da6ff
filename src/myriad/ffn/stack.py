"""Several feed-forward layers one after the other in one block, each on the residual stream of the last."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from myriad.config import register
from myriad.ffn.base import FFN, Cost, FFNConfig, FFNOutput, Role
from myriad.ffn.dense import DenseConfig
from myriad.ffn.peer import PEERConfig
from myriad.ffn.tables import NO_TABLES, Tables, TableUse


@register
class StackConfig(FFNConfig):
    """`x1 = x + f1(x)`, `x2 = x1 + f2(norm(x1))`, ...; the output is `xn - x`, what the block adds."""

    kind: Literal["stack"] = "stack"
    layers: list[FFNConfig] = Field(min_length=1)
    """The layers, first to last."""

    def build(self, d_model: int) -> "Stack":
        return self.build_sharing(d_model, NO_TABLES)

    def build_sharing(self, d_model: int, tables: Tables) -> "Stack":
        return Stack(self, d_model, tables)

    def table_uses(self) -> Sequence[TableUse]:
        return [
            use._replace(field=f"layers.{index}.{use.field}")
            for index, layer in enumerate(self.layers)
            for use in layer.table_uses()
        ]

    def cost(self, d_model: int) -> Cost:
        norms = Cost.of_vector(d_model * (len(self.layers) - 1))
        return reduce(add, (layer.cost(d_model) for layer in self.layers), norms)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        peer = PEERConfig.examples()[0]
        return [cls(layers=[peer, DenseConfig()]), cls(layers=[cls(layers=[DenseConfig()]), peer])]


class Stack(FFN):
    """The block has normalised the first layer's input; the others get an RMSNorm of their own."""

    def __init__(self, config: StackConfig, d_model: int, tables: Tables) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(layer.build_sharing(d_model, tables) for layer in config.layers)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in config.layers[1:])

    def forward(self, x: Tensor, *, mask: Tensor | None = None, with_routing: bool = False) -> FFNOutput:
        outputs: list[FFNOutput] = []
        added: Tensor | None = None
        for index, layer in enumerate(self.layers):
            inputs = x if added is None else self.norms[index - 1](x + added)
            output: FFNOutput = layer(inputs, mask=mask, with_routing=with_routing)
            added = output.y if added is None else added + output.y
            outputs.append(output)
        assert added is not None
        load = {f"{i}.{name}": value for i, output in enumerate(outputs) for name, value in output.load.items()}
        routing = tuple(routing for output in outputs for routing in output.routing)
        return FFNOutput(added, torch.stack([output.aux_loss for output in outputs]).sum(), load, routing)

    def _layers(self) -> Iterator[FFN]:
        for layer in self.layers:
            assert isinstance(layer, FFN)
            yield layer

    def after_step(self, load: Mapping[str, Tensor]) -> None:
        for index, layer in enumerate(self._layers()):
            prefix = f"{index}."
            mine = {name.removeprefix(prefix): value for name, value in load.items() if name.startswith(prefix)}
            layer.after_step(mine)

    def roles(self) -> dict[str, Role]:
        roles: dict[str, Role] = {f"norms.{name}": "vector" for name, _ in self.norms.named_parameters()}
        for index, layer in enumerate(self._layers()):
            roles |= {f"layers.{index}.{name}": role for name, role in layer.roles().items()}
        return roles
