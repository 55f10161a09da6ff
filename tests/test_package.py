"""The names that scripts outside the repository rely on."""

import subprocess
import sys

import pytest
import torch

import myriad


def test_importing_the_package_loads_nothing_heavy():
    program = "import sys, myriad, myriad.cli; print({'torch', 'transformers', 'pydantic'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize("name", [*myriad._HOMES, *myriad._ROOMS])
def test_every_public_name_is_there(name):
    assert getattr(myriad, name) is not None
    assert name in dir(myriad)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PERConfig'"):
        myriad.PERConfig  # noqa: B018


def test_the_first_example():
    from myriad.ffn import PEERConfig

    layer = PEERConfig(experts=64**2, heads=2, experts_per_head=4, d_key=8).build(d_model=32)
    x = torch.randn(3, 5, 32)
    assert (x + layer(x).y).shape == (3, 5, 32)


def test_the_parameters_of_peer_have_their_names_and_shapes():
    from myriad.ffn import PEERConfig

    shape = {"experts": 16**2, "heads": 3, "experts_per_head": 2, "d_key": 4}
    shared = PEERConfig(**shape, shared_keys=True, query_norm="batch", router="softmax", activation="gelu").build(24)
    assert shared.experts_down.shape == shared.experts_up.shape == (256, 24)
    assert shared.keys.shape == (2, 16, 4)
    assert PEERConfig(**shape, shared_keys=False).build(d_model=24).keys.shape == (3, 2, 16, 4)


def test_the_defaults_of_peer_are_the_papers():
    from myriad.ffn import PEERConfig

    peer = PEERConfig()
    assert (peer.experts, peer.heads, peer.experts_per_head, peer.d_key) == (1024**2, 8, 16, 128)
    assert (peer.shared_keys, peer.query_norm, peer.router, peer.activation) == (True, "batch", "softmax", "gelu")


def test_build_optimizer_is_a_torch_optimizer_for_a_layer_and_a_model():
    from myriad import presets
    from myriad.ffn import PEERConfig
    from myriad.train.optim import build_optimizer

    layer = PEERConfig(experts=64, heads=1, experts_per_head=2, d_key=4).build(d_model=8)
    model = myriad.build(
        presets.get("demo-peer").model.model_copy(update={"layers": 1, "ffns": {"p": layer.config}, "pattern": ["p"]})
    )
    for module in (layer, model):
        optimizer = build_optimizer(module, lr=1e-3, table_lr=1e-2)
        assert isinstance(optimizer, torch.optim.Optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in module.parameters()}


def test_presets_give_runs_whose_models_build():
    assert myriad.presets.names()
    for name in myriad.presets.names():
        run = myriad.presets.get(name)
        assert isinstance(run, myriad.RunConfig)
        assert run.model.context >= 256
        with torch.device("meta"):  # sizes without memory
            model = myriad.build(run.model)
        assert isinstance(model, myriad.LanguageModel)
        assert sum(parameter.numel() for parameter in model.parameters()) == run.model.cost().parameters


def test_the_kinds_of_layers():
    assert {"dense", "peer", "stack"} <= set(myriad.ffn.kinds())
