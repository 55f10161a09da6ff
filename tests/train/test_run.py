import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myriad import presets
from myriad.config import ConfigError, validate
from myriad.train import RunConfig, with_overrides
from tiny import tiny_model

RAW = {
    "model": tiny_model().model_dump(mode="json"),
    "data": {"source": "python", "tokenizer": "bpe:512"},
    "budget": {"steps": 10},
    "batch": {"tokens": 256},
}


def test_a_run_survives_a_round_trip():
    run = validate(RunConfig, RAW)
    assert validate(RunConfig, run.model_dump(mode="json")) == run
    assert run.digest() == validate(RunConfig, {**RAW, "out": "elsewhere"}).digest()
    assert run.digest() != validate(RunConfig, {**RAW, "seed": 1}).digest()


def test_the_vocabulary_follows_the_tokenizer_unless_set():
    assert validate(RunConfig, RAW).model.vocab_size == 512
    set_by_hand = {**RAW, "model": {**RAW["model"], "vocab_size": 600}}
    assert validate(RunConfig, set_by_hand).model.vocab_size == 600
    assert with_overrides(validate(RunConfig, RAW).model_dump(mode="json"), ["data.path=x"]).model.vocab_size is None
    assert with_overrides(set_by_hand, ["data.path=x"]).model.vocab_size == 600
    retold = with_overrides(validate(RunConfig, RAW).model_dump(mode="json"), ["data.tokenizer=bytes"])
    assert retold.model.vocab_size == 257


def test_an_override_of_one_budget_replaces_the_other():
    run = with_overrides(RAW, ["budget.tokens=1e6"])
    assert (run.budget.steps, run.budget.tokens) == (None, 1_000_000)
    assert with_overrides(RAW, ["budget.epochs=2"]).budget.in_steps(256, windows=100, windows_per_step=8) == 25
    with pytest.raises(ConfigError, match="only one of them"):
        with_overrides(RAW, ["budget.tokens=1e6", "budget.steps=5"])
    with pytest.raises(ConfigError, match="exactly one of steps, tokens and epochs, found steps and epochs"):
        validate(RunConfig, {**RAW, "budget": {"steps": 1, "epochs": 1}})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("batch.tokens=100", "not a multiple of model.context = 32"),
        ("batch.micro_tokens=96", "not a multiple of micro_tokens"),
        ("optim.lr=-1", "optim.lr: expected greater than 0"),
        ("optim.schedule=cosin", "did you mean 'cosine'"),
        ("model.ffns.peer.kind=per", "unknown kind 'per'; did you mean 'peer'"),
        ("train.precision=off", "YAML reads on, off"),
        ("data.path=x", None),
        ("modle.layers=2", "unknown key; did you mean 'model'"),
        ("early_stopping.patience=0", "early_stopping.patience"),
    ],
)
def test_bad_settings_name_their_place(word, message):
    if message is None:
        assert with_overrides(RAW, [word]).data.source is None
        return
    with pytest.raises(ConfigError, match=message):
        with_overrides(RAW, [word])


@pytest.mark.parametrize("name", presets.names())
def test_presets_are_whole(name):
    run = presets.get(name)
    assert validate(RunConfig, run.model_dump(mode="json")) == run
    assert run.model.cost().parameters > 0
    assert presets.describe(name)


def test_the_demo_contenders_cost_the_same():
    peer, dense = (presets.get(name).model.cost().flops for name in ("demo-peer", "demo-dense"))
    assert abs(peer / dense - 1) < 0.01


values = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=4), st.just([]), st.just({})
)
paths = st.sampled_from(
    ["model", "model.layers", "model.ffns", "model.ffns.peer", "model.ffns.peer.kind", "model.ffns.peer.experts",
     "model.pattern", "data", "data.path", "optim.betas", "optim.lr", "budget", "budget.tokens", "batch.tokens", "seed",
     "out", "model.vocab_size", "data.tokenizer"]
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=200)
@given(st.dictionaries(paths, values, max_size=4))
def test_any_change_gives_a_run_or_a_config_error(changes):
    raw = validate(RunConfig, RAW).model_dump(mode="json")
    for path, value in changes.items():
        place = raw
        *parents, last = path.split(".")
        for key in parents:
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[last] = value
    try:
        run = with_overrides(raw, [])
    except ConfigError as error:
        message = str(error)
        assert message
        assert "Traceback" not in message
    else:
        assert isinstance(run, RunConfig)
