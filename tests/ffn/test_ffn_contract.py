"""What every family must do. A new family is tested here unasked, on the examples that it names."""

import copy

import pytest
import torch
from torch import nn

from myriad.config import validate
from myriad.ffn import FFN, FFNConfig, FFNOutput, kinds
from myriad.ffn.retrieval import BatchNorm

D = 16
CASES = [
    pytest.param(config, id=f"{kind}-{index}")
    for kind in kinds()
    for index, config in enumerate(FFNConfig.kinds[kind].examples())
]
every_case = pytest.mark.parametrize("config", CASES)


def built(config: FFNConfig, dtype: torch.dtype = torch.float64) -> FFN:
    """The layer with every parameter moved off its symmetric start."""
    torch.manual_seed(0)
    layer = config.build(D).to(dtype)
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layer


def outputs(layer: nn.Module, x: torch.Tensor, **options) -> FFNOutput:
    with torch.no_grad():
        return layer(x, **options)


@every_case
def test_shapes_and_dtypes(config: FFNConfig):
    # Where experts choose, too few tokens are refused in training.
    layer = built(config, torch.float32).train(config.causal)
    for shape in [(D,), (3, D), (2, 5, D), (2, 0, D)]:
        output = layer(torch.randn(shape))
        assert output.y.shape == shape
        assert output.aux_loss.shape == ()
        assert output.routing == ()
    # Tables stay float32 under bfloat16 activations.
    assert layer(torch.randn(3, D, dtype=torch.bfloat16).float()).y.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, D)).y.isfinite().all()


@every_case
def test_every_parameter_has_a_role_and_gets_a_gradient(config: FFNConfig):
    layer = built(config)
    assert set(layer.roles()) == {name for name, _ in layer.named_parameters()}
    assert set(layer.roles().values()) <= {"matrix", "vector", "table"}
    output = layer(torch.randn(64, D, dtype=torch.float64))
    (output.y.square().sum() + output.aux_loss).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.to_dense().abs().sum() > 0, name


@every_case
def test_gradients_are_right(config: FFNConfig):
    layer = built(config).eval()
    names = [name for name, _ in layer.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    # Enough tokens that the tables' gradients are dense: gradcheck refuses sparse ones.
    x = torch.randn(12, D, dtype=torch.float64, requires_grad=True)

    def apply(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)).y

    assert torch.autograd.gradcheck(apply, (x, *values), fast_mode=True)


@every_case
def test_a_token_depends_on_no_other_in_evaluation(config: FFNConfig):
    layer = built(config).eval()
    x = torch.randn(2, 6, D, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:] += 1
    changed[1] += 1
    before, after = outputs(layer, x).y, outputs(layer, changed).y
    assert (before[0, :4] - after[0, :4]).abs().max() < 1e-9
    # One token at a time, as a cache feeds them.
    alone = torch.stack([outputs(layer, x[0, t : t + 1]).y[0] for t in range(6)])
    assert (before[0] - alone).abs().max() < 1e-9


def test_the_check_catches_a_planted_leak():
    class Leaky(nn.Module):
        def forward(self, x):
            return FFNOutput(x + x.mean(dim=-2, keepdim=True), x.new_zeros(()), {}, ())

    x = torch.randn(6, D)
    changed = x.clone()
    changed[5] += 1
    assert (Leaky()(x).y[:5] - Leaky()(changed).y[:5]).abs().max() > 1e-3


@every_case
def test_padding_does_not_reach_other_tokens_in_training(config: FFNConfig):
    layer = built(config)
    for module in layer.modules():
        if hasattr(module, "config") and getattr(module.config, "dropout", 0):
            pytest.skip("dropout draws anew each time")
    x = torch.randn(2, 4, D, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    changed = torch.where(mask.unsqueeze(-1), x, 7.0)
    before, after = outputs(layer, x, mask=mask).y, outputs(layer, changed, mask=mask).y
    assert (before - after)[mask].abs().max() < 1e-9


@every_case
def test_forward_changes_nothing(config: FFNConfig):
    layer = built(config)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(8, D, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@every_case
def test_load_is_additive_over_micro_batches(config: FFNConfig):
    layer = built(config)
    x = torch.randn(12, D, dtype=torch.float64)
    whole = outputs(layer, x).load
    parts = [outputs(layer, part).load for part in x.split(4)]
    assert whole.keys() == parts[0].keys()
    if any(isinstance(m, nn.Module) and type(m).__name__ == "Stack" for m in layer.modules()):
        pytest.skip("an inner layer sees what the micro-batch's statistics made of the outer one")
    if not config.causal:
        pytest.skip("each micro-batch chooses among its own tokens")
    for name, value in whole.items():
        assert torch.allclose(value, sum(part[name] for part in parts))
        assert not value.requires_grad
    layer.after_step(whole)


@every_case
def test_cost_equals_the_built_model(config: FFNConfig):
    cost = config.cost(D)
    layer = built(config)
    assert cost.parameters == sum(parameter.numel() for parameter in layer.parameters())
    assert 0 < cost.active_parameters <= cost.parameters
    widths = {parameter.element_size() for parameter in config.build(D).parameters()}
    assert min(widths) * cost.active_parameters <= cost.bytes <= max(widths) * cost.active_parameters


@every_case
def test_a_layer_that_chooses_experts_counts_what_choosing_costs(config: FFNConfig):
    cost = config.cost(D)
    chooses = bool(built(config)(torch.randn(3, D, dtype=torch.float64), with_routing=True).routing)
    assert (cost.routing > 0) == chooses
    assert 0 <= cost.routing < cost.flops


@every_case
def test_config_round_trip(config: FFNConfig):
    raw = config.model_dump(mode="json")
    assert validate(FFNConfig, raw) == config
    layer, again = built(config), built(validate(FFNConfig, raw))
    x = torch.randn(3, D, dtype=torch.float64)
    assert torch.equal(outputs(layer.eval(), x).y, outputs(again.eval(), x).y)


@every_case
def test_every_expert_is_reachable(config: FFNConfig):
    """Over many random tokens every expert is used, by some router state."""
    layer = built(config, torch.float32).eval()
    routings = outputs(layer, torch.randn(4000, D), with_routing=True).routing
    for routing in routings:
        assert routing.ids.shape == routing.weights.shape
        assert routing.ids.shape[0] == 4000
        assert len(routing.ids.unique()) > 0.9 * routing.experts
        assert int(routing.ids.min()) >= 0
        assert int(routing.ids.max()) < routing.experts


@every_case
def test_a_sampled_step_and_state_round_trip(config: FFNConfig):
    layer = built(config)
    layer.after_step(outputs(layer, torch.randn(16, D, dtype=torch.float64)).load)
    fresh = config.build(D).double()
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(4, D, dtype=torch.float64)
    assert torch.equal(outputs(layer.eval(), x).y, outputs(fresh.eval(), x).y)


@every_case
def test_compiles_to_the_same_numbers(config: FFNConfig):
    """Each family down to PyTorch's own operations, its other examples as far as one graph of the layer's."""
    layer = built(config, torch.float32).eval()
    x = torch.randn(64, D)
    first = config == type(config).examples()[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if first else "eager")
    assert torch.allclose(compiled(x).y, layer(x).y, atol=1e-5)


def test_batch_norm_equals_pytorchs():
    torch.manual_seed(0)
    mine, theirs = BatchNorm(6).double(), nn.BatchNorm1d(6).double()
    theirs.weight.data.normal_()
    mine.weight.data.copy_(theirs.weight)
    for _ in range(3):
        x = torch.randn(10, 6, dtype=torch.float64) * 2 + 1
        y, load = mine(x, None)
        assert torch.allclose(y, theirs(x))
        mine.update(load)
    mine.eval(), theirs.eval()
    assert torch.allclose(mine.running_var, theirs.running_var)
    assert torch.allclose(mine(x, None)[0], theirs(x))


def test_batch_norm_keeps_its_digits_far_from_zero():
    torch.manual_seed(0)
    norm = BatchNorm(4)
    x = torch.randn(512, 4) + 1000
    for _ in range(100):  # the running mean finds the features
        _, load = norm(x, None)
        norm.update(load)
    expected = nn.functional.batch_norm(x.double(), None, None, training=True)
    assert (norm(x, None)[0] - expected).abs().max() < 1e-2
