"""Twins: the layer of another kind that costs what a layer costs."""

from typing import Literal, TypeVar

from myriad.ffn import DenseConfig, ExpertChoiceConfig, FFNConfig, TokenChoiceConfig


def dense_twin(ffn: FFNConfig, d_model: int, activation: Literal["gelu", "relu", "swiglu"] = "gelu") -> DenseConfig:
    """The dense layer of equal FLOPs per token, to the nearest hidden unit."""
    maps = 3 if activation == "swiglu" else 2
    flops_per_hidden_unit = 2 * maps * d_model
    return DenseConfig(d_hidden=max(1, round(ffn.cost(d_model).flops / flops_per_hidden_unit)), activation=activation)


M = TypeVar("M", TokenChoiceConfig, ExpertChoiceConfig)


def mixture_twin(mixture: M, ffn: FFNConfig, d_model: int) -> M:
    """The mixture with experts of the width at which it has the FLOPs per token of a layer, to the nearest unit."""
    one, two = (mixture.model_copy(update={"d_expert": width}).cost(d_model).flops for width in (1, 2))
    width = 1 + round((ffn.cost(d_model).flops - one) / (two - one))
    return mixture.model_copy(update={"d_expert": max(1, width)})
