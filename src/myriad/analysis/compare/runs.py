"""Single runs: what each cost, what it reached, and which of two was better on held-out text.

Everything is read from run folders; an evaluation on held-out text is handed in. A figure that a run did not
record, or that was not finite, is None.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from myriad.analysis.compare.plan import EQUAL_FLOPS
from myriad.analysis.peak_memory import recorded_peak
from myriad.checkpoint import INDEX, intact_folder, read_json
from myriad.config import validate
from myriad.evaluate import Perplexity
from myriad.ffn import Cost
from myriad.train import RunConfig
from myriad.train.logs import refuse_damaged_logs
from myriad.train.record import Record, read_records

TIE = 0.005
"""Runs whose bits per byte differ by less than this share are called equal."""


class Curve(NamedTuple):
    """The losses of a run against the tokens that it was trained on; NaN where one was not finite."""

    name: str
    train_tokens: list[int]
    train_loss: list[float]
    """In nats per token."""
    validation_tokens: list[int]
    validation_bits: list[float]
    """Bits per byte of the validation split."""


class Result(NamedTuple):
    """What a contender reached on one budget."""

    budget: str
    bits: float
    """Bits per byte of held-out text, the mean over seeds."""
    deviation: float | None
    """Its standard deviation over seeds."""


class Course(NamedTuple):
    """A contender's losses against compute, on all budgets."""

    name: str
    parameters: int
    validation: list[tuple[list[float], list[float]]]
    """For each budget: the FLOPs spent so far, and bits per byte of the validation split, the mean over seeds."""
    results: list[Result]


@dataclass(frozen=True)
class Contender:
    """A trained run in a comparison.

    Attributes:
        name: how reports call it.
        run: its settings.
        sessions: what each of its sessions ran on, as recorded in `sessions.jsonl`.
        cost: of the model, per token.
        training_tokens: tokens trained on so far.
        tokens_per_second: the median over the training steps.
        seconds: time spent in training steps, over all sessions.
        best_validation_loss: the lowest, in nats per token.
        perplexity: what the model makes of the held-out text.
        split: which split of the store that text is.
        peak_bytes: the most memory that training held.
    """

    name: str
    run: RunConfig
    sessions: list[dict[str, Any]]
    cost: Cost
    training_tokens: int
    tokens_per_second: float | None
    seconds: float | None
    best_validation_loss: float | None
    perplexity: Perplexity
    split: str
    peak_bytes: int | None = None

    @property
    def digest(self) -> str:
        """Names the run's settings."""
        return self.run.digest()

    @property
    def data_sha256(self) -> str | None:
        """The hash of the held-out split; None where the run recorded none."""
        return self.sessions[-1].get("data", {}).get(self.split) if self.sessions else None

    def record(self) -> dict[str, Any]:
        """All figures, by name."""
        return {
            "name": self.name,
            "config": self.digest,
            "seed": self.run.seed,
            **{name: getattr(self.cost, name) for name in ("parameters", "active_parameters")},
            "flops_per_token": self.cost.flops,
            "routing_flops_per_token": self.cost.routing,
            "training_tokens": self.training_tokens,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "best_validation_loss": self.best_validation_loss,
            "split": self.split,
            "data_sha256": self.data_sha256,
            **self.perplexity.record(),
        }


def load_contender(run_folder: str | Path, name: str, perplexity: Perplexity, split: str) -> Contender:
    """Read what a run recorded about itself.

    Args:
        run_folder: the run.
        name: how reports shall call it.
        perplexity: of its model on a held-out split, from `evaluate`.
        split: the name of that split.

    Raises:
        MyriadError: the folder holds no settings of a run, or they or its records are damaged.
    """
    folder = Path(run_folder)
    shown = intact_folder(folder) if (folder / INDEX).exists() else folder
    run = validate(RunConfig, read_json(shown / "run.json"))
    refuse_damaged_logs(folder)
    records = list(read_records(folder / "metrics.jsonl"))
    steps = [record for record in records if record.get("kind") == "train"]
    speeds = _numbers(steps, "tokens_per_second")
    losses = _numbers([record for record in records if record.get("kind") == "validation"], "loss")
    return Contender(
        name=name,
        run=run,
        sessions=_read_sessions(folder / "sessions.jsonl"),
        cost=run.model.cost(),
        training_tokens=max((int(tokens) for tokens in _numbers(steps, "tokens")), default=0),
        tokens_per_second=median(speeds) if speeds else None,
        seconds=max(_numbers(steps, "seconds"), default=None),
        best_validation_loss=min(losses, default=None),
        perplexity=perplexity,
        split=split,
        peak_bytes=recorded_peak(folder),
    )


def load_curve(run_folder: str | Path, name: str) -> Curve:
    """The losses that a run recorded; empty where it recorded none.

    Raises:
        CheckpointError: its records are damaged.
    """
    refuse_damaged_logs(Path(run_folder))
    curve = Curve(name, [], [], [], [])
    for record in read_records(Path(run_folder) / "metrics.jsonl"):
        if record.get("kind") == "train":
            curve.train_tokens.append(record["tokens"])
            curve.train_loss.append(_number_or_nan(record.get("loss")))
        elif record.get("kind") == "validation":
            curve.validation_tokens.append(record["tokens"])
            curve.validation_bits.append(_number_or_nan(record.get("bits_per_byte")))
    return curve


def _number_or_nan(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _numbers(records: Iterable[Record], field: str) -> list[float]:
    """The finite values of a field."""
    values = (_number_or_nan(record.get(field)) for record in records)
    return [value for value in values if math.isfinite(value)]


def _read_sessions(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a killed process may leave part of one."""
    sessions: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            session = json.loads(line)
        except ValueError:
            continue
        if isinstance(session, dict):
            sessions.append(session)
    return sessions


def verdict(a: Contender, b: Contender) -> str:
    """One sentence: which of two runs is better on held-out text, by how much, and what that is worth."""
    if a.split != b.split or a.data_sha256 != b.data_sha256:
        return f"{a.name} and {b.name} were evaluated on different texts and cannot be compared."
    broken = [run.name for run in (a, b) if not math.isfinite(run.perplexity.bits_per_byte)]
    if broken:
        return f"No verdict: the held-out loss of {' and of '.join(broken)} is not finite."
    return f"{_outcome(a, b)}; {_conditions(a, b)}."


def _outcome(a: Contender, b: Contender) -> str:
    better, worse = sorted((a, b), key=lambda run: run.perplexity.bits_per_byte)
    low, high = better.perplexity.bits_per_byte, worse.perplexity.bits_per_byte
    percent = 100 * (high - low) / high
    if percent < 100 * TIE:
        return (
            f"{a.name} and {b.name} tie on held-out text ({a.split} split): {a.perplexity.bits_per_byte:.4f} and "
            f"{b.perplexity.bits_per_byte:.4f} bits per byte, a difference of {high - low:.4f} ({percent:.2f} %), "
            f"below the {100 * TIE:g} % that would count"
        )
    return (
        f"{better.name} is better than {worse.name} on held-out text ({a.split} split): {low:.4f} against {high:.4f} "
        f"bits per byte, {high - low:.4f} ({percent:.3g} %) lower"
    )


def _conditions(a: Contender, b: Contender) -> str:
    """What the reader must know to weigh the outcome."""
    parts = [compare_flops(a, b), compare_tokens(a, b)]
    mine, theirs = a.perplexity, b.perplexity
    if (mine.context, mine.stride) != (theirs.context, theirs.stride):
        parts.append("evaluations with unequal contexts or strides")
    return f"{', '.join(parts)}, and one seed each, so part of the difference may be chance"


def compare_tokens(a: Contender, b: Contender) -> str:
    """In words, how long two runs were trained."""
    if a.training_tokens == b.training_tokens:
        return "equally many training tokens"
    spent = [run.cost.flops * run.training_tokens for run in (a, b)]
    equal = ", of equal FLOPs" if min(spent) > (1 - EQUAL_FLOPS) * max(spent) else ""
    return f"{a.training_tokens:,} against {b.training_tokens:,} training tokens{equal}"


def compare_flops(a: Contender, b: Contender) -> str:
    """In words, what the models of two runs cost."""
    ratio = a.cost.flops / b.cost.flops
    if abs(ratio - 1) < EQUAL_FLOPS:
        return f"equal FLOPs per token (ratio {ratio:.3f})"
    return f"unequal FLOPs per token ({a.name} has {ratio:.3g} times those of {b.name})"


def summary(contenders: Sequence[Contender]) -> list[str]:
    """The sentences at the top of a report: the first run against each of the others."""
    if not contenders:
        return []
    first, *others = contenders
    if others:
        return [verdict(first, other) for other in others]
    bits = first.perplexity.bits_per_byte
    return [f"{first.name} reaches {bits:.4f} bits per byte on held-out text ({first.split} split)."]
