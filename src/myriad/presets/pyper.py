"""Pyper: mixtures whose experts are whole transformers, and one expert alone, at the demo's size and at 8 x 1.5 B.

Experts have RMSNorm, rotary multi-head attention and feed-forward layers of two linear maps with GELU between them.
"""

from myriad.ffn import DenseConfig
from myriad.models import ExpertChoiceRouting, ModelConfig, TransformerConfig, TransformerExpertsConfig
from myriad.train.optim import OptimConfig
from myriad.train.run import (
    BatchConfig,
    BudgetConfig,
    DataConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    RunConfig,
    TrainConfig,
)

SMALL = TransformerConfig(context=256, layers=2, d_model=192, heads=6, ffns={"dense": DenseConfig(activation="gelu")})
LARGE = TransformerConfig(
    context=2048, layers=29, d_model=2048, heads=16, ffns={"dense": DenseConfig(activation="gelu")}
)


def _small_run(model: ModelConfig, budget: BudgetConfig, stopping: EarlyStoppingConfig) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(source="python", tokenizer="bpe:4096"),
        optim=OptimConfig(lr=3e-3, warmup=30, final_lr=0.05),
        budget=budget,
        batch=BatchConfig(tokens=2048),
        evaluation=EvaluationConfig(every=50, tokens=16_384),
        early_stopping=stopping,
    )


def _large_run(model: ModelConfig) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(
            source="Salesforce/wikitext:wikitext-103-raw-v1",
            tokenizer="gpt2",
            document_start=r"^ = [^=].* = $",  # a row is a line; articles begin with a heading
        ),
        optim=OptimConfig(lr=2e-4, warmup=100),
        budget=BudgetConfig(epochs=4),
        batch=BatchConfig(tokens=524_288, micro_tokens=16_384),
        train=TrainConfig(activation_checkpointing=True),
        evaluation=EvaluationConfig(every=50, tokens=500_000),
        early_stopping=EarlyStoppingConfig(patience=4),
    )


def demo() -> RunConfig:
    """Eight small transformers that choose their tokens behind a shared trunk, trained as one, for two CPU cores."""
    model = TransformerExpertsConfig(context=256, experts=8, expert=SMALL, routing=ExpertChoiceRouting())
    return _small_run(model, BudgetConfig(tokens=450_000), EarlyStoppingConfig())


def expert() -> RunConfig:
    """One expert of the demo's size: a dense transformer, trained for some epochs until it no longer improves."""
    model = SMALL.model_copy(update={"layers": 4})
    return _small_run(model, BudgetConfig(epochs=3), EarlyStoppingConfig(patience=3))


def demo_expert() -> RunConfig:
    """One of the eight experts of `myriad demo pyper`: two blocks, on classes and functions of the standard library.

    They are narrow: eight of them, their seed and a dense model train in minutes.
    """
    run = _small_run(
        SMALL.model_copy(update={"d_model": 96, "heads": 4}), BudgetConfig(tokens=320_000), EarlyStoppingConfig()
    )
    changes = {
        "data": run.data.model_copy(update={"document_start": r"^(class|def|async def|@|if __name__)"}),
        "optim": run.optim.model_copy(update={"warmup": 10}),
        "batch": BatchConfig(tokens=1024),
        "evaluation": EvaluationConfig(every=80, tokens=8192),
    }
    return run.model_copy(update=changes)


def eight() -> RunConfig:
    """Eight experts of 1.5 B parameters that choose their tokens, 12 B in all, on WikiText-103 with GPT-2's tokens."""
    return _large_run(TransformerExpertsConfig(context=2048, experts=8, expert=LARGE, routing=ExpertChoiceRouting()))


def expert_large() -> RunConfig:
    """One expert of pyper-8x1.5b as a language model of its own, with early stopping, on WikiText-103."""
    return _large_run(LARGE)
