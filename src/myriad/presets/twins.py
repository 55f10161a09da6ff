"""Dense twins: the dense layer that costs what another layer costs."""

from typing import Literal

from myriad.ffn import DenseConfig, FFNConfig


def dense_twin(ffn: FFNConfig, d_model: int, activation: Literal["gelu", "relu", "swiglu"] = "gelu") -> DenseConfig:
    """The dense layer of equal FLOPs per token, to the nearest hidden unit."""
    maps = 3 if activation == "swiglu" else 2
    flops_per_hidden_unit = 2 * maps * d_model
    return DenseConfig(d_hidden=max(1, round(ffn.cost(d_model).flops / flops_per_hidden_unit)), activation=activation)
