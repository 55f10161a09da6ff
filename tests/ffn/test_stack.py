"""A stack against the residual stream written out."""

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from myriad.config import ConfigError, validate
from myriad.ffn import FFN, DenseConfig, FFNConfig, FFNOutput, PEERConfig, Routing, StackConfig

D = 6


class ToyConfig(FFNConfig):
    """A layer that gives back its number in every field."""

    kind: Literal["toy"] = "toy"
    number: int = 0

    def build(self, d_model: int) -> "Toy":
        return Toy(self.number)


class Toy(FFN):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.seen = number, None

    def forward(self, x: Tensor, *, mask=None, with_routing=False) -> FFNOutput:
        number = torch.tensor(float(self.number))
        self.mask = mask
        routing = (Routing(number, number, self.number),) if with_routing else ()
        return FFNOutput(x, number, {"number": number, "a.b": -number}, routing)

    def after_step(self, load) -> None:
        self.seen = load

    def roles(self):
        return {}


def peer() -> PEERConfig:
    return PEERConfig(experts=16, heads=2, experts_per_head=2, d_key=3)


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * gain


def test_each_layer_reads_the_normalised_stream_of_the_last():
    torch.manual_seed(0)
    layer = StackConfig(layers=[DenseConfig(), peer(), DenseConfig(activation="relu")]).build(D).double()
    for norm in layer.norms:
        norm.weight.data.normal_()
    x = torch.randn(7, D, dtype=torch.float64)
    first, second, third = layer.layers
    stream = x + first(x).y
    stream = stream + second(rms(stream, layer.norms[0].weight)).y
    stream = stream + third(rms(stream, layer.norms[1].weight)).y
    assert_close(layer(x).y, stream - x)


def test_a_stack_of_one_is_that_layer():
    layer = StackConfig(layers=[DenseConfig()]).build(D)
    x = torch.randn(3, D)
    assert torch.equal(layer(x).y, layer.layers[0](x).y)
    assert len(layer.norms) == 0


def test_losses_add_up_and_routings_stand_in_order():
    layer = StackConfig(layers=[ToyConfig(number=n) for n in (1, 2, 4)]).build(D)
    output = layer(torch.randn(3, D), with_routing=True)
    assert float(output.aux_loss) == 7
    assert [routing.experts for routing in output.routing] == [1, 2, 4]
    assert layer(torch.randn(3, D)).routing == ()


def test_every_layer_sees_the_mask():
    layer = StackConfig(layers=[ToyConfig(), ToyConfig()]).build(D)
    mask = torch.tensor([True, False])
    layer(torch.randn(2, D), mask=mask)
    assert all(toy.mask is mask for toy in layer.layers)


def test_every_layer_gets_its_own_load_back():
    """Twelve layers, because '1.' must not be taken for '11.', and one of them is a stack."""
    inner = StackConfig(layers=[ToyConfig(number=20), ToyConfig(number=21)])
    layer = StackConfig(layers=[*(ToyConfig(number=n) for n in range(12)), inner]).build(D)
    layer.after_step(layer(torch.randn(3, D)).load)
    toys = [*layer.layers[:12], *layer.layers[12].layers]
    for toy in toys:
        assert toy.seen == {"number": toy.number, "a.b": -toy.number}


def test_roles_follow_the_layers():
    roles = StackConfig(layers=[peer(), DenseConfig()]).build(D).roles()
    assert roles["layers.0.experts_down"] == "table"
    assert roles["layers.1.up.weight"] == "matrix"
    assert roles["norms.0.weight"] == "vector"


def test_cost_is_the_sum_and_a_gain_between_two():
    one, other = DenseConfig(), peer()
    cost = StackConfig(layers=[one, other, one]).cost(D)
    parts = [one.cost(D), other.cost(D), one.cost(D)]
    assert cost.parameters == sum(part.parameters for part in parts) + 2 * D
    assert cost.flops == sum(part.flops for part in parts)


def test_layers_with_dropout_follow_the_stacks_mode():
    layer = StackConfig(layers=[DenseConfig(dropout=0.5)]).build(D)
    x = torch.randn(50, D)
    assert not torch.equal(layer(x).y, layer(x).y)
    layer.eval()
    assert torch.equal(layer(x).y, layer(x).y)
    assert torch.equal(layer(x).y, F.linear(F.gelu(layer.layers[0].up(x)), layer.layers[0].down.weight))


def test_an_empty_stack_is_refused():
    with pytest.raises(ConfigError, match="layers"):
        validate(FFNConfig, {"kind": "stack", "layers": []})


def test_a_fault_inside_names_its_place():
    raw = {"kind": "stack", "layers": [{"kind": "dense"}, {"kind": "peer", "head": 2}]}
    with pytest.raises(ConfigError, match=r"^layers\.1\.head: unknown key; did you mean 'heads'\?"):
        validate(StackConfig, raw)
