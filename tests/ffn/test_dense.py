"""The dense layer against its formulas."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.testing import assert_close

from myriad.ffn import Cost, DenseConfig

D = 6


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_computes_its_formula(activation):
    layer = DenseConfig(activation=activation, d_hidden=7).build(D).double()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    up, down = layer.up.weight, layer.down.weight
    assert up.shape == (7, D)
    assert down.shape == (D, 7)
    if activation == "swiglu":
        gate = x @ layer.gate.weight.T
        hidden = gate * gate.sigmoid() * (x @ up.T)
    else:
        assert layer.gate is None
        hidden = {"gelu": F.gelu, "relu": F.relu}[activation](x @ up.T)
    assert_close(layer(x).y, hidden @ down.T)


def test_output_holds_no_loss_load_or_routing():
    output = DenseConfig().build(D)(torch.randn(4, D), with_routing=True)
    assert (float(output.aux_loss), output.load, output.routing) == (0.0, {}, ())


@pytest.mark.parametrize(
    ("activation", "d_hidden", "expected"),
    [("gelu", None, 4 * 96), ("relu", None, 4 * 96), ("swiglu", None, 256), ("swiglu", 10, 10)],
)
def test_hidden_width(activation, d_hidden, expected):
    config = DenseConfig(activation=activation, d_hidden=d_hidden)
    assert config.hidden(96) == config.build(96).up.out_features == expected


def test_swiglu_costs_what_gelu_costs():
    assert DenseConfig(activation="swiglu").cost(96) == DenseConfig().cost(96)


def test_cost_counts_two_operations_for_each_weight():
    assert DenseConfig(d_hidden=10).cost(D) == Cost(120, 120, 240, 480)
    assert DenseConfig(d_hidden=10, activation="swiglu").cost(D) == Cost(180, 180, 360, 720)


def test_dropout_drops_hidden_values_in_training_alone():
    layer = DenseConfig(d_hidden=1, dropout=0.5).build(D)
    x = torch.randn(200, D)
    plain = layer.eval()(x).y
    assert torch.equal(plain, layer(x).y)
    dropped = layer.train()(x).y
    kept = dropped.abs().sum(1) > 0
    assert 50 < int(kept.sum()) < 150
    assert_close(dropped[kept], 2 * plain[kept])


@pytest.mark.parametrize("options", [{"d_hidden": 0}, {"dropout": 1.0}, {"activation": "tanh"}, {"width": 3}])
def test_settings_that_cannot_be_are_refused(options):
    with pytest.raises(ValidationError):
        DenseConfig(**options)
