"""Small models and runs for tests, and where real text lies."""

import os
from pathlib import Path

from myriad.data.store import Store
from myriad.ffn import PEERConfig
from myriad.models import TransformerConfig
from myriad.train.optim import OptimConfig
from myriad.train.run import (
    BatchConfig,
    BudgetConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    RunConfig,
    TrainConfig,
)

DATA = Path(os.environ.get("MYRIAD_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Real text, where there is any; tests that use it skip where it is absent."""


def tiny_model(**options) -> TransformerConfig:
    """A PEER transformer small enough to train in a second."""
    peer = PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8)
    return TransformerConfig(
        **{
            "context": 32,
            "layers": 2,
            "d_model": 32,
            "heads": 2,
            "ffns": {"peer": peer},
            "pattern": ["peer"],
            **options,
        }
    )


def tiny_run(store: Store, **options) -> RunConfig:
    """A run of a few quick steps in float32."""
    settings = {
        "model": tiny_model(),
        "data": DataConfig(path=str(store.path)),
        "optim": OptimConfig(lr=1e-2, warmup=5),
        "budget": BudgetConfig(steps=12),
        "batch": BatchConfig(tokens=256),
        "train": TrainConfig(precision="float32"),
        "evaluation": EvaluationConfig(every=4, tokens=512),
        "checkpoint": CheckpointConfig(keep=2),
    }
    return RunConfig(**{**settings, **options})
