"""The FLOPs that are counted from a config, held to PyTorch's counter wherever that one is right.

PyTorch counts no operations of attention kernels, embedding bags, or ops of ours on a CPU. So attention goes through
plain products here, and PEER is written out in them.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from myriad.ffn import DenseConfig, PEERConfig, StackConfig
from myriad.kernels.product_key import reference_forward
from myriad.models import TransformerConfig
from tiny import tiny_model

BATCH, CONTEXT = 2, 16


def counted(run, *inputs: Tensor) -> int:
    """What PyTorch's counter makes of a function."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(*inputs)
    return counter.get_total_flops()


def later_positions(config: TransformerConfig) -> float:
    """FLOPs per token that plain products spend on positions which a mask then hides."""
    hidden = CONTEXT - (CONTEXT + 1) / 2
    return config.layers * 2 * 2 * config.heads * config.head_width * hidden


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": False},
        {"heads": 4, "kv_heads": 2, "head_dim": 6},
        {"qk_norm": True},
        {"ffns": {"dense": DenseConfig(activation="swiglu", d_hidden=40)}},
        {"ffns": {"dense": DenseConfig(d_hidden=40), "two": StackConfig(layers=[DenseConfig()] * 2)}},
    ],
)
def test_a_dense_model_costs_what_pytorch_counts(options):
    options = {"ffns": {"dense": DenseConfig()}} | options
    config = tiny_model(context=CONTEXT, vocab_size=50, **(options | {"pattern": list(options["ffns"])}))
    model = config.build()
    ids = torch.randint(50, (BATCH, CONTEXT))
    with sdpa_kernel(SDPBackend.MATH):
        found = counted(model, ids)
    assert found / ids.numel() == config.cost().flops + later_positions(config)
    assert config.cost().routing == 0


@pytest.mark.parametrize("gated", [False, True])
def test_peer_costs_what_pytorch_counts_of_it_in_plain_products(gated):
    config, tokens, d_model = PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8, gated=gated), 10, 12
    layer = config.build(d_model)
    x_TD = torch.randn(tokens, d_model)

    def choose(x_TD: Tensor) -> Tensor:
        q_THPQ, _ = layer.queries(x_TD, None)
        keys_HPSQ = layer.keys.expand(config.heads, *layer.keys.shape)
        return reference_forward(q_THPQ, keys_HPSQ, config.experts_per_head)[1].flatten(1)

    def compute(x_TD: Tensor, ids_TA: Tensor) -> Tensor:
        tables = [table for table in (layer.experts_down, layer.experts_gate) if table is not None]
        hidden_TA = torch.stack([torch.einsum("td,tad->ta", x_TD, table[ids_TA]) for table in tables]).prod(0)
        return torch.einsum("ta,tad->td", hidden_TA, layer.experts_up[ids_TA])

    cost = config.cost(d_model)
    assert counted(choose, x_TD) == tokens * cost.routing
    assert counted(compute, x_TD, choose(x_TD)) == tokens * (cost.flops - cost.routing)


def test_a_models_routing_is_that_of_its_layers():
    peer = PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8)
    two = StackConfig(layers=[peer, peer])
    ffns = {"peer": peer, "dense": DenseConfig(), "two": two}
    config = tiny_model(vocab_size=50, layers=4, ffns=ffns, pattern=["peer", "dense", "two", "peer"])
    assert config.cost().routing == 4 * peer.cost(config.d_model).routing > 0
