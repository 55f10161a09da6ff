"""The figures of a trained run on a split of a store: everything is checked before anything is measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from myriad.checkpoint import CHECKPOINTS, intact_folder, load, read_json, refuse_broken_weights
from myriad.config import ConfigError, validate
from myriad.data.store import Store, hash_of_hashes
from myriad.data.tokenizer import Tokenizer
from myriad.evaluate import Perplexity, View, causal_view, check_causality, evaluate
from myriad.models import LanguageModel
from myriad.train import RunConfig
from myriad.train.stores import store_path

PROBE_TOKENS = 64
"""Length of the sequences on which causality is checked."""
NOT_CAUSAL = "training: sees later tokens, no measure of quality"
"""What the record of a figure says that is not causal."""


class OpenedRun(NamedTuple):
    """A run's model, and a store whose tokens mean to it what they mean to the store."""

    run: Path
    """As the user named it."""
    folder: Path
    """Where its files are read from."""
    model: LanguageModel
    store: Store


class Measured(NamedTuple):
    """What a run's model makes of a text."""

    perplexity: Perplexity
    split: str
    data_sha256: str
    """Names the tokens that were measured: the split's hash, or one over all splits'."""
    causal: bool = True

    def record(self) -> dict[str, Any]:
        """All figures, by name; first of all what they are not, where they are not causal."""
        mark = {} if self.causal else {"view": NOT_CAUSAL}
        return {**mark, **self.perplexity.record(), "split": self.split, "data_sha256": self.data_sha256}


def measure_run(
    run: Path,
    data: Path | None = None,
    split: str = "validation",
    context: int | None = None,
    stride: int | None = None,
    *,
    view: View = causal_view,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Measure a run in float32.

    Args:
        run: a run folder, a checkpoint, or a Hugging Face folder of ours.
        data: a store; None: the one that the run was trained on.
        split: one of its splits, or `all` of them.
        context, stride, view: as in `evaluate`.
        progress: called with the tokens evaluated since the last call, and with all that there are.

    Raises:
        MyriadError: the run, the store or the windows cannot be used, or the model is not causal.
    """
    _, _, model, store = open_run(run, data)
    splits = [store.split(name) for name in (store.index.splits if split == "all" else [split])]
    device = next(model.parameters()).device
    probe = torch.arange(2 * min(PROBE_TOKENS, model.config.context), device=device) % model.config.vocabulary
    check_causality(model, probe.view(2, -1))
    total = sum(len(part.tokens) for part in splits)
    found = evaluate(
        model,
        splits,
        end_id=store.index.end_id,
        context=context,
        stride=stride,
        view=view,
        progress=None if progress is None else lambda tokens: progress(tokens, total),
    )
    names = [part.sha256 for part in splits]
    digest = names[0] if len(names) == 1 else hash_of_hashes(names)
    return Measured(found, split, digest, causal=view is causal_view)


def open_run(run: Path, data: Path | None = None) -> OpenedRun:
    """Open a run in eval mode, in float32 but for tables, and a store that fits it, both checked.

    Args:
        run: a run folder, a checkpoint, or a Hugging Face folder of ours.
        data: a store; None: the one that the run was trained on.

    Raises:
        MyriadError: one of them is not there, damaged, or does not fit the other.
    """
    folder = intact_folder(run)
    model = load(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    refuse_broken_weights(model, folder)
    _widen(model)
    store = open_store_of(run, folder) if data is None else Store.open(data)
    store.verify()
    _refuse_misfit(run, folder, model, store)
    return OpenedRun(run, folder, model, store)


def _widen(model: LanguageModel) -> None:
    """Let products be in float32, whatever the weights were trained in; lookups take tables of any dtype."""
    roles = model.roles()
    for name, parameter in model.named_parameters():
        if roles[name] != "table":
            parameter.data = parameter.data.float()


def open_store_of(run: Path, folder: Path) -> Store:
    """The store that a run was trained on.

    Args:
        run: as the user named it.
        folder: where its files are read from.

    Raises:
        MyriadError: the run does not say, or the store is not there.
    """
    recorded = folder / "run.json"
    if not recorded.exists():
        raise ConfigError(f"{run}: does not say what it was trained on; name a store with --data")
    out = run.resolve()
    out = out.parents[1] if out.parent.name == CHECKPOINTS else out
    path = store_path(validate(RunConfig, read_json(recorded)).data, out)
    if not path.exists():
        raise ConfigError(f"{path}: the store that {run} was trained on is not there; name one with --data")
    return Store.open(path)


def _refuse_misfit(run: Path, folder: Path, model: LanguageModel, store: Store) -> None:
    """Another tokenizer, or a vocabulary that does not fit, would make the figures meaningless."""
    theirs, mine = store.index.vocab_size, model.config.vocabulary
    if mine < theirs:
        raise ConfigError(f"{store.path}: its vocabulary of {theirs} exceeds {run}'s of {mine}")
    own = folder / "tokenizer.json"
    if own.exists() and Tokenizer.open(own).sha256 != store.index.tokenizer_sha256:
        raise ConfigError(
            f"{store.path}: made with another tokenizer than {run}; prepare it again with --tokenizer {run}"
        )
