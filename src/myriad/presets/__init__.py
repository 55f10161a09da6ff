"""Presets: Python functions that return runs. The function's docstring is what `myriad presets` says of it."""

from collections.abc import Callable

from myriad.config import ConfigError, nearest
from myriad.presets import demo, enwik8, pyper, wikitext
from myriad.train import RunConfig

_PRESETS: dict[str, Callable[[], RunConfig]] = {
    "demo-peer": demo.peer,
    "demo-dense": demo.dense,
    "demo-token-choice": demo.token_choice,
    "demo-expert-choice": demo.expert_choice,
    "demo-product-key-memory": demo.product_key_memory,
    "demo-memory-plus": demo.memory_plus,
    "peer-256x256": wikitext.peer_256,
    "dense-256x256": wikitext.dense_256,
    "peer-512x512": wikitext.peer_512,
    "dense-512x512": wikitext.dense_512,
    "peer-paper": wikitext.peer_paper,
    "enwik8-peer": enwik8.peer,
    "enwik8-dense": enwik8.dense,
    "pyper-demo": pyper.demo,
    "pyper-expert": pyper.expert,
    "pyper-demo-expert": pyper.demo_expert,
    "pyper-8x1.5b": pyper.eight,
    "pyper-expert-1.5b": pyper.expert_large,
}


def names() -> list[str]:
    """Every preset's name."""
    return list(_PRESETS)


def get(name: str) -> RunConfig:
    """The run of a preset.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in _PRESETS:
        raise ConfigError(f"unknown preset '{name}'{nearest(name, _PRESETS)} (known: {', '.join(_PRESETS)})")
    return _PRESETS[name]()


def describe(name: str) -> str:
    """What a preset is, in a line."""
    return (_PRESETS[name].__doc__ or "").strip().splitlines()[0]
