"""The plan of a comparison: who is trained, on how much compute, with which seeds. It is checked before any training.

All contenders share the data, the order in which they are dealt, the batches, the schedule and the budget. They may
differ in their model, though not in its context and vocabulary, in the peak learning rates, and in what `allow` names.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_serializer, model_validator

from myriad.config import Config, ConfigError, Count, nearest
from myriad.data.store import Store
from myriad.ffn import DenseConfig
from myriad.models import TransformerConfig
from myriad.train import RunConfig
from myriad.train.run import BudgetConfig

FORWARDS = 3
"""FLOPs of a training token in those of its forward: the backward pass takes two forwards."""
EQUAL_FLOPS = 0.01
"""FLOPs per token that differ by less than this share are called equal."""
MULTIPLIERS = (0.5, 1.0, 2.0)
"""Of the learning rates, in a sweep."""
SWEEP_SHARE = 0.2
"""Of the largest budget, on which each trial of a sweep is trained."""
OWN = ("model", "out", "budget", "checkpoint", "early_stopping")
"""Sections that are no condition of the comparison."""
OWN_SETTINGS = ("optim.lr", "optim.table_lr", "data.path")
"""Settings that are none: stores are compared by what they hold."""
MODELS = ("model.context", "model.vocab_size")
"""Settings of a model that are."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Budget(Config):
    """What each run may use: compute, or training tokens."""

    amount: Count = Field(ge=1)
    unit: Literal["flops", "tokens"]
    """`flops` are those of training: three times those of the forward passes."""

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, raw: Any) -> Any:
        return cls.parse(raw).model_dump(mode="python") if isinstance(raw, str) else raw

    @model_serializer(mode="plain", when_used="json")
    def _as_text(self) -> str:
        return str(self)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `1e15flops` or `200e6tokens`.

        Raises:
            ConfigError: not a number from 1 on with one of the units.
        """
        found = re.fullmatch(r"([0-9][0-9_.]*(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)", text.strip())
        if found is None or not found[2]:
            raise ConfigError(f"--budget: expected a number with a unit (1e15flops, 200e6tokens), found '{text}'")
        units = ("flops", "tokens")
        unit = found[2].lower()
        if unit not in units:
            raise ConfigError(f"--budget: unknown unit '{found[2]}'{nearest(unit, units)} (known: {', '.join(units)})")
        try:
            amount = float(found[1].replace("_", ""))
        except ValueError:
            raise ConfigError(f"--budget: '{found[1]}' is no number") from None
        if not 1 <= amount < 2**63:
            raise ConfigError(f"--budget: expected 1 to 9e18, found {found[1]}")
        return cls(amount=int(amount), unit=unit)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        short = re.sub(r"e\+0*", "e", f"{self.amount:g}")
        return f"{short if float(short) == self.amount else self.amount}{self.unit}"

    def tokens(self, flops_per_token: int) -> int:
        """How many training tokens it buys of a model with so many FLOPs per token, forward."""
        return self.amount if self.unit == "tokens" else self.amount // (FORWARDS * flops_per_token)


class Trial(NamedTuple):
    """One run of a comparison."""

    contender: str
    label: str
    """What tells it from the contender's other runs."""
    run: RunConfig
    multiplier: float
    """Of the learning rates."""
    budget: Budget | None
    """None: a trial of the sweep."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.contender}-{self.label}"

    @property
    def tokens(self) -> int:
        """Training tokens, in whole steps."""
        batch = self.run.batch.tokens
        return batch * self.run.budget.in_steps(batch, 0, 0)


class FolderPlan(Config):
    """What a folder of runs is made by. The work goes on with the same plan, or with one that its own extends to."""

    noun: ClassVar[str]

    def extended(self, other: Any) -> Self:
        """This plan with what another one of its kind adds that changes none of its runs."""
        return self


class Plan(FolderPlan):
    """A comparison, whole. The order of the contenders is that of every table."""

    noun: ClassVar[str] = "comparison"

    contenders: dict[str, RunConfig]
    budgets: list[Budget]
    """Each contender is trained on each of them, from the start and to the end of its schedule."""
    seeds: int = Field(ge=1, le=1000)
    """How many; they count up from the contenders' own."""
    sweep_lr: bool = False
    """Whether each contender's learning rates are chosen by a small sweep."""
    allow: list[str] = []
    """Settings in which the contenders may differ."""

    @field_validator("contenders")
    @classmethod
    def _some_contenders(cls, contenders: dict[str, RunConfig]) -> dict[str, RunConfig]:
        if len(contenders) < 2:
            raise ConfigError(f"contenders: expected two or more, found {', '.join(contenders) or 'none'}")
        for name in contenders:
            if not NAME.fullmatch(name):
                raise ConfigError(f"contenders: '{name}' is no name; expected letters, digits, '.', '_' and '-'")
        return contenders

    @field_validator("budgets")
    @classmethod
    def _distinct_budgets(cls, budgets: list[Budget]) -> list[Budget]:
        if not budgets:
            raise ConfigError("--budget: expected one or more")
        if len(set(map(str, budgets))) < len(budgets):
            raise ConfigError(f"--budget: one is named twice: {', '.join(map(str, budgets))}")
        return budgets

    @model_validator(mode="after")
    def _equal_conditions(self) -> Self:
        (first, run), *others = self.contenders.items()
        mine = _conditions(run)
        for setting in self.allow:
            if setting not in mine:
                raise ConfigError(f"--allow: '{setting}' is no condition{nearest(setting, mine)}")
            if setting.startswith("data."):
                raise ConfigError(f"--allow: '{setting}': figures on different texts or tokens cannot be compared")
        for name, other in others:
            theirs = _conditions(other)
            for setting in mine | theirs:
                if setting not in self.allow and mine.get(setting) != theirs.get(setting):
                    raise ConfigError(_unequal(setting, first, mine.get(setting), name, theirs.get(setting)))
        for name, run in self.contenders.items():
            if run.early_stopping.patience is not None:
                raise ConfigError(f"early_stopping.patience: {name} would not spend its budget; set it to null")
        return self

    @property
    def reference(self) -> str:
        """The contender that the others are set against: the first dense one, else the first."""
        dense = (name for name, run in self.contenders.items() if is_dense(run))
        return next(dense, next(iter(self.contenders)))

    @property
    def first_seed(self) -> int:
        return next(iter(self.contenders.values())).seed

    def extended(self, other: "Plan") -> Self:
        """With its seeds, and its budgets where no sweep depends on the largest of them."""
        budgets = other.budgets if set(self.budgets) < set(other.budgets) and not self.sweep_lr else self.budgets
        return self.model_copy(update={"seeds": max(self.seeds, other.seeds), "budgets": budgets})

    def training_tokens(self, budget: Budget) -> dict[str, int]:
        """Each contender's training tokens.

        Contenders whose FLOPs per token are equal to the reference's, but for EQUAL_FLOPS, get the reference's tokens:
        widths are whole numbers, so that twins are equal to a fraction of a percent only.

        Raises:
            ConfigError: less than a step.
        """
        costs = {name: run.model.cost().flops for name, run in self.contenders.items()}
        reference = costs[self.reference]
        tokens = {}
        for name, flops in costs.items():
            equal = abs(flops / reference - 1) < EQUAL_FLOPS
            tokens[name] = budget.tokens(reference if equal else flops)
            batch = self.contenders[name].batch.tokens
            if tokens[name] < batch:
                raise ConfigError(
                    f"--budget: {budget} are {tokens[name]:,} tokens of {name} ({FORWARDS} x {flops:,} FLOPs each), "
                    f"less than a step (batch.tokens = {batch:,})"
                )
        return tokens

    def trials(self, multipliers: Mapping[str, float]) -> list[Trial]:
        """The runs that are compared, budget by budget and seed by seed.

        Args:
            multipliers: of each contender's learning rates.
        """
        made = []
        for budget in self.budgets:
            tokens = self.training_tokens(budget)
            for seed in range(self.first_seed, self.first_seed + self.seeds):
                for name, run in self.contenders.items():
                    update = {"seed": seed, "budget": BudgetConfig(tokens=tokens[name])}
                    trained = scaled(run, multipliers[name], update)
                    made.append(Trial(name, f"{budget}-seed{seed}", trained, multipliers[name], budget))
        return made

    def sweep(self) -> list[Trial]:
        """The trials of the sweep, if there is one: each a shorter run, of the same shape of schedule.

        Raises:
            ConfigError: a trial would be less than a step.
        """
        made = []
        tokens = {name: max(self.training_tokens(each)[name] for each in self.budgets) for name in self.contenders}
        for name, run in self.contenders.items() if self.sweep_lr else ():
            share = round(SWEEP_SHARE * tokens[name])
            if share < run.batch.tokens:
                raise ConfigError(
                    f"--sweep-lr: {SWEEP_SHARE:g} of the largest budget are {share:,} tokens of {name}, "
                    f"less than a step (batch.tokens = {run.batch.tokens:,})"
                )
            for multiplier in MULTIPLIERS:
                trial = scaled(run, multiplier, {"budget": BudgetConfig(tokens=share)})
                optim = trial.optim.model_copy(update={"warmup": math.ceil(SWEEP_SHARE * run.optim.warmup)})
                trial = trial.model_copy(update={"optim": optim})
                made.append(Trial(name, f"sweep-x{multiplier:g}", trial, multiplier, None))
        return made


def is_dense(run: RunConfig) -> bool:
    """Whether a run's feed-forward layers are all dense ones."""
    model = run.model
    return isinstance(model, TransformerConfig) and all(isinstance(ffn, DenseConfig) for ffn in model.ffns.values())


def scaled(run: RunConfig, multiplier: float, update: Mapping[str, Any]) -> RunConfig:
    """A run with its learning rates multiplied and some settings replaced, in no folder yet."""
    rates = {name: getattr(run.optim, name) for name in ("lr", "table_lr")}
    rates = {name: None if rate is None else multiplier * rate for name, rate in rates.items()}
    return run.model_copy(update={"optim": run.optim.model_copy(update=rates), "out": None, **update})


def _conditions(run: RunConfig) -> dict[str, Any]:
    """What must be equal in all contenders, by dotted path."""
    raw = run.model_dump(mode="json")
    flat = dict(_flat({name: value for name, value in raw.items() if name not in OWN}))
    models = {path: raw["model"][path.removeprefix("model.")] for path in MODELS}
    return {path: value for path, value in (flat | models).items() if path not in OWN_SETTINGS}


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _unequal(setting: str, first: str, mine: Any, second: str, theirs: Any) -> str:
    found = f"{setting}: {mine} in {first}, {theirs} in {second}"
    if setting.startswith("data."):
        return f"{found}; contenders are compared on the same tokens of the same text"
    return f"{found}; --allow {setting} lets them differ"


def refuse_other_stores(stores: Mapping[str, Store]) -> None:
    """Refuse to compare contenders whose stores hold different tokens.

    Args:
        stores: of each contender.

    Raises:
        ConfigError: names two contenders and what differs.
    """
    (first, mine), *others = stores.items()
    for name, theirs in others:
        if mine.index.tokenizer_sha256 != theirs.index.tokenizer_sha256:
            specs = [store.index.recipe.tokenizer for store in (mine, theirs)]
            raise ConfigError(f"data.path: {first} and {name} have different tokenizers ({' and '.join(specs)})")
        hashes = [{key: split.sha256 for key, split in store.index.splits.items()} for store in (mine, theirs)]
        if hashes[0] != hashes[1]:
            raise ConfigError(f"data.path: {first} and {name} have different texts ({mine.path} and {theirs.path})")
