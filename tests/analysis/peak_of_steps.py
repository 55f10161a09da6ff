"""The peak of real training steps, in a process of its own: called with a run's settings and a layout as JSON.

Written to stdout: the bytes that the process held at most, less those of its libraries, which a small model of the same
layers has loaded and compiled before.
"""

import gc
import json
import sys

import torch

from myriad.analysis.bench.memory import held_bytes, peak_since, reset_peak
from myriad.analysis.plan import Layout
from myriad.models import LanguageModel
from myriad.train.optim import RoleOptimizer, build_optimizer, clip_gradients, hold_weights
from myriad.train.precision import autocast
from myriad.train.run import RunConfig

DEVICE = torch.device("cpu")
STEPS = 2


def train(run: RunConfig, layout: Layout, steps: int) -> None:
    model = run.model.build()
    hold_weights(model, "bfloat16" if layout.numbers == "bfloat16 weights" else "float32")
    model.activation_checkpointing = layout.activation_checkpointing
    optimizer = build_optimizer(model)
    for _ in range(steps):
        step(run, layout, model.train(), optimizer)


def step(run: RunConfig, layout: Layout, model: LanguageModel, optimizer: RoleOptimizer) -> None:
    for _ in range(run.batch.tokens // run.micro_tokens):
        ids = torch.randint(run.model.vocabulary, (run.micro_windows, run.model.context))
        with autocast("bfloat16" if layout.numbers == "bfloat16 products" else "float32", DEVICE):
            output = model(ids, targets=ids)
        assert output.loss is not None
        (output.loss / ids.numel() + output.aux_loss).backward()
    clip_gradients(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    run, layout = RunConfig.model_validate(order["run"]), Layout(*order["layout"])
    train(RunConfig.model_validate(order["small"]), layout, 1)
    gc.collect()
    before = held_bytes(DEVICE)
    reset_peak(DEVICE)
    train(run, layout, STEPS)
    sys.stdout.write(f"{peak_since(DEVICE) - before}\n")


if __name__ == "__main__":
    main()
