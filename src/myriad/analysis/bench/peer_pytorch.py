"""The layer of the package `PEER-pytorch` (the extra `bench`) with the weights of one of ours.

The two agree where ours has keys for every head (`shared_keys: false`), queries that are not normalised
(`query_norm: none`), no gate, and as `router`

- `softmax`, which is theirs with `non_competing_scores=False`, or
- `relu` with one expert per head: theirs with `non_competing_scores=True`, its default, looks up only the best expert
  of each head.
"""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor, nn

from myriad.analysis.bench.report import THEIRS
from myriad.config import ConfigError
from myriad.ffn.base import FFN, FFNOutput, Role, no_loss
from myriad.ffn.peer import PEER, PEERConfig

MODULE = "PEER_pytorch"
ABSENT = "not installed: pip install 'myriad-moe[bench]'"

NAMES = {
    "queries.proj.weight": "to_queries.0.weight",
    "keys": "keys",
    "experts_down": "weight_down_embed.weight",
    "experts_up": "weight_up_embed.weight",
}
"""Our parameters -> theirs."""

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "none": nn.Identity}


@cache
def installed() -> bool:
    """Whether the package is there."""
    return find_spec(MODULE) is not None


def missing() -> str | None:
    """What to say where it is not there."""
    return None if installed() else ABSENT


def their_layer(layer: PEER, *, share: bool = False) -> nn.Module:
    """Their layer with our weights, for inputs of shape (B, S, D).

    Args:
        layer: ours.
        share: whether the tables of both lie in the same memory, which only reading allows; else they are copied.

    Raises:
        ConfigError: our layer has options that theirs lacks.
    """
    from PEER_pytorch import PEER as TheirPEER

    config, d_model = layer.config, layer.queries.proj.in_features
    _check(config)
    with torch.device("meta"):  # their own initial values would take memory and time
        theirs = TheirPEER(
            d_model,
            heads=config.heads,
            num_experts=config.experts,
            num_experts_per_head=config.experts_per_head,
            product_key_topk=min(config.experts_per_head, layer.keys.shape[-2]),
            activation=ACTIVATIONS[config.activation],
            dim_key=config.d_key,
            non_competing_scores=config.router == "relu",
            dropout=config.dropout,
        )
    weights = in_their_layout(config, {name: weight.detach() for name, weight in layer.named_parameters()})
    if not share:
        weights = {name: weight.clone() for name, weight in weights.items()}
    theirs.load_state_dict(weights, assign=True)
    return theirs.train(layer.training)


def in_their_layout(config: PEERConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters, or their gradients, by their names and in their order: tables are not copied."""
    query_FD, keys_HPSQ = tensors["queries.proj.weight"], tensors["keys"]
    heads, halves, _, width = keys_HPSQ.shape
    query_HPQD = query_FD.view(heads, halves, width, -1)
    ordered = {
        **tensors,
        "queries.proj.weight": query_HPQD.transpose(0, 1).reshape_as(query_FD),
        "keys": keys_HPSQ.transpose(1, 2).contiguous(),
    }
    return {NAMES[name]: tensor for name, tensor in ordered.items()}


def _check(config: PEERConfig) -> None:
    one_relu = config.router == "relu" and config.experts_per_head == 1
    for option, equal in (
        ("shared_keys", not config.shared_keys),
        ("query_norm", config.query_norm == "none"),
        ("gated", not config.gated),
        ("table", config.table is None),
        ("router", config.router == "softmax" or one_relu),
    ):
        if not equal:
            raise ConfigError(f"{option}: {THEIRS} has no layer with {option} = {getattr(config, option)}")


class TheirFFN(FFN):
    """Their layer in the place of ours in a model."""

    def __init__(self, layer: PEER) -> None:
        super().__init__()
        self.layer = their_layer(layer, share=True)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, with_routing: bool = False) -> FFNOutput:
        return FFNOutput(self.layer(x), no_loss(x), {}, ())

    def roles(self) -> dict[str, Role]:
        return dict.fromkeys((name for name, _ in self.named_parameters()), "matrix")


M = TypeVar("M", bound=nn.Module)


def with_their_layers(model: M) -> M:
    """Put their layer in the place of each of our PEER layers; the tables stay the same memory."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PEER):
                setattr(module, name, TheirFFN(child))
    return model
