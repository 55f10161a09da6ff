"""What every kind of model must do. A new kind is tested here unasked, on the examples that it names."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from myriad import checkpoint
from myriad.config import validate
from myriad.evaluate import batch_leak, future_leak
from myriad.models import LanguageModel, LMOutput, ModelConfig, build, kinds
from myriad.train.optim import build_optimizer

CASES = [
    pytest.param(config, id=f"{kind}-{index}")
    for kind in kinds()
    for index, config in enumerate(ModelConfig.kinds[kind].examples())
]
every_case = pytest.mark.parametrize("config", CASES)
IDS = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))


def built(config: ModelConfig, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """The model with every parameter moved off its symmetric start, in eval mode."""
    torch.manual_seed(0)
    model = build(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def logits(model: LanguageModel, ids: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def targets_with_gaps() -> Tensor:
    targets = IDS.roll(-1, 1).clone()
    targets[:, -1] = -1
    targets[0, 3:6] = -1
    return targets


def gradients(model: LanguageModel, loss_of: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss_of().backward()
    return [parameter.grad.to_dense().clone() for parameter in model.parameters()]


@every_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_future_and_the_batch_do_not_reach_a_token(config, dtype, tolerance):
    model = built(config, dtype)
    assert max(future_leak(model, IDS, position) for position in (1, 10, 19)) < tolerance
    assert batch_leak(model, IDS) < tolerance


@every_case
def test_the_check_catches_a_planted_leak(config):
    """Every logit learns a thousandth of its neighbour's, or of the next sequence's."""
    model = built(config)
    model.register_forward_hook(lambda *call: _blended(call[-1], 1))
    assert future_leak(model, IDS, 10) > 1e-5
    model = built(config)
    model.register_forward_hook(lambda *call: _blended(call[-1], 0))
    assert batch_leak(model, IDS) > 1e-5


def _blended(output: LMOutput, dim: int) -> LMOutput:
    assert output.logits is not None
    return output._replace(logits=output.logits + 1e-3 * output.logits.roll(-1, dim))


@every_case
@pytest.mark.parametrize("steps", [[1] * 20, [5, 1, 1, 13]])
def test_a_cache_changes_nothing(config, steps):
    model = built(config)
    cache = model.new_cache()
    assert cache.get_seq_length() == 0
    parts = [logits(model, part, cache=cache) for part in IDS.split(steps, dim=1)]
    assert (torch.cat(parts, 1) - logits(model, IDS)).abs().max() < 1e-9
    assert cache.get_seq_length() == 20


@every_case
@pytest.mark.parametrize(("length", "beams"), [(3, [2, 0, 0]), (12, [1, 1, 2, 0, 2])])
def test_a_cache_goes_on_from_other_sequences(config, length, beams):
    model, rows = built(config), torch.tensor(beams)
    cache = model.new_cache()
    logits(model, IDS[:, :length], cache=cache)
    cache.reorder_cache(rows)
    found = [logits(model, part, cache=cache) for part in IDS[rows, length:].split([1, 19 - length], dim=1)]
    cache.reorder_cache(torch.tensor([1]))
    last = logits(model, torch.full((1, 1), 7), cache=cache)
    whole = torch.cat((IDS[rows], torch.full((len(rows), 1), 7)), dim=1)
    expected = logits(model, whole)
    assert (torch.cat(found, 1) - expected[:, length:20]).abs().max() < 1e-9
    assert (last - expected[1:2, 20:]).abs().max() < 1e-9


@every_case
@pytest.mark.parametrize("split", [None, 6])
def test_padding_on_the_left_changes_nothing(config, split):
    """Alone and in a batch, in one pass and with a cache."""
    model, lengths = built(config), (20, 13, 5)
    mask = torch.stack([torch.arange(20) >= 20 - length for length in lengths])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = torch.where(mask, IDS, 3)
    if split is None:
        found = logits(model, padded, mask=mask, positions=positions)
    else:
        cache, parts = model.new_cache(), [slice(0, split), slice(split, 20)]
        options = [{"mask": mask[:, : part.stop], "positions": positions[:, part], "cache": cache} for part in parts]
        found = torch.cat([logits(model, padded[:, p], **each) for p, each in zip(parts, options, strict=True)], 1)
    assert found.isfinite().all()
    for row, length in enumerate(lengths):
        alone = logits(model, IDS[row : row + 1, -length:])
        assert (found[row : row + 1, -length:] - alone).abs().max() < 1e-9


@every_case
def test_the_loss_is_the_cross_entropy_of_the_logits(config, monkeypatch):
    monkeypatch.setattr("myriad.models.loss.LOGITS_PER_CHUNK", 50 * 7)  # chunks of 7 tokens
    monkeypatch.setattr("myriad.models.loss.LEAST_TOKENS_PER_CHUNK", 1)
    model, targets = built(config).train(), targets_with_gaps()

    def expected() -> Tensor:
        found = model(IDS).logits.flatten(0, 1)
        return F.cross_entropy(found, targets.flatten(), ignore_index=-1, reduction="sum")

    output = model(IDS, targets=targets)
    assert output.logits is None
    assert output.targets == 3 * 19 - 3
    assert torch.allclose(output.loss, expected(), rtol=1e-12)
    mine, theirs = gradients(model, lambda: model(IDS, targets=targets).loss), gradients(model, expected)
    for name, one, other in zip(dict(model.named_parameters()), mine, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-9), name
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(IDS, targets=targets).loss, expected(), rtol=1e-12)


@every_case
def test_every_parameter_gets_a_gradient(config):
    model = built(config).train()
    ids = torch.randint(50, (8, 32))
    output = model(ids, targets=ids.roll(-1, 1))
    (output.loss + output.aux_loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.to_dense().abs().sum() > 0, name


@every_case
def test_activation_checkpointing_changes_nothing(config):
    model = built(config).train()
    plain = gradients(model, lambda: model(IDS, targets=IDS).loss)
    saved = _saved_numbers(model)
    model.activation_checkpointing = True
    for one, other in zip(plain, gradients(model, lambda: model(IDS, targets=IDS).loss), strict=True):
        assert torch.allclose(one, other, atol=1e-10)
    assert _saved_numbers(model) < saved


def _saved_numbers(model: LanguageModel) -> int:
    """How many numbers a forward holds for the backward pass."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(IDS, targets=IDS)
    return sum(sizes)


@every_case
def test_a_step_takes_in_the_loads_and_a_forward_changes_nothing(config):
    model = built(config).train()
    before = copy.deepcopy(model.state_dict())
    loads = [model(ids, targets=ids).loads for ids in (IDS, IDS.flip(1))]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    first, second = loads
    assert [layer.keys() for layer in first] == [layer.keys() for layer in second]
    model.after_step([{k: v + s[k] for k, v in f.items()} for f, s in zip(first, second, strict=True)])
    names = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert bool(names) == any(first)
    assert names.isdisjoint(dict(model.named_parameters()))


@every_case
def test_the_optimizer_knows_every_parameter(config):
    model = built(config, torch.float32)
    assert set(model.roles()) == {name for name, _ in model.named_parameters()}
    groups = build_optimizer(model, lr=1e-3).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@every_case
def test_cost_equals_the_built_model(config):
    cost = config.cost()
    assert cost.parameters == sum(parameter.numel() for parameter in built(config).parameters())
    assert 0 < cost.active_parameters <= cost.parameters
    assert 0 <= cost.routing < cost.flops
    assert all(isinstance(value, int) for value in cost)


@every_case
def test_routing_is_named_and_weighs_experts(config):
    model = built(config)
    assert model(IDS).routing == ()
    with torch.no_grad():
        routing = model(IDS, with_routing=True).routing
    names = [model.layer_name(index) for index in range(len(routing))]
    assert len(set(names)) == len(names)
    for each in (each for layer in routing for each in layer):
        assert each.ids.shape == each.weights.shape
        assert each.ids.shape[:2] == IDS.shape
        assert int(each.ids.min()) >= 0
        assert int(each.ids.max()) < each.experts


@every_case
def test_config_round_trip(config):
    raw = config.model_dump(mode="json")
    again = validate(ModelConfig, raw)
    assert again == config
    assert torch.equal(logits(built(config), IDS), logits(built(again), IDS))


@every_case
def test_a_folder_holds_all_of_it(config, tmp_path):
    model = built(config, torch.float32).train()
    model.after_step(model(IDS, targets=IDS).loads)
    checkpoint.write_model(tmp_path, model, None, None)
    loaded, state = checkpoint.load(tmp_path), model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    # Where tensors lie in memory, a file's as it packs them, decides the last bit of a product.
    assert torch.allclose(logits(loaded, IDS), logits(model.eval(), IDS), atol=1e-5)


@every_case
def test_more_than_the_context_is_refused(config):
    model = built(config)
    with pytest.raises(ValueError, match="33 positions exceed"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    cache = model.new_cache()
    logits(model, torch.zeros(1, 32, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="33 positions exceed"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


@every_case
def test_bfloat16_products_give_a_loss_close_to_float32s(config):
    model = built(config, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow = model(IDS, targets=IDS).loss
    with torch.no_grad():
        wide = model(IDS, targets=IDS).loss
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow, wide, rtol=0.05)
