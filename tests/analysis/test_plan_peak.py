"""The planned memory against the peak of real training steps.

The C library is told to give freed memory back at once: it would keep some, more or less of it by chance.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from myriad.analysis.bench.memory import tells_peak
from myriad.analysis.plan import Layout, memory_of
from myriad.cli import BEFORE_TORCH
from myriad.ffn import DenseConfig, FFNConfig, PEERConfig, TokenChoiceConfig
from myriad.models import TransformerConfig
from myriad.train.run import BatchConfig, BudgetConfig, DataConfig, RunConfig

CPU = torch.device("cpu")
HERE = Path(__file__).parent
PEER = PEERConfig(experts=128**2, heads=4, experts_per_head=8, d_key=64)
SPARSE = PEERConfig(experts=256**2, heads=2, experts_per_head=8, d_key=32)


def run_of(ffn: FFNConfig, tokens: int, micro: int | None = None, **model) -> RunConfig:
    options = {"vocab_size": 2048, "context": 256, "layers": 4, "d_model": 256, "heads": 4, **model}
    return RunConfig(
        model=TransformerConfig(**options, ffns={"f": ffn}, pattern=["f"]),
        data=DataConfig(path="none"),
        budget=BudgetConfig(steps=1),
        batch=BatchConfig(tokens=tokens, micro_tokens=micro),
    )


def small(run: RunConfig) -> RunConfig:
    """A run of the same layers that holds little."""
    model = run.model.model_copy(update={"layers": 1, "context": 32, "vocab_size": 64})
    return run.model_copy(update={"model": model, "batch": BatchConfig(tokens=64, micro_tokens=32)})


def measured(run: RunConfig, layout: Layout) -> int:
    order = {"run": run.model_dump(mode="json"), "small": small(run).model_dump(mode="json"), "layout": layout}
    command = [sys.executable, str(HERE / "peak_of_steps.py"), json.dumps(order)]
    environment = {**os.environ, **BEFORE_TORCH, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


CASES = {
    "dense": (run_of(DenseConfig(), 1024), Layout("float32", False, 1)),
    "dense, checkpointing": (run_of(DenseConfig(), 1024), Layout("float32", True, 1)),
    "dense, large, micro-batches": (
        run_of(DenseConfig(), 1024, 512, vocab_size=16384, d_model=512, layers=6),
        Layout("float32", False, 1),
    ),
    "dense, weights of bfloat16": (
        run_of(DenseConfig(), 512, d_model=512, heads=8),
        Layout("bfloat16 weights", True, 1),
    ),
    "peer": (run_of(PEER, 1024), Layout("float32", False, 1)),
    "peer, sparse gradients": (run_of(SPARSE, 1024), Layout("float32", True, 1)),
    "dense, products of bfloat16": (run_of(DenseConfig(), 1024), Layout("bfloat16 products", False, 1)),
    "token choice": (run_of(TokenChoiceConfig(), 1024), Layout("float32", False, 1)),
    "token choice, products of bfloat16": (run_of(TokenChoiceConfig(), 1024), Layout("bfloat16 products", False, 1)),
}
QUICK = "dense, checkpointing"
slow = [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in CASES]


@pytest.mark.skipif(not tells_peak(CPU), reason="this system does not tell the peak of a part of a run")
@pytest.mark.parametrize("name", slow)
def test_the_plan_is_within_15_percent_of_the_peak(name):
    run, layout = CASES[name]
    planned, found = memory_of(run, layout, CPU).peak, measured(run, layout)
    assert planned == pytest.approx(found, rel=0.15), (planned, found)
