"""PEER against the paper (arXiv 2407.04153), written out in loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from myriad.config import ConfigError, validate
from myriad.ffn import FFNConfig, PEERConfig
from myriad.ffn.peer import PEER

D = 5


def small(**options) -> PEERConfig:
    return PEERConfig(**{"experts": 25, "heads": 2, "experts_per_head": 3, "d_key": 4, **options})


def built(config: PEERConfig, dtype: torch.dtype = torch.float64) -> PEER:
    """The layer with its gains and biases moved off one and zero."""
    torch.manual_seed(0)
    layer = config.build(D).to(dtype)
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer


def tokens(count: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_queries(layer: PEER, x_TD: Tensor) -> Tensor:
    """Queries (T, H, 2 * d_key): a linear map, then the normalization."""
    config = layer.config
    width = 2 * config.d_key
    q = x_TD @ layer.queries.proj.weight.T
    norm = layer.queries.norm
    if config.query_norm == "batch":
        if layer.training:
            mean, var = q.mean(0), q.var(0, correction=0)
        else:
            mean, var = norm.running_mean, norm.running_var
        q = (q - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias
    q = q.view(len(x_TD), config.heads, width)
    if config.query_norm == "layer":
        q = F.layer_norm(q, (width,), norm.weight.flatten(), norm.bias.flatten())
    if config.query_norm == "rms":
        q = F.rms_norm(q, (width,), norm.weight.flatten())
    return q


def literal_peer(layer: PEER, x_TD: Tensor) -> Tensor:
    """Equations 1 to 6, expert by expert; every key is formed, and all N are searched."""
    config = layer.config
    side = math.isqrt(config.experts)
    act = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "none": lambda x: x}[config.activation]
    outputs = []
    for x, heads in zip(x_TD, literal_queries(layer, x_TD), strict=True):
        y = torch.zeros_like(x)
        for h, q in enumerate(heads):
            first, second = layer.keys if config.shared_keys else layer.keys[h]
            full_keys = [torch.cat((first[n // side], second[n % side])) for n in range(config.experts)]
            scores = torch.stack([key @ q for key in full_keys])
            winners = scores.argsort(descending=True)[: config.experts_per_head]
            best = scores[winners]
            weights = {"softmax": best.softmax(0), "sigmoid": best.sigmoid(), "relu": best.relu()}
            for weight, n in zip(weights[config.router], winners, strict=True):
                hidden = layer.experts_down[n] @ x
                if config.gated:
                    hidden = act(layer.experts_gate[n] @ x) * hidden
                else:
                    hidden = act(hidden)
                y = y + weight * hidden * layer.experts_up[n]
        outputs.append(y)
    return torch.stack(outputs)


PAPER = {"shared_keys": True, "query_norm": "batch", "router": "softmax", "activation": "gelu"}


@pytest.mark.parametrize(
    "options",
    [
        PAPER,
        {"shared_keys": False},
        {"query_norm": "layer", "router": "sigmoid"},
        {"query_norm": "rms", "activation": "relu", "heads": 1},
        {"query_norm": "none", "router": "relu", "activation": "silu"},
        {"activation": "none"},
        {"gated": True, "activation": "silu"},
        {"gated": True, "activation": "none"},
        {"gated": True, "shared_keys": False, "experts_per_head": 1},
        {"experts_per_head": 7},  # more than the side
        {"experts": 4, "experts_per_head": 4},  # all of them
        {"experts": 900},  # sparse gradients
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
    mine, expected = layer(x).y, literal_peer(layer, x)
    assert_close(mine, expected)
    upstream = tokens(seed=3)
    found = torch.autograd.grad(mine, list(inputs.values()), upstream)
    gradients = torch.autograd.grad(expected, list(inputs.values()), upstream)
    for name, gradient, wanted in zip(inputs, found, gradients, strict=True):
        assert_close(gradient.to_dense(), wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_any_leading_shape():
    layer = built(small())
    x = tokens(6)
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    flat = layer(x, mask=mask, with_routing=True)
    deep = layer(x.view(2, 3, D), mask=mask.view(2, 3), with_routing=True)
    assert torch.equal(deep.y, flat.y.view(2, 3, D))
    assert torch.equal(deep.routing[0].ids, flat.routing[0].ids.view(2, 3, 6))


def test_routing_tells_the_experts_and_their_weights():
    """The output is rebuilt from the routing, so the ids are rows of the tables."""
    layer = built(small())
    x = tokens()
    y, _, _, (routing,) = layer(x, with_routing=True)
    assert routing.experts == 25
    hidden = F.gelu(torch.einsum("td,tad->ta", x, layer.experts_down[routing.ids]))
    assert_close(torch.einsum("ta,tad->td", routing.weights * hidden, layer.experts_up[routing.ids]), y)


def test_routing_tells_the_heads_one_after_the_other():
    layer = built(small())
    (routing,) = layer(tokens(), with_routing=True).routing
    assert routing.heads == layer.config.heads == 2
    weights_THK = routing.weights.view(-1, 2, layer.config.experts_per_head)
    assert_close(weights_THK.sum(-1), torch.ones_like(weights_THK[..., 0]))  # softmax over each head's


def test_more_than_k_squared_experts_are_used_in_training():
    """Positions in the k x k grid of candidates, taken for ids, would use at most k*k."""
    config = small(experts=400, heads=1, experts_per_head=2)
    layer = built(config)
    output = layer(tokens(200), with_routing=True)
    assert len(output.routing[0].ids.unique()) > 10 * 2 * 2
    output.y.sum().backward()
    for table in (layer.experts_down, layer.experts_up):
        assert int((table.grad.to_dense() != 0).any(1).sum()) > 10 * 2 * 2


@pytest.mark.parametrize("shared_keys", [True, False])
def test_every_expert_is_reachable(shared_keys):
    """For every expert and head there is a token that retrieves it first."""
    config = PEERConfig(experts=36, heads=2, experts_per_head=3, d_key=4, query_norm="none", shared_keys=shared_keys)
    layer = config.build(8)
    layer.queries.proj.weight.data = torch.eye(8).repeat(2, 1)  # both heads' queries are the token
    layer.keys.data = F.normalize(layer.keys.data, dim=-1)
    for head in range(2):
        first, second = layer.keys.data if shared_keys else layer.keys.data[head]
        pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
        x = torch.cat((first[pairs[:, 0]], second[pairs[:, 1]]), dim=1)
        ids = layer(x, with_routing=True).routing[0].ids.view(36, 2, 3)
        assert torch.equal(ids[:, head, 0], torch.arange(36))


THE_ISSUES = {"experts": 1024**2, "heads": 8, "experts_per_head": 16, "d_key": 128} | PAPER


def test_the_defaults_are_the_papers():
    assert PEERConfig() == PEERConfig(**THE_ISSUES)


def test_a_million_experts_cost_without_a_tensor():
    class NoTensors(TorchDispatchMode):
        def __torch_dispatch__(self, function, *_):
            raise AssertionError(f"{function} was called")

    with NoTensors():
        cost = PEERConfig(**THE_ISSUES).cost(d_model=256)
    queries = 256 * 8 * 256 + 2 * 8 * 256  # the map, gain and bias
    keys = 2 * 1024 * 128
    assert cost.parameters == queries + keys + 2 * 1024**2 * 256
    assert cost.active_parameters == queries + keys + 2 * 128 * 256
    assert cost.flops == 2 * (256 * 8 * 256 + 8 * keys + 2 * 128 * 256)


def test_names_and_shapes_that_scripts_rely_on():
    with torch.device("meta"):
        layer = PEERConfig(**THE_ISSUES).build(d_model=256)
        own_keys = PEERConfig(**THE_ISSUES | {"shared_keys": False, "gated": True}).build(d_model=256)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes["experts_down"] == shapes["experts_up"] == (1024**2, 256)
    assert shapes["keys"] == (2, 1024, 128)
    assert "experts_gate" not in shapes
    assert own_keys.keys.shape == (8, 2, 1024, 128)
    assert own_keys.experts_gate.shape == (1024**2, 256)
    assert own_keys.roles() == {
        "keys": "matrix",
        "experts_down": "table",
        "experts_up": "table",
        "experts_gate": "table",
        "queries.proj.weight": "matrix",
        "queries.norm.weight": "vector",
        "queries.norm.bias": "vector",
    }


def test_a_number_of_experts_that_is_no_square_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        validate(FFNConfig, {"kind": "peer", "experts": 1_000_000 - 1})
    assert str(caught.value) == (
        "experts: product keys need a square; nearest to 999999: 999**2 = 998001 and 1000**2 = 1000000"
    )


def test_more_experts_per_head_than_experts_are_refused():
    small(experts=4, experts_per_head=4)
    with pytest.raises(ValidationError, match="experts_per_head = 5 exceeds experts = 4"):
        small(experts=4, experts_per_head=5)


def test_dropout_drops_hidden_values_in_training_alone():
    """With one expert a token, its output is dropped or doubled."""
    layer = built(small(dropout=0.5, heads=1, experts_per_head=1, query_norm="none"))
    x = tokens(200)
    plain = layer.eval()(x).y
    assert torch.equal(layer(x).y, plain)
    assert_close(plain, literal_peer(layer, x))
    dropped = layer.train()(x).y
    kept = dropped.abs().sum(1) > 0
    assert 50 < int(kept.sum()) < 150
    assert_close(dropped[kept], 2 * plain[kept])


def test_running_statistics_change_in_after_step_alone_and_evaluation_uses_them():
    layer = built(small())
    norm = layer.queries.norm
    x = tokens(20)
    load = layer(x).load
    assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
    before = layer.eval()(x).y
    assert layer(x).load == {}
    layer.after_step(load)
    q = x @ layer.queries.proj.weight.T
    assert_close(norm.running_mean, 0.1 * q.mean(0))
    assert_close(norm.running_var, 0.9 + 0.1 * q.var(0))
    assert (layer(x).y - before).abs().max() > 1e-3
    assert_close(layer(x).y, literal_peer(layer, x))


def test_masked_micro_batches_teach_what_their_kept_tokens_would_at_once():
    x = tokens(12)
    mask = torch.arange(12) % 4 != 3
    split, whole = built(small()), built(small())
    loads = [split(x[part], mask=mask[part]).load for part in (slice(0, 5), slice(5, 12))]
    split.after_step({name: sum(load[name] for load in loads) for name in loads[0]})
    whole.after_step(whole(x[mask]).load)
    for name, value in whole.state_dict().items():
        assert_close(split.state_dict()[name], value)


def test_a_mask_hides_padding_from_the_others_statistics():
    layer = built(small())
    x = tokens(12)
    mask = torch.arange(12) % 4 != 3
    assert_close(layer(x, mask=mask).y[mask], layer(x[mask]).y)
    assert_close(layer(x, mask=mask).y[mask], literal_peer(layer, x[mask]))


def test_fresh_layers_have_hidden_values_of_order_one():
    torch.manual_seed(0)
    layer = PEERConfig(experts=32**2, heads=2, experts_per_head=4, d_key=16).build(64)
    x = torch.randn(100, 64)
    assert 0.9 < float((x @ layer.experts_down.detach().T).std()) < 1.1
    assert 0.9 < float((x @ layer.queries.proj.weight.detach().T).std()) < 1.1
