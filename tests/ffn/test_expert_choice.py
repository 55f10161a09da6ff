"""Expert choice against its formulas, in training and by thresholds."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from myriad.config import ConfigError
from myriad.ffn import Cost, DenseConfig, ExpertChoiceConfig
from myriad.ffn.base import ffn_configs
from myriad.ffn.expert_choice import ExpertChoice
from myriad.models import TransformerConfig

D = 8


def built(dtype: torch.dtype = torch.float64, **options) -> ExpertChoice:
    torch.manual_seed(0)
    return ExpertChoiceConfig(**{"experts": 4, "d_expert": 5, **options}).build(D).to(dtype)


def tokens(count: int = 20, seed: int = 1) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_scores(layer: ExpertChoice, x_TD: Tensor) -> Tensor:
    return (x_TD @ layer.router.T).softmax(1)


def literal_sum(layer: ExpertChoice, x_TD: Tensor, chosen: list[list[int]]) -> Tensor:
    """Each token's experts, one by one."""
    scores_TE, experts = literal_scores(layer, x_TD), layer.experts
    outputs = []
    for x, scores, mine in zip(x_TD, scores_TE, chosen, strict=True):
        y = torch.zeros_like(x)
        for e in mine:
            hidden = experts.up[e] @ x
            if layer.config.activation == "swiglu":
                hidden = F.silu(experts.gate[e] @ x) * hidden
            else:
                hidden = {"gelu": F.gelu, "relu": F.relu}[layer.config.activation](hidden)
            y = y + scores[e] * (experts.down[e] @ hidden)
        outputs.append(y)
    return torch.stack(outputs)


def literal_choice(layer: ExpertChoice, x_TD: Tensor) -> list[list[int]]:
    """The experts of each token."""
    config, scores_TE = layer.config, literal_scores(layer, x_TD)
    chosen: list[list[int]] = [[] for _ in x_TD]
    if layer.training and not layer.causal_in_training():
        capacity = round(len(x_TD) * config.capacity_factor / config.experts)
        for e in range(config.experts):
            for t in scores_TE[:, e].argsort(descending=True)[:capacity].tolist():
                chosen[t].append(e)
    else:
        for t, scores in enumerate(scores_TE):
            chosen[t] = [e for e in range(config.experts) if scores[e] >= layer.thresholds.value[e]]
    most = config.max_experts_per_token or config.experts
    return [sorted(mine, key=lambda e: -scores_TE[t, e])[:most] for t, mine in enumerate(chosen)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capacity_factor": 1, "activation": "swiglu"},
        {"capacity_factor": 4, "activation": "relu"},
        {"max_experts_per_token": 1},
        {"max_experts_per_token": 2, "experts": 5},
        {"threshold_after": 1},
        {"threshold_after": 1, "max_experts_per_token": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_equals_its_formula_in_outputs_and_gradients(options, training):
    layer = built(**options)
    layer.after_step(layer(tokens(40, seed=3)).load)
    layer.train(training)
    x = tokens().requires_grad_()
    inputs = [x, *layer.parameters()]
    output = layer(x, with_routing=True)
    chosen = literal_choice(layer, x)
    expected = literal_sum(layer, x, chosen)
    assert_close(output.y, expected)
    upstream = tokens(seed=2)
    found = torch.autograd.grad(output.y, inputs, upstream)
    assert_close(found, torch.autograd.grad(expected, inputs, upstream))
    (routing,) = output.routing
    assert routing.ids.shape == (20, max(map(len, chosen)))
    for ids, weights, mine in zip(routing.ids, routing.weights, chosen, strict=True):
        assert ids[weights > 0].tolist() == mine
    assert float(output.aux_loss) == 0


def test_every_expert_takes_its_share_in_training():
    routing = built()(tokens(24), with_routing=True).routing[0]
    assert torch.bincount(routing.ids[routing.weights > 0], minlength=4).tolist() == [12] * 4


def test_the_load_is_the_score_of_the_last_token_taken():
    layer = built()
    x = tokens()
    load = layer(x).load
    expected = literal_scores(layer, x).sort(0, descending=True).values[9]
    assert_close(load["cutoffs"] / load["tokens"], expected.detach())
    assert int(load["tokens"]) == 20


def test_micro_batches_add_up_to_the_mean_of_their_cutoffs():
    layer = built(threshold_decay=0)
    loads = [layer(part).load for part in tokens(40).split(20)]
    layer.after_step({name: sum(load[name] for load in loads) for name in loads[0]})
    assert_close(layer.thresholds.value, (loads[0]["cutoffs"] + loads[1]["cutoffs"]) / 40)


def test_evaluation_has_no_load_and_moves_nothing():
    layer = built().eval()
    output = layer(tokens())
    assert output.load == {}
    layer.after_step(output.load)
    assert int(layer.thresholds.steps) == 0


def test_before_the_first_step_the_thresholds_are_those_of_a_router_without_a_preference():
    layer = built().eval()
    assert layer.thresholds.value.tolist() == [0.25] * 4
    routing = layer(tokens(400), with_routing=True).routing[0]
    mean = float((routing.weights > 0).sum()) / 400
    assert 1 < mean < 3
    assert (routing.weights > 0).any(1).all()  # the best of four shares is at least a quarter


def test_by_thresholds_tokens_have_about_as_many_experts_as_in_training():
    layer = built()
    for seed in range(20):
        layer.after_step(layer(tokens(400, seed)).load)
    routing = layer.eval()(tokens(4000, seed=50), with_routing=True).routing[0]
    shares = torch.bincount(routing.ids[routing.weights > 0], minlength=4) / 4000
    assert_close(shares, torch.full((4,), 0.5), rtol=0, atol=0.05)


def test_training_sees_the_future_until_it_goes_by_thresholds():
    layer = built(threshold_after=2)
    x = tokens()
    changed = torch.cat((x[:10], x[10:] + 3))
    for step in range(3):
        layer.train()
        assert layer.causal_in_training() == (step == 2)
        with torch.no_grad():
            moved = (layer(x).y[:10] - layer(changed).y[:10]).abs().max()
        assert (moved > 1e-3) == (step < 2)
        layer.after_step(layer(x).load)
    layer.eval()
    with torch.no_grad():
        assert (layer(x).y[:10] - layer(changed).y[:10]).abs().max() < 1e-12


def test_thresholds_go_on_moving_when_training_goes_by_them():
    layer = built(threshold_after=1, threshold_decay=0)
    layer.after_step(layer(tokens()).load)
    other = tokens(40, seed=7)
    layer.after_step(layer(other).load)
    expected = literal_scores(layer, other).sort(0, descending=True).values[19]
    assert_close(layer.thresholds.value, expected.detach())


@pytest.mark.parametrize("options", [{}, {"max_experts_per_token": 1}, {"threshold_after": 1}], ids=str)
def test_padding_is_never_chosen_and_counts_for_nothing(options):
    layer = built(**options)
    layer.after_step(layer(tokens(40, seed=3)).load)
    x = tokens()
    mask = torch.ones(20, dtype=torch.bool)
    mask[::4] = False
    for training in (True, False):
        layer.train(training)
        padded, alone = layer(x, mask=mask, with_routing=True), layer(x[mask], with_routing=True)
        assert_close(padded.y[mask], alone.y)
        assert not padded.y[~mask].any()
        assert padded.load.keys() == alone.load.keys()
        for name, value in padded.load.items():
            assert_close(value, alone.load[name])
        assert not padded.routing[0].weights[~mask].any()


def test_nothing_but_padding_changes_nothing():
    layer = built()
    output = layer(tokens(4), mask=torch.zeros(4, dtype=torch.bool))
    assert not output.y.any()
    layer.after_step(output.load)
    assert int(layer.thresholds.steps) == 0


def test_too_few_tokens_are_refused_in_training_alone():
    layer = built(experts=8, capacity_factor=1.5)
    with pytest.raises(ConfigError, match=r"5 tokens computed at once.*experts / capacity_factor = 8 / 1.5"):
        layer(tokens(5))
    assert layer(tokens(6)).y.shape == (6, D)
    assert layer.eval()(tokens(1)).y.shape == (1, D)


@pytest.mark.parametrize(("experts", "factor"), [(49, 1), (11, 1.1), (10, 10), (3, 0.3)])
def test_the_least_tokens_are_enough(experts, factor):
    config = ExpertChoiceConfig(experts=experts, capacity_factor=factor, d_expert=1)
    routing = config.build(D)(torch.randn(config.least_tokens(), D), with_routing=True).routing[0]
    assert (torch.bincount(routing.ids[routing.weights > 0], minlength=experts) == 1).all()


def test_the_layers_inside_a_model_are_found():
    choice = ExpertChoiceConfig(experts=4)
    model = TransformerConfig(ffns={"a": DenseConfig(), "b": choice}, pattern=["a", "b"])
    assert [config.kind for config in ffn_configs(model)] == ["dense", "expert_choice"]
    assert [config.least_tokens() for config in ffn_configs(model)] == [1, 2]
    assert [config.causal for config in ffn_configs(model)] == [True, False]


def test_costs():
    config = ExpertChoiceConfig(experts=8, capacity_factor=1.5, d_expert=16)
    expert, router = 2 * D * 16, 8 * D
    active = router + 3 * expert // 2
    assert config.cost(D) == Cost(router + 8 * expert, active, 2 * active, 4 * active, routing=2 * router)
    assert config.model_copy(update={"max_experts_per_token": 1}).cost(D).active_parameters == router + expert
    flops = ExpertChoiceConfig(activation="swiglu").cost(96).flops
    assert flops == DenseConfig(activation="swiglu").cost(96).flops + Cost.of_matrix(96, 8).flops


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"capacity_factor": 0}, "capacity_factor"),
        ({"experts": 4, "capacity_factor": 5}, "capacity_factor = 5 exceeds experts = 4"),
        ({"experts": 4, "max_experts_per_token": 5}, "max_experts_per_token = 5 exceeds experts = 4"),
        ({"max_experts_per_token": 0}, "max_experts_per_token"),
        ({"threshold_decay": 1}, "threshold_decay"),
        ({"threshold_decay": -0.1}, "threshold_decay"),
        ({"threshold_after": 0}, "threshold_after"),
        ({"experts": 0}, "experts"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(options, field):
    with pytest.raises(ValidationError, match=field):
        ExpertChoiceConfig(**options)
