import contextlib
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myriad.config import (
    Config,
    ConfigError,
    Count,
    Variant,
    apply_overrides,
    json_schema,
    load_yaml,
    parse_overrides,
    register,
    validate,
)


class Shape(Variant):
    kinds: ClassVar[dict[str, Any]] = {}


@register
class Square(Shape):
    kind: Literal["square"] = "square"
    side: int = 1
    """The side in metres."""


@register
class Group(Shape):
    kind: Literal["group"] = "group"
    members: list[Shape] = []


class Drawing(Config):
    shapes: dict[str, Shape] = {}
    mode: Literal["fast", "slow", "off"] = "fast"
    tokens: Count = 0
    rate: float = 0.1


def fault(raw: object) -> str:
    with pytest.raises(ConfigError) as error:
        validate(Drawing, raw)
    return str(error.value)


def test_variant_is_resolved_by_kind_and_survives_a_round_trip():
    raw = {"shapes": {"a": {"kind": "group", "members": [{"kind": "square", "side": 3}]}}}
    drawing = validate(Drawing, raw)
    assert isinstance(drawing.shapes["a"], Group)
    assert drawing.shapes["a"].members[0] == Square(side=3)
    assert validate(Drawing, drawing.model_dump(mode="json")) == drawing


def test_errors_name_the_path_and_the_nearest_name():
    assert "shapes.a.sdie: unknown key; did you mean 'side'?" in fault({"shapes": {"a": {"kind": "square", "sdie": 3}}})
    nested = {"shapes": {"a": {"kind": "group", "members": [{"kind": "sqare"}]}}}
    assert "shapes.a.members.0.kind: unknown kind 'sqare'; did you mean 'square'?" in fault(nested)
    assert "shapes.a.kind: missing; expected one of square, group" in fault({"shapes": {"a": {}}})
    assert "mode: expected 'fast', 'slow' or 'off', found \"fats\"; did you mean 'fast'?" in fault({"mode": "fats"})
    assert "YAML reads on, off" in fault({"mode": False})
    assert "rate: expected" in fault({"rate": "quick"})


def test_numbers_may_be_written_with_an_exponent():
    assert validate(Drawing, {"tokens": "200e6"}).tokens == 200_000_000
    assert validate(Drawing, {"rate": "1e-3"}).rate == 1e-3
    assert "tokens: expected" in fault({"tokens": "1.5"})


def test_register_refuses_a_taken_name():
    with pytest.raises(TypeError, match="taken"):

        @register
        class Other(Shape):
            kind: Literal["square"] = "square"


def test_overrides_change_paths_and_replace_alternatives():
    raw = {"budget": {"steps": 10}, "shapes": {"a": {"kind": "group", "members": [{"kind": "square"}]}}}
    changes = parse_overrides(["budget.tokens=5e6", "shapes.a.members.0.side=4", "data.path=x"])
    changed = apply_overrides(raw, changes, alternatives=[("budget.steps", "budget.tokens")])
    assert changed["budget"] == {"tokens": "5e6"}
    assert changed["shapes"]["a"]["members"][0]["side"] == 4
    assert changed["data"] == {"path": "x"}
    assert raw["budget"] == {"steps": 10}


@pytest.mark.parametrize("word", ["steps", "=3", "a..b=1", "a={"])
def test_malformed_override_is_refused(word: str):
    with pytest.raises(ConfigError):
        parse_overrides([word])


def test_override_through_a_plain_value_is_refused():
    with pytest.raises(ConfigError, match="seed is a plain value"):
        apply_overrides({"seed": 1}, {"seed.x": 2})
    with pytest.raises(ConfigError, match="not an index"):
        apply_overrides({"pattern": ["a"]}, {"pattern.3": "b"})


def test_load_yaml_refuses_what_is_not_a_mapping(tmp_path):
    for text in ["- 1", "a: [", "\x00"]:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError):
            load_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        load_yaml(tmp_path / "missing.yaml")


def test_schema_lists_every_kind():
    definitions = json_schema(Drawing)["$defs"]
    assert definitions["Shape"] == {"oneOf": [{"$ref": "#/$defs/Square"}, {"$ref": "#/$defs/Group"}]}
    assert definitions["Square"]["properties"]["side"]["description"] == "The side in metres."
    assert definitions["Group"]["properties"]["members"]["items"] == {"$ref": "#/$defs/Shape"}


keys = st.sampled_from(["kind", "shapes", "side", "x"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(["shapes", "mode", "tokens", "rate", "extra"]), json_values))
def test_any_settings_validate_or_give_a_config_error(raw):
    with contextlib.suppress(ConfigError):
        validate(Drawing, raw)
