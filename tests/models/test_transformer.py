import pytest
import torch
import torch.nn.functional as F

from myriad.config import ConfigError, validate
from myriad.evaluate import batch_leak, future_leak
from myriad.ffn import DenseConfig, PEERConfig, ProductKeyMemoryConfig, StackConfig, TableConfig
from myriad.models import KVCache, ModelConfig, TransformerConfig, build
from tiny import tiny_model

PEER = PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8)
MEMORY = ProductKeyMemoryConfig.memory_plus(memories=64, heads=2, memories_per_head=4, d_key=8, table="values")
CONFIGS = {
    "peer": tiny_model(vocab_size=50),
    "mixed": tiny_model(
        vocab_size=50, layers=3, ffns={"peer": PEER, "dense": DenseConfig()}, pattern=["dense", "peer"]
    ),
    "grouped": tiny_model(vocab_size=50, heads=4, kv_heads=2, qk_norm=True, tie_embeddings=False, head_dim=6),
    "stack": tiny_model(vocab_size=50, ffns={"two": StackConfig(layers=[PEER, PEER])}, pattern=["two"]),
    "shared": tiny_model(
        vocab_size=50, ffns={"memory": MEMORY}, pattern=["memory"], tables={"values": TableConfig(rows=64)}
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def built(config: ModelConfig, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    model = build(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@every_config
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_future_and_the_batch_do_not_reach_a_token(config, dtype, tolerance):
    model = built(config, dtype)
    ids = torch.randint(50, (3, 20))
    assert max(future_leak(model, ids, position) for position in (1, 10, 19)) < tolerance
    assert batch_leak(model, ids) < tolerance


@every_config
@pytest.mark.parametrize("steps", [[20], [7, 13], [1] * 20, [5, 1, 1, 13]])
def test_a_cache_changes_nothing(config, steps):
    model, ids, cache = built(config), torch.randint(50, (2, 20)), KVCache()
    parts = [logits(model, part, cache=cache) for part in ids.split(steps, dim=1)]
    assert (torch.cat(parts, 1) - logits(model, ids)).abs().max() < 1e-9
    assert cache.get_seq_length() == 20


def test_padding_on_the_left_changes_nothing():
    model = built(CONFIGS["peer"])
    ids = torch.randint(50, (1, 8))
    padded = torch.cat((torch.full((1, 4), 3), ids), dim=1)
    mask = torch.tensor([[False] * 4 + [True] * 8])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, padded, mask=mask, positions=positions)
    assert found.isfinite().all()
    assert (found[:, 4:] - logits(model, ids)).abs().max() < 1e-9


@every_config
def test_the_loss_is_the_cross_entropy_of_the_logits(config, monkeypatch):
    monkeypatch.setattr("myriad.models.loss.LOGITS_PER_CHUNK", 50 * 7)  # chunks of 7 tokens
    monkeypatch.setattr("myriad.models.loss.LEAST_TOKENS_PER_CHUNK", 1)
    model = built(config)
    ids = torch.randint(50, (2, 21))
    targets = ids[:, 1:].clone()
    targets[0, 3:6] = -1
    output = model(ids[:, :-1], targets=targets)
    expected = F.cross_entropy(
        model(ids[:, :-1]).logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )
    assert output.logits is None
    assert output.targets == 2 * 20 - 3
    assert torch.allclose(output.loss, expected, rtol=1e-12)
    names = [name for name, _ in model.named_parameters()]
    mine = torch.autograd.grad(output.loss / 7, list(model.parameters()))
    theirs = torch.autograd.grad(expected / 7, list(model.parameters()))
    for name, one, other in zip(names, mine, theirs, strict=True):
        assert torch.allclose(one.to_dense(), other.to_dense(), atol=1e-9), name


@every_config
def test_activation_checkpointing_changes_nothing(config):
    model = built(config).train()
    ids = torch.randint(50, (2, 20))

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model.activation_checkpointing = checkpointing
        loss = model(ids, targets=ids).loss
        return [gradient.to_dense() for gradient in torch.autograd.grad(loss, list(model.parameters()))]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(plain, again, atol=1e-10)


@every_config
def test_cost_equals_the_built_model(config):
    cost = config.cost()
    model = built(config)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.active_parameters <= cost.parameters
    assert set(model.roles()) == {name for name, _ in model.named_parameters()}


def test_cost_equals_pytorchs_counter_where_that_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = TransformerConfig(vocab_size=50, context=16, layers=2, d_model=32, heads=2)
    model, ids = built(config, torch.float32), torch.randint(50, (1, 16))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    scores = 2 * (2 * 2 * 32 * 17 // 2)  # two layers, two products of width 32, 8.5 positions on average
    assert config.cost().flops * 16 - scores * 16 == products


def test_every_config_survives_a_round_trip():
    for config in CONFIGS.values():
        assert validate(ModelConfig, config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "not a multiple"),
        ({"head_dim": 3}, "even width"),
        ({"kv_heads": 3, "heads": 4}, "does not divide"),
        ({"pattern": ["pear"]}, "did you mean 'peer'"),
        ({"ffns": {"a": {"kind": "dense"}, "b": {"kind": "dense"}}, "pattern": ["a"]}, "placed in no block"),
        ({"ffns": {"a": {"kind": "peer", "experts": 1000}}, "pattern": ["a"]}, r"31\*\*2 = 961 and 32\*\*2 = 1024"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    raw = {**CONFIGS["peer"].model_dump(mode="json"), **settings}
    with pytest.raises(ConfigError, match=message):
        validate(ModelConfig, raw)


def test_more_than_the_context_is_refused():
    model = built(CONFIGS["peer"])
    with pytest.raises(ValueError, match="33 positions exceed"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    cache = KVCache()
    logits(model, torch.zeros(1, 32, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="33 positions exceed"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


def test_a_model_without_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size"):
        build(tiny_model())


def test_a_compiled_block_gives_the_same_loss():
    model = built(CONFIGS["peer"], torch.float32).train()
    ids = torch.randint(50, (2, 32))
    plain = model(ids, targets=ids).loss
    for block in model.blocks:
        block.compile(backend="aot_eager")
    compiled = model(ids, targets=ids).loss
    compiled.backward()
    assert torch.allclose(plain, compiled, rtol=1e-5)
    assert model.blocks[0].ffn.experts_up.grad is not None
