"""One model whose experts choose: against its formula, as a language model, and grown from a seed."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from myriad.config import ConfigError, validate
from myriad.evaluate import batch_leak, future_leak, training_view
from myriad.ffn import DenseConfig, PEERConfig
from myriad.models import (
    ChosenTransformers,
    ExpertChoiceRouting,
    KVCache,
    ModelConfig,
    TransformerConfig,
    TransformerExpertsConfig,
    from_seed,
)
from myriad.models.rotary import rotary_angles

PEER = PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8)


def config_of(expert: dict | None = None, **routing) -> TransformerExpertsConfig:
    return TransformerExpertsConfig(
        vocab_size=50,
        context=32,
        experts=4,
        expert=TransformerConfig(**{"layers": 2, "d_model": 16, "heads": 2, **(expert or {})}),
        routing=ExpertChoiceRouting(**{"trunk_layers": 1, **routing}),
    )


CONFIGS = {
    "one": config_of(),
    "several": config_of(capacity_factor=2.5),
    "all": config_of(capacity_factor=4, trunk_layers=2),
    "untied": config_of({"tie_embeddings": False, "kv_heads": 1, "qk_norm": True}),
    "peer": config_of({"ffns": {"a": DenseConfig(d_hidden=24), "b": PEER}, "pattern": ["a", "b"]}, capacity_factor=2),
    "thresholds": config_of(threshold_after=1, capacity_factor=1.5),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def tokens(batch: int = 3, length: int = 32, seed: int = 1) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def built(config: TransformerExpertsConfig, dtype: torch.dtype = torch.float64, steps: int = 3) -> ChosenTransformers:
    """In eval mode, with thresholds that some training batches have moved, and scores that differ much."""
    torch.manual_seed(0)
    model = config.build().to(dtype)
    assert isinstance(model, ChosenTransformers)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.router.data *= 4
    with torch.no_grad():
        for seed in range(steps):
            model.after_step(model(tokens(seed=10 + seed)).loads)
    return model.eval()


def logits(model: ChosenTransformers, ids: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def literal_logits(model: ChosenTransformers, ids: Tensor) -> Tensor:
    """Sequence by sequence, expert by expert, each on a list of tokens."""
    expert, experts = model.config.expert, model.config.experts
    rows = []
    for ids_S in ids:
        positions = torch.arange(len(ids_S)).unsqueeze(0)
        x = model.embedding(ids_S).unsqueeze(0)
        for block in model.trunk:
            angles = rotary_angles(positions, expert.head_width, expert.rope_theta)
            x = block(x, angles, None, None, None, False).x_BSD
        scores = (model.router_norm(x[0]) @ model.router.T).softmax(-1)
        y = x[0].clone()
        for e in range(experts):
            if model.training and not model.causal_in_training():
                capacity = int(len(ids_S) * model.routing.capacity_factor / experts)
                mine = scores[:, e].argsort(descending=True)[:capacity].sort().values
            else:
                mine = (scores[:, e] >= model.thresholds.value[e]).nonzero().squeeze(1)
            if not len(mine):
                continue
            z = x[:, mine]
            for block in model.experts[e]:
                angles = rotary_angles(positions[:, mine], expert.head_width, expert.rope_theta)
                z = block(z, angles, None, None, None, False).x_BSD
            y = y.index_add(0, mine, scores[mine, e].unsqueeze(1) * (z - x[:, mine])[0])
        weight = model.embedding.weight if model.head is None else model.head.weight
        rows.append(model.norm(y) @ weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("training", [True, False])
@every_config
def test_equals_its_formula_in_outputs_and_gradients(config, training):
    if config.expert.ffns.keys() == {"a", "b"} and training:
        pytest.skip("PEER's queries take their statistics from all sequences")
    model = built(config).train(training)
    ids, parameters = tokens(), list(model.parameters())
    found, expected = model(ids).logits, literal_logits(model, ids)
    assert_close(found, expected, rtol=0, atol=1e-9)
    upstream = torch.randn_like(found)
    mine = torch.autograd.grad(found, parameters, upstream)
    theirs = torch.autograd.grad(expected, parameters, upstream, materialize_grads=True)
    for (name, _), one, other in zip(model.named_parameters(), mine, theirs, strict=True):
        assert_close(one.to_dense(), other.to_dense(), rtol=0, atol=1e-8, msg=name)


@every_config
def test_the_future_and_the_batch_do_not_reach_a_token(config):
    model = built(config)
    ids = tokens(length=20)
    assert max(future_leak(model, ids, position) for position in (1, 10, 19)) < 1e-9
    assert batch_leak(model, ids) < 1e-9


def test_the_training_view_sees_the_future():
    """The leak that the test of causality must find."""
    model = built(CONFIGS["one"])
    with training_view(model):
        assert future_leak(model, tokens(), 16) > 1e-4
        assert batch_leak(model, tokens()) < 1e-9
    assert not model.training
    model = built(CONFIGS["thresholds"])
    with pytest.raises(ConfigError, match="one view alone"), training_view(model):
        pass


def test_the_training_view_drops_nothing():
    model = built(config_of({"dropout": 0.5}))
    with training_view(model):
        assert torch.equal(logits(model, tokens()), logits(model, tokens()))


@every_config
@pytest.mark.parametrize("steps", [[20], [7, 13], [1] * 20, [5, 1, 1, 13]], ids=str)
def test_a_cache_changes_nothing(config, steps):
    model, ids = built(config), tokens(length=20)
    cache = model.new_cache()
    parts = [logits(model, part, cache=cache) for part in ids.split(steps, dim=1)]
    assert_close(torch.cat(parts, 1), logits(model, ids), rtol=0, atol=1e-9)
    assert cache.get_seq_length() == 20


@every_config
@pytest.mark.parametrize("steps", [[12], [6, 6], [5] + [1] * 7], ids=str)
def test_padding_on_the_left_changes_nothing_with_a_cache_or_without(config, steps):
    model, ids = built(config), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, start, parts = model.new_cache(), 0, []
    for part in steps:
        end = start + part
        options = {"mask": mask[:, :end], "positions": positions[:, start:end], "cache": cache}
        parts.append(logits(model, ids[:, start:end], **options))
        start = end
    found = torch.cat(parts, 1)
    assert_close(found[0, 4:], logits(model, ids[:1, 4:])[0], rtol=0, atol=1e-9)
    assert_close(found[1], logits(model, ids[1:])[0], rtol=0, atol=1e-9)
    assert found.isfinite().all()


def test_padding_counts_for_nothing_in_training():
    model = built(CONFIGS["several"]).train()
    ids = tokens(1, 24)
    padded = torch.cat((torch.full((1, 8), 3), ids), 1)
    mask = torch.arange(32).unsqueeze(0) >= 8
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone, beside = model(ids), model(padded, mask=mask, positions=positions)
    assert_close(beside.logits[:, 8:], alone.logits, rtol=0, atol=1e-9)
    for one, other in zip(beside.loads, alone.loads, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name]) for name in one)


def test_sequences_of_a_cache_can_be_exchanged_and_repeated():
    model, ids = built(CONFIGS["several"]), tokens(length=20)
    order = torch.tensor([2, 0, 2, 1])
    cache = model.new_cache()
    for part in ids[:, :9].split([5, 1, 1, 1, 1], 1):
        logits(model, part, cache=cache)
    cache.reorder_cache(order)
    expected = logits(model, ids[order])
    parts = [logits(model, part, cache=cache) for part in ids[order, 9:15].split([1, 1, 4], 1)]
    assert_close(torch.cat(parts, 1), expected[:, 9:15], rtol=0, atol=1e-9)
    cache.reorder_cache(torch.tensor([1]))  # alone, with the places that it left empty beside others
    parts = [logits(model, part, cache=cache) for part in ids[order[1:2], 15:].split([1, 4], 1)]
    assert_close(torch.cat(parts, 1), expected[1:2, 15:], rtol=0, atol=1e-9)


def test_an_expert_remembers_the_tokens_that_it_took_and_no_others():
    model, ids = built(CONFIGS["one"]), tokens(1, 20)
    cache = model.new_cache()
    for part in ids.split(1, 1):
        logits(model, part, cache=cache)
    with torch.no_grad():
        routing = model(ids, with_routing=True).routing[-1][0]
    taken = torch.bincount(routing.ids[routing.weights > 0], minlength=4).tolist()
    assert [expert.get_seq_length() for expert in cache.experts] == taken
    assert cache.trunk.get_seq_length() == 20 > max(taken)


def test_a_batch_where_no_expert_takes_a_token_goes_from_the_trunk_to_the_norm():
    model = built(CONFIGS["one"])
    model.thresholds.value.fill_(2)
    ids = tokens()
    x = model.embedding(ids)
    angles = rotary_angles(torch.arange(32).unsqueeze(0), model.config.expert.head_width, 10000.0)
    for block in model.trunk:
        x = block(x, angles, None, None, None, False).x_BSD
    assert_close(logits(model, ids), model.norm(x) @ model.embedding.weight.T)
    assert_close(logits(model, ids[:, :1], cache=model.new_cache()), logits(model, ids)[:, :1])


@every_config
def test_every_parameter_has_a_gradient_in_training_and_a_role(config):
    model = built(config).train()
    output = model(tokens(), targets=tokens(seed=2))
    (output.loss + output.aux_loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.to_dense().any(), name
    assert set(model.roles()) == {name for name, _ in model.named_parameters()}
    model.after_step(output.loads)


def test_by_thresholds_too_every_parameter_has_a_gradient_where_no_token_comes():
    """Processes that train together wait for every gradient."""
    model = built(CONFIGS["thresholds"]).train()
    model.thresholds.value.fill_(2)
    output = model(tokens(), targets=tokens(seed=2))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_config
def test_activation_checkpointing_changes_nothing(config):
    model = built(config).train()

    def gradients(checkpointing: bool) -> list[Tensor]:
        model.activation_checkpointing = checkpointing
        loss = model(tokens(), targets=tokens(seed=2)).loss
        return [gradient.to_dense() for gradient in torch.autograd.grad(loss, list(model.parameters()))]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert_close(plain, again, rtol=0, atol=1e-10)


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model = built(CONFIGS["one"])
    targets = tokens(seed=2)
    targets[0, 3:6] = -1
    output = model(tokens(), targets=targets)
    expected = F.cross_entropy(logits(model, tokens()).flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert output.logits is None
    assert int(output.targets) == 3 * 32 - 3
    assert_close(output.loss / output.targets, expected)


def test_every_expert_takes_its_share_of_every_sequence_in_training():
    model = built(CONFIGS["one"]).train()
    output = model(tokens(), with_routing=True)
    (routing,) = output.routing[-1]
    assert len(output.routing) == 2
    assert model.layer_name(1) == "router"
    for ids, weights in zip(routing.ids, routing.weights, strict=True):
        assert torch.bincount(ids[weights > 0], minlength=4).tolist() == [8] * 4


def test_thresholds_follow_the_score_of_the_last_token_taken():
    model = built(config_of(threshold_decay=0), steps=0)
    assert model.thresholds.value.tolist() == [0.25] * 4
    scores = []
    model.router_norm.register_forward_hook(lambda module, inputs, y: scores.append((y @ model.router.T).softmax(-1)))
    model.train().after_step(model(tokens()).loads)
    last = scores[0].sort(1, descending=True).values[:, 7]
    assert_close(model.thresholds.value, last.mean(0).detach())


@every_config
def test_cost_equals_the_built_model(config):
    cost = config.cost()
    assert cost.parameters == sum(parameter.numel() for parameter in config.build().parameters())
    assert cost.active_parameters <= cost.parameters
    assert cost.routing >= 2 * 16 * 4


def test_active_flops_are_those_of_the_trunk_one_expert_the_router_and_the_head():
    config = config_of({"layers": 3})
    trunk, expert = (config.expert.model_copy(update={"layers": layers}) for layers in (1, 3))
    router, head = 2 * 16 * 4, 2 * 16 * 50
    # An expert's token sees the eight that it took, not all 32.
    assert config.cost().flops == trunk.blocks_cost(32).flops + expert.blocks_cost(8).flops + router + head


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_costs_what_pytorch_counts(factor):
    config = config_of({"ffns": {"dense": DenseConfig(d_hidden=40)}}, capacity_factor=factor)
    model, ids = config.build().train(), tokens(2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    # Plain products spend as much on later positions, which a mask then hides.
    hidden = {length: 2 * 2 * 16 * (length - (length + 1) / 2) for length in (32, 8 * factor)}
    later = hidden[32] + 2 * factor * hidden[8 * factor]
    assert counter.get_total_flops() / ids.numel() == config.cost().flops + later


@every_config
def test_survives_a_round_trip(config):
    assert validate(ModelConfig, config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": {"kind": "expert_choice", "capacity_factor": 5}}, "capacity_factor = 5 exceeds experts = 4"),
        ({"routing": {"kind": "expert_choice", "capacity_factor": 0.1}}, "context = 32 is shorter than .* needs .40."),
        ({"routing": {"kind": "expert_choice", "capacity_factor": 1e-30}}, "context = 32 is shorter than"),
        ({"routing": {"kind": "expert_choice", "trunk_layers": 0}}, "trunk_layers"),
        ({"expert": {"kind": "transformer", "tables": {"a": {"rows": 64}}}}, "tables"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        validate(ModelConfig, CONFIGS["one"].model_dump(mode="json") | options)


def test_a_sequence_that_leaves_an_expert_without_a_token_is_refused_in_training_alone():
    model = built(config_of(capacity_factor=0.5))
    assert logits(model, tokens(length=3)).shape == (3, 3, 50)
    with pytest.raises(ConfigError, match=r"3 tokens is shorter than experts / capacity_factor = 4 / 0.5 .*\(8\)"):
        model.train()(tokens(length=3))


def test_more_than_the_context_is_refused():
    model = built(CONFIGS["one"])
    cache = model.new_cache()
    logits(model, tokens(1), cache=cache)
    with pytest.raises(ValueError, match="33 positions exceed"):
        logits(model, tokens(1, 1), cache=cache)


def test_a_cache_of_another_make_is_refused():
    with pytest.raises(ValueError, match="cache: expected one that this model's new_cache made, not a KVCache"):
        logits(built(CONFIGS["one"], steps=0), tokens(1, 1), cache=KVCache())


SEED = TransformerConfig(vocab_size=50, context=32, layers=3, d_model=16, heads=2)


def seed_of(config: TransformerConfig = SEED):
    """Its weights are float32, in which a mixture is made, so that none is rounded."""
    torch.manual_seed(5)
    model = config.build().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double()


@pytest.mark.parametrize("tied", [True, False])
def test_grown_from_a_seed_where_every_expert_takes_every_token_it_is_the_seed(tied):
    seed = seed_of(SEED.model_copy(update={"tie_embeddings": tied}))
    grown = from_seed(config_of({"tie_embeddings": tied}, capacity_factor=4), seed).double()
    grown.train()
    assert_close(logits(grown, tokens()), logits(seed, tokens()), rtol=0, atol=1e-9)
    assert grown.router.any()


def test_a_grown_model_shares_no_memory_with_its_seed_or_among_experts():
    seed = seed_of()
    grown = from_seed(config_of(), seed).double()
    parts = [grown.experts[0][1], grown.experts[3][1], seed.blocks[2]]
    assert all(torch.equal(part.ffn.up.weight, seed.blocks[2].ffn.up.weight) for part in parts[:2])
    assert len({part.ffn.up.weight.data_ptr() for part in parts}) == 3


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ({"layers": 4}, r"seed: has 4 blocks; routing.trunk_layers \+ expert.layers are 1 \+ 2"),
        ({"d_model": 24}, "seed: d_model: 24 instead of 16"),
        ({"vocab_size": 51}, "seed: vocab_size: 51 instead of 50"),
        ({"kv_heads": 1}, "seed: kv_heads: 1 instead of 2"),
        ({"tie_embeddings": False}, "seed: tie_embeddings: false instead of true"),
        ({"ffns": {"dense": DenseConfig(activation="relu")}}, 'seed: ffns.dense.activation: "relu" instead of "gelu"'),
    ],
    ids=str,
)
def test_a_seed_of_another_shape_is_refused_by_name(seed, message):
    with pytest.raises(ConfigError, match=message):
        from_seed(config_of(), TransformerConfig(**{**SEED.model_dump(), **seed}).build())


def test_settings_name_the_field_that_is_wrong():
    with pytest.raises(ValidationError, match="threshold_decay"):
        ExpertChoiceRouting(threshold_decay=1)
