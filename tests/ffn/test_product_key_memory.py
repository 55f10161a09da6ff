"""Product-key memories against the papers (arXiv 1907.05242, arXiv 2412.09764), written out."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from myriad.config import ConfigError, validate
from myriad.ffn import FFNConfig, ProductKeyMemoryConfig
from myriad.ffn.product_key_memory import ProductKeyMemory

D = 5


def small(**options) -> ProductKeyMemoryConfig:
    return ProductKeyMemoryConfig(**{"memories": 25, "heads": 2, "memories_per_head": 3, "d_key": 4, **options})


def plus(**options) -> ProductKeyMemoryConfig:
    sizes = {"memories": 25, "heads": 2, "memories_per_head": 3, "d_key": 4}
    return ProductKeyMemoryConfig.memory_plus(**{**sizes, **options})


def built(config: ProductKeyMemoryConfig) -> ProductKeyMemory:
    """The layer in float64 with its gains and biases moved off one and zero."""
    torch.manual_seed(0)
    layer = config.build(D).double()
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer


def tokens(count: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full_keys(keys: Tensor) -> Tensor:
    """Every memory's key (N, 2 * d_key): all pairs of sub-keys."""
    first, second = keys
    side = len(first)
    return torch.cat((first.repeat_interleave(side, 0), second.repeat(side, 1)), dim=1)


def literal_queries(layer: ProductKeyMemory, x_TD: Tensor) -> Tensor:
    """Queries (T, H, 2 * d_key): a linear map, then the normalization."""
    config, norm = layer.config, layer.queries.norm
    q = x_TD @ layer.queries.proj.weight.T
    if config.query_norm == "batch":
        training = layer.training
        mean, var = (q.mean(0), q.var(0, correction=0)) if training else (norm.running_mean, norm.running_var)
        q = (q - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias
    q = q.view(len(x_TD), config.heads, -1)
    if config.query_norm == "layer":
        q = F.layer_norm(q, q.shape[-1:], norm.weight.flatten(), norm.bias.flatten())
    if config.query_norm == "rms":
        q = q / (q.square().mean(-1, keepdim=True) + torch.finfo(q.dtype).eps).sqrt() * norm.weight.flatten()
    return q


def literal_memory(layer: ProductKeyMemory, x_TD: Tensor) -> Tensor:
    """The first paper's equations 1 and 2, memory by memory; every key is formed, and all N are searched."""
    config = layer.config
    outputs = []
    for x, heads in zip(x_TD, literal_queries(layer, x_TD), strict=True):
        m = torch.zeros(layer.table().shape[1], dtype=x.dtype)
        for h, q in enumerate(heads):
            keys = layer.keys if config.shared_keys else layer.keys[h]
            if config.key_norm:
                keys = keys / keys.square().sum(-1, keepdim=True).sqrt()
            scores = full_keys(keys) @ q
            winners = scores.argsort(descending=True)[: config.memories_per_head]
            best = scores[winners]
            weights = {"softmax": best.softmax(0), "sigmoid": best.sigmoid(), "relu": best.relu()}[config.router]
            for weight, n in zip(weights, winners, strict=True):
                m = m + weight * layer.table()[n]
        if config.gated:
            gate = layer.gate.weight @ x
            m = m * gate * gate.sigmoid()
        outputs.append(layer.out.weight @ m if config.projected else m)
    return torch.stack(outputs)


PAPER = {"shared_keys": False, "query_norm": "batch", "router": "softmax"}


@pytest.mark.parametrize(
    "options",
    [
        PAPER,
        {"shared_keys": True},
        {"query_norm": "layer", "router": "sigmoid"},
        {"query_norm": "rms", "key_norm": True, "heads": 1},
        {"query_norm": "none", "router": "relu", "key_norm": True, "shared_keys": True},
        {"d_value": 7},
        {"d_value": D},
        {"gated": True},
        {"gated": True, "d_value": 3, "query_norm": "rms", "key_norm": True},
        {"memories_per_head": 7},  # more than the side
        {"memories": 4, "memories_per_head": 4},  # all of them
        {"memories": 900, "gated": True},  # sparse gradients
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_paper_in_outputs_and_gradients(options, training):
    layer = built(small(**options))
    layer.after_step(layer(tokens(20, seed=2)).load)
    layer.train(training)
    x = tokens().requires_grad_()
    inputs = {"x": x, **dict(layer.named_parameters())}
    mine, expected = layer(x).y, literal_memory(layer, x)
    assert_close(mine, expected)
    upstream = tokens(seed=3)
    found = torch.autograd.grad(mine, list(inputs.values()), upstream)
    gradients = torch.autograd.grad(expected, list(inputs.values()), upstream)
    for name, gradient, wanted in zip(inputs, found, gradients, strict=True):
        assert_close(gradient.to_dense(), wanted, msg=lambda text, name=name: f"{name}: {text}")


def restated_memory_plus(layer: ProductKeyMemory, x_TD: Tensor) -> Tensor:
    """Memory+ at once for all tokens: I = top-k(K q), s = softmax(K_I q), m = s V_I, y = (m * silu(x W_1)) W_2."""
    config = layer.config
    q_THQ = F.rms_norm(
        F.linear(x_TD, layer.queries.proj.weight).unflatten(1, (config.heads, -1)),
        (2 * config.d_key,),
        layer.queries.norm.weight.flatten(),
    )
    keys_HNQ = torch.stack([full_keys(F.normalize(keys, dim=-1)) for keys in layer.keys])
    scores_THK, ids_THK = torch.einsum("thq,hnq->thn", q_THQ, keys_HNQ).topk(config.memories_per_head)
    bag = torch.nn.EmbeddingBag.from_pretrained(layer.table().detach(), mode="sum", freeze=False)
    m_TV = bag(ids_THK.flatten(1), per_sample_weights=scores_THK.softmax(-1).flatten(1))
    return F.linear(m_TV * F.silu(F.linear(x_TD, layer.gate.weight)), layer.out.weight)


@pytest.mark.parametrize("options", [{}, {"d_value": 8}, {"heads": 4, "memories": 400}], ids=str)
def test_memory_plus_equals_its_equations(options):
    layer, x = built(plus(**options)), tokens(40)
    assert_close(layer(x).y, restated_memory_plus(layer, x))


def test_memory_plus_is_its_options():
    config = ProductKeyMemoryConfig.memory_plus(memories=16**2)
    assert config == ProductKeyMemoryConfig(memories=16**2, gated=True, query_norm="rms", key_norm=True)
    assert ProductKeyMemoryConfig.memory_plus(query_norm="batch", table="pool").query_norm == "batch"


def test_the_defaults_are_the_first_papers():
    sizes = {"memories": 512**2, "heads": 4, "memories_per_head": 32, "d_key": 256}
    plain = {"d_value": None, "gated": False, "key_norm": False, "table": None}
    assert ProductKeyMemoryConfig() == ProductKeyMemoryConfig(**sizes, **PAPER, **plain)


def test_names_shapes_and_roles():
    with torch.device("meta"):
        plain = ProductKeyMemoryConfig().build(d_model=192)
        layer = ProductKeyMemoryConfig.memory_plus(d_value=64).build(d_model=192)
    assert {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()} == {
        "queries.proj.weight": (4 * 2 * 256, 192),
        "queries.norm.weight": (4 * 2 * 256,),
        "queries.norm.bias": (4 * 2 * 256,),
        "keys": (4, 2, 512, 256),
        "values": (512**2, 192),
    }
    assert tuple(layer.table().shape) == (512**2, 64)
    assert tuple(layer.gate.weight.shape) == (64, 192)
    assert tuple(layer.out.weight.shape) == (192, 64)
    assert layer.roles() == {
        "queries.proj.weight": "matrix",
        "queries.norm.weight": "vector",
        "keys": "matrix",
        "values": "table",
        "gate.weight": "matrix",
        "out.weight": "matrix",
    }


def test_cost_counts_two_operations_for_each_weight():
    cost = ProductKeyMemoryConfig.memory_plus(memories=64**2, d_key=32, d_value=128).cost(192)
    queries, keys, maps = 192 * 4 * 64, 4 * 2 * 64 * 32, 2 * 192 * 128
    active = queries + 2 * 32 + keys + maps + 4 * 32 * 128
    assert cost.parameters == active + (64**2 - 4 * 32) * 128
    assert cost.active_parameters == active
    assert cost.flops == 2 * (queries + keys + maps + 4 * 32 * 128)


def test_routing_tells_the_memories_and_their_weights():
    layer = built(small(d_value=3))
    x = tokens(6).view(2, 3, D)
    y, _, _, (routing,) = layer(x, with_routing=True)
    assert routing.experts == 25
    assert routing.ids.shape == routing.weights.shape == (2, 3, 6)
    m = torch.einsum("bsa,bsav->bsv", routing.weights, layer.table()[routing.ids])
    assert_close(F.linear(m, layer.out.weight), y)


@pytest.mark.parametrize("options", [{}, {"shared_keys": True}, {"key_norm": True}], ids=str)
def test_every_memory_is_reachable(options):
    """For every memory and head there is a token that retrieves it first."""
    layer = small(memories=36, query_norm="none", **options).build(8)
    layer.queries.proj.weight.data = torch.eye(8).repeat(2, 1)  # both heads' queries are the token
    layer.keys.data = F.normalize(layer.keys.data, dim=-1)
    for head in range(2):
        keys = layer.keys.data if layer.config.shared_keys else layer.keys.data[head]
        ids = layer(full_keys(keys), with_routing=True).routing[0].ids.view(36, 2, 3)
        assert torch.equal(ids[:, head, 0], torch.arange(36))


def test_the_length_of_a_sub_key_does_not_matter_where_keys_are_normalised():
    layer, x = built(plus()).eval(), tokens()
    before = layer(x).y
    layer.keys.data *= 7
    assert_close(layer(x).y, before)


def test_batch_statistics_move_in_after_step_alone():
    layer, x = built(small()), tokens(20)
    load = layer(x).load
    before = layer.eval()(x).y
    layer.after_step(load)
    assert (layer(x).y - before).abs().max() > 1e-3
    assert_close(layer(x).y, literal_memory(layer, x))


@pytest.mark.parametrize("options", [{}, {"gated": True, "d_value": 8}], ids=str)
def test_narrow_models_give_narrow_outputs(options):
    layer, x = small(**options).build(D).bfloat16().eval(), tokens().bfloat16()
    assert layer(x).y.dtype == torch.bfloat16
    assert (layer(x).y - small(**options).build(D).bfloat16().eval()(x).y).abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memories": 1000}, r"^memories: product keys need a square; nearest to 1000: 31\*\*2 = 961"),
        ({"memories": 0}, r"^memories: expected greater than or equal to 1"),
        ({"memories": 4, "memories_per_head": 5}, "memories_per_head = 5 exceeds memories = 4"),
        ({"d_value": 0}, "^d_value: "),
        ({"experts": 4}, "^experts: unknown key"),
        ({"query_norm": "rsm"}, "^query_norm: .*did you mean 'rms'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(FFNConfig, {"kind": "product_key_memory", **settings})


def test_a_layer_alone_has_no_table_to_share():
    with pytest.raises(ConfigError, match=r"^table: 'pool' is not there to be shared"):
        small(table="pool").build(D)


def test_fields_are_frozen():
    with pytest.raises(ValidationError):
        small().memories = 4
