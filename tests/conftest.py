"""Fixtures for tests that need a trained run."""

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line does, before torch is loaded

import pytest
import torch

from myriad.data.store import Store, prepare
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

torch.set_num_threads(2)

DATA = Path(os.environ.get("MYRIAD_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Real text, where there is any; tests that use it skip where it is absent."""


@pytest.fixture(scope="session")
def text() -> str:
    """Text with structure to learn: some sentences, in an order that never repeats."""
    subjects, verbs = ["the cat", "a dog", "my bird", "one fish"], ["sees", "likes", "hears", "finds"]
    lines = []
    for n in range(2000):
        lines.append(f"{n}: {subjects[n * 7 % 4]} {verbs[n * n % 4]} {subjects[n // 3 % 4]}.")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, text: str) -> Store:
    """A store of byte tokens with a train and a validation split."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(text)
    return prepare(folder / "text.txt", "bytes", folder / "store")


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
