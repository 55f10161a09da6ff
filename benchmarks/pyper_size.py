"""Training steps of a mixture of whole transformers at its true size, on one GPU.

    python benchmarks/pyper_size.py --preset pyper-8x1.5b --micro-tokens 16384,65536 --out RESULT.json
    python benchmarks/pyper_size.py --preset pyper-demo --micro-tokens 256,512 --steps 2 --device cpu    # a smoke run

Weights, gradients and moments are bfloat16, products too; activation checkpointing is as the preset says. Tokens are
random ones of GPT-2's vocabulary: what a step takes does not depend on which they are, and nothing can be learned from
them. The device is waited for around every part of a step. Rates are medians over the steps after the first, which
compiles kernels and makes the moments.

FLOPs are counted from the config, three times the forward's a token in training. What checkpointing computes again is
named beside them, and no part of the utilisation: that is counted FLOPs by those of a large product of matrices, both
per second and in the same run. A size that does not fit in memory is noted as such. Figures of a smoke run are not
measurements.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from myriad import kernels, presets
from myriad.kernels.hardware import processor
from myriad.models.transformer import Block
from myriad.train.optim import build_optimizer, clip_gradients, hold_weights
from myriad.train.run import RunConfig

GPT2_VOCABULARY = 50257
FORWARDS = 3
"""A training step's FLOPs by those of its forward pass."""
SIDE = 8192
"""Of the matrices whose product gives the peak rate."""
PARTS = ("step", "forward and backward", "clip", "optimizer")
"""What is timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pyper-8x1.5b")
    parser.add_argument("--micro-tokens", default="16384,65536", help="tokens of a micro-batch: sizes to measure")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step")
    parser.add_argument("--steps", type=int, default=3, help="of each size, of which the first is not counted")
    parser.add_argument("--compile", action="store_true", help="compile each block")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a smoke run, no measurement")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: the first step is not counted, so that two are needed")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("pyper_size needs a CUDA device; `--device cpu --preset pyper-demo` runs its code on the CPU.")
    report: dict[str, Any] = {}
    try:
        measure(options, report)
    finally:  # what was measured before a failure is kept
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Fill in the report."""
    device = torch.device(options.device)
    run = presets.get(options.preset)
    model = run.model.with_vocabulary(GPT2_VOCABULARY)
    run, cost = run.model_copy(update={"model": model}), model.cost()
    checkpointing = run.train.activation_checkpointing
    report |= {
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "smoke": device.type != "cuda",
        "versions": versions(),
        "kernels": kernels.choices(device.type, torch.bfloat16),
        "context": model.context,
        "activation_checkpointing": checkpointing,
        "cost": cost._asdict(),
        "training_flops_per_token": FORWARDS * cost.flops,
        "recomputed_flops_per_token_at_most": cost.flops if checkpointing else 0,
        "peak_flops": product_rate(device),
        "sizes": [],
    }
    print(f"{report['device']}: products at {report['peak_flops'] / 1e12:,.2f} TFLOP/s")
    trainer = Trainer(run, device, options.compile)
    for micro_tokens in map(int, options.micro_tokens.split(",")):
        found = trainer.measure(micro_tokens, options.micro_batches, options.steps)
        if "tokens_per_second" in found:
            rate = found["tokens_per_second"] * FORWARDS * cost.flops
            found |= {"flops_per_second": rate, "utilisation": rate / report["peak_flops"]}
        report["sizes"].append(found)
        print(json.dumps(found), flush=True)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.split()[0], "torch": torch.__version__}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = None
    return found | {"cuda": torch.version.cuda}


def product_rate(device: torch.device, rounds: int = 20) -> float:
    """FLOPs a second of a product of square bfloat16 matrices: the median of some, after three to warm up."""
    side = SIDE if device.type == "cuda" else 256
    one, other = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    taken = [seconds(device, lambda: one @ other)[0] for _ in range(rounds + 3)][3:]
    return 2 * side**3 / statistics.median(taken)


def seconds(device: torch.device, part: Callable[[], Any]) -> tuple[float, Any]:
    """How long a part takes until the device is done, and what it returns."""
    wait_for(device)
    started = time.perf_counter()
    result = part()
    wait_for(device)
    return time.perf_counter() - started, result


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Trainer:
    """A model of a run on a device, and its steps as in the training loop."""

    def __init__(self, run: RunConfig, device: torch.device, compiled: bool) -> None:
        torch.manual_seed(run.seed)
        self.run, self.device, self.steps = run, device, 0
        with device:
            self.model = run.model.build()
        hold_weights(self.model, "bfloat16")
        self.model.activation_checkpointing = run.train.activation_checkpointing
        for block in self.model.modules() if compiled else ():
            if isinstance(block, Block):
                block.compile()
        optim = run.optim
        self.optimizer = build_optimizer(
            self.model, optim.lr, optim.table_lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )

    def measure(self, micro_tokens: int, micro_batches: int, steps: int) -> dict[str, Any]:
        """Some steps of one size, or a note that they do not fit in memory."""
        windows, context = micro_tokens // self.run.model.context, self.run.model.context
        size = {"micro_tokens": micro_tokens, "micro_batches": micro_batches}
        if not windows:
            return size | {"note": f"no window of {context} tokens fits in"}
        size |= {"micro_tokens": windows * context, "tokens_per_step": windows * context * micro_batches}
        self.forget()
        try:
            taken = [self.step(windows, micro_batches) for _ in range(steps)]
        except torch.OutOfMemoryError as error:
            return size | {"note": "out of memory", "error": str(error), "peak_bytes": self.peak_bytes()}
        medians = {part: statistics.median(step[part] for step in taken[1:]) for part in PARTS}
        return size | {
            "tokens_per_second": size["tokens_per_step"] / medians["step"],
            "median_seconds": medians,
            "peak_bytes": self.peak_bytes(),
            "finite": all(math.isfinite(step["loss"] + step["gradient_norm"]) for step in taken),
            "steps": taken,
        }

    def forget(self) -> None:
        """Let nothing of an earlier size take room, or count in the peak."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def step(self, windows: int, micro_batches: int) -> dict[str, float]:
        """The seconds of one step and of its parts, its loss and the norm of its gradient."""
        self.model.train()
        shape = (micro_batches, windows, self.run.model.context + 1)
        ids = torch.randint(self.run.model.vocabulary, shape, device=self.device)
        self.optimizer.scale_lr(self.run.optim.scale(self.steps, 1000))
        whole, parts = seconds(self.device, lambda: self._timed_parts(ids))
        self.steps += 1
        return {"step": whole, **parts}

    def _timed_parts(self, ids: Tensor) -> dict[str, float]:
        backward, (loss, loads) = seconds(self.device, lambda: self._gradients(ids))
        clip, norm = seconds(self.device, lambda: clip_gradients(self.model.parameters(), self.run.optim.clip))
        update, _ = seconds(self.device, self.optimizer.step)
        self.model.after_step(loads)
        self.optimizer.zero_grad(set_to_none=True)
        figures = {"loss": loss.item(), "gradient_norm": norm.item()}
        return {"forward and backward": backward, "clip": clip, "optimizer": update, **figures}

    def _gradients(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Of the mean loss over all micro-batches. As in the loop, no autocast: the weights' dtype is the products'."""
        count, loss, loads = ids[..., 1:].numel(), torch.zeros((), device=self.device), []
        for part in ids:
            output = self.model(part[:, :-1], targets=part[:, 1:])
            mean = output.loss / count
            (mean + output.aux_loss / len(ids)).backward()
            loss += mean.detach()
            loads.append(output.loads)
        summed = [{name: sum(load[name] for load in layer) for name in layer[0]} for layer in zip(*loads, strict=True)]
        return loss, summed


if __name__ == "__main__":
    main()
