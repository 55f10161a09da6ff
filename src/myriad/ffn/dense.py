"""The dense feed-forward layer: two linear maps, or SwiGLU's three (arXiv 2002.05202)."""

from collections.abc import Sequence
from typing import Literal, Self

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from myriad.config import register
from myriad.ffn.base import FFN, Cost, FFNConfig, FFNOutput, Role, no_loss


@register
class DenseConfig(FFNConfig):
    """`y = W2 act(W1 x)`, or `y = W2 (silu(Wg x) * W1 x)` for `swiglu`."""

    kind: Literal["dense"] = "dense"
    d_hidden: int | None = Field(default=None, ge=1)
    """Width of the hidden layer; None: 4 * d_model, or 8/3 * d_model for swiglu, of equal cost."""
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of hidden values dropped in training."""

    def hidden(self, d_model: int) -> int:
        """The width of the hidden layer at a width of the model."""
        if self.d_hidden is not None:
            return self.d_hidden
        return 8 * d_model // 3 if self.activation == "swiglu" else 4 * d_model

    def build(self, d_model: int) -> "Dense":
        return Dense(self, d_model)

    def cost(self, d_model: int) -> Cost:
        maps = 3 if self.activation == "swiglu" else 2
        return Cost.of_matrix(d_model, maps * self.hidden(d_model))

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return [cls(), cls(activation="relu", d_hidden=24), cls(activation="swiglu", dropout=0.1)]


class Dense(FFN):
    def __init__(self, config: DenseConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden(d_model)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)
        self.gate = nn.Linear(d_model, hidden, bias=False) if config.activation == "swiglu" else None
        for linear in (self.up, self.down, self.gate):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, with_routing: bool = False) -> FFNOutput:
        if self.gate is not None:
            hidden = F.silu(self.gate(x)) * self.up(x)
        else:
            hidden = F.gelu(self.up(x)) if self.config.activation == "gelu" else F.relu(self.up(x))
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        return FFNOutput(self.down(hidden), no_loss(x), {}, ())

    def roles(self) -> dict[str, Role]:
        return {name: "matrix" for name, _ in self.named_parameters()}
