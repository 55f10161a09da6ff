"""The routing of a trained run on a text: use of experts, weights, overlap of heads, and what top experts are for.

The text is read in windows of the model's context that do not overlap, in a random order that a seed gives, until
there are enough tokens. A token so sees the tokens before it in its window: none at the first place, all but one of
the context at the last. It is read twice: which experts are the most used is known only after the first time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from myriad.analysis.heads import HeadTally, LayerHeads
from myriad.analysis.measure import OpenedRun
from myriad.analysis.routing import LayerUsage, UsageTally, batches, number_of_windows, route
from myriad.analysis.specialties import Specialty, TokenTally, characteristic
from myriad.checkpoint import INDEX, MANIFEST, Manifest, read_json
from myriad.config import ConfigError, validate
from myriad.data.tokenizer import Tokenizer
from myriad.kernels.hardware import processor
from myriad.models import LanguageModel
from myriad.train import RunConfig

TOP_EXPERTS = 8
TOP_TOKENS = 6


class LayerRouting(NamedTuple):
    """What is known of one routed layer."""

    usage: LayerUsage
    heads: LayerHeads
    specialties: list[Specialty]
    """Of the most used experts, most used first."""

    @property
    def name(self) -> str:
        return self.usage.name


@dataclass(frozen=True)
class Inspection:
    """The routing of a run, and what it was found on.

    Attributes:
        run: as the user named it.
        checkpoint: whose weights were used; None where the folder does not say.
        config: names the run's settings; None where the folder has none.
        run_seed: the seed that the run was trained with.
        split: of the store.
        data_sha256: names the split's tokens.
        tokens: positions looked at.
        context: tokens of a window.
        seed: of the choice of windows.
        layers: first to last.
        device: what it was computed on.
        words: token -> its text, of the tokens in `specialties`.
    """

    run: str
    checkpoint: str | None
    config: str | None
    run_seed: int | None
    split: str
    data_sha256: str
    tokens: int
    context: int
    seed: int
    layers: list[LayerRouting]
    device: str
    words: dict[int, str]

    def word(self, token: int) -> str:
        """A token as it is shown: quoted, so that spaces and line ends can be seen."""
        return repr(self.words[token])

    def record(self) -> dict[str, Any]:
        """All figures, by name; None for those that are not finite."""
        names = (
            "run",
            "checkpoint",
            "config",
            "run_seed",
            "split",
            "data_sha256",
            "tokens",
            "context",
            "seed",
            "device",
        )
        layers = [self._record_of(layer) for layer in self.layers]
        return _finite({name: getattr(self, name) for name in names} | {"layers": layers})

    def _record_of(self, layer: LayerRouting) -> dict[str, Any]:
        top = [
            {
                "expert": specialty.expert,
                "share": specialty.share,
                "tokens": [each._asdict() | {"text": self.words[each.token]} for each in specialty.tokens],
            }
            for specialty in layer.specialties
        ]
        return layer.usage.record() | layer.heads.record() | {"top": top}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inspect_run(
    opened: OpenedRun,
    split: str = "validation",
    *,
    limit: int = 65_536,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Look at the routing of a run.

    Args:
        opened: from `open_run`.
        split: of its store.
        limit: tokens to look at, about; at least one window is.
        seed: of the choice of windows.
        progress: called with the tokens read since the last call, and with all that will be.

    Raises:
        MyriadError: the model has no routed layers, or the store no such split or one shorter than a window.
    """
    run, folder, model, store = opened
    if limit < 1:
        raise ConfigError(f"tokens: expected at least 1, found {limit}")
    if seed < 0:
        raise ConfigError(f"seed: expected at least 0, found {seed}")
    refuse_unrouted(model, str(run))
    text, context = store.split(split), model.config.context
    windows = number_of_windows(len(text.tokens), context, limit)

    def read() -> Iterator[Tensor]:
        for ids_BS in batches(text.tokens, context, limit=limit, seed=seed):
            yield ids_BS
            if progress is not None:
                progress(ids_BS.numel(), 2 * windows * context)

    layers = inspect_layers(model, read)
    recorded = folder / "run.json"
    settings = validate(RunConfig, read_json(recorded)) if recorded.exists() else None
    return Inspection(
        run=str(run),
        checkpoint=_checkpoint_of(folder),
        config=settings.digest() if settings else None,
        run_seed=settings.seed if settings else None,
        split=split,
        data_sha256=text.sha256,
        tokens=layers[0].usage.tokens,
        context=context,
        seed=seed,
        layers=layers,
        device=torch.cuda.get_device_name() if next(model.parameters()).is_cuda else processor(),
        words=_words(store.tokenizer, layers),
    )


def refuse_unrouted(model: LanguageModel, name: str) -> None:
    """Refuse a model that has no routed layers, before it reads a text.

    Raises:
        ConfigError: names the run.
    """
    ((_, layers),) = route(model, [torch.zeros(1, 2, dtype=torch.int64)])
    if not layers:
        raise ConfigError(f"{name}: the model has no routed layers, so there is no routing to inspect")


def inspect_layers(model: LanguageModel, read: Callable[[], Iterable[Tensor]]) -> list[LayerRouting]:
    """Find the figures of every routed layer.

    Args:
        model: put in eval mode for the while.
        read: gives the same batches of tokens, int64 of shape (B, S), each time that it is called.
    """
    usages: dict[str, UsageTally] = {}
    heads: dict[str, HeadTally] = {}
    text_V = torch.zeros(model.config.vocabulary, dtype=torch.int64)
    for ids_BS, layers in route(model, read()):
        text_V += torch.bincount(ids_BS.flatten(), minlength=len(text_V))
        for name, routing in layers.items():
            usages.setdefault(name, UsageTally(routing.experts)).add(routing, ids_BS.numel())
            heads.setdefault(name, HeadTally.of(routing)).add(routing)
    found = {name: tally.finish(name) for name, tally in usages.items()}
    specialties = _specialties(model, read(), found, text_V)
    return [LayerRouting(found[name], heads[name].finish(name), specialties[name]) for name in found]


def _specialties(
    model: LanguageModel, ids: Iterable[Tensor], usages: dict[str, LayerUsage], text_V: Tensor
) -> dict[str, list[Specialty]]:
    """What the most used experts of every layer are used for."""
    top = {name: usage.top(TOP_EXPERTS) for name, usage in usages.items()}
    tallies = {
        name: TokenTally(torch.tensor([each.expert for each in best], dtype=torch.int64), usage.experts, len(text_V))
        for (name, usage), best in zip(usages.items(), top.values(), strict=True)
    }
    for ids_BS, layers in route(model, ids):
        for name, routing in layers.items():
            tallies[name].add(ids_BS, routing)
    return {
        name: [
            Specialty(expert, share, characteristic(counts_V, text_V, TOP_TOKENS))
            for (expert, share), counts_V in zip(best, tallies[name].counts, strict=True)
        ]
        for name, best in top.items()
    }


def _words(tokenizer: Tokenizer, layers: Sequence[LayerRouting]) -> dict[int, str]:
    """The texts of the tokens that set experts apart."""
    specialties = [specialty for layer in layers for specialty in layer.specialties]
    tokens = {each.token for specialty in specialties for each in specialty.tokens}
    return {token: tokenizer.decode([token]) for token in sorted(tokens)}


def _checkpoint_of(folder: Path) -> str | None:
    """The name of the checkpoint whose weights a folder shows."""
    for name in (MANIFEST, INDEX):
        if (folder / name).exists():
            return Manifest.read(folder / name).checkpoint
    return None
