"""Run folders as training leaves them, made of a few lines."""

import json
import math

from myriad.evaluate import Perplexity
from myriad.ffn import DenseConfig
from myriad.models import TransformerConfig
from myriad.train import RunConfig

SESSION = {
    "time": "2026-01-02T03:04:05Z",
    "data": {"test": "a" * 64},
    "precision": "float32",
    "kernels": "reference",
    "device": "a processor, 2 cores",
    "threads": 2,
    "versions": {"torch": "2.13.0"},
}


def train_record(step, loss, **fields):
    record = {"kind": "train", "step": step, "tokens": 64 * step, "loss": loss}
    return record | {"tokens_per_second": 100.0 * step, "seconds": 0.5 * step} | fields


def validation_record(step, loss, bits):
    return {"kind": "validation", "step": step, "tokens": 64 * step, "loss": loss, "bits_per_byte": bits}


RECORDS = [
    *(train_record(step, 6.0 / step) for step in range(1, 6)),
    validation_record(2, 3.0, 2.5),
    validation_record(4, 1.5, 1.25),
    validation_record(5, 2.0, 1.5),
]


def make_run(folder, *, records=RECORDS, sessions=(SESSION,), d_hidden=64, seed=0):
    """Write a run folder; `d_hidden` sets what its model costs."""
    model = TransformerConfig(
        layers=1, d_model=16, heads=2, context=16, vocab_size=32, ffns={"dense": DenseConfig(d_hidden=d_hidden)}
    )
    run = RunConfig(model=model, data={"source": "python"}, budget={"steps": 5}, batch={"tokens": 64}, seed=seed)
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "sessions.jsonl").write_text("".join(json.dumps(session) + "\n" for session in sessions))
    return folder


def perplexity(bits, context=16):
    """Of 100 tokens that are 100 bytes and 25 words."""
    return Perplexity(bits * math.log(2), tokens=100, words=25, bytes=100, context=context, stride=8)
