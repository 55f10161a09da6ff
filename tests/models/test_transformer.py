import pytest
import torch

from myriad.config import ConfigError, validate
from myriad.ffn import PEERConfig
from myriad.models import ModelConfig, TransformerConfig, build
from tiny import tiny_model

PEER = PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8)
CONFIG = tiny_model(vocab_size=50)


def built(config: ModelConfig, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    model = build(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def test_cost_equals_pytorchs_counter_where_that_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = TransformerConfig(vocab_size=50, context=16, layers=2, d_model=32, heads=2)
    model, ids = built(config, torch.float32), torch.randint(50, (1, 16))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    scores = 2 * (2 * 2 * 32 * 17 // 2)  # two layers, two products of width 32, 8.5 positions on average
    assert config.cost().flops * 16 - scores * 16 == products


@pytest.mark.parametrize("counted", [0, 5, 16])
def test_without_gradient_only_the_logits_of_counted_targets_are_computed(counted):
    from torch.utils.flop_counter import FlopCounterMode

    config = TransformerConfig(vocab_size=50, context=16, layers=1, d_model=32, heads=2)
    model, ids = built(config, torch.float32), torch.randint(50, (1, 16))
    targets = torch.where(torch.arange(16) < counted, ids, -1)

    def products(**options: torch.Tensor) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, **options)
        return counter.get_total_flops()

    assert products() - products(targets=targets) == 2 * (16 - counted) * 32 * 50


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
    raw = {**CONFIG.model_dump(mode="json"), **settings}
    with pytest.raises(ConfigError, match=message):
        validate(ModelConfig, raw)


def test_a_model_without_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size"):
        build(tiny_model())


def test_a_compiled_block_gives_the_same_loss():
    model = built(CONFIG, torch.float32).train()
    ids = torch.randint(50, (2, 32))
    plain = model(ids, targets=ids).loss
    for block in model.blocks:
        block.compile(backend="aot_eager")
    compiled = model(ids, targets=ids).loss
    compiled.backward()
    assert torch.allclose(plain, compiled, rtol=1e-5)
    assert model.blocks[0].ffn.experts_up.grad is not None
