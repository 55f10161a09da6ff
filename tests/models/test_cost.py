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
from myriad.models import ClusterRouting, PosteriorRouting, TransformerConfig, TransformerExpertsConfig
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


def mixture(routing: PosteriorRouting | ClusterRouting) -> TransformerExpertsConfig:
    expert = TransformerConfig(layers=2, d_model=32, heads=2, ffns={"dense": DenseConfig(d_hidden=40)})
    return TransformerExpertsConfig(vocab_size=50, context=CONTEXT, experts=4, expert=expert, routing=routing)


def counted_of_loss(config: TransformerExpertsConfig) -> float:
    """Per token, what PyTorch counts of evaluation."""
    model, ids = config.build().eval(), torch.randint(50, (BATCH, CONTEXT))
    with sdpa_kernel(SDPBackend.MATH):
        return counted(lambda ids: model(ids, targets=ids), ids) / ids.numel()


def test_a_posterior_mixture_costs_all_of_its_experts():
    config = mixture(PosteriorRouting())
    one, cost = config.whole_expert.cost(), config.cost()
    assert cost.active_parameters == cost.parameters == 4 * one.parameters
    assert cost.routing == 4 * 2 * 32  # its dot products with the token that came, which PyTorch does not count
    assert counted_of_loss(config) == cost.flops - cost.routing + 4 * later_positions(config.expert)


@pytest.mark.parametrize("prompt_tokens", [1, 6, CONTEXT, 100])
def test_a_cluster_mixture_costs_its_picked_experts_and_all_of_a_beginning(prompt_tokens):
    config = mixture(ClusterRouting(top_k=2, features=5, prompt_tokens=prompt_tokens))
    one, cost = config.whole_expert.cost(), config.cost()
    assert cost.active_parameters == 2 * one.active_parameters
    assert cost.flops == 2 * one.flops + cost.routing
    read = min(prompt_tokens - 1, CONTEXT)
    scores = config.expert.layers * 2 * 2 * config.expert.heads * config.expert.head_width
    hidden = 2 * later_positions(config.expert) + 2 * scores * (read - (read + 1) / 2) * read / CONTEXT
    assert counted_of_loss(config) == pytest.approx(cost.flops + hidden, abs=1)
