"""RunConfig: everything that a run is. It is the only root config; a run folder's `run.json` holds one."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from myriad.config import Config, ConfigError, Count, apply_overrides, parse_overrides, validate
from myriad.data.recipe import Preparation, Recipe, Spec
from myriad.data.tokenizer import known_vocab_size
from myriad.models import ModelConfig
from myriad.train.optim import OptimConfig


class DataConfig(Preparation):
    """Where the tokens come from: a prepared store, or a source that is prepared when the run starts."""

    path: str | None = None
    """A store made by `myriad data prepare`."""
    source: Spec | None = None
    """A source to prepare: `python` (the standard library's own sources), a file, a folder or a Hugging Face
    dataset, as `myriad data prepare` takes it."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.source is None):
            raise ValueError("expected exactly one of path and source")
        return self

    @model_validator(mode="after")
    def _a_store_is_prepared(self) -> Self:
        default = {name: field.default for name, field in Preparation.model_fields.items()}
        changed = [name for name in default if getattr(self, name) != default[name]]
        if self.path is not None and changed:
            raise ValueError(f"path: a store was prepared with settings of its own; {changed[0]} has no effect on it")
        return self

    def recipe(self) -> Recipe:
        """How the source becomes a store.

        Raises:
            ConfigError: the data are a prepared store.
        """
        return validate(Recipe, self.model_dump(exclude={"path"}))


class BudgetConfig(Config):
    """How long to train: exactly one of the three."""

    steps: Count | None = Field(default=None, ge=1)
    """Optimizer steps."""
    tokens: Count | None = Field(default=None, ge=1)
    """Training tokens; the last step is whole."""
    epochs: float | None = Field(default=None, gt=0, le=1e9)
    """Passes over the training split; the last step is whole."""

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of steps, tokens and epochs, found {' and '.join(given) or 'none'}")
        return self

    def in_steps(self, tokens_per_step: int, windows: int, windows_per_step: int) -> int:
        """The budget as whole steps, rounded up."""
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return -(-self.tokens // tokens_per_step)
        assert self.epochs is not None
        return max(1, -(-round(self.epochs * windows) // windows_per_step))


class BatchConfig(Config):
    """How many tokens make a step."""

    tokens: Count = Field(default=4096, ge=1, le=2**30)
    """Tokens of an optimizer step, a multiple of the model's context."""
    micro_tokens: Count | None = Field(default=None, ge=1)
    """Tokens computed at once, by all processes together, of which several micro-batches make a step; None: all."""


class TrainConfig(Config):
    """How the arithmetic is done, and when it has failed."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of products: `auto` is bfloat16 where weights are, and bfloat16 autocast where the hardware multiplies it
    fast."""
    compile: bool = False
    """Whether every block goes through `torch.compile`."""
    cuda_graph: bool = False
    """Whether a micro-batch's forward and backward passes are captured once as a CUDA graph and replayed."""
    activation_checkpointing: bool = False
    """Whether the backward pass computes each block again, to hold less."""
    max_skipped: PositiveInt = 10
    """Updates in a row that may be skipped for a loss or gradient that is not finite."""


class EvaluationConfig(Config):
    """Validation while training."""

    every: PositiveInt = 250
    """Steps between two; the last step is always followed by one."""
    tokens: Count | None = Field(default=None, ge=1)
    """Validation tokens, from the start of the split; None: all."""


class EarlyStoppingConfig(Config):
    """When to stop before the budget is spent."""

    patience: PositiveInt | None = None
    """Validations without improvement after which training stops; None: never."""
    min_delta: float = Field(default=0.0, ge=0)
    """The smallest fall of the validation loss, in nats per token, that counts as improvement."""


class CheckpointConfig(Config):
    """What is kept."""

    every: PositiveInt | None = None
    """Steps between two checkpoints; None: at every validation. The last step always has one."""
    keep: PositiveInt = 2
    """Newest checkpoints kept, beside the best."""


class RunConfig(Config):
    """A training run."""

    alternatives: ClassVar[list[list[str]]] = [
        ["budget.steps", "budget.tokens", "budget.epochs"],
        ["data.path", "data.source"],
    ]
    """Settings of which an override of one replaces the others."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    budget: BudgetConfig
    batch: BatchConfig = BatchConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    init: str | None = None
    """What the first step starts from: a run folder, checkpoint, mixture or Hugging Face folder with a model of the
    same shape, or a transformer that grows into a mixture whose experts choose; None: random weights."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the initial weights, the order of the data and dropout."""
    out: str | None = None
    """The run folder; None: runs/NAME."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        context, micro = self.model.context, self.micro_tokens
        if micro % context:
            raise ValueError(f"batch: micro-batches of {micro} tokens are not a multiple of model.context = {context}")
        if self.batch.tokens % micro:
            raise ValueError(f"batch.tokens = {self.batch.tokens} is not a multiple of micro_tokens = {micro}")
        return self

    @model_validator(mode="after")
    def _products_follow_the_weights(self) -> Self:
        if self.optim.weights == "bfloat16" and self.train.precision == "float32":
            raise ValueError("train.precision = float32: with optim.weights = bfloat16, products are in bfloat16, too")
        return self

    @model_validator(mode="after")
    def _a_graph_keeps_what_it_computed(self) -> Self:
        if self.train.cuda_graph and self.train.activation_checkpointing:
            raise ValueError(
                "train.cuda_graph: not with train.activation_checkpointing = true, which sets random numbers back for "
                "what it computes again"
            )
        return self

    @model_validator(mode="after")
    def _vocabulary_of_the_tokenizer(self) -> Self:
        """A source names its tokenizer; where that tells the vocabulary, the model can be built without data."""
        size = known_vocab_size(self.data.tokenizer) if self.data.source is not None else None
        if self.model.vocab_size is None and size is not None:
            object.__setattr__(self, "model", self.model.with_vocabulary(size))
        return self

    @property
    def micro_tokens(self) -> int:
        """Tokens computed at once."""
        return self.batch.micro_tokens or self.batch.tokens

    @property
    def micro_windows(self) -> int:
        """Sequences computed at once, by all processes together."""
        return self.micro_tokens // self.model.context

    @property
    def windows_per_step(self) -> int:
        """Sequences of an optimizer step."""
        return self.batch.tokens // self.model.context

    def digest(self) -> str:
        """Names the run's settings in reports; where it is written does not matter."""
        return Config.digest(self.model_copy(update={"out": None})) if self.out is not None else super().digest()


def with_overrides(raw: Mapping[str, Any], words: Sequence[str]) -> RunConfig:
    """A run's settings with `key.path=value` words applied.

    Raises:
        ConfigError: a word or a resulting setting that cannot be.
    """
    changes = parse_overrides(words)
    for group in RunConfig.alternatives:
        named = [path for path in group if changes.get(path) is not None]
        if len(named) > 1:
            raise ConfigError(f"{' and '.join(named)}: only one of them can be set")
    if any(path.startswith("data.") for path in changes):
        raw = _without_derived_vocabulary(raw)
    if changes.get("data.path") is not None:
        for setting in Preparation.model_fields:  # a store was made with settings of its own
            raw = _without(raw, "data", setting)
    return validate(RunConfig, apply_overrides(raw, changes, RunConfig.alternatives))


def _without_derived_vocabulary(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings without a vocabulary size that came from their tokenizer: the data are about to change."""
    model, data = raw.get("model"), raw.get("data")
    tokenizer = data.get("tokenizer") if isinstance(data, dict) else None
    derived = known_vocab_size(tokenizer) if isinstance(tokenizer, str) else None
    if isinstance(model, dict) and derived is not None and model.get("vocab_size") == derived:
        return _without(raw, "model", "vocab_size")
    return raw


def _without(raw: Mapping[str, Any], section: str, key: str) -> Mapping[str, Any]:
    settings = raw.get(section)
    if not isinstance(settings, dict):
        return raw
    return {**raw, section: {name: value for name, value in settings.items() if name != key}}
