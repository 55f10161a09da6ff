"""The plan of a comparison: budgets, tokens, trials, the sweep."""

import pytest

from myriad.analysis.compare.plan import FORWARDS, MULTIPLIERS, SWEEP_SHARE, Budget, Plan
from myriad.config import ConfigError, validate
from myriad.ffn import DenseConfig, PEERConfig, StackConfig
from myriad.models import TransformerConfig
from myriad.presets.twins import dense_twin
from myriad.train import RunConfig

PEER = PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8)


def run(ffn=PEER, **options) -> RunConfig:
    model = TransformerConfig(
        layers=2, d_model=32, heads=2, context=16, vocab_size=50, ffns={"ffn": ffn}, pattern=["ffn"]
    )
    settings = {"model": model, "data": {"source": "python"}, "budget": {"steps": 5}, "batch": {"tokens": 64}}
    return RunConfig(**settings, **options)


def plan(contenders=None, budgets=("64e3tokens",), seeds=2, **options) -> Plan:
    contenders = contenders or {"peer": run(), "dense": run(DenseConfig())}
    return Plan(contenders=contenders, budgets=[Budget.parse(text) for text in budgets], seeds=seeds, **options)


@pytest.mark.parametrize(
    ("text", "amount", "unit", "shown"),
    [
        ("1e15flops", 10**15, "flops", "1e15flops"),
        ("200e6tokens", 200_000_000, "tokens", "2e8tokens"),
        ("1.5e3 Tokens", 1500, "tokens", "1500tokens"),
        ("450_000tokens", 450_000, "tokens", "450000tokens"),
        ("1234567tokens", 1_234_567, "tokens", "1234567tokens"),
    ],
)
def test_a_budget_is_a_number_and_a_unit(text, amount, unit, shown):
    budget = Budget.parse(text)
    assert (budget.amount, budget.unit, str(budget)) == (amount, unit, shown)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text", ["", "flops", "1e15", "1e15flopz", "-1e15flops", "1..2flops", "1e30flops", "0.5tokens"]
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--budget: "):
        Budget.parse(text)


def test_flops_buy_tokens_at_three_forwards_each():
    assert Budget.parse("3e9flops").tokens(1000) == 10**6
    assert Budget.parse("3e9tokens").tokens(1000) == 3 * 10**9


def test_twins_get_equal_tokens_and_others_equal_flops():
    odd = PEER.model_copy(update={"d_key": 9})  # no whole hidden unit has its cost
    twins = {"peer": run(odd), "dense": run(dense_twin(odd, 32)), "wide": run(DenseConfig(d_hidden=500))}
    costs = {name: each.model.cost().flops for name, each in twins.items()}
    assert costs["peer"] != costs["dense"]
    budget = Budget.parse("1e9flops")
    tokens = plan(twins).training_tokens(budget)
    assert tokens["peer"] == tokens["dense"] == 10**9 // (FORWARDS * costs["dense"])
    assert tokens["wide"] == 10**9 // (FORWARDS * costs["wide"])
    assert set(plan(twins).training_tokens(Budget.parse("5000tokens")).values()) == {5000}


def test_the_reference_is_the_first_dense_contender_else_the_first():
    two = StackConfig(layers=[PEER, PEER])
    assert plan({"a": run(), "b": run(DenseConfig()), "c": run(DenseConfig(d_hidden=9))}).reference == "b"
    assert plan({"a": run(), "b": run(two)}).reference == "a"


def test_the_trials_are_all_of_them_with_seeds_that_count_up():
    trials = plan({"a": run(seed=5), "b": run(PEER, seed=5)}, ["640tokens", "1e3tokens"]).trials({"a": 2.0, "b": 1.0})
    assert [trial.name for trial in trials] == [
        f"{name}-{budget}-seed{seed}"
        for budget in ("640tokens", "1000tokens")
        for seed in (5, 6)
        for name in ("a", "b")
    ]
    assert [trial.tokens for trial in trials] == [640] * 4 + [1024] * 4  # whole steps
    assert trials[0].run.optim.lr == 2 * trials[1].run.optim.lr == 2 * run().optim.lr
    assert trials[2].run.seed == 6
    changed = {"budget", "optim", "seed"}
    assert trials[2].run.model_dump(exclude=changed) == run().model_dump(exclude=changed)


def test_a_sweep_is_shorter_and_of_the_same_shape():
    optim = {"lr": 1e-3, "table_lr": 4e-3, "warmup": 10}
    swept = plan({"a": run(optim=optim), "b": run(optim=optim)}, ["6400tokens", "3200tokens"], sweep_lr=True).sweep()
    assert [trial.multiplier for trial in swept] == [*MULTIPLIERS, *MULTIPLIERS]
    for trial in swept:
        assert trial.budget is None
        assert trial.tokens == SWEEP_SHARE * 6400
        assert trial.run.optim.lr == trial.multiplier * 1e-3
        assert trial.run.optim.table_lr == trial.multiplier * 4e-3
        assert trial.run.optim.warmup == 2
    assert plan().sweep() == []


def test_conditions_may_differ_where_that_is_allowed_and_rates_always():
    rates = {"a": run(optim={"lr": 1e-3}), "b": run(optim={"lr": 2e-3, "table_lr": 1e-3})}
    assert plan(rates).contenders == rates
    warm = {"a": run(optim={"warmup": 10}), "b": run(optim={"warmup": 20})}
    with pytest.raises(ConfigError, match=r"^optim\.warmup: 10 in a, 20 in b; --allow optim\.warmup"):
        plan(warm)
    assert plan(warm, allow=["optim.warmup"]).contenders == warm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "^seed: 0 in a, 1 in b"),
        ({"batch": {"tokens": 128}}, r"^batch\.tokens: 64 in a, 128 in b"),
        ({"train": {"precision": "float32"}}, r"^train\.precision: auto in a, float32 in b"),
        ({"data": {"source": "python", "tokenizer": "bpe:300"}}, r"^data\.tokenizer: bytes in a, bpe:300 in b"),
    ],
)
def test_unequal_conditions_are_refused(changes, message):
    raw = run().model_dump(mode="json") | changes
    with pytest.raises(ConfigError, match=message):
        plan({"a": run(), "b": validate(RunConfig, raw)})


def test_a_plan_is_extended_by_seeds_and_budgets_alone():
    mine = plan(budgets=["64e3tokens"])
    more = plan(budgets=["32e3tokens", "64e3tokens"], seeds=5)
    assert mine.extended(more) == more
    ones = {"peer": 1.0, "dense": 1.0}
    assert set(map(repr, mine.trials(ones))) < set(map(repr, more.trials(ones)))
    assert more.extended(mine) == more
    other = plan(budgets=["32e3tokens"], seeds=3)
    assert mine.extended(other) == plan(seeds=3)
    swept = plan(sweep_lr=True)
    assert swept.extended(more) == plan(seeds=5, sweep_lr=True)


def test_a_plan_survives_json():
    mine = plan(budgets=["1e9flops", "5e3tokens"], sweep_lr=True)
    raw = mine.model_dump(mode="json")
    assert raw["budgets"] == ["1e9flops", "5000tokens"]
    assert validate(Plan, raw) == mine
