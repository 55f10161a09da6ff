"""Configs: frozen, validated, written as YAML, changed by dotted overrides.

- `Config` is the base of every config. An unknown key is an error that suggests the nearest one.
- `Variant` is a config of one of several kinds, told apart by `kind`. The root of such a family
  (`FFNConfig`, say) can stand as a field's type; `@register` adds a kind to it, from any module.
- `Count` is an integer that may be written `200e6`.
- `load_yaml`, `apply_overrides` and `validate` turn a file and `key.path=value` words into a config.

Every error that a user can cause is a `MyriadError`, whose text is one clear line per fault.
"""

import copy
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, LiteralString, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

MAX_FAULTS, MAX_LINE = 20, 500
"""Of an error's text: lines, and characters of a line. What stood in a file may be of any length."""


class MyriadError(Exception):
    """A fault that the user can mend. The command line prints it without a traceback and exits with 2."""

    exit_code: ClassVar[int] = 2


class ConfigError(MyriadError):
    """A config that cannot be: every line names a key's path, what was expected and what stood there."""


class RunError(MyriadError):
    """A fault during a run, such as a loss that stays infinite. The command line exits with 1."""

    exit_code: ClassVar[int] = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to this one, or nothing if none is close."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _fault(kind: LiteralString, message: str, at: tuple[str | int, ...], value: object) -> InitErrorDetails:
    """One line of a ValidationError, with braces kept from being read as a template."""
    return InitErrorDetails(type=PydanticCustomError(kind, "{text}", {"text": message}), loc=at, input=value)


class Config(BaseModel):
    """A frozen group of settings. The docstring under each field is its description in the schema."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _suggest_for_unknown_keys(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping):
            known = list(cls.model_fields)
            faults = [
                _fault(
                    "unknown_key",
                    f"unknown key{nearest(key, known)} (known: {', '.join(known)})",
                    (str(key),),
                    raw[key],
                )
                for key in raw
                if key not in known
            ]
            if faults:
                raise ValidationError.from_exception_data(cls.__name__, faults)
        return raw

    def digest(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of the settings: names a config in reports."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        """The settings as YAML, a valid input again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


class Variant(Config):
    """A config of one of several kinds. A family is a direct subclass that declares `kinds = {}`.

    A kind is a subclass of the family with `kind: Literal["name"] = "name"`, made known by `@register`.
    Wherever a field's type is the family, a mapping with `kind` (or an instance of any kind) is accepted.
    """

    kinds: ClassVar[dict[str, Any]]

    @classmethod
    def _is_family(cls) -> bool:
        return "kinds" in cls.__dict__

    @classmethod
    def _resolve(cls, raw: Any) -> Any:
        """Validate a mapping as the kind that it names."""
        if isinstance(raw, cls):
            return raw
        known = ", ".join(cls.kinds)
        if not isinstance(raw, Mapping):
            fault = _fault("not_a_mapping", f"expected a mapping with a 'kind' (one of {known})", (), raw)
            raise ValidationError.from_exception_data(cls.__name__, [fault])
        if "kind" not in raw:
            fault = _fault("missing_kind", f"missing; expected one of {known}", ("kind",), dict(raw))
            raise ValidationError.from_exception_data(cls.__name__, [fault])
        kind = raw["kind"]
        if not isinstance(kind, str) or kind not in cls.kinds:
            text = f"unknown kind {_show(kind, repr)}{nearest(_show(kind, str), cls.kinds)} (known: {known})"
            raise ValidationError.from_exception_data(cls.__name__, [_fault("unknown_kind", text, ("kind",), kind)])
        return cls.kinds[kind].model_validate(raw)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        if not cls._is_family():
            return handler(source)

        def dump(value: Config, info: core_schema.SerializationInfo) -> dict[str, Any]:
            return value.model_dump(mode=info.mode)

        serializer = core_schema.plain_serializer_function_ser_schema(dump, info_arg=True)
        return core_schema.no_info_plain_validator_function(cls._resolve, serialization=serializer)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        if not cls._is_family():
            return handler(schema)
        return {"family": cls.__name__}  # `json_schema` turns it into a reference: families may nest


V = TypeVar("V", bound=type[Variant])


def register(config_class: V) -> V:
    """Class decorator: make a kind known to its family, so that configs can name it.

    Raises:
        TypeError: the class has no `kind` default, or another class has taken the name.
    """
    kind = config_class.model_fields["kind"].default if "kind" in config_class.model_fields else None
    if not isinstance(kind, str):
        raise TypeError(f'{config_class.__name__} needs a field `kind: Literal["name"] = "name"`')
    taken = config_class.kinds.get(kind)
    if taken is not None and taken.__qualname__ != config_class.__qualname__:
        raise TypeError(f"kind '{kind}' is taken by {taken.__module__}.{taken.__qualname__}")
    config_class.kinds[kind] = config_class
    return config_class


def _whole_number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = float(value.replace("_", ""))
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Count = Annotated[int, BeforeValidator(_whole_number)]
"""An integer that may be written as `200e6`."""


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML or JSON file.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as the date 2024-13-45
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    return raw


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read `key.path=value` words; values are YAML.

    Raises:
        ConfigError: a word without `=`, with an empty key, or with a value that is not YAML.
    """
    changes: dict[str, Any] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not all(path.split(".")):
            raise ConfigError(f"'{word}': expected key.path=value")
        try:
            changes[path] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(f"'{word}': the value is not YAML; put it in quotes") from None
    return changes


def apply_overrides(
    raw: Mapping[str, Any], changes: Mapping[str, Any], alternatives: Sequence[Sequence[str]] = ()
) -> dict[str, Any]:
    """A copy of nested settings with dotted paths changed.

    Args:
        raw: nested settings.
        changes: dotted path -> value. Numbers index lists.
        alternatives: groups of paths of which one stands for all: a change of one removes the others.

    Raises:
        ConfigError: a path leads through something that is neither a mapping nor a list.
    """
    result = copy.deepcopy(dict(raw))
    for group in alternatives:
        changed = [path for path in group if changes.get(path) is not None]
        for path in group if changed else ():
            if path not in changed:
                _remove(result, path.split("."))
    for path, value in changes.items():
        _set(result, path, value)
    return result


def _remove(tree: Any, keys: list[str]) -> None:
    for key in keys[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else None
    if isinstance(tree, dict):
        tree.pop(keys[-1], None)


def _set(tree: Any, path: str, value: Any) -> None:
    keys = path.split(".")
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        place: Any = key
        if isinstance(tree, list):
            if not key.isdecimal() or int(key) >= len(tree):
                raise ConfigError(f"{path}: '{key}' is not an index into a list of {len(tree)}")
            place = int(key)
        elif not isinstance(tree, dict):
            raise ConfigError(f"{path}: {'.'.join(keys[:depth])} is a plain value and holds no '{key}'")
        if last:
            tree[place] = value
        else:
            if isinstance(tree, dict) and tree.get(place) is None:
                tree[place] = {}
            tree = tree[place]


def first_difference(mine: object, theirs: object, path: str = "") -> str:
    """The first place where two nested settings differ, and what stands there in each."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                return first_difference(mine.get(key), theirs.get(key), f"{path}.{key}" if path else str(key))
    return f"{path + ': ' if path else ''}{json.dumps(mine)} instead of {json.dumps(theirs)}"


def json_schema(config_class: type[Config]) -> dict[str, Any]:
    """The JSON schema of a config, with every registered kind of every family in it."""
    families = {family.__name__: family for family in Variant.__subclasses__()}
    definitions: dict[str, Any] = {}

    def link(node: Any) -> Any:
        if isinstance(node, list):
            return [link(item) for item in node]
        if not isinstance(node, dict):
            return node
        if isinstance(node.get("family"), str):
            name = node["family"]
            if name not in definitions:
                definitions[name] = {}  # before its kinds, which may refer to it
                definitions[name] = {"oneOf": [add(kind) for kind in families[name].kinds.values()]}
            return {key: value for key, value in node.items() if key != "family"} | {"$ref": f"#/$defs/{name}"}
        return {key: link(value) for key, value in node.items()}

    def add(kind: type[Config]) -> dict[str, str]:
        schema = kind.model_json_schema()
        definitions.update(link(schema.pop("$defs", {})))
        definitions[kind.__name__] = link(schema)
        return {"$ref": f"#/$defs/{kind.__name__}"}

    return add(config_class) | {"$defs": definitions}


C = TypeVar("C", bound=Config)


def validate(config_class: type[C], raw: Any) -> C:
    """Build a config from nested settings.

    Raises:
        ConfigError: one line for every fault: its path, what was expected, what stood there.
    """
    try:
        return config_class.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(error))) from None
    except RecursionError:
        raise ConfigError("the settings are nested too deeply") from None


def describe(error: ValidationError) -> list[str]:
    """A line for every fault of a failed validation; of very many, or very long ones, as much as helps."""
    faults = error.errors(include_url=False, include_context=True)
    lines = [_shorten(_describe_line(dict(fault)), MAX_LINE) for fault in faults[:MAX_FAULTS]]
    more = len(faults) - len(lines)
    return [*lines, f"config: {more} more faults"] if more else lines


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _show(value: object, form: Callable[[object], str]) -> str:
    """A value as text, however odd it is."""
    try:
        return form(value)
    except (ValueError, RecursionError):  # YAML's anchors can make a mapping that holds itself
        pass
    try:
        return repr(value)
    except ValueError:  # Python prints no integer of thousands of digits
        return f"a very large {type(value).__name__}"


def _describe_line(line: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in line["loc"]) or "config"
    message: str = line["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    own = line["type"] in ("unknown_key", "unknown_kind", "missing_kind", "value_error")
    if own:
        return f"{path}: {message}"
    if line["type"] == "missing":
        return f"{path}: missing"
    value = line.get("input")
    hint = ""
    if line["type"] == "literal_error":
        words = [word.strip(" '") for word in str(line["ctx"]["expected"]).replace(" or ", ",").split(",")]
        hint = nearest(_show(value, str), words)
    if isinstance(value, bool):
        hint = " (YAML reads on, off, yes and no as true and false: put the word in quotes)"
    shown = _shorten(_show(value, lambda found: json.dumps(found, default=str)), 60)
    return f"{path}: expected {message}, found {shown}{hint}"
