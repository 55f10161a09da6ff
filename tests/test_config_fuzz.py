"""Whatever stands in a config: a RunConfig, or a ConfigError of a few short lines; never a traceback, never a wait.

1,000 examples in all. What is valid is counted by `cost()`, and its YAML is a valid input again.
"""

import math
import time
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myriad import presets
from myriad.cli.train import resolve_run
from myriad.config import ConfigError, json_schema, load_yaml, validate
from myriad.train import RunConfig, with_overrides

LONGEST_MESSAGE = 4000
SLOWEST = 10.0
"""Seconds, of an example on a busy machine; what hangs or allocates takes far longer."""

fuzzed = settings(suppress_health_check=list(HealthCheck), deadline=None, derandomize=True)
ROOTS = [presets.get(name).model_dump(mode="json") for name in presets.names()]


def paths_of(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every place in nested settings."""
    if not isinstance(tree, dict):
        return [path]
    return [path] * bool(path) + [place for key, value in tree.items() for place in paths_of(value, (*path, key))]


PATHS = sorted({path for root in ROOTS for path in paths_of(root)})
WORDS = sorted({key for path in PATHS for key in path} | {"peer", "dense", "stack", "transformer", "layers", "path"})

words = st.one_of(
    st.sampled_from(WORDS), st.text(max_size=20), st.sampled_from(["{x}", "__class__", "a.b", "", "é\n☃"])
)
numbers = st.one_of(
    st.integers(-5, 5),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.sampled_from([10**9, 10**18, 2**31, 2**63, 2**64, -(2**63), 1e308, 5e-324, -0.0, math.inf, math.nan]),
)
spelled = st.sampled_from(["200e6", "1e400", "nan", "NaN", "-inf", "1_0", "_", "0x10", "1e-400", "٣", "true", "null"])
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, spelled, words, st.binary(max_size=8), st.dates()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


def change(tree: dict, path: tuple[str, ...], how: str, value: Any) -> None:
    """Set, drop, rename or wrap what stands in a place, if it is still there."""
    *parents, last = path
    for key in parents:
        tree = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or last not in tree:
        return
    found = tree.pop(last)
    if how == "set":
        tree[last] = value
    elif how == "rename":
        tree[value if isinstance(value, str | int | float | bool | None) else repr(value)] = found
    elif how == "wrap":
        tree[last] = [found] if value is None else {str(value): found}


@st.composite
def broken_settings(draw: st.DrawFn) -> dict:
    raw = yaml.safe_load(yaml.safe_dump(draw(st.sampled_from(ROOTS))))
    kinds = st.sampled_from(["set", "set", "set", "drop", "rename", "wrap"])
    for _ in range(draw(st.integers(0, 4))):
        change(raw, draw(st.sampled_from(PATHS)), draw(kinds), draw(values))
    return raw


def as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("\n...\n").strip()


override_words = st.one_of(
    st.text(max_size=30),
    st.builds(lambda path, text: f"{path}={text}", st.text(max_size=20), st.text(max_size=20)),
    st.builds(lambda path, text: f"{'.'.join(path)}={text}", st.sampled_from(PATHS), st.text(max_size=20)),
    st.builds(lambda path, value: f"{'.'.join(path)}={as_yaml(value)}", st.sampled_from(PATHS), values),
    st.builds(
        lambda path, end, value: f"{'.'.join(path)}.{end}={as_yaml(value)}", st.sampled_from(PATHS), words, values
    ),
)


def assert_run_or_error(attempt: Any) -> None:
    """A run whose cost can be counted and which its own YAML gives again, or a short error."""
    started = time.monotonic()
    try:
        run = attempt()
        if run.model.vocab_size is not None:
            cost = run.model.cost()
            assert cost.parameters > 0
        again = validate(RunConfig, yaml.safe_load(run.to_yaml()))
        assert again == run
        assert again.digest() == run.digest()
    except ConfigError as error:
        text = str(error)
        assert text.strip()
        assert "Traceback" not in text
        assert len(text) < LONGEST_MESSAGE, text[:LONGEST_MESSAGE]
    assert time.monotonic() - started < SLOWEST


@settings(fuzzed, max_examples=450)
@given(broken_settings(), st.lists(override_words, max_size=2))
def test_broken_settings_and_overrides_give_a_run_or_a_short_error(raw, overrides):
    assert_run_or_error(lambda: with_overrides(raw, overrides))


@settings(fuzzed, max_examples=250)
@given(st.sampled_from(presets.names()), st.lists(override_words, max_size=3))
def test_any_words_after_a_preset_give_a_run_or_a_short_error(preset, overrides):
    assert_run_or_error(lambda: resolve_run(preset, overrides)[0])


@st.composite
def broken_bytes(draw: st.DrawFn) -> bytes:
    """A preset's file with bytes changed, cut out or put in; or bytes of any kind."""
    if draw(st.booleans()):
        return draw(
            st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
        )
    whole = bytearray(yaml.safe_dump(draw(st.sampled_from(ROOTS)), sort_keys=False).encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(whole)))
        whole[at : at + draw(st.integers(0, 6))] = draw(
            st.binary(max_size=6) | st.sampled_from([b"*a", b"&a ", b"- ", b"<<: "])
        )
    return bytes(whole)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


@settings(fuzzed, max_examples=300)
@given(content=broken_bytes())
def test_any_bytes_as_a_file_give_a_run_or_a_short_error(config_file, content):
    config_file.write_bytes(content)
    assert_run_or_error(lambda: with_overrides(load_yaml(config_file), []))


HOSTILE = {
    "a thousand wrong keys": {f"x{n}": n for n in range(1000)},
    "a key of a million characters": {"x" * 10**6: 1},
    "a kind of a million characters": {"model": {"kind": "x" * 10**6}},
    "a value of a million characters": {"seed": "x" * 10**6},
    "a pattern that names a million absent layers": {"model": {"kind": "transformer", "pattern": ["x"] * 10**6}},
    "a pattern of a million numbers": {"model": {"kind": "transformer", "pattern": [1] * 10**6}},
    "a pattern of a million characters": {"model": {"kind": "transformer", "pattern": ["x" * 10**6]}},
    "a layer that is placed nowhere in a long pattern": {
        "model": {"kind": "transformer", "layers": 5000, "pattern": ["dense"] * 5000}
        | {"ffns": {"dense": {"kind": "dense"}, "x" * 10**5: {"kind": "dense"}}}
    },
    "a thousand layers of an unknown kind": {
        "model": {"kind": "transformer", "ffns": {f"f{n}": {"kind": "x"} for n in range(1000)}}
    },
    "a billion blocks": {"model": {"kind": "transformer", "layers": 10**9}},
    "an integer of ten thousand digits": {"seed": 10**10_000},
    "a count of ten thousand digits": {"budget": {"steps": "9" * 10_000}},
    "tuples and sets as values": {"seed": (1, 2), "model": {1, 2}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_settings_give_a_short_error_at_once(name):
    with pytest.raises(ConfigError):
        validate(RunConfig, ROOTS[0] | HOSTILE[name])
    assert_run_or_error(lambda: with_overrides(ROOTS[0] | HOSTILE[name], []))


BOMBS = {
    "an alias that doubles thirty times": "a0: &a0 [x, x]\n"
    + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 31))
    + "model: {kind: transformer, ffns: *a30}\n",
    "a deep nest": "model: " + "[" * 400 + "]" * 400,
    "a merge of itself": "model: &a\n  <<: *a\n  kind: transformer\n",
    "a long integer": "seed: " + "1" * 5000,
    "sexagesimal numbers": "seed: 1:00:00:00:00\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_that_grows_gives_a_short_error_at_once(config_file, name):
    config_file.write_text(BOMBS[name])
    assert_run_or_error(lambda: with_overrides(load_yaml(config_file), []))


def test_the_largest_sizes_that_the_schema_allows_are_counted_without_making_a_tensor():
    raw = ROOTS[0]
    assert json_schema(RunConfig)
    huge = ["model.layers=10000", "model.d_model=1048576", "model.vocab_size=1000000000", "model.context=1048576"]
    assert_run_or_error(lambda: with_overrides(raw, [*huge, "batch.tokens=1048576"]))
