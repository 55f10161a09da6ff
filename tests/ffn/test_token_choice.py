"""Token choice against its formulas, and against the sparse block of transformers' Mixtral."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from myriad.ffn import Cost, DenseConfig, TokenChoiceConfig
from myriad.ffn.token_choice import TokenChoice

D = 8
NO_LOSS = {"balance_loss": 0, "z_loss": 0}


def built(dtype: torch.dtype = torch.float64, **options) -> TokenChoice:
    torch.manual_seed(0)
    return TokenChoiceConfig(**{"experts": 4, "d_expert": 5, **options}).build(D).to(dtype)


def tokens(count: int = 20, seed: int = 1) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal(layer: TokenChoice, x_TD: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    config, experts = layer.config, layer.experts
    outputs = []
    for x in x_TD:
        logits = layer.router @ x
        scores = logits.softmax(0) if config.router == "softmax" else logits.sigmoid()
        ranked = scores if layer.balance_bias is None else scores + layer.balance_bias
        chosen = ranked.argsort(descending=True)[: config.experts_per_token]
        weights = scores[chosen]
        if config.normalize:
            weights = weights / weights.sum()
        y = torch.zeros_like(x)
        for weight, e in zip(weights, chosen, strict=True):
            hidden = experts.up[e] @ x
            if config.activation == "swiglu":
                hidden = F.silu(experts.gate[e] @ x) * hidden
            else:
                hidden = {"gelu": F.gelu, "relu": F.relu}[config.activation](hidden)
            y = y + weight * (experts.down[e] @ hidden)
        if layer.shared is not None:
            y = y + layer.shared(x).y
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"experts_per_token": 1, "normalize": False},
        {"experts_per_token": 4, "router": "sigmoid"},
        {"router": "sigmoid", "normalize": False, "activation": "relu"},
        {"shared_experts": 2, "activation": "swiglu", "experts": 7},
        {"balance_bias": 0.1, "router": "sigmoid"},
    ],
    ids=str,
)
def test_equals_its_formula_in_outputs_and_gradients(options):
    layer = built(**options)
    if layer.balance_bias is not None:
        layer.balance_bias += torch.tensor([1.0, -1.0, 0.2, 0.0])
    x = tokens().requires_grad_()
    inputs = [x, *layer.parameters()]
    mine, expected = layer(x).y, literal(layer, x)
    assert_close(mine, expected)
    upstream = tokens(seed=2)
    found = torch.autograd.grad(mine, inputs, upstream)
    assert_close(found, torch.autograd.grad(expected, inputs, upstream))


def test_equals_mixtrals_block_in_outputs_gradients_and_balance_loss():
    pytest.importorskip("transformers")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

    torch.manual_seed(0)
    layer = TokenChoiceConfig(experts=6, d_expert=12, activation="swiglu", balance_loss=0.5, z_loss=0).build(16)
    config = MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2)
    theirs = MixtralSparseMoeBlock(config)
    theirs.gate.weight.data.copy_(layer.router)
    theirs.experts.gate_up_proj.data.copy_(torch.cat((layer.experts.gate, layer.experts.up), 1))
    theirs.experts.down_proj.data.copy_(layer.experts.down)

    x = torch.randn(3, 11, 16)
    mine_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = layer(mine_x), theirs(their_x)
    assert_close(output.y, expected)
    logits = F.linear(their_x.flatten(0, 1), theirs.gate.weight)
    loss = load_balancing_loss_func((logits,), num_experts=6, top_k=2)
    assert_close(output.aux_loss, 0.5 * loss)
    mask = torch.rand(3, 11) > 0.3
    masked = load_balancing_loss_func((logits,), num_experts=6, top_k=2, attention_mask=mask)
    assert_close(layer(x, mask=mask).aux_loss, 0.5 * masked)

    upstream = torch.randn_like(x)
    torch.autograd.backward([output.y, output.aux_loss], [upstream, torch.tensor(2.0)])
    torch.autograd.backward([expected, loss], [upstream, torch.tensor(1.0)])
    assert_close(mine_x.grad, their_x.grad)
    assert_close(layer.router.grad, theirs.gate.weight.grad)
    assert_close(torch.cat((layer.experts.gate.grad, layer.experts.up.grad), 1), theirs.experts.gate_up_proj.grad)
    assert_close(layer.experts.down.grad, theirs.experts.down_proj.grad)


def test_the_losses_are_those_of_the_papers():
    layer = built(balance_loss=0.3, z_loss=0.2)
    x = tokens()
    logits = x @ layer.router.T
    probabilities = logits.softmax(1)
    chosen = torch.zeros(20, 4).scatter(1, probabilities.topk(2).indices, 1.0)
    balance = 4 * (chosen.mean(0) * probabilities.mean(0)).sum()
    expected = 0.3 * balance + 0.2 * logits.logsumexp(1).square().mean()
    assert_close(layer(x).aux_loss, expected)


def test_the_balance_loss_of_sigmoid_scores_is_of_their_shares():
    layer = built(router="sigmoid", balance_loss=1, z_loss=0, experts_per_token=1, normalize=False)
    with torch.no_grad():
        layer.router.zero_()
        layer.router[0] = 1e-6  # all choose the first or none of it, scores as good as even
    x = tokens().abs()
    assert_close(layer(x).aux_loss, torch.tensor(1.0, dtype=torch.float64), rtol=1e-4, atol=0)


def test_without_coefficients_there_is_no_loss():
    assert built(**NO_LOSS)(tokens()).aux_loss == 0


def test_the_load_counts_each_experts_tokens():
    layer = built()
    output = layer(tokens(), with_routing=True)
    assert torch.equal(output.load["counts"], torch.bincount(output.routing[0].ids.flatten(), minlength=4))


# Capacity


def test_later_tokens_are_dropped_when_an_expert_is_full():
    layer = built(capacity_factor=0.5, **NO_LOSS)  # of 20 tokens x 2, each of 4 experts takes 5
    x = tokens()
    output = layer(x, with_routing=True)
    ids, weights = output.routing[0].ids, output.routing[0].weights
    scores = (x @ layer.router.T).softmax(1)
    full = scores.gather(1, ids)
    full = full / full.sum(1, keepdim=True)
    places = dict.fromkeys(range(4), 0)
    for t in range(20):
        for slot in range(2):
            e = int(ids[t, slot])
            places[e] += 1
            expected = full[t, slot] if places[e] <= 5 else torch.zeros((), dtype=torch.float64)
            assert_close(weights[t, slot], expected.detach())
    assert (weights == 0).any()
    # What is dropped adds nothing.
    layer.eval()
    for t in (weights == 0).all(1).nonzero().flatten().tolist():
        assert not output.y[t].any()
    kept = (weights > 0).all(1)
    assert_close(output.y[kept], layer(x).y[kept])
    assert int(output.load["counts"].sum()) == 40  # what was chosen, taken or not


def test_a_capacity_that_no_expert_reaches_changes_nothing():
    capped, free = built(capacity_factor=2, **NO_LOSS), built(**NO_LOSS)
    assert_close(capped(tokens()).y, free(tokens()).y)


def test_evaluation_drops_nothing():
    capped, free = built(capacity_factor=0.1).eval(), built().eval()
    assert torch.equal(capped(tokens()).y, free(tokens()).y)


def test_padding_takes_no_place_and_counts_for_nothing():
    layer = built(capacity_factor=0.5, balance_loss=0.3, z_loss=0.2)
    x = tokens()
    mask = torch.ones(20, dtype=torch.bool)
    mask[::3] = False
    padded, alone = layer(x, mask=mask, with_routing=True), layer(x[mask], with_routing=True)
    assert_close(padded.y[mask], alone.y)
    assert not padded.y[~mask].any()
    assert_close(padded.aux_loss, alone.aux_loss)
    assert_close(padded.load["counts"], alone.load["counts"])
    assert_close(padded.routing[0].weights[mask], alone.routing[0].weights)
    assert not padded.routing[0].weights[~mask].any()


def test_nothing_but_padding():
    output = built(shared_experts=1)(tokens(3), mask=torch.zeros(3, dtype=torch.bool))
    assert output.aux_loss == 0
    assert output.y.isfinite().all()


def test_a_batch_in_which_nothing_goes_to_an_expert_has_gradients():
    """Of zeros: data parallelism waits for the gradient of every parameter."""
    layer = built()
    output = layer(tokens(3), mask=torch.zeros(3, dtype=torch.bool))
    (output.y.sum() + output.aux_loss).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.parameters())


# Balance without a loss


def test_the_bias_moves_by_the_sign_of_the_difference_to_the_mean():
    layer = built(balance_bias=0.01)
    layer.after_step({"counts": torch.tensor([10, 0, 5, 5])})
    assert_close(layer.balance_bias, torch.tensor([-0.01, 0.01, 0.0, 0.0], dtype=torch.float64))
    assert "balance_bias" in layer.state_dict()
    assert built().balance_bias is None


def test_the_bias_changes_the_choice_but_not_the_weights():
    layer = built(balance_bias=0.01, normalize=False).eval()
    x = tokens()
    layer.balance_bias[3] = 10
    output = layer(x, with_routing=True)
    ids, weights = output.routing[0].ids, output.routing[0].weights
    assert (ids == 3).any(1).all()
    assert_close(weights, (x @ layer.router.T).softmax(1).gather(1, ids).detach())


def test_the_bias_evens_out_a_router_that_is_not():
    layer = built(torch.float32, balance_bias=0.02, router="sigmoid")
    x = tokens(512).float() + 1
    unevenness = []
    for _ in range(100):
        load = layer(x).load
        unevenness.append(float(load["counts"].max() / load["counts"].float().mean()))
        layer.after_step(load)
    assert unevenness[0] > 1.4
    assert unevenness[-1] < 1.15


# Settings


def test_costs():
    config = TokenChoiceConfig(experts=8, experts_per_token=2, shared_experts=1, d_expert=16, activation="swiglu")
    expert = 3 * D * 16
    active = 8 * D + 3 * expert
    assert config.cost(D) == Cost(8 * D + 9 * expert, active, 2 * active, 4 * active, routing=2 * 8 * D)


@pytest.mark.parametrize("options", [{}, {"activation": "swiglu"}, {"shared_experts": 2, "experts_per_token": 6}])
def test_by_default_it_costs_what_the_dense_layer_costs_and_a_router(options):
    config = TokenChoiceConfig(**options)
    dense = DenseConfig(activation=config.activation).cost(96)
    assert config.cost(96).flops == dense.flops + Cost.of_matrix(96, 8).flops


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"capacity_factor": 0}, "capacity_factor"),
        ({"capacity_factor": -1}, "capacity_factor"),
        ({"experts": 4, "experts_per_token": 5}, "experts_per_token = 5 exceeds experts = 4"),
        ({"experts_per_token": 0}, "experts_per_token"),
        ({"experts_per_token": 1}, "normalize"),
        ({"balance_loss": -0.1}, "balance_loss"),
        ({"z_loss": -0.1}, "z_loss"),
        ({"balance_bias": 0}, "balance_bias"),
        ({"shared_experts": -1}, "shared_experts"),
        ({"d_expert": 0}, "d_expert"),
        ({"router": "relu"}, "router"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(options, field):
    with pytest.raises(ValidationError, match=field):
        TokenChoiceConfig(**options)


def test_autocast_changes_the_rounding_alone():
    layer = built(torch.float32, **NO_LOSS)
    x = tokens(64).float()
    plain = layer(x, with_routing=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x, with_routing=True)
    assert torch.equal(plain.routing[0].ids, rounded.routing[0].ids)
    assert rounded.y.dtype == torch.bfloat16
    assert (plain.y - rounded.y).abs().max() < 0.03 * plain.y.abs().max() + math.ulp(1.0)
